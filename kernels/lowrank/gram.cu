#include <algorithm>

#include "attend/launch.h"
#include "lowrank/gram.cuh"
#include "lowrank/lowrank.h"
#include "lowrank/mma_f64.cuh"
#include "lowrank/subspace.h"
#include "runtime.h"

namespace adaattn::cuda {
namespace {

constexpr int kTile = 64;  // columns of a panel
constexpr int kStep = 16;  // rows of a step
constexpr int kPad = 8;    // rows of a fragment fall on distinct banks
constexpr int kGramThreads = 128;
constexpr int kJacobiThreads = 1024;
constexpr int kMaxSweeps = 40;
constexpr size_t kStaticShared = 4096;  // more than the kernel declares
// Columns count as orthogonal below this cosine: float64 rounding of sums of a few hundred terms.
constexpr double kOrthogonal = 1e-14;
// Columns shorter than this share of the trace are rounding noise, which no rotation makes orthogonal.
constexpr double kNoise = 2e-16;

// One 64 x 64 tile of A^T A, on or below the diagonal, over one part of the rows; products are exact in float64. Four
// warps, a quarter each.
__global__ __launch_bounds__(kGramThreads) void gram_kernel(TallView a, int splits, int64_t ld, double* partial) {
  __shared__ float left[kStep][kTile + kPad], right[kStep][kTile + kPad];
  const int64_t matrix = blockIdx.x % a.batch, n = a.cols;
  int ti = 0, tj = static_cast<int>(blockIdx.x / a.batch);
  while (tj > ti) tj -= ++ti;
  const float* data = a.matrix(matrix);
  const int64_t first = a.rows * blockIdx.y / splits, last = a.rows * (blockIdx.y + 1) / splits;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int m = warp / 2 * 32, c0 = warp % 2 * 32;
  constexpr int kEach = kStep * kTile / kGramThreads;
  float next_left[kEach], next_right[kEach];
  const auto fetch = [&](int64_t row0) {
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int i = thread + e * kGramThreads;
      const int64_t r = row0 + i / kTile, cl = ti * kTile + i % kTile, cr = tj * kTile + i % kTile;
      next_left[e] = r < last && cl < n ? data[r * a.stride_row + cl * a.stride_col] : 0.0f;
      next_right[e] = r < last && cr < n ? data[r * a.stride_row + cr * a.stride_col] : 0.0f;
    }
  };
  double sum[4][4][2] = {};
  fetch(first);
  for (int64_t row0 = first; row0 < last; row0 += kStep) {
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int i = thread + e * kGramThreads;
      left[i / kTile][i % kTile] = next_left[e];
      right[i / kTile][i % kTile] = next_right[e];
    }
    __syncthreads();
    fetch(row0 + kStep);
#pragma unroll
    for (int k = 0; k < kStep; k += 4) {
      double x[4], y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] = left[k + lane % 4][m + 8 * i + lane / 4];
        y[i] = right[k + lane % 4][c0 + 8 * i + lane / 4];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) mma_f64(sum[i][j], x[i], y[j]);
    }
  }
  double* out = partial + (matrix * splits + blockIdx.y) * ld * ld;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int64_t r = ti * kTile + m + 8 * i + lane / 4, c = tj * kTile + c0 + 8 * j + 2 * (lane % 4) + e;
        if (r < ld && c < ld) out[r * ld + c] = sum[i][j][e];
      }
}

