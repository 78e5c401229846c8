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
  const double mass = given.policy == decide::Policy::kQuality ? 0.95
                      : given.policy == decide::Policy::kSpeed ? 0.70
                                                               : 0.80;
  o.min_level = decide::level_for_mass(mass);
  o.far_field = false;
  o.rank_mode = decide::RankMode::kOff;
  return o;
}

// What keeps as many tiles of the reference model at context 16384 as shares of whole tiles that bound its loss there
// to +0.10, +0.38 and +0.97 per cent, at less error of the heads. A cell's share falls as there are more of them: at
// context 8192 the shares of the same loss are about twice as large, and beyond 16384 they follow the mean.
uint32_t keep_peak(const Problem& problem) {
  const decide::Policy policy = problem.adaptive.policy;
  if (policy == decide::Policy::kCustom) return 0;
  const double at_16k = policy == decide::Policy::kQuality ? 0.0006 : policy == decide::Policy::kSpeed ? 0.0035 : 0.002;
  const double length = 16384.0 / static_cast<double>(std::max<int64_t>(problem.max_seqlen_k, 1));
  return static_cast<uint32_t>(0x1p24 * std::min(0.05, at_16k * (length < 1 ? length : std::sqrt(length))));
}

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
