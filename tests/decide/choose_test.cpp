#include "decide/choose.h"

#include <gtest/gtest.h>

#include <cmath>

#include "decide/feedback.h"
#include "decide/tile_options.h"

namespace adaattn::decide {
namespace {

// A head of 10 query tiles and 100 visible tiles whose kept share and dropped mass fall with the level.
HeadLevels sparse_head() {
  HeadLevels h;
  h.query_tiles = 10;
  h.tiles = 100;
  for (int level = 0; level < kLevels; ++level) {
    h.kept[level] = level == kDenseLevel ? 100 : 15 + 4 * level;
    const uint64_t dropped = 65536 - level_mass(level);
    h.dropped_sq[level] = 10 * dropped * dropped;
  }
  return h;
}

// Nothing to gain: every level keeps nearly everything, as for random normal inputs.
HeadLevels even_head() {
  HeadLevels h = sparse_head();
  for (int level = 0; level < kDenseLevel; ++level) h.kept[level] = 90 + level / 2;
  return h;
}

Options options(float tolerance) {
  Options o = tile_options(tolerance);
  o.far_field = true;
  return o;
}

GroupErrors errors() {
  GroupErrors e;
  e.far_spread = 0.5f;
  e.drop_spread = 1.0f;
  return e;
}

TEST(Choose, DroppedMassIsItsRootMeanSquare) {
  const HeadLevels h = sparse_head();
  for (int level = 0; level < kDenseLevel; ++level)
    EXPECT_NEAR(dropped_rms(h, level), 1 - level_mass(level) / 65536.0, 1e-5);
  EXPECT_EQ(dropped_rms(h, kDenseLevel), 0.0f);
}

TEST(Choose, LargerToleranceNeverCostsMore) {
  const HeadLevels h = sparse_head();
  const HeadFeedback feedback;
  float previous = 1e9f;
  for (float tolerance = 0.001f; tolerance < 0.3f; tolerance *= 1.2f) {
    HeadChoice choice;
    choose_group(options(tolerance), {}, errors(), &h, &feedback, 1, 16, &choice);
    EXPECT_LE(choice.predicted_cost, previous);
    if (!choice.dense) {
      EXPECT_LE(choice.predicted_error, tolerance);
    }
    previous = choice.predicted_cost;
  }
  EXPECT_LT(previous, 20.0f);
}

TEST(Choose, TightToleranceIsDense) {
  const HeadLevels h = sparse_head();
  const HeadFeedback feedback;
  HeadChoice choice;
  choose_group(options(1e-5f), {}, errors(), &h, &feedback, 1, 16, &choice);
  EXPECT_TRUE(choice.dense);
  EXPECT_EQ(choice.level, kDenseLevel);
  EXPECT_EQ(choice.rank_class, 0);
}

TEST(Choose, EvenHeadIsDenseBecauseTheGainIsTooSmall) {
  const HeadLevels h = even_head();
  const HeadFeedback feedback;
  HeadChoice choice;
  choose_group(options(10.0f), {}, errors(), &h, &feedback, 1, 16, &choice);
  EXPECT_TRUE(choice.dense);
}

// Masses that are all alike: a level keeps the share of tiles that it has of the mass, whichever they are.
TEST(Choose, LevelsThatSelectNothingAreNotTaken) {
  HeadLevels h = sparse_head();
  h.tiles = 1000;
  for (int level = 0; level < kDenseLevel; ++level) h.kept[level] = 1 + 1000 * uint64_t{level_mass(level)} / 65536;
  h.kept[kDenseLevel] = 1000;
  const HeadFeedback feedback;
  HeadChoice choice;
  choose_group(options(10.0f), {}, errors(), &h, &feedback, 1, 16, &choice);
  EXPECT_TRUE(choice.dense);
  h.kept[3] = h.kept[3] * 85 / 100;
  choose_group(options(10.0f), {}, errors(), &h, &feedback, 1, 16, &choice);
  EXPECT_EQ(choice.level, 3);
}

TEST(Choose, FeedbackRaisesTheLevel) {
  const HeadLevels h = sparse_head();
  const HeadFeedback low, high{{8, 8, 8, 8}};
  HeadChoice a, b;
  choose_group(options(0.05f), {}, errors(), &h, &low, 1, 16, &a);
  choose_group(options(0.05f), {}, errors(), &h, &high, 1, 16, &b);
  EXPECT_GT(b.level, a.level);
}

TEST(Choose, LowestLevelIsRespected) {
  const HeadLevels h = sparse_head();
  const HeadFeedback feedback;
  Options o = options(10.0f);
  o.min_level = 5;
  HeadChoice choice;
  choose_group(o, {}, errors(), &h, &feedback, 1, 16, &choice);
  EXPECT_EQ(choice.level, 5);
}

TEST(Choose, RankIsTakenWhenItsErrorFitsAndItPays) {
  const HeadLevels heads[2] = {sparse_head(), sparse_head()};
  const HeadFeedback feedback[2];
  GroupErrors e = errors();
  CostTable c;
  for (int r = 1; r < kRankClasses; ++r) {
    e.rank_allowed[r] = true;
    e.rank_error[r] = 0.002f * static_cast<float>(r);
    c.tile[r] = 0.5f + 0.5f * static_cast<float>(rank_of_class(r)) / 128.0f;
  }
  HeadChoice choice[2];
  choose_group(options(0.1f), c, e, heads, feedback, 2, 16, choice);
  EXPECT_GT(choice[0].rank_class, 0);
  EXPECT_EQ(choice[0].rank_class, choice[1].rank_class);
  EXPECT_LE(choice[0].predicted_error, 0.1f);
  e.rank_error[1] = e.rank_error[2] = e.rank_error[3] = 0.5f;
  choose_group(options(0.1f), c, e, heads, feedback, 2, 16, choice);
  EXPECT_EQ(choice[0].rank_class, 0);
}

TEST(Choose, SkippedTilesThatCostMoreThanTheySaveAreKept) {
  const HeadLevels h = sparse_head();
  const HeadFeedback feedback;
  CostTable c;
  c.far_tile = 1.2f;
  HeadChoice choice;
  choose_group(options(10.0f), c, errors(), &h, &feedback, 1, 16, &choice);
  EXPECT_TRUE(choice.dense);
}

TEST(Feedback, SettlesWherePredictionIsTheMeasuredErrorWithItsMargin) {
  float f = 1;
  const float raw = 0.02f, measured = 0.05f;
  for (int call = 0; call < 20; ++call) f = next_feedback(f, f * raw, measured);
  EXPECT_NEAR(f * raw, kFeedbackMargin * measured, 1e-4);
}

TEST(Feedback, RisesAtOnceAndFallsSlowly) {
  EXPECT_NEAR(next_feedback(1, 0.01f, 0.08f), 8 * kFeedbackMargin, 1e-4);
  EXPECT_NEAR(next_feedback(8, 0.08f, 0.0001f), 8 * kFeedbackDecay, 1e-4);
}

TEST(Feedback, LearnsNothingFromACallThatSkippedNothing) { EXPECT_EQ(next_feedback(3, 0, 0), 3.0f); }

// A head may take a rank while the multiplier of skipped tiles refuses those: it is that one that rests.
TEST(Choose, RefusedHeadsComeBackByTheMultiplierThatRefusedThem) {
  const HeadLevels h = sparse_head();
  Options o = options(0.01f);
  o.min_level = kDenseLevel - 1;
  GroupErrors e = errors();
  CostTable c;
  e.rank_allowed[2] = true;
  e.rank_error[2] = 0.004f;
  c.tile[2] = 0.7f;
  HeadFeedback feedback{{9, 1, 2, 1}};
  const float coherent = dropped_rms(h, o.min_level) * e.far_spread;
  int calls = 0;
  HeadChoice choice;
  for (float expected = 9; expected * coherent > o.tolerance; expected = rested_feedback(expected), ++calls) {
    choose_group(o, c, e, &h, &feedback, 1, 16, &choice);
    EXPECT_EQ(choice.rank_class, 2);
    EXPECT_EQ(choice.level, kDenseLevel);
    ASSERT_TRUE(is_refused(o, e, h, choice, feedback));
    rest_refused(&feedback);
    EXPECT_EQ(feedback.multiplier[0], rested_feedback(expected));
    EXPECT_EQ(feedback.multiplier[1], 1);
    EXPECT_EQ(feedback.multiplier[2], 2);
    EXPECT_EQ(feedback.multiplier[3], 1);
  }
  EXPECT_GT(calls, 3);
  choose_group(o, c, e, &h, &feedback, 1, 16, &choice);
  EXPECT_FALSE(is_refused(o, e, h, choice, feedback));
  EXPECT_EQ(choice.rank_class, 0);
  EXPECT_EQ(choice.level, o.min_level);
}

TEST(Feedback, FallsWhileAHeadIsRefusedAndNeverBelowItsLeast) {
  float f = 2;
  EXPECT_FLOAT_EQ(rested_feedback(f), 2 * kFeedbackRest);
  for (int call = 0; call < 100; ++call) f = rested_feedback(f);
  EXPECT_EQ(f, kFeedbackMin);
}

}  // namespace
}  // namespace adaattn::decide
