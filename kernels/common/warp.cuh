// Reductions over a warp, in a fixed order.
#pragma once

namespace adaattn::cuda {

template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

}  // namespace adaattn::cuda
