// Host side of the e4m3 class.
#pragma once

#include <cuda_runtime_api.h>

#include "attend/kernel.h"
#include "attend/sm90/forward_args.h"

namespace adaattn::cuda::sm90 {

// As launch_forward(), for inputs in e4m3 and any 16-byte aligned output.
cudaError_t launch_e4m3(const ForwardInstance& instance, const AttendArgs& args, cudaStream_t stream);

}  // namespace adaattn::cuda::sm90
