// Host side of the Hopper forward kernels: tensor maps and the launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "attend/sm90/forward_args.h"

namespace adaattn::sm90 {

// counters: two int32 in device memory, zero before the first launch; every launch leaves them zero. Launches that
// share them must be ordered. Capture-safe. The instance must serve the call: 16-byte aligned bases and strides, no
// bias, ALiBi, paging or entropy, scale > 0, and a masked instance for windows and softcap. Throws Error.
void launch_forward(const ForwardInstance& instance, const AttnParams& params, int32_t* counters, int multiprocessors,
                    cudaStream_t stream);

}  // namespace adaattn::sm90
