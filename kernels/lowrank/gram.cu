#include <algorithm>

#include "attend/launch.h"
#include "lowrank/gram.cuh"
#include "runtime.h"

namespace adaattn::cuda {
namespace {

constexpr int kTile = 32;  // columns of a panel and rows of a step
constexpr int kGramThreads = 256;
constexpr int kJacobiThreads = 1024;
constexpr int kMaxSweeps = 40;
constexpr size_t kStaticShared = 4096;  // more than the kernel declares
// Columns count as orthogonal below this cosine: float64 rounding of sums of a few hundred terms.
constexpr double kOrthogonal = 1e-14;
// Columns shorter than this share of the trace are rounding noise, which no rotation makes orthogonal.
constexpr double kNoise = 2e-16;

// One 32 x 32 tile of A^T A over one part of the rows; products are exact in float64.
__global__ __launch_bounds__(kGramThreads) void gram_kernel(TallView a, int splits, double* partial) {
  __shared__ float left[kTile][kTile + 1], right[kTile][kTile + 1];
  const int tiles = static_cast<int>((a.cols + kTile - 1) / kTile);
  const int ti = blockIdx.x / tiles, tj = blockIdx.x % tiles;
  if (tj < ti) return;  // symmetric
  const int64_t matrix = blockIdx.z, n = a.cols;
  const float* data = a.matrix(matrix);
  const int64_t first = a.rows * blockIdx.y / splits, last = a.rows * (blockIdx.y + 1) / splits;
  const int thread = threadIdx.x, tx = thread % 16, ty = thread / 16;
  double sum[2][2] = {};
  for (int64_t row0 = first; row0 < last; row0 += kTile) {
    __syncthreads();
    for (int i = thread; i < kTile * kTile; i += kGramThreads) {
      const int64_t r = row0 + i / kTile;
      const int c = i % kTile;
      const int64_t cl = ti * kTile + c, cr = tj * kTile + c;
      left[i / kTile][c] = r < last && cl < n ? data[r * a.stride_row + cl * a.stride_col] : 0.0f;
      right[i / kTile][c] = r < last && cr < n ? data[r * a.stride_row + cr * a.stride_col] : 0.0f;
    }
    __syncthreads();
#pragma unroll 8
    for (int r = 0; r < kTile; ++r)
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          sum[i][j] =
              fma(static_cast<double>(left[r][ty + 16 * i]), static_cast<double>(right[r][tx + 16 * j]), sum[i][j]);
  }
  double* out = partial + (matrix * splits + blockIdx.y) * n * n;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int64_t r = ti * kTile + ty + 16 * i, c = tj * kTile + tx + 16 * j;
      if (r < n && c < n) out[r * n + c] = sum[i][j];
    }
}

// Adds the parts in order and mirrors the upper triangle.
__global__ void gram_sum_kernel(int64_t n, int splits, const double* partial, double* gram) {
  const int64_t matrix = blockIdx.y, i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n * n) return;
  const int64_t r = i / n, c = i % n, from = r / kTile <= c / kTile ? i : c * n + r;
  double sum = 0;
  for (int s = 0; s < splits; ++s) sum += partial[(matrix * splits + s) * n * n + from];
  gram[matrix * n * n + i] = sum;
}

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// Hestenes' one-sided Jacobi: rotates pairs of columns of G until they are orthogonal, G V = U diag(lambda), and for a
// positive semi-definite G the columns of V are eigenvectors. Pairs of a round are disjoint (round-robin tournament),
// one warp per pair.
__global__ __launch_bounds__(kJacobiThreads) void jacobi_kernel(int n, double* grams, double* all_vectors,
                                                                double* all_values, int* all_order, bool in_shared) {
  extern __shared__ double gram_copy[];
  __shared__ int rotated;
  __shared__ double value[kTile * 8];
  double* g = grams + static_cast<int64_t>(blockIdx.x) * n * n;
  double* v = all_vectors + static_cast<int64_t>(blockIdx.x) * n * n;
  if (in_shared) {
    for (int i = threadIdx.x; i < n * n; i += kJacobiThreads) gram_copy[i] = g[i];
    g = gram_copy;
    __syncthreads();
  }
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, warps = kJacobiThreads / 32;
  for (int i = thread; i < n * n; i += kJacobiThreads) v[i] = i / n == i % n ? 1.0 : 0.0;
  double trace = 0;
  for (int i = 0; i < n; ++i) trace += g[static_cast<int64_t>(i) * n + i];
  const double noise = kNoise * trace * (kNoise * trace);
  const int players = n + (n & 1), rounds = players - 1;
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    __syncthreads();
    if (thread == 0) rotated = 0;
    __syncthreads();
    for (int round = 0; round < rounds; ++round) {
      for (int pair = warp; pair < players / 2; pair += warps) {
        // Player 0 stays, the others walk around the table.
        const int p = pair == 0 ? 0 : 1 + (pair - 1 + round) % rounds;
        const int q = 1 + (players - 2 - pair + round) % rounds;
        if (p >= n || q >= n) continue;
        double* gp = g + static_cast<int64_t>(p) * n;
        double* gq = g + static_cast<int64_t>(q) * n;
        double alpha = 0, beta = 0, gamma = 0;
        for (int i = lane; i < n; i += 32) {
          const double x = gp[i], y = gq[i];
          alpha = fma(x, x, alpha);
          beta = fma(y, y, beta);
          gamma = fma(x, y, gamma);
        }
        alpha = warp_sum(alpha);
        beta = warp_sum(beta);
        gamma = warp_sum(gamma);
        if (!(fabs(gamma) > kOrthogonal * sqrt(alpha) * sqrt(beta)) || fmin(alpha, beta) <= noise)
          continue;  // NaN ends the sweeps too
        const double zeta = (beta - alpha) / (2 * gamma);
        const double t = copysign(1.0, zeta) / (fabs(zeta) + sqrt(fma(zeta, zeta, 1.0)));
        const double c = rsqrt(fma(t, t, 1.0)), s = c * t;
        double* vp = v + static_cast<int64_t>(p) * n;
        double* vq = v + static_cast<int64_t>(q) * n;
        for (int i = lane; i < n; i += 32) {
          const double x = gp[i], y = gq[i], a = vp[i], b = vq[i];
          gp[i] = c * x - s * y;
          gq[i] = s * x + c * y;
          vp[i] = c * a - s * b;
          vq[i] = s * a + c * b;
        }
        if (lane == 0) rotated = 1;
      }
      __syncthreads();
    }
    if (rotated == 0) break;
  }
  for (int j = warp; j < n; j += warps) {
    double sum = 0;
    for (int i = lane; i < n; i += 32)
      sum = fma(g[static_cast<int64_t>(j) * n + i], g[static_cast<int64_t>(j) * n + i], sum);
    sum = warp_sum(sum);
    if (lane == 0) value[j] = sqrt(sum);
  }
  __syncthreads();
  for (int j = thread; j < n; j += kJacobiThreads) {
    int place = 0;
    for (int i = 0; i < n; ++i) place += value[i] > value[j] || (!(value[i] < value[j]) && i < j);
    if (!isfinite(value[j])) place = j;
    all_values[static_cast<int64_t>(blockIdx.x) * n + place] = value[j];
    all_order[static_cast<int64_t>(blockIdx.x) * n + place] = j;
  }
}

