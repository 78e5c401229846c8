#include "cpu_fallback/adaptive/own_options.h"

#include <algorithm>
#include <cmath>

#include "decide/tile_mass.h"

namespace adaattn::cpu {
namespace {

using decide::Policy;

// Of the mass of 16 queries in a needle, at kCalibrated keys; what bounds the loss of the reference model on its two
// texts there.
constexpr double kCalibrated = 8192;

double needle_share(Policy policy) {
  return policy == Policy::kQuality ? 0.0028 : policy == Policy::kSpeed ? 0.0092 : 0.005;
}
// Beside needles hardly any cell matters.
constexpr double kCellShare = 0.05;
// A mean query underestimates what its rows give to what they drop, the less so the more that is.
float remainder(Policy policy) { return policy == Policy::kQuality ? 3.0f : 2.0f; }

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
  o.remainder = remainder(o.policy);
  o.min_level = decide::level_for_mass(0.70);
  // A cell's share falls as there are more of them: with the root of their number where few of them matter.
  const double length = kCalibrated / static_cast<double>(std::max<int64_t>(given.max_seqlen_k, 1));
  const auto at_length = [&](double share) {
    return std::min(0.05, share * (length < 1 ? length : std::sqrt(length)));
  };
  o.keep_peak = static_cast<uint32_t>(0x1p24 * at_length(kCellShare));
  o.needle_mass = static_cast<float>(at_length(needle_share(o.policy)));
  return problem;
}

}  // namespace adaattn::cpu
