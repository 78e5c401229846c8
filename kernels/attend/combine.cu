// The grid behind kernels with split keys.
#include "attend/launch.h"
#include "common/join.cuh"

namespace adaattn::cuda {
namespace {

constexpr int kThreads = 128;

// One CTA per (sequence, query, head).
__global__ __launch_bounds__(kThreads) void combine_kernel(const __grid_constant__ AttendArgs args) {
  __shared__ float weight[kMaxSplits];
  __shared__ float partial[kThreads / 32][256];
  const AttnParams& p = args.p;
  const int heads = static_cast<int>(p.heads_q);
  const int seqlen_q = static_cast<int>(p.seqlen_q);
  const int query = blockIdx.x / heads, head = blockIdx.x - query * heads;
  const int b = query / seqlen_q, position = query - b * seqlen_q;
  const Sequence s = sequence_of(p, b);
  if (position >= s.len_q) return;
  const int64_t token = s.q_start + position;
  const int64_t row = (p.cu_seqlens_q != nullptr ? token : b * p.seqlen_q + position) * heads + head;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, d_v = static_cast<int>(p.d_v);

  wait_for_previous_grid();
  RowResult result{};
  if (warp == 0) result = join_weights(args, row, head, lane, weight);
  __shared__ float factor;
  if (thread == 0) factor = result.factor;
  __syncthreads();

  float sum[8] = {};
  for (int i = warp; i < args.splits; i += kThreads / 32) {
    const float w = weight[i];
    if (w == 0) continue;  // an empty part's numbers are not read
    const float* from = args.partial_o + (i * args.partial_rows + row) * d_v;
#pragma unroll
    for (int c = 0; c < 8; ++c)
      if (const int column = lane + 32 * c; column < d_v) sum[c] = fmaf(w, from[column], sum[c]);
  }
#pragma unroll
  for (int c = 0; c < 8; ++c) partial[warp][lane + 32 * c] = sum[c];
  __syncthreads();
  const JoinedPlace place{b, token, head};
  for (int column = thread; column < d_v; column += kThreads) {
    float x = 0;
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) x += partial[w][column];
    place.store(p, column, x * factor);
  }
  if (thread == 0) place.store_statistics(p, result);
}

__global__ __launch_bounds__(kThreads) void report_kernel(const __grid_constant__ AttendArgs args) {
  report_sequence(args, blockIdx.x, threadIdx.x, kThreads);
}

}  // namespace

cudaError_t launch_report(const AttendArgs& args, cudaStream_t stream) {
  return launch_grid(report_kernel, dim3(static_cast<unsigned>(args.p.batch)), kThreads, 0, stream, args);
}

cudaError_t launch_combine(const AttendArgs& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(args.p.batch * args.p.seqlen_q * args.p.heads_q));
  return launch_grid_overlapped(combine_kernel, grid, kThreads, 0, stream, args.overlap_grids, args);
}

}  // namespace adaattn::cuda
