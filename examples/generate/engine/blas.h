// Matrix products of the weights, by OpenBLAS on the calling thread; the engine's pool spreads them.
#pragma once

#include <cstdint>
#include <string>

namespace generate {

// Opens OpenBLAS on first use (thread-safe) and throws where there is none.
void open_blas();

// Version and kernel set of the library in use, e.g. "OpenBLAS 0.3.21 SkylakeX".
std::string blas_description();

// y[rows, out] = beta * y + x[rows, in] * weight[out, in]^T, all row-major; ldy is the row stride of y.
void matmul_transposed(int64_t rows, int64_t out, int64_t in, const float* x, const float* weight, float beta, float* y,
                       int64_t ldy);

}  // namespace generate
