#include "decide/tile_levels.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "decide/level_checks.h"

namespace adaattn::decide {
namespace {

TEST(TileLevels, ATileOfTheShareIsKeptAtEveryLevel) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 rng(seed);
  std::normal_distribution<float> log2_mass(0, 3);
  for (int trial = 0; trial < 200; ++trial) {
    const int tiles = 3 + static_cast<int>(rng() % 150);
    std::vector<float> estimate(static_cast<size_t>(tiles));
    for (float& e : estimate) e = log2_mass(rng);
    std::vector<uint32_t> mass(estimate.size());
    const uint32_t share = 1 + rng() % (1u << 21);
    TileLevels without, with;
    without.row = with.row = {0, tiles, 0, tiles};
    measure_levels(estimate.data(), 1000, 0, mass.data(), &without);
    measure_levels(estimate.data(), 1000, share, mass.data(), &with);
    uint64_t total = 0;
    for (const uint32_t m : mass) total += m;
    expect_levels(
        with, mass,
        [&](int level, int t) {
          const auto i = static_cast<size_t>(t);
          return keeps(without, level, t, estimate[i]) || (static_cast<uint64_t>(mass[i]) << 24) >= total * share;
        },
        [&](int level, int t) { return keeps(with, level, t, estimate[static_cast<size_t>(t)]); });
  }
}

}  // namespace
}  // namespace adaattn::decide
