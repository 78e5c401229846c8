// Matrix products of the weights on the GPU, by cuBLAS.
#pragma once

#include <cublas_v2.h>

#include <cstdint>
#include <string>

#include "engine/dtype.h"

namespace generate::cuda {

class Blas {
 public:
  // Opens cuBLAS on first use (thread-safe) and throws where there is none; its work goes to `stream`.
  explicit Blas(cudaStream_t stream);
  ~Blas();
  Blas(const Blas&) = delete;
  Blas& operator=(const Blas&) = delete;

  // y[rows, out] = beta * y + x[rows, in] * weight[out, in]^T, all row-major; x and weight are in dtype, sums and y are
  // in f32.
  void multiply_transposed(int64_t rows, int64_t out, int64_t in, DType dtype, const void* x, const void* weight,
                           float beta, float* y) const;

  // Name and version.
  std::string description() const;

 private:
  cublasHandle_t handle_ = nullptr;
};

}  // namespace generate::cuda
