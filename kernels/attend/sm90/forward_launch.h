// Host side of the Hopper forward kernels: tensor maps and the launch.
#pragma once

#include <cuda_runtime_api.h>

#include "attend/kernel.h"
#include "attend/sm90/forward_args.h"

namespace adaattn::cuda::sm90 {

// All that follows from the tensors and the mask: no tiles, no counters.
ForwardArgs common_args(const ForwardConfig& config, const AttnParams& params);

// The persistent grid over all query tiles. `args` is what the kernel takes, `forward` the part of it that the
// scheduler reads, filled in here.
cudaError_t launch_tiles(const ForwardInstance& instance, const AttendArgs& call, ForwardArgs& forward, void* args,
                         cudaStream_t stream);

// The instance serves the call: 16-byte aligned rows, no bias, ALiBi, entropy or f32 output, pages only of a paged
// instance, scale > 0, and a masked or softcap instance where one is needed. Capture-safe; launches that share
// args.scheduler must be ordered. Throws Error where the driver refuses a tensor.
cudaError_t launch_forward(const ForwardInstance& instance, const AttendArgs& args, cudaStream_t stream);

}  // namespace adaattn::cuda::sm90
