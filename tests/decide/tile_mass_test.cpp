#include "decide/tile_mass.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "support/random.h"

namespace adaattn::decide {
namespace {

// The same threshold by sorting: the definition, in other words.
uint32_t threshold_by_sorting(std::vector<uint32_t> mass, int level) {
  const uint64_t total = std::accumulate(mass.begin(), mass.end(), uint64_t{0});
  const uint64_t wanted = (total * level_mass(level) + 65535u) >> 16;
  std::sort(mass.rbegin(), mass.rend());
  uint64_t sum = 0;
  for (uint32_t m : mass) {
    sum += m;
    if (sum >= wanted) return m;
  }
  return 0;
}

std::vector<uint32_t> random_masses(std::mt19937& rng, int tiles) {
  std::normal_distribution<float> log2_mass(0, 4);
  std::vector<float> estimate(tiles);
  for (float& e : estimate) e = log2_mass(rng);
  const float top = *std::max_element(estimate.begin(), estimate.end());
  std::vector<uint32_t> mass(tiles);
  for (int i = 0; i < tiles; ++i) mass[i] = integer_mass(estimate[i], top);
  return mass;
}

TEST(TileMass, HeaviestTileHasTheFullInteger) {
  EXPECT_EQ(integer_mass(3.5f, 3.5f), 1u << 22);
  EXPECT_EQ(integer_mass(-100.0f, 3.5f), 0u);
}

TEST(TileMass, LevelsRiseToOne) {
  for (int level = 1; level < kLevels; ++level) EXPECT_GT(level_mass(level), level_mass(level - 1));
  EXPECT_EQ(level_mass(kDenseLevel), 65536u);
  for (int level = 0; level < kLevels; ++level) EXPECT_EQ(level_for_mass(level_mass(level) / 65536.0), level);
  EXPECT_EQ(level_for_mass(0.86), level_for_mass(0.90));
  EXPECT_EQ(level_for_mass(0.999), kDenseLevel);
}

TEST(TileMass, ThresholdAgreesWithSorting) {
  std::mt19937 rng(static_cast<unsigned>(test::run_seed()));
  for (int trial = 0; trial < 300; ++trial) {
    const std::vector<uint32_t> mass = random_masses(rng, 1 + static_cast<int>(rng() % 200));
    const uint64_t total = std::accumulate(mass.begin(), mass.end(), uint64_t{0});
    for (int level = 0; level < kDenseLevel; ++level)
      EXPECT_EQ(mass_threshold(mass.data(), static_cast<int64_t>(mass.size()), total, level),
                threshold_by_sorting(mass, level));
  }
}

TEST(TileMass, KeptMassReachesTheLevelAndNoTileOfItIsSpare) {
  std::mt19937 rng(7);
  for (int trial = 0; trial < 100; ++trial) {
    const std::vector<uint32_t> mass = random_masses(rng, 64);
    const uint64_t total = std::accumulate(mass.begin(), mass.end(), uint64_t{0});
    for (int level = 0; level < kDenseLevel; ++level) {
      const uint32_t x = mass_threshold(mass.data(), 64, total, level);
      uint64_t kept = 0, above = 0;
      for (uint32_t m : mass) {
        kept += m >= x ? m : 0;
        above += m > x ? m : 0;
      }
      EXPECT_GE(kept * 65536, total * level_mass(level));
      EXPECT_LT(above * 65536, total * level_mass(level));
    }
  }
}

TEST(TileMass, DiagonalItsNeighbourAndTheFirstTileAreForced) {
  const TileRow row{0, 10, 0, 9};
  EXPECT_TRUE(is_forced(row, 0));
  EXPECT_FALSE(is_forced(row, 1));
  EXPECT_FALSE(is_forced(row, 7));
  EXPECT_TRUE(is_forced(row, 8));
  EXPECT_TRUE(is_forced(row, 9));
}

TEST(TileMass, WindowEdgesAreForced) {
  const TileRow row{4, 12, 6, 11};
  EXPECT_TRUE(is_forced(row, 4));
  EXPECT_TRUE(is_forced(row, 5));
  EXPECT_FALSE(is_forced(row, 6));
  EXPECT_TRUE(is_forced(row, 11));
}

}  // namespace
}  // namespace adaattn::decide
