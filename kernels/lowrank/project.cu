// Projection on a basis, with what is lost.
#include <algorithm>

#include "attend/launch.h"
#include "core/error.h"
#include "lowrank/lowrank.h"
#include "runtime.h"

namespace adaattn::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kMostRows = 8;  // at a time: each element of the basis that is read serves all of them
constexpr int64_t kSharedBytes = 44 * 1024;

// The sums of kRows numbers over the CTA, in every thread.
template <int kRows>
__device__ __forceinline__ void block_sums(double (&x)[kRows], double (*shared)[kMostRows]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x[r] += __shfl_xor_sync(0xffffffffu, x[r], step);
  __syncthreads();
  if (threadIdx.x % 32 == 0)
#pragma unroll
    for (int r = 0; r < kRows; ++r) shared[threadIdx.x / 32][r] = x[r];
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    x[r] = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) x[r] += shared[w][r];
  }
}

// One CTA per block of rows, kRows at a time: y first, then the residual of each row. energies: [batch, blocks, 2],
// residual and rows.
template <int kRows>
__global__ __launch_bounds__(kThreads) void project_kernel(const __grid_constant__ ProjectParams p, int blocks,
                                                           double* energies) {
  extern __shared__ double dynamic[];
  __shared__ double shared[kWarps][kMostRows];
  const int64_t matrix = blockIdx.y, n = p.a.cols, rank = p.basis.cols;
  double *x = dynamic, *y = dynamic + n * kRows;  // [n][kRows], [rank][kRows]
  const float* a = static_cast<const float*>(p.a.data) + p.a.offset(matrix);
  const float* basis = static_cast<const float*>(p.basis.data) + p.basis.offset(matrix);
  const float* mean = p.mean.data != nullptr ? static_cast<const float*>(p.mean.data) + p.mean.offset(matrix) : nullptr;
  const int64_t first = p.a.rows * blockIdx.x / blocks, last = p.a.rows * (blockIdx.x + 1) / blocks;
  double lost_sum = 0, all_sum = 0;
  for (int64_t row0 = first; row0 < last; row0 += kRows) {
    double all[kRows] = {};
    for (int64_t c = threadIdx.x; c < n; c += kThreads) {
      const double center = mean != nullptr ? static_cast<double>(mean[c * p.mean.stride_row]) : 0.0;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {  // rows behind the last are 0
        const double e =
            row0 + r < last ? static_cast<double>(a[(row0 + r) * p.a.stride_row + c * p.a.stride_col]) - center : 0.0;
        x[c * kRows + r] = e;
        all[r] = fma(e, e, all[r]);
      }
    }
    __syncthreads();
    for (int64_t k = threadIdx.x; k < rank; k += kThreads) {
      double sum[kRows] = {};
#pragma unroll 4
      for (int64_t c = 0; c < n; ++c) {
        const auto b = static_cast<double>(basis[c * p.basis.stride_row + k * p.basis.stride_col]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) sum[r] = fma(x[c * kRows + r], b, sum[r]);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        y[k * kRows + r] = sum[r];
        if (p.y.data != nullptr && row0 + r < last)
          static_cast<float*>(p.y.data)[p.y.offset(matrix) + (row0 + r) * p.y.stride_row + k * p.y.stride_col] =
              static_cast<float>(sum[r]);
      }
    }
    __syncthreads();
    if (p.row_residual.data != nullptr || energies != nullptr) {
      double lost[kRows] = {};
      for (int64_t c = threadIdx.x; c < n; c += kThreads) {
        double rest[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) rest[r] = x[c * kRows + r];
#pragma unroll 4
        for (int64_t k = 0; k < rank; ++k) {
          const auto b = static_cast<double>(basis[c * p.basis.stride_row + k * p.basis.stride_col]);
#pragma unroll
          for (int r = 0; r < kRows; ++r) rest[r] = fma(-y[k * kRows + r], b, rest[r]);
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) lost[r] = fma(rest[r], rest[r], lost[r]);
      }
      block_sums(lost, shared);
      block_sums(all, shared);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        lost_sum += lost[r];
        all_sum += all[r];
        if (threadIdx.x == r && row0 + r < last && p.row_residual.data != nullptr)
          static_cast<float*>(
              p.row_residual.data)[p.row_residual.offset(matrix) + (row0 + r) * p.row_residual.stride_row] =
              static_cast<float>(sqrt(lost[r]));
      }
    }
    __syncthreads();
  }
  if (threadIdx.x == 0 && energies != nullptr) {
    energies[(matrix * blocks + blockIdx.x) * 2] = lost_sum;
    energies[(matrix * blocks + blockIdx.x) * 2 + 1] = all_sum;
  }
}

__global__ void residual_kernel(MatrixBatch residual, int64_t batch, int blocks, const double* energies) {
  const int64_t matrix = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (matrix >= batch) return;
  double lost = 0, all = 0;
  for (int b = 0; b < blocks; ++b) {
    lost += energies[(matrix * blocks + b) * 2];
    all += energies[(matrix * blocks + b) * 2 + 1];
  }
  static_cast<float*>(residual.data)[residual.offset(matrix)] = all == 0 ? 0.0f : static_cast<float>(sqrt(lost / all));
}

}  // namespace

void low_rank_project(const ProjectParams& p, const Allocator& allocator, cudaStream_t stream) {
  const int64_t batch = p.a.batch();
  if (batch == 0) return;
  const int64_t shared = (p.a.cols + p.basis.cols) * static_cast<int64_t>(sizeof(double));
  if (shared > kSharedBytes)
    fail(ADAATTN_ERROR_NOT_SUPPORTED,
         "low_rank_project: a has %lld columns and basis %lld; the CUDA back-end takes 5632 in all",
         static_cast<long long>(p.a.cols), static_cast<long long>(p.basis.cols));
  const int blocks =
      static_cast<int>(std::clamp<int64_t>(p.a.rows / 8, 1, std::max<int64_t>(1, 2048 / std::max<int64_t>(batch, 1))));
  const auto launch = [&](double* energies) {
    const bool many = shared * kMostRows <= kSharedBytes;
    const auto kernel = many ? project_kernel<kMostRows> : project_kernel<1>;
    check(launch_grid(kernel, dim3(blocks, static_cast<unsigned>(batch)), kThreads,
                      static_cast<size_t>(many ? shared * kMostRows : shared), stream, p, blocks, energies),
          "low_rank_project");
  };
  if (p.residual.data == nullptr) {
    launch(nullptr);
    return;
  }
  const ScopedBuffer energies(allocator, static_cast<size_t>(batch * blocks * 2) * sizeof(double), 256, stream);
  launch(static_cast<double*>(energies.data()));
  check(launch_grid(residual_kernel, dim3(static_cast<unsigned>((batch + 127) / 128)), 128, 0, stream, p.residual,
                    batch, blocks, static_cast<const double*>(energies.data())),
        "low_rank_project");
}

}  // namespace adaattn::cuda
