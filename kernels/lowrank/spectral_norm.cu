// Largest singular value by power iteration on a^T a, one CTA per matrix.
#include "attend/launch.h"
#include "core/sampling.h"
#include "lowrank/gram.cuh"
#include "lowrank/lowrank.h"
#include "runtime.h"

namespace adaattn::cuda {
namespace {

constexpr int kThreads = 512;
constexpr double kDefaultTolerance = 1e-6;
constexpr int64_t kDefaultIterations = 1000;

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

// vectors: [batch, cols + rows] of the tall view: x and a x.
__global__ __launch_bounds__(kThreads) void power_kernel(TallView a, double tolerance, int64_t iterations,
                                                         uint64_t seed, MatrixBatch norms, double* vectors) {
  __shared__ double shared[kThreads];
  const int64_t matrix = blockIdx.x;
  const float* data = a.matrix(matrix);
  double* x = vectors + matrix * (a.cols + a.rows);
  double* y = x + a.cols;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int64_t c = threadIdx.x; c < a.cols; c += kThreads)
    x[c] = sketch_entry(seed, static_cast<uint64_t>(matrix), static_cast<uint64_t>(c));
  double estimate = 0;
  for (int64_t i = 0; i < iterations; ++i) {
    double square = 0;
    for (int64_t c = threadIdx.x; c < a.cols; c += kThreads) square = fma(x[c], x[c], square);
    const double length = sqrt(block_sum(square, shared));
    for (int64_t c = threadIdx.x; c < a.cols; c += kThreads) x[c] /= length;
    __syncthreads();
    double energy = 0;
    for (int64_t r = warp; r < a.rows; r += kThreads / 32) {
      double sum = 0;
      for (int64_t c = lane; c < a.cols; c += 32)
        sum = fma(static_cast<double>(data[r * a.stride_row + c * a.stride_col]), x[c], sum);
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (lane == 0) {
        y[r] = sum;
        energy = fma(sum, sum, energy);
      }
    }
    energy = block_sum(energy, shared);
    if (energy == 0) {
      estimate = 0;
      break;
    }
    double image = 0;
    for (int64_t c = threadIdx.x; c < a.cols; c += kThreads) {
      double sum = 0;
      for (int64_t r = 0; r < a.rows; ++r)
        sum = fma(static_cast<double>(data[r * a.stride_row + c * a.stride_col]), y[r], sum);
      x[c] = sum;
      image = fma(sum, sum, image);
    }
    image = block_sum(image, shared);
    // |a^T a x| / |a x|: never above the norm, and nearer to it than |a x|.
    const double next = sqrt(image / energy);
    const bool done = fabs(next - estimate) <= tolerance * next || !isfinite(next);
    estimate = next;
    if (done) break;
  }
  if (threadIdx.x == 0) static_cast<float*>(norms.data)[norms.offset(matrix)] = static_cast<float>(estimate);
}

}  // namespace

size_t spectral_norm_workspace(const SpectralNormParams& params) {
  return static_cast<size_t>(params.a.batch() * (params.a.rows + params.a.cols)) * sizeof(double);
}

void spectral_norm(const SpectralNormParams& params, void* workspace, cudaStream_t stream) {
  const TallView a = tall_view(params.a);
  if (a.batch == 0) return;
  check(launch_grid(power_kernel, dim3(static_cast<unsigned>(a.batch)), kThreads, 0, stream, a,
                    params.tolerance > 0 ? params.tolerance : kDefaultTolerance,
                    params.max_iterations > 0 ? params.max_iterations : kDefaultIterations, params.seed, params.norms,
                    static_cast<double*>(workspace)),
        "spectral_norm");
}

}  // namespace adaattn::cuda
