// From raw products to modified, masked scores: softcap, ALiBi, bias and the window mask, on single elements.
#pragma once

#include "common/problem.cuh"
#include "common/ptx.cuh"

namespace adaattn::cuda {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;
inline constexpr float kNegInf = -__builtin_huge_valf();

// First and one past the last key that a query position sees.
struct KeySpan {
  int begin, end;
};
__device__ __forceinline__ KeySpan key_span(const AttendArgs& args, const Sequence& s, int position) {
  const int len_k = static_cast<int>(s.len_k), diagonal = position + static_cast<int>(s.off);
  const int left = static_cast<int>(args.p.window_left), right = static_cast<int>(args.p.window_right);
  return {left >= 0 ? max(0, diagonal - left) : 0, right >= 0 ? min(len_k, diagonal + right + 1) : len_k};
}

// Everything but the mask for one score of one row, in natural units. Made once per row.
struct ScoreModifier {
  float scale, softcap, two_over_cap, slope;
  int diagonal;
  const void* bias_row;
  int64_t bias_stride_k;
  Dtype bias_dtype;

  __device__ __forceinline__ ScoreModifier(const AttendArgs& args, const Sequence& s, int b, int head, int position) {
    const AttnParams& p = args.p;
    scale = p.scale;
    softcap = p.softcap;
    two_over_cap = p.softcap > 0 ? 2.0f * kLog2e / p.softcap : 0;
    slope = p.alibi_slopes != nullptr ? p.alibi_slopes[b * p.alibi_stride_b + head * p.alibi_stride_h] : 0;
    diagonal = position + static_cast<int>(s.off);
    bias_row = nullptr;
    bias_stride_k = p.bias.stride_k;
    bias_dtype = p.bias.dtype;
    if (p.bias.data != nullptr) {
      bias_row = static_cast<const char*>(p.bias.data) +
                 (b * p.bias.stride_b + head * p.bias.stride_h + position * p.bias.stride_q) * dtype_size(bias_dtype);
    }
  }

  // key must be visible: the bias is read.
  __device__ __forceinline__ float operator()(float product, int key) const {
    float x = product * scale;
    // cap * tanh(x / cap), tanh y = 1 - 2 / (e^2y + 1): absolute error about 2e-7 * cap.
    if (softcap > 0) x = softcap * (1.0f - __fdividef(2.0f, exp2_approx(x * two_over_cap) + 1.0f));
    if (slope != 0) x -= slope * fabsf(static_cast<float>(diagonal - key));
    if (bias_row != nullptr) {
      const int64_t i = key * bias_stride_k;
      x += bias_dtype == Dtype::kF32    ? static_cast<const float*>(bias_row)[i]
           : bias_dtype == Dtype::kBF16 ? to_float(static_cast<const __nv_bfloat16*>(bias_row)[i])
                                        : to_float(static_cast<const __half*>(bias_row)[i]);
    }
    return x;
  }
};

// The running softmax of one row after its last key, joined with the sink.
struct RowResult {
  float factor;   // accumulated output times this is the output
  float lse;      // natural
  float entropy;  // nats, over real keys
};

// max2: maximum in log2 units (-inf: no key seen); sum = sum of 2^(x - max2); weighted = sum of 2^(x - max2)(x - max2).
template <bool kWithEntropy>
__device__ __forceinline__ RowResult finish_row(float max2, float sum, float weighted, float sink2) {
  RowResult r;
  r.entropy = 0;
  if (kWithEntropy && sum != 0) {
    r.entropy = kLn2 * (__log2f(sum) - __fdividef(weighted, sum));
    if (r.entropy < 0) r.entropy = 0;  // by rounding; NaN stays
  }
  float top = max2, shrink = 1.0f, total = sum;
  if (sink2 != kNegInf) {
    top = fmaxf(max2, sink2);
    shrink = max2 == kNegInf ? 0.0f : exp2_approx(max2 - top);
    total = sum * shrink + exp2_approx(sink2 - top);
  }
  r.factor = total == 0 ? 0.0f : __fdividef(shrink, total);
  r.lse = total == 0 ? kNegInf : kLn2 * (top + __log2f(total));
  return r;
}

// The entropy tool's result of row m: the caller's tensor has it by position, the workspace by row.
__device__ __forceinline__ void store_tool_entropy(const AttendArgs& args, const Sequence& s, const SampledRows& map,
                                                   int m, KeySpan span, float entropy) {
  const int keys = max(span.end - span.begin, 0), position = map.position(m);
  if (args.normalized) entropy = keys < 2 ? 0.0f : entropy / logf(static_cast<float>(keys));
  const AttnParams& p = args.p;
  args.partial_entropy[(static_cast<int64_t>(map.batch) * map.heads + map.first_head) * args.partial_rows + m] =
      entropy;
  if (p.entropy.data != nullptr)
    static_cast<float*>(p.entropy.data)[map.batch * p.entropy.stride_b + (s.q_start + position) * p.entropy.stride_s +
                                        map.first_head * p.entropy.stride_h] = entropy;
}

// Where the results of one query row go: the outputs, or the partial arrays when the keys are split.
struct RowPlace {
  int64_t token, partial;
  int batch, head;
  bool split;

  __device__ __forceinline__ RowPlace(const AttendArgs& args, const TileIndex& tile, const Sequence& s,
                                      const RowMap& row_map, int m) {
    const int position = row_map.position(m);
    token = s.q_start + position;
    batch = tile.batch;
    head = row_map.head(m);
    split = args.splits > 1;
    const int64_t row = args.p.cu_seqlens_q != nullptr ? token : batch * args.p.seqlen_q + position;
    partial = tile.split * args.partial_rows + row * args.p.heads_q + head;
  }
  __device__ __forceinline__ int64_t offset(const Operand& x) const {
    return batch * x.stride_b + token * x.stride_s + head * x.stride_h;
  }
  // The sink's logit in log2 units, -inf without one; with split keys it enters when they are combined.
  __device__ __forceinline__ float sink2(const AttendArgs& args) const {
    return args.p.sinks != nullptr && !split ? args.p.sinks[head * args.p.sinks_stride] * kLog2e : kNegInf;
  }
  template <bool kWithEntropy>
  __device__ __forceinline__ void store_statistics(const AttendArgs& args, const RowResult& result) const {
    const AttnParams& p = args.p;
    if (split) {
      args.partial_lse[partial] = result.lse;
      if (kWithEntropy && args.partial_entropy != nullptr) args.partial_entropy[partial] = result.entropy;
    } else {
      if (p.lse.data != nullptr) static_cast<float*>(p.lse.data)[offset(p.lse)] = result.lse;
      if (kWithEntropy && p.entropy.data != nullptr)
        static_cast<float*>(p.entropy.data)[offset(p.entropy)] = result.entropy;
    }
  }
  // The row of f32 results: partial ones, or a wide output.
  __device__ __forceinline__ float* f32_output(const AttendArgs& args) const {
    return split ? args.partial_o + partial * args.p.d_v : static_cast<float*>(args.p.o.data) + offset(args.p.o);
  }
};

}  // namespace adaattn::cuda
