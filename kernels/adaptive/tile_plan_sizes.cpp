#include "adaptive/tile_plan_sizes.h"

#include <algorithm>

#include "adaptive/int8_tables.h"
#include "adaptive/refuse.h"
#include "attend/sm90/walk.h"
#include "decide/shares.h"

namespace adaattn::cuda {
namespace {

using decide::Options;

constexpr int64_t kHeadDim = 128;
// Masks that exist at a time, and likewise shares of what they leave out; longer problems are computed in waves of
// query tiles.
constexpr double kMaskBytes = 64.0 * (1 << 20);

// Calls of a named policy: the latency of verifying is several per cent of a call's time at context 8192.
constexpr int32_t kVerifyEvery = 4;

// In floating point: the product of maxima that a descriptor may name need not fit an integer.
int32_t tiles_of_wave(const TableShape& s) {
  const double mask = sizeof(uint64_t) * static_cast<double>(s.mask_words);
  const double shares = s.compensates ? sizeof(uint16_t) * static_cast<double>(s.key_tiles) : 0;
  const double tiles = kMaskBytes / (std::max(mask, shares) * s.batch * s.heads_q);
  return static_cast<int32_t>(std::clamp<double>(tiles, 1, std::max(s.query_tiles, 1)));
}

size_t whole(size_t bytes) { return (bytes + 255) / 256 * 256; }

void place(TilePlanSizes& sizes, const Options& o) {
  const TableShape& s = sizes.shape;
  const int64_t items = int64_t{s.batch} * s.heads_q * s.wave_tiles;
  sizes.far_share = whole(analyze_bytes(s));
  sizes.found =
      sizes.far_share + (o.far_field ? whole(static_cast<size_t>(items) * sm90::kWalkShares * sizeof(float)) : 0);
  sizes.verify_parts =
      sizes.found + (o.probe != decide::Probe::kOff ? whole(static_cast<size_t>(items) * sizeof(int32_t)) : 0);
  sizes.bytes = sizes.verify_parts + whole(verify_bytes(s, sizes.verify));
  sizes.workspace_bytes =
      sizes.bytes + (s.bytes ? whole(int8_tables_bytes(s.batch, s.heads_kv, s.key_rows(), s.d_qk, s.d_v)) : 0);
}

constexpr int64_t kCalibrated = 16384;

// Measured on all whole windows of the reference model's texts (NOTES.md), the limits being +0.1, +0.4 and +1 per cent.
// What is left out weighs more than its mass by the estimate, which is of means, and these have less mass than what
// they are of.
decide::ShareRule rule_of(decide::Policy policy) {
  switch (policy) {
    case decide::Policy::kQuality:
      return {.needles = {.cell = 0.0021, .remainder = 4}};
    case decide::Policy::kBalanced:
      return {.cells = {.cell = 0.00328, .remainder = 3, .power = 0.744},
              .needles = {.cell = 0.0035, .needle = 0.0023, .power = 0.6},
              .cells_from = 6144,
              .needles_from = 12288};
    case decide::Policy::kSpeed:
      // Where keys repeat, a needle among them holds little, and the shorter the context the less is left of it: no
      // needles there.
      return {.cells = {.cell = 0.00416, .power = 0.75, .most_cell = 0.02},
              .needles = {.cell = 0.02, .needle = 0.0053, .power = 0.65},
              .needles_from = 8704};
    default:
      return {};
  }
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

// Here neither a probe nor the far field nor a projected V gains as much time as it costs.
Options device_options(const Problem& given) {
  Options o = given.adaptive;
  if (o.policy == decide::Policy::kCustom) return o;
  o.probe = decide::Probe::kOff;
  o.min_level = 0;  // shares of cells keep what matters
  o.far_field = false;
  o.rank_mode = decide::RankMode::kOff;
  decide::set_shares(decide::shares_at(rule_of(o.policy), given.max_seqlen_k, kCalibrated), &o);
  return o;
}

bool tiles_in_bytes(const Options& o) { return o.policy == decide::Policy::kCustom && decide::only_bytes(o); }

void check_tile_options(const Options& o) {
  if (!tiles_in_bytes(o)) return;
  if (o.probe != decide::Probe::kOff)
    refuse("adaptive.probe is %d; accepted for 8-bit attention: %d (OFF)",
           static_cast<int>(o.probe) + ADAATTN_PROBE_OFF, ADAATTN_PROBE_OFF);
  if (o.far_field)
    refuse("adaptive.far_field is %d; accepted for 8-bit attention, which has no centroids: %d (OFF)",
           ADAATTN_SWITCH_ON, ADAATTN_SWITCH_OFF);
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
  s.needles = o.needle_mass > 0;
  s.by_shares = s.needles || o.keep_peak > 0;
  s.compensates = o.remainder > 0;
  // At most three classes share a call.
  s.bytes = o.policy == decide::Policy::kCustom && o.min_precision <= decide::Precision::kI8 && s.max_rank == 0 &&
            !o.far_field && o.probe == decide::Probe::kOff;
  sizes.verify = verify_shape(s, o.verify_rows, device.multiprocessors);
  if (o.policy != decide::Policy::kCustom && !o.recompute) sizes.verify.every = kVerifyEvery;
  s.wave_tiles = tiles_of_wave(s);
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
  const double bytes = 8.0 * s.batch * s.heads_q * s.query_tiles * s.mask_words;
  return bytes <= static_cast<double>(kMaxTileMapBytes) ? static_cast<size_t>(bytes) : 0;
}

}  // namespace adaattn::cuda
