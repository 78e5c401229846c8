// Truncated SVD of matrices whose smaller side is beyond a Gram matrix.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "core/tool_params.h"

namespace adaattn::cuda {

class MathLibraries;

// desc.rank + desc.oversampling, rounded up to whole tiles of 8, at most kMaxEigenDim.
size_t range_bytes(const LowRankParams& params, MathLibraries* libraries);
void low_rank_by_range(const LowRankParams& params, void* workspace, MathLibraries* libraries, cudaStream_t stream);

}  // namespace adaattn::cuda
