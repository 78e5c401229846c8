#include <algorithm>

#include "attend/launch.h"
#include "lowrank/mma_f64.cuh"
#include "lowrank/product.cuh"
#include "runtime.h"

namespace adaattn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 16 * kWarps;  // of a CTA; 16 of a warp
constexpr int kTiles = 5;           // of 8 vectors
constexpr int kVectors = 8 * kTiles;
constexpr int kStep = 32;           // columns of a step
constexpr int kStride = kStep + 4;  // fragments fall on distinct banks
constexpr int64_t kWanted = 256;    // CTAs, two on each multiprocessor of a large device
constexpr int64_t kLeastSteps = 8;  // of a part of the columns

template <bool kRowsAdjacent>
__global__ __launch_bounds__(kThreads, 2) void product_kernel(const __grid_constant__ ProductArgs args) {
  __shared__ float a[kRows][kStride];
  __shared__ double x[kVectors][kStride];
  const int64_t blocks = gridDim.x / args.a.batch, matrix = blockIdx.x / blocks, block = blockIdx.x % blocks;
  const int64_t row0 = block * kRows, vector0 = int64_t{blockIdx.y} * kVectors;
  const int64_t n = args.a.cols;
  const float* data = args.a.matrix(matrix);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  constexpr int kEachA = kRows * kStep / kThreads, kEachX = kVectors * kStep / kThreads;
  float next_a[kEachA];
  double next_x[kEachX];
  // Neighbouring threads read neighbouring elements of a: this one's are in row r + e * kAheadRows, column
  // c + e * kAheadColumns.
  constexpr int kAheadRows = kRowsAdjacent ? 0 : kThreads / kStep;
  constexpr int kAheadColumns = kRowsAdjacent ? kThreads / kRows : 0;
  const int r = kRowsAdjacent ? thread % kRows : thread / kStep, c = kRowsAdjacent ? thread / kRows : thread % kStep;
  const int rows = static_cast<int>(min(static_cast<int64_t>(kRows), args.a.rows - row0));
  const float* from = data + (row0 + r) * args.a.stride_row + c * args.a.stride_col;
  const int64_t ahead = kAheadRows * args.a.stride_row + kAheadColumns * args.a.stride_col;
  const double* vectors[kEachX];  // null beyond the last
#pragma unroll
  for (int e = 0; e < kEachX; ++e) {
    const int64_t j = vector0 + thread / kStep + e * (kThreads / kStep);
    vectors[e] = nullptr;
    if (j < args.vectors) {
      const int64_t row = args.order != nullptr ? args.order[matrix * args.x_vectors + j] : j;
      vectors[e] = args.x + (matrix * args.x_vectors + row) * args.x_stride + thread % kStep;
    }
  }
  const auto fetch = [&](int64_t k) {
    const int left = static_cast<int>(min(static_cast<int64_t>(kStep), n - k));
    const float* at = from + k * args.a.stride_col;
#pragma unroll
    for (int e = 0; e < kEachA; ++e, at += ahead)
      next_a[e] = r + e * kAheadRows < rows && c + e * kAheadColumns < left ? *at : 0.0f;
#pragma unroll
    for (int e = 0; e < kEachX; ++e) next_x[e] = vectors[e] != nullptr && thread % kStep < left ? vectors[e][k] : 0.0;
  };
  const int64_t steps = (n + kStep - 1) / kStep;
  const int64_t begin = steps * blockIdx.z / gridDim.z * kStep, end = steps * (blockIdx.z + 1) / gridDim.z * kStep;
  double sum[2][kTiles][2] = {};
  fetch(begin);
  for (int64_t k = begin; k < end; k += kStep) {
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kEachA; ++e) a[r + e * kAheadRows][c + e * kAheadColumns] = next_a[e];
#pragma unroll
    for (int e = 0; e < kEachX; ++e) {
      const int i = thread + e * kThreads;
      x[i / kStep][i % kStep] = next_x[e];
    }
    __syncthreads();
    if (k + kStep < end) fetch(k + kStep);
#pragma unroll
    for (int s = 0; s < kStep; s += 4) {
      const double upper = a[warp * 16 + lane / 4][s + lane % 4], lower = a[warp * 16 + 8 + lane / 4][s + lane % 4];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const double b = x[8 * t + lane / 4][s + lane % 4];
        mma_f64(sum[0][t], upper, b);
        mma_f64(sum[1][t], lower, b);
      }
    }
  }
  float* out = args.out.data != nullptr ? static_cast<float*>(args.out.data) + args.out.offset(matrix) : nullptr;
  double* y = args.y;
  if (gridDim.z > 1) y = args.partial + blockIdx.z * args.a.batch * args.vectors * args.y_stride;
  double square[kTiles][2];
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t j = vector0 + 8 * t + 2 * (lane % 4) + e;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t row = row0 + warp * 16 + 8 * h + lane / 4;
        if (j >= args.vectors || row >= args.a.rows) continue;
        if (y != nullptr) y[(matrix * args.vectors + j) * args.y_stride + row] = sum[h][t][e];
        if (out != nullptr) out[row * args.out.stride_row + j * args.out.stride_col] = static_cast<float>(sum[h][t][e]);
      }
      square[t][e] = sum[0][t][e] * sum[0][t][e] + sum[1][t][e] * sum[1][t][e];
    }
  if (args.squares == nullptr) return;
  __syncthreads();
  double(*parts)[kStride] = x;  // [vectors][warps]
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) square[t][e] += __shfl_xor_sync(0xffffffffu, square[t][e], step);
      if (lane < 4) parts[8 * t + 2 * lane + e][warp] = square[t][e];
    }
  __syncthreads();
  if (thread >= kVectors || vector0 + thread >= args.vectors) return;
  double total = 0;
  for (int i = 0; i < kWarps; ++i) total += parts[thread][i];
  args.squares[(matrix * blocks + block) * args.vectors + vector0 + thread] = total;
}

