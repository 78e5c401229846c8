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

// Shares for context 16384, at any other. A cell's share falls as there are more of them: at context 8192 the shares of
// the same loss are one and a half times as large, and beyond 16384 they follow the mean.
double at_length(const Problem& problem, double at_16k) {
  const double length = 16384.0 / static_cast<double>(std::max<int64_t>(problem.max_seqlen_k, 1));
  return std::min(0.05, at_16k * (length < 1 ? length : std::sqrt(length)));
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

// The shares bound the loss of the reference model at context 16384 to +0.09, +0.38 and +0.96 per cent, at 8192 to
// +0.04, +0.33 and +0.99. Where little is left out, the mean of the rest makes up for half of the loss; where much is,
// it is not like its estimate, but finer cells save more tiles than they cost.
uint32_t keep_peak(const Problem& problem) {
  const decide::Policy policy = problem.adaptive.policy;
  if (policy == decide::Policy::kCustom) return 0;
  const double at_16k = policy == decide::Policy::kQuality    ? 0.001
                        : policy == decide::Policy::kBalanced ? 0.0024
                                                              : 0.02;
  return static_cast<uint32_t>(0x1p24 * at_length(problem, at_16k));
}

double needle_share(const Problem& problem) {
  return problem.adaptive.policy == decide::Policy::kSpeed ? at_length(problem, 0.0065) : 0.0;
}

float compensation(const Problem& problem) { return problem.adaptive.policy == decide::Policy::kQuality ? 0.5f : 0.0f; }

void check_tile_options(const Options& o) {
  if (o.policy == decide::Policy::kCustom && o.probe != decide::Probe::kOff)
    refuse("adaptive.probe is %d; CUDA contexts have no probe: set ADAATTN_PROBE_OFF (%d)",
           static_cast<int>(o.probe) + ADAATTN_PROBE_OFF, ADAATTN_PROBE_OFF);
}

void check_tile_problem(const Problem& p, const DeviceTraits& device) {
  if (device.compute_capability != 90)
    refuse("adaptive.policy: skipping tiles needs a device of compute capability 9.0, this one has %d.%d",
           device.compute_capability / 10, device.compute_capability % 10);
  if (p.dtype_q != Dtype::kBF16 || p.dtype_o != Dtype::kBF16)
    refuse("dtype_q: adaptive attention on CUDA takes and writes BF16");
  if (p.d_qk != kHeadDim || p.d_v != kHeadDim)
    refuse("head_dim_qk: %lld with head_dim_v %lld; adaptive attention on CUDA takes 128 for both",
           static_cast<long long>(p.d_qk), static_cast<long long>(p.d_v));
  if (!(p.scale > 0)) refuse("scale: %g; adaptive attention on CUDA takes scales > 0", static_cast<double>(p.scale));
  if (p.want_entropy) refuse("outputs: ENTROPY; adaptive attention on CUDA does not compute it for every row");
  if (p.layout_kv == Layout::kPaged) refuse("layout_kv: PAGED; adaptive attention on CUDA takes BSHD, BHSD and THD");
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
    refuse("adaptive.max_workspace_bytes is %llu; the tables of this problem take %zu",
           static_cast<unsigned long long>(o.max_workspace_bytes), sizes.workspace_bytes);
  return sizes;
}

size_t tile_map_bytes(const TableShape& s) {
  // In floating point: the product of maxima that a descriptor may name need not fit an integer.
  const double bytes = 8.0 * s.batch * s.heads_q * s.query_tiles * s.mask_words;
  return bytes <= static_cast<double>(kMaxTileMapBytes) ? static_cast<size_t>(bytes) : 0;
}

}  // namespace adaattn::cuda
