// Entropy of attention distributions without computing attention.
#pragma once

#include <cuda_runtime_api.h>

#include "attend/select.h"
#include "core/problem.h"
#include "core/tool_params.h"

namespace adaattn::cuda {

size_t entropy_workspace(const Problem& problem, const EntropyParams& params, const DeviceTraits& device);
void entropy(const EntropyParams& params, void* workspace, const DeviceTraits& device, cudaStream_t stream);

// Means of per-row entropies [batch, heads, row_capacity] over the rows that exist.
cudaError_t launch_head_means(const EntropyParams& params, const float* rows, int64_t row_capacity,
                              cudaStream_t stream);

}  // namespace adaattn::cuda
