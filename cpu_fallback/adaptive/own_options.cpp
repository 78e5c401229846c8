#include "cpu_fallback/adaptive/own_options.h"

#include "decide/shares.h"
#include "decide/tile_mass.h"

namespace adaattn::cpu {
namespace {

using decide::Policy;

constexpr int64_t kCalibrated = 8192;

// Of the mass of 16 queries in a needle; what bounds the loss of the reference model on its two texts at kCalibrated
// keys. Needles at every length: to find them takes 0.7 ms there of an exact call's 62 on AMX (isa/NOTES.md).
decide::ShareRule rule_of(Policy policy) {
  const double needle = policy == Policy::kQuality ? 0.0028 : policy == Policy::kSpeed ? 0.0092 : 0.005;
  // Beside needles hardly any cell matters. A mean query underestimates what its rows give to what they drop, the less
  // so the more that is.
  return {.needles = {.cell = 0.05, .needle = needle, .remainder = policy == Policy::kQuality ? 3.0 : 2.0}};
}

}  // namespace

// Exact tiles are so cheap on this unit that probes, centroids and a projected V cost more time than they save. The
// heaviest needles say what is kept, and a mean of V per block of rows stands for the rest.
Problem with_tile_options(const Problem& given) {
  Problem problem = given;
  decide::Options& o = problem.adaptive;
  if (o.policy != Policy::kQuality && o.policy != Policy::kBalanced && o.policy != Policy::kSpeed) return problem;
  o.probe = decide::Probe::kOff;
  o.rank_mode = decide::RankMode::kOff;
  o.far_field = false;
  o.min_level = decide::level_for_mass(0.70);
  decide::set_shares(decide::shares_at(rule_of(o.policy), given.max_seqlen_k, kCalibrated), &o);
  return problem;
}

}  // namespace adaattn::cpu
