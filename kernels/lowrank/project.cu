// Projection on a basis, with what is lost.
#include <algorithm>

#include "attend/launch.h"
#include "core/error.h"
#include "lowrank/lowrank.h"
#include "lowrank/mma_f64.cuh"
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

// Ranks up to 8 kTiles on tensor cores: a warp takes 16 rows of a block, and the basis lies in shared memory in
// float64. Products of y sum over the basis' columns in the order in which the accumulators of x basis hold them.
constexpr int kBlockRows = 16 * kWarps;

template <int kTiles>
struct ProjectShape {
  static constexpr int kRank = 8 * kTiles, kPitch = kRank + 4;  // fragments of 4 rows fall on distinct banks
  static int64_t padded(int64_t columns) { return (columns + 7) / 8 * 8; }
  static int64_t shared_bytes(int64_t columns) {
    return padded(columns) * kPitch * 8 + kBlockRows * (padded(columns) + 4) * 4;
  }
};

template <int kTiles>
__global__ __launch_bounds__(kThreads) void project_mma_kernel(const __grid_constant__ ProjectParams p, int blocks,
                                                               double* energies) {
  using Shape = ProjectShape<kTiles>;
  extern __shared__ double dynamic[];
  __shared__ double sums[kWarps][2];
  const int64_t matrix = blockIdx.y, row_blocks = (p.a.rows + kBlockRows - 1) / kBlockRows;
  const int n = static_cast<int>(p.a.cols), padded = (n + 7) / 8 * 8, rank = static_cast<int>(p.basis.cols);
  const int x_pitch = padded + 4;
  double* basis = dynamic;                                               // [padded][kPitch]
  auto* x = reinterpret_cast<float*>(dynamic + padded * Shape::kPitch);  // [kBlockRows][x_pitch], less the mean
  const float* a = static_cast<const float*>(p.a.data) + p.a.offset(matrix);
  const float* from = static_cast<const float*>(p.basis.data) + p.basis.offset(matrix);
  const float* mean = p.mean.data != nullptr ? static_cast<const float*>(p.mean.data) + p.mean.offset(matrix) : nullptr;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
  for (int i = threadIdx.x; i < padded * Shape::kRank; i += kThreads) {
    const int c = i / Shape::kRank, k = i % Shape::kRank;
    basis[c * Shape::kPitch + k] =
        c < n && k < rank ? static_cast<double>(from[c * p.basis.stride_row + k * p.basis.stride_col]) : 0.0;
  }
  double lost_sum = 0, all_sum = 0;
  const int64_t last = row_blocks * (blockIdx.x + 1) / blocks;
  for (int64_t block = row_blocks * blockIdx.x / blocks; block < last; ++block) {
    const int64_t row0 = block * kBlockRows;
    __syncthreads();
    for (int i = threadIdx.x; i < kBlockRows * padded; i += kThreads) {
      const int r = i / padded, c = i % padded;
      x[r * x_pitch + c] = row0 + r < p.a.rows && c < n ? a[(row0 + r) * p.a.stride_row + c * p.a.stride_col] : 0.0f;
    }
    __syncthreads();
    // Centred in float64: the mean is subtracted from every fragment.
    const float* rows[2] = {x + (warp * 16 + row) * x_pitch, x + (warp * 16 + 8 + row) * x_pitch};
    const auto element = [&](int half, int c) {
      const double center = mean != nullptr && c < n ? static_cast<double>(mean[c * p.mean.stride_row]) : 0.0;
      return row0 + warp * 16 + 8 * half + row < p.a.rows ? static_cast<double>(rows[half][c]) - center : 0.0;
    };
    double y[2][kTiles][2] = {};
    for (int c = 0; c < padded; c += 4) {
      const double upper = element(0, c + quad), lower = element(1, c + quad);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const double b = basis[(c + quad) * Shape::kPitch + 8 * t + row];
        mma_f64(y[0][t], upper, b);
        mma_f64(y[1][t], lower, b);
      }
    }
    if (p.y.data != nullptr) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int64_t r = row0 + warp * 16 + 8 * half + row;
            const int k = 8 * t + 2 * quad + e;
            if (r < p.a.rows && k < rank)
              static_cast<float*>(p.y.data)[p.y.offset(matrix) + r * p.y.stride_row + k * p.y.stride_col] =
                  static_cast<float>(y[half][t][e]);
          }
    }
    if (p.row_residual.data == nullptr && energies == nullptr) continue;
    double lost[2] = {}, all[2] = {};
    for (int c = 0; c < padded; c += 8) {
      double rest[2][2];
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          rest[half][e] = element(half, c + 2 * quad + e);
          all[half] = fma(rest[half][e], rest[half][e], all[half]);
        }
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const auto b = *reinterpret_cast<const double2*>(basis + (c + row) * Shape::kPitch + 8 * t + 2 * quad);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          mma_f64(rest[half], -y[half][t][0], b.x);
          mma_f64(rest[half], -y[half][t][1], b.y);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int e = 0; e < 2; ++e) lost[half] = fma(rest[half][e], rest[half][e], lost[half]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        lost[half] += __shfl_xor_sync(0xffffffffu, lost[half], step);
        all[half] += __shfl_xor_sync(0xffffffffu, all[half], step);
      }
      const int64_t r = row0 + warp * 16 + 8 * half + row;
      if (quad == 0 && r < p.a.rows && p.row_residual.data != nullptr)
        static_cast<float*>(p.row_residual.data)[p.row_residual.offset(matrix) + r * p.row_residual.stride_row] =
            static_cast<float>(sqrt(lost[half]));
      lost_sum += lost[half];
      all_sum += all[half];
    }
  }
  if (energies == nullptr) return;
    // Every thread of a quad has its rows' sums.
