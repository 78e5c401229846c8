// Products in 8 bits: whether a head whose class is chosen (choose.h) takes them. The CPU's are those of the scores,
// beside weights and V of their own precision; CUDA's are all of them. Rounding is independent over keys and adds to
// the error in quadrature.
#pragma once

#include "core/host_device.h"
#include "decide/choose.h"
#include "decide/fixed_math.h"
#include "decide/policy.h"

namespace adaattn::decide {

struct ByteScores {
  float tile[kRankClasses] = {};  // one kept tile, as CostTable::tile
  float per_query_tile = 0;       // what a query block costs more than beside other products
  float per_head = 0;             // the head's share in what K and V in 8 bits cost, in exact tiles
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

ADAATTN_HD inline float bytes_cost(const ByteScores& bytes, const HeadLevels& h, float tiles) {
  return tiles + static_cast<float>(h.query_tiles) * bytes.per_query_tile + bytes.per_head;
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
  const float cost = bytes_cost(bytes, h, level_cost(o, costs, h, level, rank));
  // Written so that an error that is not a number is refused.
  if (!(error <= o.tolerance) || cost * kMinGain > choice->predicted_cost) return false;
  *choice = {level, rank, false, true, error, cost};
  return true;
}

// Nothing wider is allowed: errors of rounding are those of bytes from the start (GroupErrors::round_error), and a head
// takes them whatever it gains, a dense one with all of its tiles.
ADAATTN_HD inline bool only_bytes(const Options& o) { return o.max_precision == Precision::kI8; }
ADAATTN_HD inline void put_in_bytes(const HeadLevels& h, const ByteScores& bytes, HeadChoice* choice) {
  if (choice->dense) choice->level = kDenseLevel;
  choice->dense = false;
  choice->bytes = true;
  choice->predicted_cost = bytes_cost(bytes, h, choice->predicted_cost * bytes.tile[choice->rank_class]);
}

}  // namespace adaattn::decide
