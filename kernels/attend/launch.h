// Shared by the kernels' registry rows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "attend/kernel.h"

namespace adaattn::cuda {

template <typename T>
constexpr Dtype dtype_of();
template <>
constexpr Dtype dtype_of<float>() {
  return Dtype::kF32;
}
template <>
constexpr Dtype dtype_of<__half>() {
  return Dtype::kF16;
}
template <>
constexpr Dtype dtype_of<__nv_bfloat16>() {
  return Dtype::kBF16;
}

// overlapped: the grid may start before the previous one ends and waits for it by itself (compute capability 9.0).
template <typename... Params, typename... Args>
cudaError_t launch_grid_overlapped(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes,
                                   cudaStream_t stream, bool overlapped, Args&&... args) {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = overlapped ? 1 : 0;
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

template <typename... Params, typename... Args>
cudaError_t launch_grid(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
                        Args&&... args) {
  return launch_grid_overlapped(kernel, grid, threads, shared_bytes, stream, false, args...);
}

}  // namespace adaattn::cuda
