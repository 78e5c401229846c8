// The persistent, warp-specialised kernel of the e4m3 class.
#pragma once

#include "attend/sm90/e4m3_consumer.cuh"
#include "attend/sm90/e4m3_producer.cuh"

namespace adaattn::cuda::sm90 {

template <class Shared>
__device__ __forceinline__ void init_e4m3_barriers(Shared& shared, int groups) {
  constexpr int kWarps = kWarpgroup / 32, kTransposers = 3;
  const auto init = [](auto& barriers, int arrivals) {
    for (uint64_t& barrier : barriers) ptx::mbarrier_init(&barrier, arrivals);
  };
  init(shared.q_full, 1);
  init(shared.q_empty, kWarps);
  init(shared.k_full, 1);
  init(shared.k_empty, kWarps * groups);
  init(shared.raw_full, 1);
  init(shared.raw_empty, kTransposers);
  init(shared.v_full, kTransposers);
  init(shared.v_empty, kWarps * groups);
  init(shared.tile_full, 1);
  init(shared.tile_empty, kWarps * groups);
  ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
}

template <class Policy>
__global__ void __launch_bounds__(E4m3Traits<Policy>::kThreads, 1) e4m3_kernel(const __grid_constant__ E4m3Args args) {
  using Traits = E4m3Traits<Policy>;
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(dynamic_shared);
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&args.q_map);
    if (args.seqlen_k > 0 && args.total_k > 0) {
      prefetch_tensor_map(&args.k_map);
      prefetch_tensor_map(&args.v_map);
    }
    init_e4m3_barriers(shared, Traits::kGroups);
  }
  if constexpr (!Traits::kBlockFactors) {
    constexpr uint32_t kOnes = 0x38383838;  // e4m3
    constexpr int kWords = 8 * kSlabKeys / 16;
    for (int i = static_cast<int>(threadIdx.x); i < Traits::kVStages * Traits::kSlabs * kWords; i += Traits::kThreads) {
      const int slab = i / kWords % Traits::kSlabs, stage = i / (kWords * Traits::kSlabs);
      uint8_t* const ones = shared.v[stage] + slab * Traits::kSlabBytes + Traits::kDv * kSlabKeys;
      reinterpret_cast<uint4*>(ones)[i % kWords] = make_uint4(kOnes, kOnes, kOnes, kOnes);
    }
  }
  ptx::fence_proxy_async(ptx::space_shared);
  __syncthreads();
  if (warpgroup == 0) {
    set_max_registers_down<Traits::kProducerRegisters>();
    if (threadIdx.x < 32) {
      E4m3Producer<Traits>(args, shared).run();
    } else {
      Transposer<Traits>(shared).run();
    }
  } else {
    set_max_registers_up<Traits::kConsumerRegisters>();
    E4m3Consumer<Traits>(args, shared, warpgroup - 1).run();
  }
}

}  // namespace adaattn::cuda::sm90
