// Hopper forward kernels over pages of keys and values, their registry rows included. A tile's rows may be the query
// heads of a group and its keys come in parts where tiles are few, as in the split instances.
#pragma once

#include "attend/sm90/forward_kernel.cuh"
#include "attend/sm90/forward_row.cuh"
#include "attend/sm90/paged_producer.cuh"

namespace adaattn::cuda::sm90 {

// Tiles are read by the consumers and by all warps of the producer but the one that draws them.
template <class Shared>
__device__ __forceinline__ void init_paged_barriers(Shared& shared, int groups, int producers) {
  const int consumers = kWarpgroup / 32 * groups;
  const auto init = [](auto& barriers, int arrivals) {
    for (uint64_t& barrier : barriers) ptx::mbarrier_init(&barrier, arrivals);
  };
  init(shared.q_full, 1);
  init(shared.q_empty, kWarpgroup / 32);
  init(shared.k_full, 1);
  init(shared.k_empty, consumers);
  init(shared.v_full, 1);
  init(shared.v_empty, consumers);
  init(shared.tile_full, 1);
  init(shared.tile_empty, consumers + producers - 1);
  ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
}

template <typename T, class Policy>
__global__ void __launch_bounds__(ForwardTraits<T, Policy>::kThreads, 1)
    paged_kernel(const __grid_constant__ ForwardArgs args) {
  using Traits = ForwardTraits<T, Policy>;
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(dynamic_shared);
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&args.q_map);
    if (args.seqlen_k > 0) {
      prefetch_tensor_map(&args.k_map);
      prefetch_tensor_map(&args.v_map);
    }
    init_paged_barriers(shared, Traits::kGroups, PagedProducer<Traits>::kWarps);
  }
  __syncthreads();
  if (warpgroup == 0) {
    set_max_registers_down<Traits::kProducerRegisters>();
    if (threadIdx.x < 32 * PagedProducer<Traits>::kWarps) PagedProducer<Traits>(args, shared).run();
  } else {
    set_max_registers_up<Traits::kConsumerRegisters>();
    Consumer<Traits>(args, shared, warpgroup - 1).run();
  }
}

template <typename T, int kDqk, int kDv, uint32_t kFeatures>
struct Paged {
  static_assert(kFeatures == kSplit);
  static constexpr ForwardConfig kConfig = {.d_qk = kDqk,
                                            .d_v = kDv,
                                            .masked = true,
                                            .dynamic = true,
                                            .ordered = false,
                                            .k_stages = 3,
                                            .quick = true,
                                            .split = true};
  static_assert(kConfig.tile_n % kPageMultiple == 0);

  static AttendKernel row(const char* name) {
    AttendKernel k = forward_row<T, Paged, &paged_kernel<T, Paged>>(
        name, kPaged | kVarlen | kSink | kRagged | kMasked | kSplit | kPacked);
    k.page_multiple = kPageMultiple;
    return k;
  }
};

}  // namespace adaattn::cuda::sm90