#pragma unroll
  for (int step = 4; step < 32; step *= 2) {
    lost_sum += __shfl_xor_sync(0xffffffffu, lost_sum, step);
    all_sum += __shfl_xor_sync(0xffffffffu, all_sum, step);
  }
  if (lane == 0) {
    sums[warp][0] = lost_sum;
    sums[warp][1] = all_sum;
  }
  __syncthreads();
  if (threadIdx.x >= 2) return;
  double total = 0;
  for (int w = 0; w < kWarps; ++w) total += sums[w][threadIdx.x];
  energies[(matrix * blocks + blockIdx.x) * 2 + threadIdx.x] = total;
}

// 0: not by these kernels.
int mma_tiles(const ProjectParams& p) {
  int device = 0, limit = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  const auto fits = [&](int64_t rank, int64_t bytes) {
    return p.basis.cols <= rank && bytes + static_cast<int64_t>(sizeof(double[kWarps][2])) <= limit;
  };
  if (p.a.rows < kBlockRows) return 0;  // most of a block of rows would be empty
  if (fits(32, ProjectShape<4>::shared_bytes(p.a.cols))) return 4;
  if (fits(64, ProjectShape<8>::shared_bytes(p.a.cols))) return 8;
  return 0;
}

template <int kTiles>
void launch_mma(const ProjectParams& p, int blocks, double* energies, cudaStream_t stream) {
  const int64_t bytes = ProjectShape<kTiles>::shared_bytes(p.a.cols);
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(&project_mma_kernel<kTiles>),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        "low_rank_project");
  check(launch_grid(project_mma_kernel<kTiles>, dim3(blocks, static_cast<unsigned>(p.a.batch())), kThreads,
                    static_cast<size_t>(bytes), stream, p, blocks, energies),
        "low_rank_project");
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
    fail(ADAATTN_ERROR_NOT_SUPPORTED, "a has %lld columns and basis %lld; accepted on CUDA: 5632 in all",
         static_cast<long long>(p.a.cols), static_cast<long long>(p.basis.cols));
  // Two CTAs with their basis on each multiprocessor of a large device, or as many as have rows.
  const int tiles = mma_tiles(p);
  const int64_t units = p.a.rows / (tiles > 0 ? kBlockRows : kMostRows), wanted = tiles > 0 ? 256 : 2048;
  const int blocks = static_cast<int>(std::clamp<int64_t>(units, 1, std::max<int64_t>(1, wanted / batch)));
  const auto launch = [&](double* energies) {
    if (tiles == 4) return launch_mma<4>(p, blocks, energies, stream);
    if (tiles == 8) return launch_mma<8>(p, blocks, energies, stream);
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
