// What the device counts for the statistics of a tile plan.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "adaptive/analyze.h"

namespace adaattn::cuda {

// Of the newest call, one for each (sequence, query head).
struct HeadTally {
  uint64_t tiles, kept;                // with a visible key; computed exactly
  uint64_t rows, rows_kept, rows_far;  // query rows; times tiles kept; times tiles that entered as centroids
  double far_share;                    // sum over rows of the far field's share
  float entropy, predicted_error, rank_energy;
  int32_t rank_class, dense;
};

// Sums over the heads of all calls.
struct TileTotals {
  unsigned long long heads, heads_dense, heads_low_rank, tiles, kept;
  double flops, rank_v_sum, entropy_sum, entropy_min, entropy_max, predicted_sum, far_sum;
};

// Adds one wave to the heads' tallies, the first wave anew. far_share: of walk.h, null where there is no far field.
cudaError_t launch_tally(const AnalyzeArgs& args, int32_t first_tile, const float* far_share, HeadTally* heads,
                         cudaStream_t stream);
// Adds a call's heads to the totals, when all its waves have been tallied.
cudaError_t launch_total(const AnalyzeArgs& args, const HeadTally* heads, TileTotals* totals, cudaStream_t stream);

}  // namespace adaattn::cuda
