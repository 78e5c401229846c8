// What the registry says of a Hopper forward kernel.
#pragma once

#include "attend/launch.h"
#include "attend/sm90/forward_launch.h"
#include "attend/sm90/forward_traits.cuh"

namespace adaattn::cuda::sm90 {

// kKernel: the __global__ function; features: those that it serves.
template <typename T, class Policy, auto kKernel>
AttendKernel forward_row(const char* name, uint32_t features) {
  using Traits = ForwardTraits<T, Policy>;
  static const ForwardInstance instance{name, dtype_of<T>(), Policy::kConfig,
                                        static_cast<int>(sizeof(typename Traits::Shared)),
                                        reinterpret_cast<const void*>(kKernel)};
  AttendKernel k{};
  k.name = name;
  k.arch = 90;
  k.phase = Phase::kForward;
  k.dtype = dtype_of<T>();
  k.d_qk = Traits::kD;
  k.d_v = Traits::kDv;
  k.features = features;
  k.tile_q = Traits::kM;
  k.tile_k = Traits::kN;
  k.ctas_per_sm = 1;
  k.reports = false;
  k.shared_bytes = sizeof(typename Traits::Shared);
  k.function = instance.kernel;
  k.launch = [](const AttendArgs& args, cudaStream_t stream) { return launch_forward(instance, args, stream); };
  return k;
}

}  // namespace adaattn::cuda::sm90
