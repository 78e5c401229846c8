// What the device counts for the statistics of a tile plan.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "adaptive/verify.h"

namespace adaattn::cuda {

// Of the newest call, one for each (sequence, query head).
struct HeadTally {
  uint64_t tiles, kept;                // with a visible key; computed exactly
  uint64_t found;                      // of the kept ones, by the probe
  uint64_t rows, rows_kept, rows_far;  // query rows; times tiles kept; times tiles that entered as centroids
  uint64_t rows_swept;                 // times tiles that the probe looked at
  double dropped_share;                // sum over rows of what is not computed exactly
  int64_t len_q, len_k;
  float entropy, predicted_error, rank_energy;
  float feedback;  // the multiplier that the next prediction takes
  int32_t rank_class, dense, bytes;
  int32_t verified_rows;  // 0: not verified
  int32_t measured;       // whether there are errors, of this call or of the newest verified one
  float measured_error, measured_row_error;
  int32_t recomputed;
};

// Sums over the heads of all calls.
struct TileTotals {
  unsigned long long heads, heads_dense, heads_low_rank, heads_bytes, tiles, kept, found;
  unsigned long long verified_heads, verified_rows, over_tolerance, recomputed;
  unsigned long long stage_ns[kStages];
  double flops, rank_v_sum, entropy_sum, entropy_min, entropy_max, predicted_sum, dropped_sum;
  double measured_sum, measured_max, measured_row_max;
};

// Where the counts go, in memory that lasts as long as the plan.
struct TallyTargets {
  HeadTally* heads = nullptr;             // [batch, heads_q]
  TileTotals* totals = nullptr;           // one
  uint64_t* map = nullptr;                // [batch, heads_q, query_tiles, mask_words]; null: not kept
  decide::TileRow* map_ranges = nullptr;  // [batch, heads_q, query_tiles]
  TileTotals* newest = nullptr;           // one: of the newest call that was tallied
  uint32_t* ctas = nullptr;               // one, 0 between calls
  // In host memory that the device writes: calls so far, and for how many more every unit will be computed exactly
  // (kOutlookBits).
  unsigned long long* outlook = nullptr;
};
inline constexpr int kOutlookBits = 8;

// Loads the kernels below on the current device: what is loaded at its first launch may have to wait for the device.
void prepare_tally();

// What the walk leaves of each item of a wave: WalkCall's, null where there is no far field, or no probe.
struct WalkLeaves {
  const float* far_share = nullptr;
  const int32_t* found = nullptr;
  ADAATTN_HD bool any() const { return far_share != nullptr || found != nullptr; }
};

// Adds one wave to the heads' tallies, the first wave anew.
// ends: the call's last wave. Its heads are judged by what launch_exact_rows left in `parts`, if that is not null, and
// added to the totals.
cudaError_t launch_tally(const AnalyzeArgs& args, int32_t first_tile, const WalkLeaves& leaves,
                         const TallyTargets& targets, const VerifyShape& verify, const VerifyPart* parts, bool ends,
                         cudaStream_t stream);

// Adds the time since launch_tally ended the call to that of verify.
cudaError_t launch_recompute_end(const AnalyzeArgs& args, const TallyTargets& targets, cudaStream_t stream);

// A call that finds all units among those computed exactly: what begins its exact kernel, and what ends it with the
// tallies of the call before, which was the same. looked: it is the one that looks at the units again.
cudaError_t launch_exact_begin(const AnalyzeArgs& args, cudaStream_t stream);
cudaError_t launch_exact_end(const AnalyzeArgs& args, const TallyTargets& targets, bool looked, cudaStream_t stream);

}  // namespace adaattn::cuda
