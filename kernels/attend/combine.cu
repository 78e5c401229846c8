// Joins the partial results of split keys: o = sum_s w_s o_s, w_s = e^(lse_s - lse), lse = ln sum_s e^lse_s; the sink
// enters here. H = sum_s p_s (H_s - ln p_s) over real keys, p_s = e^(lse_s - lse without sink).
#include "attend/launch.h"
#include "common/scores.cuh"

namespace adaattn::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kMaxSplits = 128;

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
  float top = kNegInf;
  for (int i = lane; i < args.splits; i += 32) top = fmaxf(top, args.partial_lse[i * args.partial_rows + row]);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
  const float sink = p.sinks != nullptr ? p.sinks[head * p.sinks_stride] : kNegInf;
  const float base = fmaxf(top, sink);
  float real = 0, entropy = 0;
  for (int i = lane; i < args.splits; i += 32) {
    const float lse = args.partial_lse[i * args.partial_rows + row];
    const float w = lse == kNegInf ? 0.0f : expf(lse - base);
    if (warp == 0) weight[i] = w;
    real += w;
    if (args.partial_entropy != nullptr && w != 0)
      entropy += w * (args.partial_entropy[i * args.partial_rows + row] - (lse - base));
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    real += __shfl_xor_sync(0xffffffffu, real, step);
    entropy += __shfl_xor_sync(0xffffffffu, entropy, step);
  }
  const float total = real + (sink == kNegInf ? 0.0f : expf(sink - base));
  const float factor = total == 0 ? 0.0f : 1.0f / total;
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
  const int64_t o_offset = b * p.o.stride_b + token * p.o.stride_s + head * p.o.stride_h;
  for (int column = thread; column < d_v; column += kThreads) {
    float x = 0;
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) x += partial[w][column];
    x *= factor;
    if (p.o.dtype == Dtype::kF32) {
      static_cast<float*>(p.o.data)[o_offset + column] = x;
    } else if (p.o.dtype == Dtype::kBF16) {
      static_cast<__nv_bfloat16*>(p.o.data)[o_offset + column] = __float2bfloat16_rn(x);
    } else {
      static_cast<__half*>(p.o.data)[o_offset + column] = __float2half_rn(x);
    }
  }
  if (thread == 0) {
    if (p.lse.data != nullptr)
      static_cast<float*>(p.lse.data)[b * p.lse.stride_b + token * p.lse.stride_s + head * p.lse.stride_h] =
          total == 0 ? kNegInf : base + logf(total);
    if (p.entropy.data != nullptr) {
      float x = real == 0 ? 0.0f : entropy / real + logf(real);
      if (x < 0) x = 0;  // by rounding; NaN stays
      static_cast<float*>(
          p.entropy.data)[b * p.entropy.stride_b + token * p.entropy.stride_s + head * p.entropy.stride_h] = x;
    }
  }
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
