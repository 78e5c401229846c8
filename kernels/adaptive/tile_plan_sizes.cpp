#include "adaptive/tile_plan_sizes.h"

#include <algorithm>
#include <cmath>

#include "adaptive/refuse.h"
#include "attend/sm90/walk.h"

namespace adaattn::cuda {
namespace {

using decide::Options;

constexpr int64_t kHeadDim = 128;
// Masks that exist at a time; longer problems are computed in waves of query tiles.
constexpr size_t kMaskBytes = size_t{64} << 20;

// Calls of a named policy: the latency of verifying is several per cent of a call's time at context 8192.
constexpr int32_t kVerifyEvery = 4;

size_t whole(size_t bytes) { return (bytes + 255) / 256 * 256; }

void place(TilePlanSizes& sizes, const Options& o) {
  const TableShape& s = sizes.shape;
  const int64_t items = int64_t{s.batch} * s.heads_q * s.wave_tiles;
  sizes.far_share = whole(analyze_bytes(s));
  sizes.verify_parts =
      sizes.far_share + (o.far_field ? whole(static_cast<size_t>(items) * sm90::kWalkShares * sizeof(float)) : 0);
  sizes.workspace_bytes = sizes.verify_parts + whole(verify_bytes(s, sizes.verify));
}

// What a named policy keeps and makes up for, at context 16384: the shares of a row in a cell and in a needle from
// which on their tile is kept (0: there are no needles), and the weight of what is left out in its masses by the
// estimate, which is of means, and these have less mass than what they are of.
struct NamedRule {
  double cell, needle, left_out;
  // A share falls as there are more cells: at half the context the shares of the same loss are 2^power times as large.
  double power;
};

// Measured on all whole windows of the reference model's texts (NOTES.md), the limits being +0.1, +0.4 and +1 per cent.
NamedRule rule_of(decide::Policy policy) {
  switch (policy) {
    case decide::Policy::kQuality:
      return {0.0018, 0, 3, 0.5};
    case decide::Policy::kBalanced:
      return {0.0035, 0.0023, 0, 0.6};
    case decide::Policy::kSpeed:
      return {0.02, 0.0053, 0, 0.65};
    default:
      return {};
  }
}

// Beyond 16384 shares follow the mean.
double at_length(const Problem& problem, double share, double power) {
  const double length = 16384.0 / static_cast<double>(std::max<int64_t>(problem.max_seqlen_k, 1));
  return std::min(0.05, share * (length < 1 ? length : std::pow(length, power)));
}

}  // namespace

bool always_exact(const Problem& p) {
  return p.softcap > 0 || p.alibi || p.bias || p.max_seqlen_q * (p.heads_q / p.heads_kv) <= 16 ||
         p.max_seqlen_k < 4 * decide::kTileK;
}

Problem exact_problem(const Problem& problem) {
  Problem exact = problem;
  exact.adaptive = {};
  return exact;
}

// There is no probe here, and neither the far field nor a projected V gains as much time as it costs.
Options device_options(const Options& given) {
  Options o = given;
  o.probe = decide::Probe::kOff;
  if (given.policy == decide::Policy::kCustom) return o;
  o.min_level = 0;  // shares of cells keep what matters
  o.far_field = false;
  o.rank_mode = decide::RankMode::kOff;
  return o;
}

uint32_t keep_peak(const Problem& problem) {
  const NamedRule rule = rule_of(problem.adaptive.policy);
  return static_cast<uint32_t>(0x1p24 * at_length(problem, rule.cell, rule.power));
}

double needle_share(const Problem& problem) {
  const NamedRule rule = rule_of(problem.adaptive.policy);
  return at_length(problem, rule.needle, rule.power);
}

float compensation(const Problem& problem) { return static_cast<float>(rule_of(problem.adaptive.policy).left_out); }

void check_tile_options(const Options& o) {
  if (o.policy == decide::Policy::kCustom && o.probe != decide::Probe::kOff)
    refuse("adaptive.probe is %d; accepted on CUDA, which has no probe: %d (OFF)",
           static_cast<int>(o.probe) + ADAATTN_PROBE_OFF, ADAATTN_PROBE_OFF);
}

void check_tile_problem(const Problem& p, const DeviceTraits& device) {
  if (device.compute_capability != 90)
    refuse("adaptive.policy is not EXACT; accepted on devices of compute capability 9.0, this one has %d.%d",
           device.compute_capability / 10, device.compute_capability % 10);
  if (p.dtype_q != Dtype::kBF16 || p.dtype_o != Dtype::kBF16)
    refuse("desc.dtype_q is %d with desc.dtype_o %d; accepted for policies on CUDA: BF16 for both",
           static_cast<int>(p.dtype_q), static_cast<int>(p.dtype_o));
  if (p.d_qk != kHeadDim || p.d_v != kHeadDim)
    refuse("desc.head_dim_qk is %lld with desc.head_dim_v %lld; accepted for policies on CUDA: 128 for both",
           static_cast<long long>(p.d_qk), static_cast<long long>(p.d_v));
  if (!(p.scale > 0))
    refuse("desc.scale is %g; accepted for policies on CUDA: 0 (1/sqrt(head_dim_qk)) or more",
           static_cast<double>(p.scale));
  if (p.want_entropy) refuse("desc.outputs has ENTROPY; accepted for policies on CUDA: LSE");
  if (p.layout_kv == Layout::kPaged)
    refuse("desc.layout_kv is 4 (PAGED); accepted for policies on CUDA: BSHD, BHSD, THD");
}

// As many query tiles at a time as the masks' bound and the caller's limit leave room for.
TilePlanSizes tile_plan_sizes(const Problem& problem, const DeviceTraits& device) {
  const Options& o = problem.adaptive;
  TilePlanSizes sizes;
  TableShape& s = sizes.shape;
  s = table_shape(problem, 0);
  s.needles = needle_share(problem) > 0;
  s.by_shares = s.needles || keep_peak(problem) > 0;
  s.compensates = compensation(problem) > 0 && estimated_tiles(s) <= kMaxCodeBytes;
  sizes.verify = verify_shape(s, o.verify_rows, device.multiprocessors);
  if (o.policy != decide::Policy::kCustom && !o.recompute) sizes.verify.every = kVerifyEvery;
  const size_t mask_bytes =
      size_t{8} * static_cast<size_t>(s.batch) * static_cast<size_t>(s.heads_q) * static_cast<size_t>(s.mask_words);
  s.wave_tiles = std::clamp<int32_t>(static_cast<int32_t>(std::min(kMaskBytes / mask_bytes, size_t{1} << 24)), 1,
                                     std::max(s.query_tiles, 1));
  place(sizes, o);
  if (o.max_workspace_bytes == 0) return sizes;
  while (s.wave_tiles > 1 && sizes.workspace_bytes > o.max_workspace_bytes) {
    s.wave_tiles = (s.wave_tiles + 1) / 2;
    place(sizes, o);
  }
  if (sizes.workspace_bytes > o.max_workspace_bytes)
    refuse("adaptive.max_workspace_bytes is %llu; accepted: 0 (no limit), or at least %zu for this problem's tables",
           static_cast<unsigned long long>(o.max_workspace_bytes), sizes.workspace_bytes);
  return sizes;
}

size_t tile_map_bytes(const TableShape& s) {
  // In floating point: the product of maxima that a descriptor may name need not fit an integer.
  const double bytes = 8.0 * s.batch * s.heads_q * s.query_tiles * s.mask_words;
  return bytes <= static_cast<double>(kMaxTileMapBytes) ? static_cast<size_t>(bytes) : 0;
}

}  // namespace adaattn::cuda
