// The persistent, warp-specialised kernel of the 8-bit classes.
#pragma once

#include "attend/sm90/forward_kernel.cuh"
#include "attend/sm90/int8_consumer.cuh"
#include "attend/sm90/int8_producer.cuh"

namespace adaattn::cuda::sm90 {

// The lines behind V's.
template <class Traits>
__device__ __forceinline__ void write_ones(typename Traits::Shared& shared) {
  constexpr uint32_t kOnes = 0x38383838;  // e4m3
  for (int i = static_cast<int>(threadIdx.x); i < Traits::kStages * Traits::kOnesBytes / 16; i += Traits::kThreads) {
    const int stage = i / (Traits::kOnesBytes / 16), word = i % (Traits::kOnesBytes / 16);
    reinterpret_cast<uint4*>(shared.v[stage] + Traits::kVBytes)[word] = make_uint4(kOnes, kOnes, kOnes, kOnes);
  }
}

template <typename T, class Policy>
__global__ void __launch_bounds__(Int8Traits<T, Policy>::kThreads, 1)
    int8_kernel(const __grid_constant__ Int8Args args) {
  using Traits = Int8Traits<T, Policy>;
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(dynamic_shared);
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&args.forward.q_map);
    init_barriers(shared, Traits::kGroups);
  }
  write_ones<Traits>(shared);
  ptx::fence_proxy_async(ptx::space_shared);
  __syncthreads();
  if (warpgroup == 0) {
    set_max_registers_down<Traits::kProducerRegisters>();
    if (threadIdx.x < 32) Int8Producer<Traits>(args.forward, args.tables, shared).run();
  } else {
    set_max_registers_up<Traits::kConsumerRegisters>();
    Int8Consumer<Traits>(args.forward, args.tables, args.with_shift, shared, warpgroup - 1).run();
  }
}

}  // namespace adaattn::cuda::sm90
