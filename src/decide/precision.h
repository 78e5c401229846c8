// Scores of 8-bit products: whether a head whose class is chosen (choose.h) takes them, beside products of its own
// precision. Rounding Q and K is independent over keys and adds to the error in quadrature.
#pragma once

#include "core/host_device.h"
#include "decide/choose.h"
#include "decide/fixed_math.h"
#include "decide/policy.h"

namespace adaattn::decide {

struct ByteScores {
  float tile[kRankClasses] = {};  // one kept tile, as CostTable::tile
  // What they add to the head's error. The root mean square error of its scores, in units of the natural logarithm,
  // bounds it: a row's output moves by sum p e (v - o), whose mean square is at most that of e times the spread of V.
  float round_error = 0;
};

ADAATTN_HD inline float quadrature(float a, float b) {
  const float sum = fixed_fma(a, a, b * b);
  // 0 and what is not finite stay what they are.
  return sum > 0.0f && sum < 3e38f ? fixed_exp2(0.5f * fixed_log2(sum)) : sum;
}

// Variance of a score's error, in units of the natural logarithm, where q and k are rounded to multiples of steps that
// differ from row to row: a rounding error is spread evenly over a step, so its variance is step^2 / 12.
ADAATTN_HD inline float byte_variance(float scale, float q_square, float q_step_square, float k_square,
                                      float k_step_square) {
  return scale * scale * fixed_fma(q_square, k_step_square, k_square * q_step_square) * (1.0f / 12.0f);
}

// With scores of bytes where they gain enough over `choice` within the tolerance; false leaves it as it is. A dense
// head keeps all of its tiles, but not its precision.
ADAATTN_HD inline bool take_bytes(const Options& o, const CostTable& c, const GroupErrors& e, const HeadLevels& h,
                                  const ByteScores& bytes, const HeadFeedback& feedback, HeadChoice* choice) {
  const int level = choice->dense ? kDenseLevel : choice->level, rank = choice->dense ? 0 : choice->rank_class;
  CostTable costs = c;
  costs.tile[rank] = bytes.tile[rank];
  GroupErrors errors = e;
  errors.round_error = quadrature(e.round_error, bytes.round_error);
  const float error = level_error(o, errors, h, level, rank, feedback.multiplier[rank]);
  const float cost = level_cost(o, costs, h, level, rank);
  // Written so that an error that is not a number is refused.
  if (!(error <= o.tolerance) || cost * kMinGain > choice->predicted_cost) return false;
  *choice = {level, rank, false, error, cost};
  return true;
}

}  // namespace adaattn::decide
