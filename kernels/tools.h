// The tools of the CUDA back-end; all enqueue on `stream` with their device current.
#pragma once

#include <cuda_runtime_api.h>

#include "attend/select.h"
#include "core/problem.h"
#include "core/tool_params.h"

namespace adaattn::cuda {

void merge(const MergeParams& params, cudaStream_t stream);

}  // namespace adaattn::cuda
