// Dense linear algebra in float64 over the SIMD kernels, for the tools and the analysis of attention heads. Sets of
// vectors (bases) are stored one vector per row. No function allocates; all give the same bits for any thread count.
#pragma once

#include <cstdint>

#include "cpu_fallback/thread_pool.h"
#include "cpu_fallback/tools/arena.h"
#include "cpu_fallback/tools/tool_kernels.h"

namespace adaattn::cpu {

// How to run: on at most `lanes` threads of the pool, which scratch memory is laid out for.
struct Exec {
  ThreadPool* pool = nullptr;
  const ToolKernels* kernels = nullptr;
  int64_t lanes = 1;

  Exec serial() const { return {nullptr, kernels, 1}; }
  // body(lane, i), lane in [0, lanes).
  template <typename Body>
  void for_each(int64_t n, Body&& body) const {
    if (lanes > 1) return pool->for_each(n, body, lanes);
    for (int64_t i = 0; i < n; ++i) body(int64_t{0}, i);
  }
};

inline ConstMatrix row_major(const double* data, int64_t rows, int64_t cols) {
  return {data, rows, cols, cols, 1, true};
}

enum class Precision { kF32, kF64 };  // of the products; sums over 256 products are f64 either way

// Scratch of gemm: packing buffers per lane, and the partial sums where a long inner dimension is split.
struct GemmScratch {
  uint8_t* packing = nullptr;  // lanes * kGemmScratchBytes
  double* partial = nullptr;   // the largest gemm_partial_size() of the products it serves
};
// Parts that a product's inner dimension is cut into: a function of the shape alone.
int64_t gemm_splits(int64_t rows, int64_t cols, int64_t depth);
// Elements of GemmScratch::partial that the product needs.
int64_t gemm_partial_size(int64_t rows, int64_t cols, int64_t depth);
GemmScratch take_gemm_scratch(Arena& arena, int64_t lanes, int64_t partial_size);

// c = alpha a b, or c += alpha a b; c row-major [a.rows, b.cols].
void gemm(const Exec& exec, const GemmScratch& scratch, const ConstMatrix& a, const ConstMatrix& b, double* c,
          int64_t ldc, Precision precision, double alpha = 1, bool accumulate = false);

// gram = x x^T, symmetric to the bit, [x.rows, x.rows].
void gram_matrix(const Exec& exec, const GemmScratch& scratch, const ConstMatrix& x, double* gram,
                 Precision precision = Precision::kF64);

// a = r^T r of a symmetric positive definite matrix, in place: r in the upper triangle, zeros below. False when a pivot
// falls under tolerance times its diagonal element, leaving a undefined.
bool cholesky(int64_t n, double* a, double tolerance);
// Inverse of an upper triangular matrix, in place.
void invert_upper(int64_t n, double* r);

// Eigen-decomposition of a symmetric matrix by Householder tridiagonalisation and the implicit symmetric QR algorithm
// (Golub and Van Loan, Matrix Computations, 4th ed., 8.3). The `wanted` largest values descend; row i of vectors is the
// eigenvector of values[i], null: not wanted. Absolute accuracy: a few eps times the norm. a is destroyed. False: no
// convergence (a holds a NaN or an infinity).
int64_t symmetric_eigen_work_size(int64_t n, bool vectors);  // doubles
bool symmetric_eigen(const ToolKernels& kernels, int64_t n, double* a, double* values, double* vectors, int64_t wanted,
                     double* work);

// Updates the triangle of a QR factorisation by `count` further rows of length n: r^T r <- r^T r + rows^T rows. r is
// n x n with zeros below the diagonal (all zero at the start); rows are destroyed.
int64_t qr_append_work_size(int64_t count, int64_t n);
void qr_append(const ToolKernels& kernels, int64_t n, double* r, int64_t count, double* rows, double* work);

// Singular values, descending, of the p x n row-major matrix m, p >= n, through Householder bidiagonalisation; m is
// destroyed. work: singular_values_work_size(p, n).
int64_t singular_values_work_size(int64_t p, int64_t n);
bool singular_values(const ToolKernels& kernels, int64_t p, int64_t n, double* m, double* values, double* work);

// Makes the rows of y orthonormal in their order: row i spans with the rows before it what it did, and norms[i] (null:
// not wanted) is its distance from the span of those before it. A row that is dependent up to rounding or to
// zero_below gets norm 0 and is replaced by a seeded direction orthogonal to all. CholeskyQR2 (Yamamoto et al., ETNA
// 44, 2015), falling back to Gram-Schmidt with reorthogonalisation when the Gram matrix is near singular.
struct OrthonormalScratch {
  double* spare = nullptr;  // [count, length]
  double* gram = nullptr;   // [count, count]
};
OrthonormalScratch take_orthonormal_scratch(Arena& arena, int64_t count, int64_t length);
// passes 1 leaves a basis that is orthonormal to about 1e-5, enough between power iterations.
void orthonormalize(const Exec& exec, const GemmScratch& gemm_scratch, const OrthonormalScratch& scratch, int64_t count,
                    int64_t length, double* y, double* norms, double zero_below, uint64_t seed, int passes = 2);

}  // namespace adaattn::cpu