int64_t align(int64_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

TallView tall_view(const MatrixBatch& a) {
  TallView t{static_cast<const float*>(a.data),
             a.rows,
             a.cols,
             a.stride_row,
             a.stride_col,
             a.stride0,
             a.stride1,
             a.batch1,
             a.batch(),
             a.cols > a.rows};
  if (t.transposed) {
    std::swap(t.rows, t.cols);
    std::swap(t.stride_row, t.stride_col);
  }
  return t;
}

int64_t gram_splits(const TallView& a) {
  const int64_t wanted = std::max<int64_t>(1, 512 / std::max<int64_t>(a.batch, 1));
  return std::clamp<int64_t>(a.rows / 256, 1, std::min<int64_t>(wanted, 64));
}

size_t gram_eigen_bytes(const TallView& a) {
  const int64_t square = a.cols * a.cols * a.batch * 8;
  return static_cast<size_t>(align(square * gram_splits(a)) + 2 * align(square) + align(a.cols * a.batch * 8) +
                             align(a.cols * a.batch * 4));
}

GramEigen gram_eigen_layout(const TallView& a, void* workspace) {
  const int64_t square = a.cols * a.cols * a.batch * 8;
  char* at = static_cast<char*>(workspace);
  const auto take = [&](int64_t bytes) {
    void* here = at;
    at += align(bytes);
    return here;
  };
  GramEigen w;
  w.partial = static_cast<double*>(take(square * gram_splits(a)));
  w.gram = static_cast<double*>(take(square));
  w.vectors = static_cast<double*>(take(square));
  w.values = static_cast<double*>(take(a.cols * a.batch * 8));
  w.order = static_cast<int*>(take(a.cols * a.batch * 4));
  return w;
}

void gram_eigen(const TallView& a, const GramEigen& w, cudaStream_t stream) {
  const auto tiles = static_cast<unsigned>((a.cols + kTile - 1) / kTile), batch = static_cast<unsigned>(a.batch);
  const int splits = static_cast<int>(gram_splits(a));
  check(launch_grid(gram_kernel, dim3(tiles * tiles, splits, batch), kGramThreads, 0, stream, a, splits, w.partial),
        "gram");
  const auto elements = static_cast<unsigned>((a.cols * a.cols + 255) / 256);
  check(launch_grid(gram_sum_kernel, dim3(elements, batch), 256, 0, stream, a.cols, splits, w.partial, w.gram), "gram");
  int device = 0, limit = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  const auto bytes = static_cast<size_t>(a.cols * a.cols) * sizeof(double);
  const bool in_shared = bytes + kStaticShared <= static_cast<size_t>(limit);
  if (in_shared)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(&jacobi_kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, limit - static_cast<int>(kStaticShared)),
          "jacobi");
  check(launch_grid(jacobi_kernel, dim3(batch), kJacobiThreads, in_shared ? bytes : 0, stream, static_cast<int>(a.cols),
                    w.gram, w.vectors, w.values, w.order, in_shared),
        "jacobi");
}

}  // namespace adaattn::cuda
