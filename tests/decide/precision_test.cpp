#include "decide/precision.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "decide/tile_options.h"

namespace adaattn::decide {
namespace {

HeadLevels half_kept() {
  HeadLevels h;
  h.query_tiles = 10;
  h.tiles = 100;
  for (int level = 0; level < kLevels; ++level) h.kept[level] = level == kDenseLevel ? 100 : 50;
  return h;
}

ByteScores bytes(float cost, float round_error) {
  ByteScores b;
  for (float& tile : b.tile) tile = cost;
  b.round_error = round_error;
  return b;
}

TEST(Precision, BytesAreTakenFromTheLeastGainOn) {
  const HeadLevels h = half_kept();
  for (const float cost : {0.5f, 0.86f, 0.88f, 1.0f}) {
    HeadChoice choice = {0, 0, false, false, 0.0f, 50.0f};
    const bool taken = take_bytes(tile_options(0.1f), {}, {}, h, bytes(cost, 0.01f), {}, &choice);
    EXPECT_EQ(taken, cost * kMinGain <= 1.0f) << cost;
    EXPECT_FLOAT_EQ(choice.predicted_cost, taken ? 50 * cost : 50);
    EXPECT_NEAR(choice.predicted_error, taken ? 0.01 : 0.0, 1e-6);
  }
}

TEST(Precision, DenseHeadKeepsItsTiles) {
  const HeadLevels h = half_kept();
  HeadChoice choice;
  choice.predicted_cost = 100;
  ASSERT_TRUE(take_bytes(tile_options(0.1f), {}, {}, h, bytes(0.6f, 0.01f), {}, &choice));
  EXPECT_FALSE(choice.dense);
  EXPECT_EQ(choice.level, kDenseLevel);
  EXPECT_FLOAT_EQ(choice.predicted_cost, 60);
}

TEST(Precision, WhereNothingWiderIsAllowedAHeadTakesThemWhateverTheyCost) {
  Options o = tile_options(0.001f);
  EXPECT_FALSE(only_bytes(o));
  o.min_precision = o.max_precision = Precision::kI8;
  EXPECT_TRUE(only_bytes(o));
  ByteScores b = bytes(1.5f, 0.01f);
  b.per_query_tile = 0.5f;
  b.per_head = 2;
  HeadChoice some = {2, 0, false, false, 0.01f, 50.0f}, all;
  all.predicted_cost = 100;
  put_in_bytes(half_kept(), b, &some);
  put_in_bytes(half_kept(), b, &all);
  EXPECT_TRUE(some.bytes && all.bytes);
  EXPECT_EQ(some.level, 2);
  EXPECT_FLOAT_EQ(some.predicted_cost, 82);
  EXPECT_FALSE(all.dense);
  EXPECT_EQ(all.level, kDenseLevel);
  EXPECT_FLOAT_EQ(all.predicted_cost, 157);
}

TEST(Precision, WhatKeysAndQueryBlocksInBytesCostCountsAgainstThem) {
  const HeadLevels h = half_kept();
  for (const float more : {0.0f, 18.0f, 19.0f})
    for (const bool of_blocks : {false, true}) {
      ByteScores b = bytes(0.5f, 0.01f);
      if (of_blocks)
        b.per_query_tile = more / static_cast<float>(h.query_tiles);
      else
        b.per_head = more;
      HeadChoice choice = {0, 0, false, false, 0.0f, 50.0f};
      EXPECT_EQ(take_bytes(tile_options(0.1f), {}, {}, h, b, {}, &choice), more < 18.5f) << more;
      EXPECT_EQ(choice.bytes, more < 18.5f);
    }
}

TEST(Precision, RoundingAddsInQuadratureAndToleranceBoundsIt) {
  const HeadLevels h = half_kept();
  GroupErrors e;
  e.round_error = 0.03f;
  HeadChoice choice = {0, 0, false, false, 0.03f, 50.0f};
  ASSERT_TRUE(take_bytes(tile_options(0.06f), {}, e, h, bytes(0.5f, 0.04f), {}, &choice));
  EXPECT_NEAR(choice.predicted_error, 0.05, 1e-5);
  for (const float error : {0.06f, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    HeadChoice same = {0, 0, false, false, 0.03f, 50.0f};
    EXPECT_FALSE(take_bytes(tile_options(0.06f), {}, e, h, bytes(0.5f, error), {}, &same)) << error;
    EXPECT_EQ(same.predicted_cost, 50);
  }
}

// q and k of standard normal elements, rounded to multiples of steps: the variance of the products' error.
TEST(Precision, VarianceIsThatOfRoundedProducts) {
  constexpr double kStep = 0.05, kDims = 64;
  const float variance = byte_variance(0.125f, kDims, kStep * kStep, kDims, kStep * kStep);
  EXPECT_NEAR(variance, 2 * kDims * kStep * kStep / 12 / 64, 1e-7);
}

}  // namespace
}  // namespace adaattn::decide