// Adds the parts in order.
__global__ __launch_bounds__(kThreads) void product_sum_kernel(const __grid_constant__ ProductArgs args, int splits) {
  const int64_t vector = blockIdx.x, row = int64_t{blockIdx.y} * kThreads + threadIdx.x;
  if (row >= args.a.rows) return;
  double sum = 0;
  for (int64_t s = 0; s < splits; ++s) sum += args.partial[(s * gridDim.x + vector) * args.y_stride + row];
  args.y[vector * args.y_stride + row] = sum;
}

}  // namespace

int64_t product_blocks(const TallView& a) { return (a.rows + kRows - 1) / kRows; }

int64_t product_splits(const TallView& a, int64_t vectors) {
  const int64_t ctas = product_blocks(a) * a.batch * ((vectors + kVectors - 1) / kVectors);
  const int64_t most = std::max<int64_t>(1, a.cols / (kStep * kLeastSteps));
  return std::clamp<int64_t>(kWanted / std::max<int64_t>(ctas, 1), 1, most);
}

void product(const ProductArgs& args, cudaStream_t stream) {
  const auto splits = static_cast<unsigned>(args.partial != nullptr ? product_splits(args.a, args.vectors) : 1);
  const dim3 grid(static_cast<unsigned>(product_blocks(args.a) * args.a.batch),
                  static_cast<unsigned>((args.vectors + kVectors - 1) / kVectors), splits);
  const auto kernel = args.a.stride_row == 1 && args.a.stride_col != 1 ? product_kernel<true> : product_kernel<false>;
  check(launch_grid(kernel, grid, kThreads, 0, stream, args), "low_rank");
  if (splits > 1)
    check(launch_grid(product_sum_kernel,
                      dim3(static_cast<unsigned>(args.a.batch * args.vectors),
                           static_cast<unsigned>((args.a.rows + kThreads - 1) / kThreads)),
                      kThreads, 0, stream, args, static_cast<int>(splits)),
          "low_rank");
}

}  // namespace adaattn::cuda
