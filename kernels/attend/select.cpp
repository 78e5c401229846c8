#include "attend/select.h"

#include <algorithm>

#include "attend/e4m3_features.h"
#include "attend/tall_features.h"
#include "core/error.h"

namespace adaattn::cuda {
namespace {

constexpr int64_t kMaxSplits = 128;               // what the combining kernel takes
constexpr int64_t kMaxLength = int64_t{1} << 30;  // kernels count rows and keys in 32 bits
constexpr int64_t kDecodeRows = 16;               // one mma tile of query rows
constexpr int64_t kWidenedDecodeRows = 64;        // widening keys takes a prefill kernel as long as four such tiles
constexpr int64_t kHopperRows = 128;              // of a Hopper kernel's tile
constexpr int64_t kBoxRows = 64;                  // rows that one copy of a Hopper kernel brings
constexpr int64_t kSplitKeys = 2048;              // fewer are not worth splitting
constexpr int64_t kTallKeys = 512;                // fewer are not worth tiles of 192 rows
static_assert(kMostTailTiles * kTailWarps <= 32 * kMostJoinedTiles, "a warp of rows has a bit of a launch's arrivals");

const char* name_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF32:
      return "F32";
    case Dtype::kF16:
      return "F16";
    case Dtype::kBF16:
      return "BF16";
    case Dtype::kE4M3:
      return "E4M3";
    default:
      return "NONE";
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool runs_on(const AttendKernel& kernel, const DeviceTraits& device) {
  const bool arch =
      kernel.arch >= 90 ? device.compute_capability == kernel.arch : device.compute_capability >= kernel.arch;
  return arch && static_cast<int64_t>(kernel.shared_bytes) <= device.shared_bytes;
}

// For kernels of pages alone, which read whole blocks of keys: a block at a window's left end holds keys that no row
// sees, whose pages may have got another use since.
bool has_pages(const Problem& problem, int64_t multiple) {
  return problem.layout_kv == Layout::kPaged && problem.page_size % multiple == 0 && problem.window_left < 0;
}

// The least padding wins, then the newer architecture, then the order of the table. For E4M3 tensors the architecture
// comes first: with 8-bit products padding to twice the width costs no more than widening.
const AttendKernel* best(Phase phase, const Problem& problem, uint32_t features, const DeviceTraits& device) {
  const AttendKernel* found = nullptr;
  const bool eight_bits = problem.dtype_kv == Dtype::kE4M3;
  for (const AttendKernel* kernel : attend_kernels()) {
    if (kernel->phase != phase || kernel->dtype != problem.dtype_kv || kernel->d_qk < problem.d_qk ||
        kernel->d_v < problem.d_v ||
        (!(kernel->features & kRagged) && (kernel->d_qk != problem.d_qk || kernel->d_v != problem.d_v)) ||
        (features & ~kernel->features) != 0 || !runs_on(*kernel, device) ||
        (kernel->page_multiple != 0 && !has_pages(problem, kernel->page_multiple)))
      continue;
    if (found == nullptr || (eight_bits && kernel->arch > found->arch)) {
      found = kernel;
      continue;
    }
    if (eight_bits && kernel->arch < found->arch) continue;
    if (kernel->d_qk + kernel->d_v < found->d_qk + found->d_v ||
        (kernel->d_qk + kernel->d_v == found->d_qk + found->d_v && kernel->arch > found->arch))
      found = kernel;
  }
  return found;
}

// The Hopper kernel of tall tiles that could stand for `usual`. It was measured with causal masks and without any.
const AttendKernel* tall_kernel(const AttendKernel* usual, const Problem& problem, uint32_t features,
                                const DeviceTraits& device) {
  if (usual == nullptr || usual->arch != 90 || problem.window_right > 0 || problem.window_left >= 0) return nullptr;
  const AttendKernel* kernel = best(Phase::kForward, problem, features | kTall, device);
  const bool same = kernel != nullptr && kernel->d_qk == usual->d_qk && kernel->d_v == usual->d_v;
  return same ? kernel : nullptr;
}

int64_t tiles_of(const Problem& problem, const Extent& extent, const AttendKernel& kernel) {
  const int64_t tiles = problem.layout_q == Layout::kTHD ? ceil_div(extent.total_q, kernel.tile_q)
                                                         : extent.batch * ceil_div(extent.seqlen_q, kernel.tile_q);
  return tiles * problem.heads_q;
}

// Whether the tall kernel takes less time (sm90/NOTES.md).
bool tall_wins(const Problem& problem, const Extent& extent, const AttendKernel& usual, const AttendKernel& tall,
               const DeviceTraits& device) {
  if (extent.seqlen_k < kTallKeys) return false;
  const int64_t tiles = tiles_of(problem, extent, tall), multiprocessors = device.multiprocessors;
  // With many more keys than queries most blocks have no mask, and those of the other kernel are larger. Where tiles
  // are few the longest of them takes as long as the call, and the other kernel's are shorter.
  if (problem.window_right == 0) return extent.seqlen_k <= 2 * extent.seqlen_q && 2 * tiles >= 3 * multiprocessors;
  // Rounds of equal tiles; a row takes 0.93 of the time that it takes there.
  const int64_t rounds = ceil_div(tiles, multiprocessors);
  const int64_t usual_rounds = ceil_div(tiles_of(problem, extent, usual), multiprocessors);
  return 93 * rounds * tall.tile_q < 100 * usual_rounds * usual.tile_q;
}

const AttendKernel* kernel_for(const Problem& problem, const Extent& extent, uint32_t features,
                               const DeviceTraits& device) {
  const int64_t group = problem.heads_q / problem.heads_kv, seqlen_q = extent.seqlen_q;
  if (problem.dtype_q == Dtype::kF32) {
    const AttendKernel* kernel = problem.fast_f32 ? best(Phase::kTf32, problem, features, device) : nullptr;
    return kernel != nullptr ? kernel : best(Phase::kExactF32, problem, features, device);
  }
  if (seqlen_q * group <= (problem.dtype_kv != problem.dtype_q ? kWidenedDecodeRows : kDecodeRows)) {
    if (const AttendKernel* kernel =
            best(Phase::kDecode, problem, features | (group > 1 ? uint32_t{kPacked} : 0u), device))
      return kernel;
  }
  // With few tiles and many keys most SMs would have nothing to do.
  const int64_t pairs = extent.batch * problem.heads_q;
  const int64_t apart = pairs * ceil_div(seqlen_q, kHopperRows);
  const int64_t together = pairs / group * ceil_div(seqlen_q * group, kHopperRows);
  const auto few = [&](int64_t tiles) { return tiles * 2 <= device.multiprocessors && extent.seqlen_k >= kSplitKeys; };
  // Keys that a multiprocessor goes through. Writing and joining parts takes as long as kSplitKeys of them.
  const auto cost = [&](int64_t tiles) {
    const int64_t whole = ceil_div(tiles, device.multiprocessors) * extent.seqlen_k;
    const int64_t parts = tiles * extent.seqlen_k / device.multiprocessors + kSplitKeys;
    return few(tiles) ? std::min(whole, parts) : whole;
  };
  if (kBoxRows % group == 0 && cost(together) < cost(apart)) {
    const uint32_t packed = features | kPacked | (few(together) ? kSplit : kPlain);
    const AttendKernel* kernel = best(Phase::kForward, problem, packed, device);
    if (kernel != nullptr && kernel->arch == 90) return kernel;
  }
  const AttendKernel* usual = best(Phase::kForward, problem, features | (few(apart) ? kSplit : kPlain), device);
  const AttendKernel* tall = tall_kernel(usual, problem, features, device);
  return tall != nullptr && tall_wins(problem, extent, *usual, *tall, device) ? tall : usual;
}

// Smallest number of parts whose last wave is at least 85 % as full as the best choice's.
int64_t choose_splits(int64_t tiles, int64_t slots, int64_t most) {
  if (most <= 1 || tiles * 10 >= slots * 8) return 1;
  const auto efficiency = [&](int64_t s) {
    const double waves = static_cast<double>(tiles * s) / static_cast<double>(slots);
    return waves / static_cast<double>(ceil_div(tiles * s, slots));
  };
  double top = 0;
  for (int64_t s = 1; s <= most; ++s) top = std::max(top, efficiency(s));
  for (int64_t s = 1; s <= most; ++s)
    if (efficiency(s) >= 0.85 * top) return s;
  return 1;
}

// Decode with few keys: equal parts, two CTAs on each multiprocessor, which the last CTA of a tile joins. 1 where there
// are too many keys, or too many parts for one CTA.
int32_t joined_splits(int64_t tiles, int64_t blocks, const DeviceTraits& device) {
  constexpr int64_t kMostBlocks = 16, kMostParts = 32;  // blocks of a part
  if (tiles < 1 || tiles > kMostJoinedTiles) return 1;
  const int64_t one_each = device.multiprocessors / tiles, parts = std::min(2 * one_each, kMostParts);
  if (one_each < 2 || one_each > kMostParts || blocks < 2 || blocks > parts * kMostBlocks) return 1;
  return static_cast<int32_t>(ceil_div(blocks, ceil_div(blocks, parts)));
}

// Of the tiles that whole rounds of the grid leave over, how many come in two parts of their keys: all or none. Lengths
// are those of the call.
int64_t tail_tiles(const AttendKernel& kernel, const Extent& extent, uint32_t features, int64_t tiles,
                   const DeviceTraits& device) {
  constexpr int64_t kLeastKeys = 2048;  // fewer are not worth another start and a join
  const int64_t left = tiles % device.multiprocessors;
  if ((kernel.features & kTail) == 0 || (features & kVarlen) != 0 || extent.seqlen_k < kLeastKeys ||
      tiles < device.multiprocessors || 2 * left > device.multiprocessors || left > kMostTailTiles)
    return 0;
  return left;
}

}  // namespace

uint32_t features_of(const Problem& problem) {
  uint32_t features = kPlain;
  if (problem.softcap > 0) features |= kSoftcap;
  if (problem.alibi) features |= kAlibi;
  if (problem.bias) features |= kBias;
  if (problem.want_entropy) features |= kEntropy;
  if (!(problem.scale > 0)) features |= kAnyScale;
  if (problem.layout_kv == Layout::kPaged) features |= kPaged | kVarlen;
  if (problem.layout_q == Layout::kTHD) features |= kVarlen;
  if (problem.dtype_o != problem.dtype_q) features |= kWideOutput;
  if (problem.sink) features |= kSink;
  if (problem.window_left >= 0 || problem.window_right >= 0) features |= kMasked;
  if (problem.dtype_kv != problem.dtype_q) features |= kMixed;
  if (problem.descale_block != 0) features |= kDescaleBlocks;
  return features;
}

void check_problem(const Problem& problem, const DeviceTraits& device) {
  const auto refuse = [](const auto&... arguments) { fail(ADAATTN_ERROR_NOT_SUPPORTED, arguments...); };
  if (device.compute_capability < 80)
    refuse("config.device_id names a device of compute capability %d.%d; accepted: 8.0 or newer",
           device.compute_capability / 10, device.compute_capability % 10);
  if (problem.dtype_q == Dtype::kNone || dtype_size(problem.dtype_q) == 8 || problem.dtype_q == Dtype::kI32)
    refuse("desc.dtype_q is %d; accepted on CUDA: F32, F16, BF16, E4M3", static_cast<int>(problem.dtype_q));
  const bool eight_bits = problem.dtype_kv == Dtype::kE4M3;
  if (problem.dtype_kv != problem.dtype_q && (!eight_bits || problem.dtype_q == Dtype::kF32))
    refuse(
        "desc.dtype_kv is %s with desc.dtype_q %s; accepted on CUDA: the same, or E4M3 with desc.dtype_q F16 or BF16",
        name_of(problem.dtype_kv), name_of(problem.dtype_q));
  if (!eight_bits && problem.dtype_o != problem.dtype_q && problem.dtype_o != Dtype::kF32)
    refuse("desc.dtype_o is %s with desc.dtype_q %s; accepted on CUDA: the same, or F32", name_of(problem.dtype_o),
           name_of(problem.dtype_q));
  if (problem.d_qk > 256)
    refuse("desc.head_dim_qk is %lld; accepted on CUDA: 1 to 256", static_cast<long long>(problem.d_qk));
  if (problem.d_v > 256)
    refuse("desc.head_dim_v is %lld; accepted on CUDA: 1 to 256", static_cast<long long>(problem.d_v));
  const int64_t group = problem.heads_q / problem.heads_kv;
  if (problem.max_seqlen_q * group >= kMaxLength || problem.max_seqlen_k >= kMaxLength)
    refuse(
        "desc.max_seqlen_q makes %lld query rows of a key head, desc.max_seqlen_k is %lld; accepted on CUDA: less than "
        "2^30 of each",
        static_cast<long long>(problem.max_seqlen_q * group), static_cast<long long>(problem.max_seqlen_k));
  if (problem.max_batch * problem.heads_q * problem.max_seqlen_q >= int64_t{1} << 37)
    refuse(
        "desc.max_batch is %lld with desc.max_seqlen_q %lld and desc.heads_q %lld; accepted on CUDA: products below "
        "2^37",
        static_cast<long long>(problem.max_batch), static_cast<long long>(problem.max_seqlen_q),
        static_cast<long long>(problem.heads_q));
  for (const int64_t seqlen_q : {int64_t{1}, problem.max_seqlen_q}) {
    const Extent extent{problem.max_batch, seqlen_q, problem.max_seqlen_k, problem.max_total_q};
    if (kernel_for(problem, extent, features_of(problem) | kUnaligned, device) == nullptr)
      refuse("desc.head_dim_qk is %lld with desc.head_dim_v %lld in %s; accepted: what this build has kernels for",
             static_cast<long long>(problem.d_qk), static_cast<long long>(problem.d_v), name_of(problem.dtype_kv));
  }
}

int32_t even_section(int64_t pairs, int64_t most, int64_t group) {
  const int64_t unit = most >= group ? group : 1;
  const int64_t units = std::max<int64_t>(1, pairs / unit);
  most = std::clamp<int64_t>(most / unit, 1, units);
  for (int64_t size = most; 2 * size > most; --size)
    if (units % size == 0) return static_cast<int32_t>(size * unit);
  return static_cast<int32_t>(ceil_div(units, ceil_div(units, most)) * unit);
}

Launch choose(const Problem& problem, const Extent& extent, uint32_t features, const DeviceTraits& device,
              int64_t partial_bytes) {
  Launch launch;
  launch.kernel = kernel_for(problem, extent, features, device);
  if (launch.kernel == nullptr)
    fail(ADAATTN_ERROR_INTERNAL, "no CUDA kernel for head_dim_qk %lld, head_dim_v %lld, features 0x%x",
         static_cast<long long>(problem.d_qk), static_cast<long long>(problem.d_v), features);
  const AttendKernel& kernel = *launch.kernel;
  const int64_t group = problem.heads_q / problem.heads_kv;
  const int64_t apart = ceil_div(extent.seqlen_q, kernel.tile_q) * group;
  const int64_t together = ceil_div(extent.seqlen_q * group, kernel.tile_q);
  const bool packs = (kernel.features & kPacked) != 0 && (kernel.arch < 90 || kBoxRows % group == 0);
  if (group > 1 && together < apart && packs) launch.pack = static_cast<int32_t>(group);
  const int64_t heads = problem.heads_q / launch.pack;
  launch.m_tiles = static_cast<int32_t>(launch.pack > 1 ? together : ceil_div(extent.seqlen_q, kernel.tile_q));

  int64_t keys = extent.seqlen_k;
  if (problem.window_left >= 0 && problem.window_right >= 0 && problem.window_left < kMaxLength &&
      problem.window_right < kMaxLength)
    keys = std::min(keys, problem.window_left + problem.window_right + 1 + kernel.tile_q);
  const int64_t tiles = launch.m_tiles * heads * extent.batch;
  const int64_t slots = int64_t{device.multiprocessors} * kernel.ctas_per_sm;
  if ((kernel.features & kSplit) != 0) {
    const int64_t rows =
        (problem.layout_q == Layout::kTHD ? extent.total_q : extent.batch * extent.seqlen_q) * problem.heads_q;
    int64_t most = kMaxSplits;
    if (partial_bytes >= 0 && rows > 0) most = std::min(most, partial_bytes / (rows * partial_row_bytes(problem)));
    const int64_t blocks = ceil_div(keys, kernel.tile_k);
    if (kernel.phase == Phase::kDecode) launch.splits = joined_splits(tiles, blocks, device);
    launch.joined = launch.splits > 1 && launch.splits <= most;
    // Two key blocks a part at least: less does not fill the pipeline.
    if (!launch.joined)
      launch.splits = static_cast<int32_t>(choose_splits(tiles, slots, std::min(most, ceil_div(blocks, 2))));
  }

  const int64_t left = tail_tiles(kernel, extent, features, tiles, device);
  if (left > 0 && (partial_bytes < 0 || partial_bytes >= left * kTailBytes)) {
    launch.splits = 2;
    launch.joined = true;
  }

  const int64_t sharing = launch.pack > 1 ? 1 : group;
  const int64_t kv_bytes = extent.seqlen_k * (problem.d_qk + problem.d_v) * dtype_size(problem.dtype_kv) / sharing;
  launch.section = section_of(device, heads * extent.batch, kv_bytes, sharing);
  // Rows of few tiles leave nothing to balance, but starting with the longest tile of every head would read all keys
  // and values at once and leave memory idle afterwards.
  constexpr int32_t kShortRows = 4;
  const bool from_end = (kernel.features & kFromEnd) != 0;  // late tiles fill the gaps at the ends of small sections
  if (from_end || launch.m_tiles <= kShortRows)
    launch.section = std::min<int32_t>(launch.section, std::max<int32_t>(from_end ? 8 : 4, group));
  // Where tiles are few, the longest of all heads come first: a section that starts with its own would end last.
  const int64_t pairs = heads * extent.batch;
  if (kernel.arch == 90 && problem.window_right >= 0 && launch.m_tiles > kShortRows &&
      2 * tiles <= 5 * device.multiprocessors && 3 * pairs * kv_bytes <= 2 * device.l2_bytes)
    launch.section = static_cast<int32_t>(pairs);
  return launch;
}

int32_t section_of(const DeviceTraits& device, int64_t pairs, int64_t kv_bytes, int64_t group) {
  const int64_t most = device.l2_bytes / 6 / std::max<int64_t>(kv_bytes, 1);
  return even_section(pairs, std::max(most, std::min<int64_t>(group, 8)), group);
}

int64_t partial_row_bytes(const Problem& problem) {
  return (problem.d_v + 1 + (problem.want_entropy ? 1 : 0)) * static_cast<int64_t>(sizeof(float));
}

int64_t partial_capacity(const Problem& problem, const DeviceTraits& device) {
  const int64_t rows_max =
      (problem.layout_q == Layout::kTHD ? problem.max_total_q : problem.max_batch * problem.max_seqlen_q) *
      problem.heads_q;
  int64_t rows = 0, tail_bytes = 0;
  for (const AttendKernel* kernel : candidates(problem, device)) {
    if ((kernel->features & kSplit) != 0)
      rows = std::max(rows, int64_t{2} * device.multiprocessors * kernel->ctas_per_sm * kernel->tile_q);
    // Calls of fewer tiles than the maxima make may leave over more of them.
    const int64_t tiles = problem.max_batch * problem.heads_q * ceil_div(problem.max_seqlen_q, kernel->tile_q);
    if ((kernel->features & kTail) != 0 && tiles > device.multiprocessors)
      tail_bytes = std::min<int64_t>(device.multiprocessors / 2, kMostTailTiles) * kTailBytes;
  }
  rows = std::min(rows, rows_max * std::min(kMaxSplits, problem.max_seqlen_k));
  return ceil_div(std::max(rows * partial_row_bytes(problem), tail_bytes), 256) * 256;
}

std::vector<const AttendKernel*> candidates(const Problem& problem, const DeviceTraits& device) {
  std::vector<const AttendKernel*> found;
  for (const int64_t seqlen_q : {int64_t{1}, problem.max_seqlen_q})
    for (const uint32_t unaligned : {uint32_t{kPlain}, uint32_t{kUnaligned}})
      for (const uint32_t more : {uint32_t{kPlain}, uint32_t{kVarlen}, uint32_t{kSplit}}) {
        const Extent extent{problem.max_batch, seqlen_q, 0, problem.max_total_q};
        const AttendKernel* kernel = kernel_for(problem, extent, features_of(problem) | unaligned | more, device);
        for (const AttendKernel* row : {kernel, tall_kernel(kernel, problem, features_of(problem) | more, device)})
          if (row != nullptr && std::find(found.begin(), found.end(), row) == found.end()) found.push_back(row);
      }
  return found;
}

}  // namespace adaattn::cuda
