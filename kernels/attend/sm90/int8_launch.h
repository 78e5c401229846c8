// Host side of the 8-bit kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "attend/kernel.h"
#include "attend/sm90/forward_args.h"

namespace adaattn::cuda::sm90 {

// As launch_forward(), with K and V from args.int8.
cudaError_t launch_int8(const ForwardInstance& instance, const AttendArgs& args, cudaStream_t stream);

}  // namespace adaattn::cuda::sm90
