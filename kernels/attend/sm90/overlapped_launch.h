// A forward kernel within kernels of its own, whose grid may start beside the end of the one before it.
#pragma once

#include "attend/sm90/forward_launch.h"

namespace adaattn::cuda::sm90 {

// As launch_forward; `args` is what the kernel takes, `forward` the part of it that is filled in here.
cudaError_t launch_forward_overlapped(const ForwardInstance& instance, const AttendArgs& call, ForwardArgs& forward,
                                      void* args, cudaStream_t stream);

}  // namespace adaattn::cuda::sm90
