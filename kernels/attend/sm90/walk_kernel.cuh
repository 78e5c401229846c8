// The mask-walking kernel: persistent, one CTA per SM, a warp that draws query tiles, one that loads key tiles, and two
// consumer warpgroups.
#pragma once

#include "attend/sm90/forward_kernel.cuh"
#include "attend/sm90/walk_consumer.cuh"
#include "attend/sm90/walk_producer.cuh"
#include "common/ptx.cuh"

namespace adaattn::cuda::sm90 {

template <typename T, class Policy>
__global__ void __launch_bounds__(ForwardTraits<T, Policy>::kThreads, 1)
    walk_kernel(const __grid_constant__ WalkArgs args) {
  using Traits = WalkTraits<T, Policy>;
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(dynamic_shared);
  // Uniform over the warp, which the compiler cannot see in threadIdx.
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&args.forward.q_map);
    if (args.forward.seqlen_k > 0 && args.forward.total_k > 0) {
      prefetch_tensor_map(&args.forward.k_map);
      prefetch_tensor_map(&args.forward.v_map);
    }
    init_barriers(shared, Traits::kGroups);
    ptx::mbarrier_init(&shared.draw, 1);
    if constexpr (Traits::kRemainder) {
      ptx::mbarrier_init(&shared.remainder_full, 1);
      ptx::mbarrier_init(&shared.remainder_empty, kWarpgroup * Traits::kGroups);
    }
    if constexpr (Traits::kProbe) {
      ptx::mbarrier_init(&shared.found_full, kWarpgroup / 32 * Traits::kGroups);
      shared.found[0] = shared.found[1] = 0;
    }
    ptx::mbarrier_init(&shared.basis_full, 1);
    ptx::mbarrier_init(&shared.basis_empty, kWarpgroup / 32 * Traits::kGroups);
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
  }
  __syncthreads();
  wait_for_previous_grid();  // masks and lists
  launch_dependents();
  if (warpgroup == 0) {
    set_max_registers_down<Traits::kProducerRegisters>();
    if (threadIdx.x == 0) WalkProducer<Traits>(args, shared).run();
    if (threadIdx.x / 32 == 1) WalkList<Traits>(args, shared).run();
  } else {
    set_max_registers_up<Traits::kConsumerRegisters>();
    WalkConsumer<Traits>(args, shared, warpgroup - 1).run();
  }
}

}  // namespace adaattn::cuda::sm90
