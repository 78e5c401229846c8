// Which shares keep tiles, by the length of the context.
#include "decide/shares.h"

#include <gtest/gtest.h>

namespace adaattn::decide {
namespace {

constexpr int64_t kCalibrated = 16384;
constexpr ShareRule kRule = {.cells = {.cell = 0.003, .remainder = 2, .power = 0.5},
                             .needles = {.cell = 0.01, .needle = 0.002, .power = 0.6},
                             .cells_from = 3000,
                             .needles_from = 12288};

Options options_at(const ShareRule& rule, int64_t keys) {
  Options o;
  set_shares(shares_at(rule, keys, kCalibrated), &o);
  return o;
}

TEST(Shares, CellsAloneDecideBetweenTheLengthsAndNeedlesBesideThemInOtherOnes) {
  EXPECT_GT(options_at(kRule, 2999).needle_mass, 0);
  EXPECT_EQ(options_at(kRule, 3000).needle_mass, 0);
  const Options below = options_at(kRule, 12287), from = options_at(kRule, 12288);
  EXPECT_EQ(below.needle_mass, 0);
  EXPECT_EQ(below.remainder, 2);
  EXPECT_GT(below.keep_peak, 0u);
  EXPECT_GT(from.needle_mass, 0);
  EXPECT_EQ(from.remainder, 0);
}

TEST(Shares, GrowAsTheContextGetsShorter) {
  const auto share = [](int64_t keys) { return options_at(kRule, keys).keep_peak * 0x1p-24; };
  EXPECT_NEAR(share(4096), 0.003 * 2, 1e-6);
  EXPECT_NEAR(share(8192), 0.003 * std::sqrt(2.0), 1e-6);
  EXPECT_NEAR(share(16384), 0.01, 1e-6);
  EXPECT_NEAR(share(65536), 0.01 / 4, 1e-6);
  EXPECT_NEAR(options_at(kRule, 32768).needle_mass, 0.001, 1e-7);
  EXPECT_NEAR(share(1), 0.05, 1e-6);  // no more than that
  const Options less = options_at({.needles = {.cell = 0.01, .needle = 0.01, .most_cell = 0.02}}, 1);
  EXPECT_NEAR(less.keep_peak * 0x1p-24, 0.02, 1e-6);
  EXPECT_NEAR(less.needle_mass, 0.05, 1e-6);
}

TEST(Shares, ARuleWithoutACrossoverIsTheSameAtEveryLength) {
  for (const int64_t keys : {1, 8192, 100000})
    EXPECT_GT(options_at({.needles = {.cell = 0.01, .needle = 0.002}}, keys).needle_mass, 0) << keys;
  const Options none = options_at({}, 8192);
  EXPECT_EQ(none.keep_peak, 0u);
  EXPECT_EQ(none.needle_mass, 0);
  EXPECT_EQ(none.remainder, 0);
}

}  // namespace
}  // namespace adaattn::decide
