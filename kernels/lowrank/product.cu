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
  // Neighbouring threads read neighbouring elements of a.
  const auto place = [&](int e, int* r, int* c) {
    const int i = thread + e * kThreads;
    *r = kRowsAdjacent ? i % kRows : i / kStep;
    *c = kRowsAdjacent ? i / kRows : i % kStep;
  };
  const auto fetch = [&](int64_t k) {
#pragma unroll
    for (int e = 0; e < kEachA; ++e) {
      int r, c;
      place(e, &r, &c);
      next_a[e] = row0 + r < args.a.rows && k + c < n
                      ? data[(row0 + r) * args.a.stride_row + (k + c) * args.a.stride_col]
                      : 0.0f;
    }
#pragma unroll
    for (int e = 0; e < kEachX; ++e) {
      const int i = thread + e * kThreads;
      const int64_t j = vector0 + i / kStep, c = k + i % kStep;
      double value = 0;
      if (j < args.vectors && c < n) {
        const int64_t row = args.order != nullptr ? args.order[matrix * args.x_vectors + j] : j;
        value = args.x[(matrix * args.x_vectors + row) * n + c];
      }
      next_x[e] = value;
    }
  };
  double sum[2][kTiles][2] = {};
  fetch(0);
  for (int64_t k = 0; k < n; k += kStep) {
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kEachA; ++e) {
      int r, c;
      place(e, &r, &c);
      a[r][c] = next_a[e];
    }
#pragma unroll
    for (int e = 0; e < kEachX; ++e) {
      const int i = thread + e * kThreads;
      x[i / kStep][i % kStep] = next_x[e];
    }
    __syncthreads();
    if (k + kStep < n) fetch(k + kStep);
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
  double square[kTiles][2];
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t j = vector0 + 8 * t + 2 * (lane % 4) + e;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t r = row0 + warp * 16 + 8 * h + lane / 4;
        if (j >= args.vectors || r >= args.a.rows) continue;
        if (args.y != nullptr) args.y[(matrix * args.vectors + j) * args.a.rows + r] = sum[h][t][e];
        if (out != nullptr) out[r * args.out.stride_row + j * args.out.stride_col] = static_cast<float>(sum[h][t][e]);
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

}  // namespace

int64_t product_blocks(const TallView& a) { return (a.rows + kRows - 1) / kRows; }

void product(const ProductArgs& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(product_blocks(args.a) * args.a.batch),
                  static_cast<unsigned>((args.vectors + kVectors - 1) / kVectors));
  const auto kernel = args.a.stride_row == 1 && args.a.stride_col != 1 ? product_kernel<true> : product_kernel<false>;
  check(launch_grid(kernel, grid, kThreads, 0, stream, args), "low_rank");
}

}  // namespace adaattn::cuda
