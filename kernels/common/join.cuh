// Joins the partial results of split keys: o = sum_s w_s o_s, w_s = e^(lse_s - lse), lse = ln sum_s e^lse_s; the sink
// enters here. H = sum_s p_s (H_s - ln p_s) over real keys, p_s = e^(lse_s - lse without sink).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attend/kernel.h"
#include "common/scores.cuh"

namespace adaattn::cuda {

inline constexpr int kMaxSplits = 128;

// Orders this thread's and, behind a barrier, its CTA's accesses with those of CTAs that meet it at an atomic
// operation.
// __threadfence() would order them among all others too, which costs more.
__device__ __forceinline__ void fence_device() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// weight[s] of every part of `row` of the partial arrays, unscaled, by the lanes of one warp; scaled by the factor of
// the result they are w_s.
__device__ __forceinline__ RowResult join_weights(const AttendArgs& args, int64_t row, int head, int lane,
                                                  float* weight) {
  const AttnParams& p = args.p;
  float top = kNegInf;
  for (int i = lane; i < args.splits; i += 32) top = fmaxf(top, __ldcg(args.partial_lse + i * args.partial_rows + row));
#pragma unroll
  for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
  const float sink = p.sinks != nullptr ? p.sinks[head * p.sinks_stride] : kNegInf;
  const float base = fmaxf(top, sink);
  float real = 0, entropy = 0;
  for (int i = lane; i < args.splits; i += 32) {
    const float lse = __ldcg(args.partial_lse + i * args.partial_rows + row);
    const float w = lse == kNegInf ? 0.0f : expf(lse - base);
    weight[i] = w;
    real += w;
    if (args.partial_entropy != nullptr && w != 0)
      entropy += w * (__ldcg(args.partial_entropy + i * args.partial_rows + row) - (lse - base));
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    real += __shfl_xor_sync(0xffffffffu, real, step);
    entropy += __shfl_xor_sync(0xffffffffu, entropy, step);
  }
  const float total = real + (sink == kNegInf ? 0.0f : expf(sink - base));
  RowResult r;
  r.factor = total == 0 ? 0.0f : 1.0f / total;
  r.lse = total == 0 ? kNegInf : base + logf(total);
  r.entropy = real == 0 ? 0.0f : entropy / real + logf(real);
  if (r.entropy < 0) r.entropy = 0;  // by rounding; NaN stays
  return r;
}

// Where the results of a row go.
struct JoinedPlace {
  int64_t batch, token, head;
  __device__ __forceinline__ int64_t offset(const Operand& x) const {
    return batch * x.stride_b + token * x.stride_s + head * x.stride_h;
  }
  __device__ __forceinline__ void store_statistics(const AttnParams& p, const RowResult& r) const {
    if (p.lse.data != nullptr) static_cast<float*>(p.lse.data)[offset(p.lse)] = r.lse;
    if (p.entropy.data != nullptr) static_cast<float*>(p.entropy.data)[offset(p.entropy)] = r.entropy;
  }
  __device__ __forceinline__ void store(const AttnParams& p, int column, float x) const {
    const int64_t i = offset(p.o) + column;
    if (p.o.dtype == Dtype::kF32) {
      static_cast<float*>(p.o.data)[i] = x;
    } else if (p.o.dtype == Dtype::kBF16) {
      static_cast<__nv_bfloat16*>(p.o.data)[i] = __float2bfloat16_rn(x);
    } else {
      static_cast<__half*>(p.o.data)[i] = __float2half_rn(x);
    }
  }
};

}  // namespace adaattn::cuda
