// Truncated SVD and effective rank from the eigen-decomposition of the Gram matrix.
#include <algorithm>

#include "attend/launch.h"
#include "core/error.h"
#include "core/sampling.h"
#include "lowrank/gram.cuh"
#include "lowrank/lowrank.h"
#include "runtime.h"

namespace adaattn::cuda {
namespace {

constexpr int kThreads = 256;
// Below this share of the largest, a singular value's left vector is rounding noise of the Gram matrix.
constexpr double kNullShare = 1e-8;
// Below this share rounding in the Gram matrix shows in the angles between left vectors: they are made orthogonal anew.
constexpr double kSmallShare = 1e-5;
// Eigenvalues below this share times the dimension are rounding noise.
constexpr double kEigenNoise = 2.3e-16;

struct LeftArgs {
  TallView a;
  GramEigen eigen;
  MatrixBatch left;  // [rows, rank] of the output that belongs to the tall side, data null: norms only
  double* squares;   // [batch, row blocks, rank]
  double* norms;     // [batch, rank]
  int64_t rank;
  int blocks;
};

__device__ __forceinline__ float& element(const MatrixBatch& m, int64_t matrix, int64_t r, int64_t c) {
  return static_cast<float*>(m.data)[m.offset(matrix) + r * m.stride_row + c * m.stride_col];
}

// left = A V for a block of rows, unscaled, and the squares of its columns; thread j has columns j, j + kThreads, ...
__global__ __launch_bounds__(kThreads) void left_kernel(const __grid_constant__ LeftArgs w) {
  __shared__ float row[kMaxGramDim];
  const int64_t matrix = blockIdx.y, n = w.a.cols;
  const float* data = w.a.matrix(matrix);
  const int64_t first = w.a.rows * blockIdx.x / w.blocks, last = w.a.rows * (blockIdx.x + 1) / w.blocks;
  const int j = threadIdx.x;
  const double* v = j < w.rank ? w.eigen.vectors + (matrix * n + w.eigen.order[matrix * n + j]) * n : nullptr;
  double square = 0;
  for (int64_t r = first; r < last; ++r) {
    __syncthreads();
    for (int64_t c = threadIdx.x; c < n; c += kThreads) row[c] = data[r * w.a.stride_row + c * w.a.stride_col];
    __syncthreads();
    if (v != nullptr) {
      double sum = 0;
      for (int64_t c = 0; c < n; ++c) sum = fma(static_cast<double>(row[c]), v[c], sum);
      square = fma(sum, sum, square);
      if (w.left.data != nullptr) element(w.left, matrix, r, j) = static_cast<float>(sum);
    }
  }
  if (v != nullptr) w.squares[(matrix * w.blocks + blockIdx.x) * w.rank + j] = square;
}

__device__ double block_sum(double x, double* shared) {
  __syncthreads();
  shared[threadIdx.x] = x;
  for (int step = kThreads / 2; step > 0; step /= 2) {
    __syncthreads();
    if (threadIdx.x < step) shared[threadIdx.x] += shared[threadIdx.x + step];
  }
  __syncthreads();
  return shared[0];
}

// One CTA per matrix: singular values, left vectors to unit length, small ones orthogonal to all before them, and for
// null directions any orthonormal completion from seeded vectors (Gram-Schmidt, repeated).
__global__ __launch_bounds__(kThreads) void finish_kernel(const __grid_constant__ LeftArgs w, MatrixBatch right,
                                                          MatrixBatch values, uint64_t seed) {
  __shared__ double shared[kThreads];
  const int64_t matrix = blockIdx.x, n = w.a.cols, rows = w.a.rows;
  double* norms = w.norms + matrix * w.rank;
  for (int64_t j = threadIdx.x; j < w.rank; j += kThreads) {
    double sum = 0;
    for (int b = 0; b < w.blocks; ++b) sum += w.squares[(matrix * w.blocks + b) * w.rank + j];
    norms[j] = sqrt(sum);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double bound = norms[0];
    for (int64_t j = 0; j < w.rank; ++j) {
      bound = norms[j] > bound ? bound : norms[j];  // the order of nearly equal values may have changed by rounding
      static_cast<float*>(values.data)[values.offset(matrix) + j * values.stride_row] = static_cast<float>(bound);
    }
  }
  if (right.data != nullptr)
    for (int64_t i = threadIdx.x; i < w.rank * n; i += kThreads) {
      const int64_t j = i / n, c = i % n;
      element(right, matrix, c, j) =
          static_cast<float>(w.eigen.vectors[(matrix * n + w.eigen.order[matrix * n + j]) * n + c]);
    }
  if (w.left.data == nullptr) return;
  const double null_norm = kNullShare * norms[0];
  for (int64_t i = threadIdx.x; i < w.rank * rows; i += kThreads) {
    const int64_t j = i % w.rank;
    if (!(norms[j] <= null_norm)) {
      float& x = element(w.left, matrix, i / w.rank, j);
      x = static_cast<float>(x / norms[j]);
    }
  }
  for (int64_t j = 0; j < w.rank; ++j) {
    if (!(norms[j] <= kSmallShare * norms[0])) continue;
    __syncthreads();
    for (int64_t r = threadIdx.x; r < rows && norms[j] <= null_norm; r += kThreads)
      element(w.left, matrix, r, j) =
          sketch_entry(seed, static_cast<uint64_t>(matrix), static_cast<uint64_t>(j * rows + r));
    for (int pass = 0; pass < 3; ++pass) {
      for (int64_t k = 0; k < j; ++k) {
        double dot = 0;
        for (int64_t r = threadIdx.x; r < rows; r += kThreads)
          dot = fma(static_cast<double>(element(w.left, matrix, r, j)),
                    static_cast<double>(element(w.left, matrix, r, k)), dot);
        dot = block_sum(dot, shared);
        for (int64_t r = threadIdx.x; r < rows; r += kThreads)
          element(w.left, matrix, r, j) =
              static_cast<float>(element(w.left, matrix, r, j) - dot * element(w.left, matrix, r, k));
      }
      double square = 0;
      for (int64_t r = threadIdx.x; r < rows; r += kThreads) {
        const double x = element(w.left, matrix, r, j);
        square = fma(x, x, square);
      }
      const double length = sqrt(block_sum(square, shared));
      for (int64_t r = threadIdx.x; r < rows; r += kThreads)
        element(w.left, matrix, r, j) = static_cast<float>(element(w.left, matrix, r, j) / length);
    }
  }
}

__global__ __launch_bounds__(kThreads) void rank_kernel(int64_t n, const double* eigenvalues, double threshold,
                                                        MatrixBatch ranks, MatrixBatch values) {
  const int64_t matrix = blockIdx.x;
  const double* lambda = eigenvalues + matrix * n;
  const double noise = kEigenNoise * static_cast<double>(n) * lambda[0];
  if (values.data != nullptr)
    for (int64_t j = threadIdx.x; j < n; j += kThreads)
      static_cast<float*>(values.data)[values.offset(matrix) + j * values.stride_row] =
          lambda[j] <= noise ? 0.0f : static_cast<float>(sqrt(lambda[j]));
  if (threadIdx.x != 0) return;
  double total = 0;
  for (int64_t j = n; j-- > 0;) total += lambda[j] <= noise ? 0.0 : lambda[j];
  int32_t rank = 0;
  for (double sum = 0; rank < n && total > 0 && (rank == 0 || sum < threshold * total * (1 - kEigenNoise * n));) {
    if (lambda[rank] <= noise) break;
    sum += lambda[rank++];
  }
  static_cast<int32_t*>(ranks.data)[ranks.offset(matrix)] = rank;
}

void check_dim(int64_t rows, int64_t cols, const char* tool) {
  if (std::min(rows, cols) > kMaxGramDim)
    fail(ADAATTN_ERROR_NOT_SUPPORTED, "%s: a is %lld x %lld; the CUDA back-end takes min(rows, cols) up to %lld", tool,
         static_cast<long long>(rows), static_cast<long long>(cols), static_cast<long long>(kMaxGramDim));
}

int row_blocks(const TallView& a) {
  return static_cast<int>(
      std::clamp<int64_t>(a.rows / 64, 1, std::max<int64_t>(1, 1024 / std::max<int64_t>(a.batch, 1))));
}

int64_t align(int64_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

size_t low_rank_workspace(const LowRankParams& params) {
  check_dim(params.a.rows, params.a.cols, "low_rank");
  const TallView a = tall_view(params.a);
  return gram_eigen_bytes(a) +
         static_cast<size_t>(align(a.batch * row_blocks(a) * params.rank * 8) + align(a.batch * params.rank * 8));
}

void low_rank(const LowRankParams& params, void* workspace, cudaStream_t stream) {
  LeftArgs w;
  w.a = tall_view(params.a);
  if (w.a.batch == 0) return;
  w.eigen = gram_eigen_layout(w.a, workspace);
  w.rank = params.rank;
  w.blocks = row_blocks(w.a);
  w.squares = reinterpret_cast<double*>(static_cast<char*>(workspace) + gram_eigen_bytes(w.a));
  w.norms = reinterpret_cast<double*>(reinterpret_cast<char*>(w.squares) + align(w.a.batch * w.blocks * w.rank * 8));
  w.left = w.a.transposed ? params.v : params.u;
  const MatrixBatch& right = w.a.transposed ? params.u : params.v;
  gram_eigen(w.a, w.eigen, stream);
  check(launch_grid(left_kernel, dim3(w.blocks, static_cast<unsigned>(w.a.batch)), kThreads, 0, stream, w), "low_rank");
  check(launch_grid(finish_kernel, dim3(static_cast<unsigned>(w.a.batch)), kThreads, 0, stream, w, right, params.s,
                    params.seed),
        "low_rank");
}

size_t effective_rank_workspace(const EffectiveRankParams& params) {
  check_dim(params.a.rows, params.a.cols, "effective_rank");
  return gram_eigen_bytes(tall_view(params.a));
}

void effective_rank(const EffectiveRankParams& params, void* workspace, cudaStream_t stream) {
  const TallView a = tall_view(params.a);
  if (a.batch == 0) return;
  const GramEigen eigen = gram_eigen_layout(a, workspace);
  gram_eigen(a, eigen, stream);
  check(launch_grid(rank_kernel, dim3(static_cast<unsigned>(a.batch)), kThreads, 0, stream, a.cols, eigen.values,
                    params.threshold, params.ranks, params.singular_values),
        "effective_rank");
}

}  // namespace adaattn::cuda
