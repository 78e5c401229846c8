// The persistent, warp-specialised forward kernel: one CTA per SM, a producer warp and the consumer warpgroups.
#pragma once

#include "attend/sm90/forward_consumer.cuh"
#include "attend/sm90/forward_producer.cuh"

namespace adaattn::cuda::sm90 {

template <class Shared>
__device__ __forceinline__ void init_barriers(Shared& shared, int groups) {
  constexpr int kWarps = kWarpgroup / 32;
  for (uint64_t& barrier : shared.q_full) ptx::mbarrier_init(&barrier, 1);
  for (uint64_t& barrier : shared.q_empty) ptx::mbarrier_init(&barrier, kWarps);
  for (uint64_t& barrier : shared.k_full) ptx::mbarrier_init(&barrier, 1);
  for (uint64_t& barrier : shared.v_full) ptx::mbarrier_init(&barrier, 1);
  for (uint64_t& barrier : shared.k_empty) ptx::mbarrier_init(&barrier, kWarps * groups);
  for (uint64_t& barrier : shared.v_empty) ptx::mbarrier_init(&barrier, kWarps * groups);
  for (int i = 0; i < 2; ++i) {
    ptx::mbarrier_init(&shared.tile_full[i], 1);
    ptx::mbarrier_init(&shared.tile_empty[i], kWarps * groups);
  }
  ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
}

template <typename T, class Policy>
__global__ void __launch_bounds__(ForwardTraits<T, Policy>::kThreads, 1)
    forward_kernel(const __grid_constant__ ForwardArgs args) {
  using Traits = ForwardTraits<T, Policy>;
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(dynamic_shared);
  // Uniform over the warp, which the compiler cannot see in threadIdx.
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&args.q_map);
    if (args.seqlen_k > 0 && args.total_k > 0) {
      prefetch_tensor_map(&args.k_map);
      prefetch_tensor_map(&args.v_map);
    }
    init_barriers(shared, Traits::kGroups);
  }
  __syncthreads();
  if (warpgroup == 0) {
    set_max_registers_down<Traits::kProducerRegisters>();
    if (threadIdx.x < 32) Producer<Traits>(args, shared).run();
  } else {
    set_max_registers_up<Traits::kConsumerRegisters>();
    Consumer<Traits>(args, shared, warpgroup - 1).run();
  }
}

}  // namespace adaattn::cuda::sm90
