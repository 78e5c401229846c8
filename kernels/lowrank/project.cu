// Projection on a basis, with what is lost.
#include <algorithm>

#include "attend/launch.h"
#include "core/error.h"
#include "lowrank/lowrank.h"
#include "runtime.h"

namespace adaattn::cuda {
namespace {

constexpr int kThreads = 128;

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

// One CTA per block of rows: y first, then the residual of each row. energies: [batch, blocks, 2], residual and rows.
__global__ __launch_bounds__(kThreads) void project_kernel(const __grid_constant__ ProjectParams p, int blocks,
                                                           double* energies) {
  extern __shared__ double dynamic[];
  __shared__ double shared[kThreads];
  const int64_t matrix = blockIdx.y, n = p.a.cols, rank = p.basis.cols;
  double *x = dynamic, *y = dynamic + n;
  const float* a = static_cast<const float*>(p.a.data) + p.a.offset(matrix);
  const float* basis = static_cast<const float*>(p.basis.data) + p.basis.offset(matrix);
  const float* mean = p.mean.data != nullptr ? static_cast<const float*>(p.mean.data) + p.mean.offset(matrix) : nullptr;
  const int64_t first = p.a.rows * blockIdx.x / blocks, last = p.a.rows * (blockIdx.x + 1) / blocks;
  double lost_sum = 0, all_sum = 0;
  for (int64_t r = first; r < last; ++r) {
    double all = 0;
    for (int64_t c = threadIdx.x; c < n; c += kThreads) {
      x[c] = static_cast<double>(a[r * p.a.stride_row + c * p.a.stride_col]) -
             (mean != nullptr ? static_cast<double>(mean[c * p.mean.stride_row]) : 0.0);
      all = fma(x[c], x[c], all);
    }
    __syncthreads();
    for (int64_t k = threadIdx.x; k < rank; k += kThreads) {
      double sum = 0;
      for (int64_t c = 0; c < n; ++c)
        sum = fma(x[c], static_cast<double>(basis[c * p.basis.stride_row + k * p.basis.stride_col]), sum);
      y[k] = sum;
      if (p.y.data != nullptr)
        static_cast<float*>(p.y.data)[p.y.offset(matrix) + r * p.y.stride_row + k * p.y.stride_col] =
            static_cast<float>(sum);
    }
    __syncthreads();
    if (p.row_residual.data != nullptr || energies != nullptr) {
      double lost = 0;
      for (int64_t c = threadIdx.x; c < n; c += kThreads) {
        double rest = x[c];
        for (int64_t k = 0; k < rank; ++k)
          rest = fma(-y[k], static_cast<double>(basis[c * p.basis.stride_row + k * p.basis.stride_col]), rest);
        lost = fma(rest, rest, lost);
      }
      lost = block_sum(lost, shared);
      lost_sum += lost;
      all_sum += block_sum(all, shared);
      if (threadIdx.x == 0 && p.row_residual.data != nullptr)
        static_cast<float*>(p.row_residual.data)[p.row_residual.offset(matrix) + r * p.row_residual.stride_row] =
            static_cast<float>(sqrt(lost));
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
  if (shared > 44 * 1024)
    fail(ADAATTN_ERROR_NOT_SUPPORTED,
         "low_rank_project: a has %lld columns and basis %lld; the CUDA back-end takes 5632 in all",
         static_cast<long long>(p.a.cols), static_cast<long long>(p.basis.cols));
  const int blocks =
      static_cast<int>(std::clamp<int64_t>(p.a.rows / 8, 1, std::max<int64_t>(1, 2048 / std::max<int64_t>(batch, 1))));
  const auto launch = [&](double* energies) {
    check(launch_grid(project_kernel, dim3(blocks, static_cast<unsigned>(batch)), kThreads, static_cast<size_t>(shared),
                      stream, p, blocks, energies),
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
