// Truncated SVD and effective rank from leading eigenvectors of the Gram matrix.
#include <algorithm>

#include "attend/launch.h"
#include "core/error.h"
#include "core/sampling.h"
#include "lowrank/eigen.h"
#include "lowrank/gram.cuh"
#include "lowrank/left.cuh"
#include "lowrank/lowrank.h"
#include "lowrank/product.cuh"
#include "lowrank/range.h"
#include "lowrank/subspace.h"
#include "runtime.h"

namespace adaattn::cuda {
namespace {

constexpr int kThreads = 256;
// Below this share of the largest, a singular value's left vector is rounding noise of the Gram matrix.
constexpr double kNullShare = 1e-8;
// Below this share rounding in the Gram matrix shows in the angles between left vectors: they are made orthogonal anew.
constexpr double kSmallShare = 1e-4;
// Eigenvalues below this share times the dimension are rounding noise.
constexpr double kEigenNoise = 2.3e-16;

__device__ __forceinline__ float& element(const MatrixBatch& m, int64_t matrix, int64_t r, int64_t c) {
  return static_cast<float*>(m.data)[m.offset(matrix) + r * m.stride_row + c * m.stride_col];
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

// One CTA per matrix: singular values and right vectors.
__global__ __launch_bounds__(kThreads) void values_kernel(const __grid_constant__ LeftArgs w) {
  const int64_t matrix = blockIdx.x;
  double* norms = w.norms + matrix * w.rank;
  for (int64_t j = threadIdx.x; j < w.rank; j += kThreads) {
    double sum = 0;
    for (int64_t b = 0; b < w.blocks; ++b) sum += w.squares[(matrix * w.blocks + b) * w.rank + j];
    norms[j] = sqrt(sum);
  }
  if (w.right_out.data != nullptr)
    for (int64_t i = threadIdx.x; i < w.rank * w.cols; i += kThreads) {
      const int64_t j = i / w.cols, c = i % w.cols;
      const int64_t from = w.order != nullptr ? w.order[matrix * w.right_vectors + j] : j;
      element(w.right_out, matrix, c, j) = static_cast<float>(w.right[(matrix * w.right_vectors + from) * w.cols + c]);
    }
  __syncthreads();
  if (threadIdx.x != 0) return;
  double bound = norms[0];
  for (int64_t j = 0; j < w.rank; ++j) {
    bound = norms[j] > bound ? bound : norms[j];  // the order of nearly equal values may have changed by rounding
    static_cast<float*>(w.values.data)[w.values.offset(matrix) + j * w.values.stride_row] = static_cast<float>(bound);
  }
}

// Left vectors to unit length, but for null ones.
__global__ __launch_bounds__(kThreads) void scale_kernel(const __grid_constant__ LeftArgs w) {
  const int64_t matrix = blockIdx.x, step = int64_t{gridDim.y} * kThreads;
  const double* norms = w.norms + matrix * w.rank;
  for (int64_t i = int64_t{blockIdx.y} * kThreads + threadIdx.x; i < w.rank * w.rows; i += step) {
    const int64_t j = i % w.rank;
    if (norms[j] <= kNullShare * norms[0]) continue;
    float& x = element(w.left, matrix, i / w.rank, j);
    x = static_cast<float>(x / norms[j]);
  }
}

// One CTA per matrix: makes small left vectors orthogonal to all before them, and for null directions any orthonormal
// completion from seeded vectors (Gram-Schmidt, repeated).
__global__ __launch_bounds__(kThreads) void repair_kernel(const __grid_constant__ LeftArgs w) {
  __shared__ double shared[kThreads];
  const int64_t matrix = blockIdx.x, rows = w.rows;
  const double* norms = w.norms + matrix * w.rank;
  const double null_norm = kNullShare * norms[0];
  for (int64_t j = 0; j < w.rank; ++j) {
    if (!(norms[j] <= kSmallShare * norms[0])) continue;
    __syncthreads();
    for (int64_t r = threadIdx.x; r < rows && norms[j] <= null_norm; r += kThreads)
      element(w.left, matrix, r, j) =
          sketch_entry(w.seed, static_cast<uint64_t>(matrix), static_cast<uint64_t>(j * rows + r));
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

// Whether a is decomposed through the Gram matrix of its smaller side; refuses what neither way takes.
bool by_gram(const LowRankParams& p) {
  const int64_t small = std::min(p.a.rows, p.a.cols), columns = subspace_columns(p.rank, p.oversampling);
  if (small <= kMaxGramDim) return true;
  const bool pays = subspace_pays(small, columns);
  if (!pays && small <= kMaxEigenDim) return true;
  if (pays && columns <= kMaxEigenDim) return false;
  fail(ADAATTN_ERROR_NOT_SUPPORTED,
       "desc.rank is %lld with desc.oversampling %lld, for matrices of %lld x %lld; accepted on CUDA devices: %lld in "
       "all, and less than three quarters of the smaller side",
       static_cast<long long>(p.rank), static_cast<long long>(p.oversampling), static_cast<long long>(p.a.rows),
       static_cast<long long>(p.a.cols), static_cast<long long>(kMaxEigenDim));
}

int64_t align(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// Where the steps of low_rank keep what they pass on.
struct Layout {
  TallView a;
  int64_t columns;
  bool whole;  // all eigenvectors, for there are nearly as many wanted
  int64_t basis, values, scratch, squares, norms, bytes;
  Layout(const LowRankParams& p, MathLibraries* libraries)
      : a(tall_view(p.a)), columns(subspace_columns(p.rank, p.oversampling)), whole(!subspace_pays(a.cols, columns)) {
    int64_t at = static_cast<int64_t>(gram_bytes(a));
    const auto take = [&](int64_t size) {
      const int64_t here = at;
      at += align(size);
      return here;
    };
    basis =
        take(whole ? static_cast<int64_t>(eigen_bytes(a.cols, a.batch, libraries)) : a.batch * columns * a.cols * 8);
    values = take(whole ? 0 : a.batch * columns * 8);
    scratch = take(whole ? 0 : static_cast<int64_t>(subspace_scratch_bytes(a.batch, a.cols, columns)));
    squares = take(a.batch * product_blocks(a) * p.rank * 8);
    norms = take(a.batch * p.rank * 8);
    bytes = at;
  }
};

}  // namespace

void finish_left(const LeftArgs& w, int64_t matrices, cudaStream_t stream) {
  const auto batch = static_cast<unsigned>(matrices);
  check(launch_grid(values_kernel, dim3(batch), kThreads, 0, stream, w), "low_rank");
  if (w.left.data == nullptr) return;
  const auto blocks = static_cast<unsigned>(std::clamp<int64_t>(w.rows * w.rank / (4 * kThreads), 1, 1024));
  check(launch_grid(scale_kernel, dim3(batch, blocks), kThreads, 0, stream, w), "low_rank");
  check(launch_grid(repair_kernel, dim3(batch), kThreads, 0, stream, w), "low_rank");
}

size_t low_rank_workspace(const LowRankParams& params, MathLibraries* libraries) {
  return by_gram(params) ? static_cast<size_t>(Layout(params, libraries).bytes) : range_bytes(params, libraries);
}

void low_rank(const LowRankParams& params, void* workspace, MathLibraries* libraries, cudaStream_t stream) {
  if (params.a.batch() == 0) return;
  if (!by_gram(params)) return low_rank_by_range(params, workspace, libraries, stream);
  const Layout layout(params, libraries);
  const TallView& a = layout.a;
  const auto at = [&](int64_t offset) { return reinterpret_cast<double*>(static_cast<char*>(workspace) + offset); };
  double* const gram = gram_of(a, workspace, stream);
  LeftArgs w{};
  w.rows = a.rows;
  w.cols = a.cols;
  w.rank = params.rank;
  w.blocks = product_blocks(a);
  w.squares = at(layout.squares);
  w.norms = at(layout.norms);
  w.left = a.transposed ? params.v : params.u;
  w.right_out = a.transposed ? params.u : params.v;
  w.values = params.s;
  w.seed = params.seed;
  if (layout.whole) {
    const Eigen eigen = eigen_of(a.cols, a.batch, gram, at(layout.basis), libraries, stream);
    w.right = eigen.vectors;
    w.order = eigen.order;
    w.right_vectors = a.cols;
  } else {
    SubspaceArgs s;
    s.batch = a.batch;
    s.dim = static_cast<int32_t>(a.cols);
    s.ld = static_cast<int32_t>(subspace_ld(a.cols));
    s.columns = static_cast<int32_t>(layout.columns);
    s.gram = gram;
    s.basis = at(layout.basis);
    s.values = at(layout.values);
    s.scratch = at(layout.scratch);
    // A sweep costs a small part of a power step on the matrix.
    s.cold_sweeps = static_cast<int32_t>(2 * params.power_iterations + 1);
    s.seed = params.seed;
    subspace_iteration(s, stream);
    w.right = s.basis;
    w.right_vectors = layout.columns;
  }
  ProductArgs left;
  left.a = a;
  left.x = w.right;
  left.order = w.order;
  left.x_vectors = w.right_vectors;
  left.x_stride = a.cols;
  left.vectors = params.rank;
  left.out = w.left;
  left.squares = at(layout.squares);
  product(left, stream);
  finish_left(w, a.batch, stream);
}

size_t effective_rank_workspace(const EffectiveRankParams& params, MathLibraries* libraries) {
  const TallView a = tall_view(params.a);
  return gram_bytes(a) + eigen_bytes(a.cols, a.batch, libraries);
}

void effective_rank(const EffectiveRankParams& params, void* workspace, MathLibraries* libraries, cudaStream_t stream) {
  const TallView a = tall_view(params.a);
  if (a.batch == 0) return;
  double* const gram = gram_of(a, workspace, stream);
  const Eigen eigen = eigen_of(a.cols, a.batch, gram, static_cast<char*>(workspace) + gram_bytes(a), libraries, stream);
  check(launch_grid(rank_kernel, dim3(static_cast<unsigned>(a.batch)), kThreads, 0, stream, a.cols, eigen.values,
                    params.threshold, params.ranks, params.singular_values),
        "effective_rank");
}

}  // namespace adaattn::cuda
