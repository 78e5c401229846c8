#include "attend/launch.h"
#include "core/sampling.h"
#include "entropy/entropy.h"

namespace adaattn::cuda {
namespace {

constexpr int kThreads = 256;

// One CTA per (sequence, head), summed in a fixed order.
__global__ __launch_bounds__(kThreads) void head_means_kernel(const __grid_constant__ EntropyParams p,
                                                              const float* rows, int64_t row_capacity) {
  __shared__ double sums[kThreads];
  const int64_t heads = p.attn.heads_q, b = blockIdx.x / heads, head = blockIdx.x % heads;
  const Sequence s = sequence_of(p.attn, b);
  const int64_t count = p.sampled ? number_of_strata(p.sample_rows, s.len_q) : s.len_q;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += rows[blockIdx.x * row_capacity + i];
  sums[threadIdx.x] = sum;
  for (int step = kThreads / 2; step > 0; step /= 2) {
    __syncthreads();
    if (threadIdx.x < step) sums[threadIdx.x] += sums[threadIdx.x + step];
  }
  if (threadIdx.x == 0)
    p.head_entropy[b * p.head_stride_b + head * p.head_stride_h] =
        count == 0 ? 0.0f : static_cast<float>(sums[0] / static_cast<double>(count));
}

}  // namespace

cudaError_t launch_head_means(const EntropyParams& params, const float* rows, int64_t row_capacity,
                              cudaStream_t stream) {
  return launch_grid(head_means_kernel, dim3(static_cast<unsigned>(params.attn.batch * params.attn.heads_q)), kThreads,
                     0, stream, params, rows, row_capacity);
}

}  // namespace adaattn::cuda
