#include "attend/launch.h"
#include "attend/sm90/dense_round.h"
#include "attend/sm90/forward.cuh"
#include "attend/sm90/overlapped_launch.h"
#include "attend/tall_features.h"
#include "common/ptx.cuh"
#include "runtime.h"

namespace adaattn::cuda::sm90 {
namespace {

using T = __nv_bfloat16;
using Policy = Forward<T, 128, 128, kTall>;
using Traits = ForwardTraits<T, Policy>;

struct DenseRoundArgs {
  ForwardArgs forward;
  DenseUnits units;
};

// forward_kernel behind a question.
__global__ void __launch_bounds__(Traits::kThreads, 1)
    dense_round_kernel(const __grid_constant__ DenseRoundArgs dense_round) {
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(dynamic_shared);
  const ForwardArgs& args = dense_round.forward;
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  launch_dependents();
  bool dense = true;
  for (int u = static_cast<int>(threadIdx.x); u < dense_round.units.count; u += Traits::kThreads)
    dense = __ldcg(dense_round.units.calls + u) > 0 && dense;
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&args.q_map);
    if (args.seqlen_k > 0 && args.total_k > 0) {
      prefetch_tensor_map(&args.k_map);
      prefetch_tensor_map(&args.v_map);
    }
    init_barriers(shared, Traits::kGroups);
  }
  dense = __syncthreads_and(dense) != 0;
  // The grid after this one waits for this one alone.
  if (blockIdx.x == 0) wait_for_previous_grid();
  if (!dense) return;
  if (warpgroup == 0) {
    set_max_registers_down<Traits::kProducerRegisters>();
    if (threadIdx.x < 32) Producer<Traits>(args, shared).run();
  } else {
    set_max_registers_up<Traits::kConsumerRegisters>();
    Consumer<Traits>(args, shared, warpgroup - 1).run();
  }
}

const ForwardInstance kInstance{"dense round", dtype_of<T>(), Policy::kConfig,
                                static_cast<int>(sizeof(typename Traits::Shared)),
                                reinterpret_cast<const void*>(&dense_round_kernel)};

}  // namespace

bool has_dense_round(const AttendKernel& kernel) {
  return kernel.dtype == kInstance.dtype && (kernel.features & kTall) != 0;
}

void prepare_dense_round() {
  check(cudaFuncSetAttribute(kInstance.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kInstance.shared_bytes),
        kInstance.name);
}

cudaError_t launch_dense_round(const AttendArgs& call, const DenseUnits& units, cudaStream_t stream) {
  DenseRoundArgs args{{}, units};
  return launch_forward_overlapped(kInstance, call, args.forward, &args, stream);
}

}  // namespace adaattn::cuda::sm90
