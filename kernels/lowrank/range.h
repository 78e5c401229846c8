// Truncated SVD of matrices whose smaller side is beyond a Gram matrix.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "core/tool_params.h"

namespace adaattn::cuda {

// desc.rank + desc.oversampling, rounded up to whole tiles of 8, at most kMaxEigenDim.
size_t range_bytes(const LowRankParams& params);
void low_rank_by_range(const LowRankParams& params, void* workspace, cudaStream_t stream);

}  // namespace adaattn::cuda