// Adds the parts in order and mirrors the lower triangle.
__global__ void gram_sum_kernel(int64_t ld, int splits, const double* partial, double* gram) {
  const int64_t matrix = blockIdx.x, i = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
  if (i >= ld * ld) return;
  const int64_t r = i / ld, c = i % ld, from = r / kTile >= c / kTile ? i : c * ld + r;
  double sum = 0;
  for (int s = 0; s < splits; ++s) sum += partial[(matrix * splits + s) * ld * ld + from];
  gram[matrix * ld * ld + i] = sum;
}

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// Hestenes' one-sided Jacobi: rotates pairs of columns of G until they are orthogonal, G V = U diag(lambda), and for a
// positive semi-definite G the columns of V are eigenvectors. Pairs of a round are disjoint (round-robin tournament),
// one warp per pair.
__global__ __launch_bounds__(kJacobiThreads) void jacobi_kernel(int n, int64_t ld, double* grams, double* all_vectors,
                                                                double* all_values, int* all_order, bool in_shared) {
  extern __shared__ double gram_copy[];
  __shared__ int rotated;
  __shared__ double value[kMaxGramDim];
  double* g = grams + static_cast<int64_t>(blockIdx.x) * ld * ld;
  double* v = all_vectors + static_cast<int64_t>(blockIdx.x) * n * n;
  if (in_shared) {
    for (int i = threadIdx.x; i < n * n; i += kJacobiThreads) gram_copy[i] = g[i / n * ld + i % n];
    g = gram_copy;
    ld = n;
    __syncthreads();
  }
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, warps = kJacobiThreads / 32;
  for (int i = thread; i < n * n; i += kJacobiThreads) v[i] = i / n == i % n ? 1.0 : 0.0;
  double trace = 0;
  for (int i = 0; i < n; ++i) trace += g[i * (ld + 1)];
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
        double* gp = g + p * ld;
        double* gq = g + q * ld;
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
    for (int i = lane; i < n; i += 32) sum = fma(g[j * ld + i], g[j * ld + i], sum);
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

size_t gram_bytes(const TallView& a) {
  const int64_t ld = subspace_ld(a.cols), square = ld * ld * a.batch * 8;
  return static_cast<size_t>(align(square * gram_splits(a)) + align(square));
}

double* gram_of(const TallView& a, void* workspace, cudaStream_t stream) {
  const int64_t ld = subspace_ld(a.cols);
  const int splits = static_cast<int>(gram_splits(a));
  auto* partial = static_cast<double*>(workspace);
  auto* gram = reinterpret_cast<double*>(static_cast<char*>(workspace) + align(ld * ld * a.batch * 8 * splits));
  const auto tiles = static_cast<unsigned>((a.cols + kTile - 1) / kTile), batch = static_cast<unsigned>(a.batch);
  check(launch_grid(gram_kernel, dim3(tiles * (tiles + 1) / 2 * batch, splits), kGramThreads, 0, stream, a, splits, ld,
                    partial),
        "gram");
  check(launch_grid(gram_sum_kernel, dim3(batch, static_cast<unsigned>((ld * ld + 255) / 256)), 256, 0, stream, ld,
                    splits, static_cast<const double*>(partial), gram),
        "gram");
  return gram;
}

size_t eigen_bytes(int64_t n, int64_t batch) {
  return static_cast<size_t>(align(n * n * batch * 8) + align(n * batch * 8) + align(n * batch * 4));
}

Eigen eigen_of(int64_t n, int64_t batch, double* gram, void* workspace, cudaStream_t stream) {
  char* at = static_cast<char*>(workspace);
  Eigen e;
  e.vectors = reinterpret_cast<double*>(at);
  e.values = reinterpret_cast<double*>(at += align(n * n * batch * 8));
  e.order = reinterpret_cast<int*>(at + align(n * batch * 8));
  int device = 0, limit = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  const auto bytes = static_cast<size_t>(n * n) * sizeof(double);
  const bool in_shared = bytes + kStaticShared <= static_cast<size_t>(limit);
  if (in_shared)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(&jacobi_kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, limit - static_cast<int>(kStaticShared)),
          "jacobi");
  check(launch_grid(jacobi_kernel, dim3(static_cast<unsigned>(batch)), kJacobiThreads, in_shared ? bytes : 0, stream,
                    static_cast<int>(n), subspace_ld(n), gram, e.vectors, e.values, e.order, in_shared),
        "jacobi");
  return e;
}

}  // namespace adaattn::cuda
