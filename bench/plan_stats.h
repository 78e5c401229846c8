// What the adaptive plans of a model's layers report, added up.
#pragma once

#include <vector>

#include "adaattn/adaattn.hpp"

namespace adaattn::bench {

inline adaattn_plan_stats_t summed_stats(const std::vector<Plan>& plans) {
  adaattn_plan_stats_t sum = {};
  for (const Plan& plan : plans) {
    const adaattn_plan_stats_t s = plan.stats().value();
    sum.calls += s.calls;
    sum.heads += s.heads;
    sum.heads_dense += s.heads_dense;
    sum.tiles += s.tiles;
    sum.tiles_kept += s.tiles_kept;
    sum.rank_v_sum += s.rank_v_sum;
    sum.predicted_error_sum += s.predicted_error_sum;
    sum.verified_heads += s.verified_heads;
    sum.measured_error_sum += s.measured_error_sum;
    sum.heads_over_tolerance += s.heads_over_tolerance;
    sum.seconds_analyze += s.seconds_analyze;
    sum.seconds_decide += s.seconds_decide;
    sum.seconds_attend += s.seconds_attend;
    sum.seconds_verify += s.seconds_verify;
  }
  return sum;
}

}  // namespace adaattn::bench
