#include "cpu_fallback/adaptive/own_options.h"

#include <algorithm>
#include <cmath>

#include "decide/tile_mass.h"

namespace adaattn::cpu {
namespace {

using decide::Policy;

// Of the mass of 32 queries in a cell, at kCalibrated keys; what bounds the loss of the reference model on its two
// texts there.
constexpr double kCalibrated = 8192;

double keep_peak(Policy policy) {
  return policy == Policy::kQuality ? 0.0022 : policy == Policy::kSpeed ? 0.0065 : 0.0038;
}

}  // namespace

// Exact tiles are so cheap on this unit that the probe, the far field and a projected V cost more time than they save.
// A share of the mass from which on a tile is kept finds most of what the probe would, and a mean of V per block of
// rows stands for what is dropped.
Problem with_tile_options(const Problem& given) {
  Problem problem = given;
  decide::Options& o = problem.adaptive;
  if (o.policy != Policy::kQuality && o.policy != Policy::kBalanced && o.policy != Policy::kSpeed) return problem;
  o.probe = decide::Probe::kOff;
  o.rank_mode = decide::RankMode::kOff;
  o.far_field = o.policy == Policy::kQuality;
  o.compensate = !o.far_field;
  o.min_level = decide::level_for_mass(0.70);
  // A cell's share falls as there are more of them: with the root of their number where few of them matter.
  const double length = kCalibrated / static_cast<double>(std::max<int64_t>(given.max_seqlen_k, 1));
  const double share = std::min(0.05, keep_peak(o.policy) * (length < 1 ? length : std::sqrt(length)));
  o.keep_peak = static_cast<uint32_t>(0x1p24 * share);
  return problem;
}

}  // namespace adaattn::cpu
