// What the sampled rows of a head say about its error, and what that teaches.
#pragma once

#include "adaptive/tile_tally.h"
#include "common/ptx.cuh"
#include "common/scores.cuh"
#include "core/spread_rows.h"
#include "decide/feedback.h"

namespace adaattn::cuda {

constexpr int kJudges = 16;  // warps

__device__ __forceinline__ SpreadRows verified_rows(const AnalyzeArgs& args, const VerifyShape& verify,
                                                    const Sequence& s) {
  return spread_rows(*args.state.calls + args.options.seed, verify.rows, s.len_q);
}

template <typename Part>
__device__ __forceinline__ Part* part_of(Part* parts, const VerifyShape& verify, int64_t unit, int row, int split) {
  return parts + ((unit * verify.row_tiles + row / kVerifyTile) * verify.splits + split) * kVerifyTile +
         row % kVerifyTile;
}

// By kJudges warps, one row in each at a time. index: of the head in the batch. The first thread corrects its tally and
// its multiplier, if there is one.
__device__ __forceinline__ void judge_head(const AnalyzeArgs& args, const VerifyShape& verify, const VerifyPart* parts,
                                           int index, HeadTally* tally) {
  using T = __nv_bfloat16;
  __shared__ double warp_sum[kJudges];
  __shared__ float warp_worst[kJudges];
  const AttnParams& p = args.p;
  const int b = index / args.shape.heads_q, head = index % args.shape.heads_q, group = args.shape.group;
  const int unit = b * args.shape.heads_kv + head / group;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const decide::HeadChoice choice = args.tables.choice[index];
  const bool marks = args.options.recompute;
  if (marks && threadIdx.x == 0) args.tables.exceeds[index] = 0;
  if (choice.dense || *args.state.calls % verify.every != 0) return;
  const Sequence s = sequence_of(p, b);
  const SpreadRows sample = verified_rows(args, verify, s);
  const float sink = p.sinks != nullptr ? p.sinks[head * p.sinks_stride] * kLog2e : kNegInf;
  double sum = 0;
  float worst = 0;
  for (int i = warp; i < sample.count; i += kJudges) {
    const int row = i * group + head % group;
    float top = sink;
    for (int x = lane; x < verify.splits; x += 32) top = fmaxf(top, part_of(parts, verify, unit, row, x)->statistics.x);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
    float total = sink == kNegInf ? 0.0f : exp2f(sink - top);
    float exact[4] = {};
#pragma unroll 4
    for (int x = 0; x < verify.splits; ++x) {
      const VerifyPart& from = *part_of(parts, verify, unit, row, x);
      const float2 part = from.statistics;
      const float weight = part.y == 0 ? 0.0f : exp2f(part.x - top);
      total += weight * part.y;
#pragma unroll
      for (int c = 0; c < 4; ++c) exact[c] = fmaf(weight, from.o[lane + 32 * c], exact[c]);
    }
    const T* const o = static_cast<const T*>(p.o.data) + b * p.o.stride_b +
                       (s.q_start + sample.first + i * sample.step) * p.o.stride_s + head * p.o.stride_h;
    float square = 0;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float shift = to_float(o[lane + 32 * c]) - (total == 0 ? 0.0f : exact[c] / total);
      square = fmaf(shift, shift, square);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) square += __shfl_xor_sync(0xffffffffu, square, step);
    sum += static_cast<double>(square);
    worst = fmaxf(worst, square);
  }
  if (lane == 0) {
    warp_sum[warp] = sum;
    warp_worst[warp] = worst;
  }
  __syncthreads();
  if (threadIdx.x != 0 || sample.count == 0) return;
  for (int w = 1; w < kJudges; ++w) {
    sum += warp_sum[w];
    worst = fmaxf(worst, warp_worst[w]);
  }
  const float spread = args.tables.units[unit].v_spread;
  tally->verified_rows = static_cast<int32_t>(sample.count);
  tally->measured = 1;
  tally->measured_error = static_cast<float>(sqrt(sum / static_cast<double>(sample.count))) / spread;
  tally->measured_row_error = sqrtf(worst) / spread;
  if (marks && tally->measured_error > args.options.tolerance) {
    args.tables.exceeds[index] = 1;
    tally->recomputed = 1;
  }
  if (args.state.feedback == nullptr) return;
  float& multiplier = args.state.feedback[index].multiplier[choice.rank_class];
  // The multiplier is of what tiles and ranks leave out; rounding is predicted by a bound.
  const float rounding = choice.bytes ? args.bytes.round_error : 0.0f;
  multiplier = decide::next_feedback(multiplier, choice.predicted_error - rounding, tally->measured_error);
  tally->feedback = multiplier;
}

}  // namespace adaattn::cuda
