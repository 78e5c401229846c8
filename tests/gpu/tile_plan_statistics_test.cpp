// What adaptive plans on a CUDA device measure and tell: errors, feedback, maps, times, and heads that are left alone.
#include <algorithm>
#include <chrono>
#include <cmath>

#include "decide/feedback.h"
#include "gpu/tile_plans.h"

namespace adaattn::test {
namespace {

TEST_F(TilePlans, MeasuredErrorsAreThoseOfTheRowsThatWereSampled) {
  const Context host, context(kCuda);
  AttentionCase packed = causal_case(700);
  packed.name = "Packed";
  packed.layout_q = packed.layout_kv = ADAATTN_LAYOUT_THD;
  packed.lens_q = {700, 650};
  packed.lens_k = {700, 690};
  AttentionCase window = causal_case(900);
  window.name = "Window";
  window.window_left = 500;
  uint64_t verified_in_all = 0;
  for (const AttentionCase& c : {causal_case(2000), packed, window}) {
    SCOPED_TRACE(describe(c));
    AttentionData data = structured(c);
    const Tensor exact = exact_output(host, data);
    adaattn_adaptive_desc_t adaptive = custom_desc(0.7);
    adaptive.verify_rows = 4096;  // every row
    const AdaptivePlan plan(context, data.desc, adaptive);
    ASSERT_NO_FATAL_FAILURE(execute(plan, data));
    double sum = 0, most = 0;
    uint64_t verified = 0, rows = 0;
    for (const adaattn_head_stats_t& head : plan.heads()) {
      if (head.dense) {  // nothing to save in so short a sequence, or not enough
        EXPECT_TRUE(std::isnan(head.measured_error));
        continue;
      }
      ++verified;
      const double error = head_error(data, exact, head.batch, head.head);
      EXPECT_NEAR(head.measured_error, error, 0.02 * error + 2e-3) << "b " << head.batch << " head " << head.head;
      EXPECT_GT(error, 5e-3);
      sum += head.measured_error;
      most = std::max(most, head.measured_error);
      rows += static_cast<uint64_t>(data.len_q(head.batch));
    }
    const adaattn_plan_stats_t stats = plan.stats();
    verified_in_all += verified;
    EXPECT_EQ(stats.verified_heads, verified);
    EXPECT_EQ(stats.verified_rows, rows);
    EXPECT_NEAR(stats.measured_error_sum, sum, 1e-6);
    EXPECT_NEAR(stats.measured_error_max, most, 1e-6);
    EXPECT_GE(stats.measured_row_error_max, most);
    EXPECT_EQ(stats.heads_over_tolerance, 0u);
  }
  EXPECT_GE(verified_in_all, 4u);
}

TEST_F(TilePlans, FeedbackFollowsWhatIsMeasured) {
  const Context context(kCuda);
  AttentionData data = structured(causal_case(2000));
  for (const bool feedback : {false, true}) {
    adaattn_adaptive_desc_t adaptive = custom_desc(0.8);
    adaptive.rank_mode = ADAATTN_RANK_OFF;  // a multiplier belongs to a rank
    adaptive.feedback = feedback ? ADAATTN_SWITCH_ON : ADAATTN_SWITCH_OFF;
    const AdaptivePlan plan(context, data.desc, adaptive);
    std::vector<float> multiplier(8, 1.0f);
    for (int call = 0; call < 3; ++call) {
      ASSERT_NO_FATAL_FAILURE(execute(plan, data));
      const std::vector<adaattn_head_stats_t> heads = plan.heads();
      for (size_t i = 0; i < heads.size(); ++i) {
        if (feedback)
          multiplier[i] = decide::next_feedback(multiplier[i], static_cast<float>(heads[i].predicted_error),
                                                static_cast<float>(heads[i].measured_error));
        EXPECT_EQ(static_cast<float>(heads[i].feedback), multiplier[i]) << "call " << call << " head " << i;
      }
    }
  }
}

// One of a unit's heads, or all of them: then the unit is looked at again in the eighth call, for the one after it.
TEST_F(TilePlans, HeadsThatASampleRefusedAreTriedAgain) {
  const Context context(kCuda);
  for (const int64_t heads_kv : {2, 4}) {
    AttentionCase c = causal_case(3000);
    c.heads_kv = heads_kv;
    SCOPED_TRACE(describe(c));
    AttentionData data = structured(c);
    adaattn_adaptive_desc_t adaptive = adaptive_desc(ADAATTN_POLICY_SPEED);
    adaptive.tolerance = 10;
    adaptive.verify_rows = 4096;                       // every row
    adaptive.on_exceed = ADAATTN_ON_EXCEED_RECOMPUTE;  // in every call
    const AdaptivePlan loose(context, data.desc, adaptive);
    ASSERT_NO_FATAL_FAILURE(execute(loose, data));
    double most = 0;
    std::vector<float> coherent;  // predicted by a multiplier of 1
    for (const adaattn_head_stats_t& head : loose.heads()) {
      ASSERT_LT(head.kept_tiles, 0.6);
      coherent.push_back(static_cast<float>(head.predicted_error));
      const double learned =
          std::min<double>(decide::kFeedbackMargin * head.measured_error, decide::kFeedbackMax * head.predicted_error);
      most = std::max({most, head.predicted_error, learned});
    }
    adaptive.tolerance = 0.85 * most;
    const auto tolerance = static_cast<float>(adaptive.tolerance);
    const size_t group = static_cast<size_t>(c.heads_q / c.heads_kv);
    std::vector<float> multiplier(coherent.size(), 1.0f);
    std::vector<int> exact(coherent.size() / group), refused(coherent.size());
    const AdaptivePlan plan(context, data.desc, adaptive);
    int refusals = 0, returns = 0;
    for (int call = 0; call < 32; ++call) {
      ASSERT_NO_FATAL_FAILURE(execute(plan, data));
      const std::vector<adaattn_head_stats_t> heads = plan.heads();
      ASSERT_EQ(heads.size(), multiplier.size());
      for (size_t unit = 0; unit < exact.size(); ++unit) {
        const bool looked = exact[unit] <= 1, dense = exact[unit] > 0;
        bool all_refused = true;
        for (size_t h = unit * group; h < (unit + 1) * group; ++h) {
          SCOPED_TRACE("call " + std::to_string(call) + " head " + std::to_string(h));
          const bool now = std::fmaf(multiplier[h], coherent[h], 0.0f) > tolerance;
          if (looked && now) multiplier[h] = decide::rested_feedback(multiplier[h]);
          all_refused = all_refused && now;
          const bool whole = dense || now;
          EXPECT_EQ(heads[h].kept_tiles == 1, whole);
          if (!whole)
            multiplier[h] = decide::next_feedback(multiplier[h], static_cast<float>(heads[h].predicted_error),
                                                  static_cast<float>(heads[h].measured_error));
          EXPECT_EQ(static_cast<float>(heads[h].feedback), multiplier[h]);
          refusals += now && refused[h] == 0;
          returns += !whole && refused[h] != 0;
          refused[h] = whole;
        }
        exact[unit] = !looked ? exact[unit] - 1 : all_refused ? 8 : 0;
      }
    }
    EXPECT_GT(refusals, 0);
    EXPECT_GT(returns, 0);
  }
}

TEST_F(TilePlans, NamedPoliciesVerifyInEveryFourthCall) {
  const Context context(kCuda);
  AttentionData data = structured(causal_case(3000));
  const AdaptivePlan plan(context, data.desc, adaptive_desc(ADAATTN_POLICY_SPEED));
  std::vector<double> measured;
  for (int call = 0; call < 6; ++call) {
    ASSERT_NO_FATAL_FAILURE(execute(plan, data));
    EXPECT_EQ(plan.stats().verified_heads, call < 4 ? 8u : 16u) << call;
    const std::vector<adaattn_head_stats_t> heads = plan.heads();
    if (call % 4 == 0) measured.clear();
    for (size_t i = 0; i < heads.size(); ++i) {
      ASSERT_FALSE(heads[i].dense);
      if (call % 4 == 0) measured.push_back(heads[i].measured_error);
      EXPECT_GT(heads[i].measured_error, 0);
      EXPECT_EQ(heads[i].measured_error, measured[i]) << "call " << call << " head " << i;
    }
  }
  EXPECT_EQ(plan.stats().verified_rows, 16u * 16u);
}

TEST_F(TilePlans, HeadsOverTheToleranceAreCounted) {
  const Context context(kCuda);
  AttentionData data = structured(causal_case(1500));
  adaattn_adaptive_desc_t adaptive = custom_desc(0.7);
  adaptive.feedback = ADAATTN_SWITCH_OFF;
  const AdaptivePlan loose(context, data.desc, adaptive);
  ASSERT_NO_FATAL_FAILURE(execute(loose, data));
  // Predictions may be low: what counts is the measured error beside the tolerance.
  adaptive.tolerance = loose.stats().measured_error_max / 4;
  const AdaptivePlan tight(context, data.desc, adaptive);
  ASSERT_NO_FATAL_FAILURE(execute(tight, data));
  uint64_t over = 0;
  for (const adaattn_head_stats_t& head : tight.heads()) over += head.measured_error > adaptive.tolerance;
  EXPECT_EQ(tight.stats().heads_over_tolerance, over);
}

TEST_F(TilePlans, TileMapsAgreeWithTheMaskAndTheStatistics) {
  const Context context(kCuda);
  std::vector<AttentionCase> cases(3, causal_case(2100));
  cases[1].name = "Window";
  cases[1].window_left = 1000;
  cases[2].name = "Packed";
  cases[2].layout_q = cases[2].layout_kv = ADAATTN_LAYOUT_THD;
  cases[2].lens_q = {1700, 1300};
  cases[2].lens_k = {1700, 2100};
  for (const AttentionCase& c : cases) {
    SCOPED_TRACE(c.name);
    AttentionData data = structured(c);
    adaattn_adaptive_desc_t adaptive = custom_desc(0.7);
    for (const bool waves : {false, true}) {
      const AdaptivePlan plan(context, data.desc, adaptive);
      EXPECT_EQ(plan.tile_map(0, 0).query_tiles, 0);
      for (int call = 0; call < 2; ++call) {
        const adaattn_plan_stats_t before = plan.stats();
        ASSERT_NO_FATAL_FAILURE(execute(plan, data));
        const int64_t skipped = check_maps(plan, data);
        EXPECT_GT(skipped, 0);
        const adaattn_plan_stats_t after = plan.stats();
        EXPECT_EQ(static_cast<uint64_t>(skipped), after.tiles - before.tiles - (after.tiles_kept - before.tiles_kept));
      }
      if (!waves) adaptive.max_workspace_bytes = workspace_size(plan) - 1;
    }
  }
}

TEST_F(TilePlans, StagesAreTimed) {
  const Context context(kCuda);
  AttentionData data = structured(causal_case(3000));
  const AdaptivePlan plan(context, data.desc, adaptive_desc(ADAATTN_POLICY_SPEED));
  ASSERT_NO_FATAL_FAILURE(execute(plan, data));
  plan.stats(ADAATTN_STATS_WAIT | ADAATTN_STATS_RESET);
  const auto start = std::chrono::steady_clock::now();
  for (int call = 0; call < 5; ++call) ASSERT_NO_FATAL_FAILURE(execute(plan, data));
  const double wall = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const adaattn_plan_stats_t stats = plan.stats();
  const double stages[] = {stats.seconds_analyze, stats.seconds_decide, stats.seconds_attend, stats.seconds_verify};
  for (const double seconds : stages) EXPECT_GT(seconds, 5 * 2e-6);
  EXPECT_LT(stages[0] + stages[1] + stages[2] + stages[3], wall);
}

// A unit judged dense is looked at again in the eighth call after, which is computed exactly itself, whatever comes in
// between.
TEST_F(TilePlans, DenseHeadsAreLookedAtAgainInTheEighthCall) {
  const Context context(kCuda);
  const AttentionCase c = causal_case(2048);
  AttentionData random(c, kBf16All, run_seed(), ADAATTN_OUTPUT_LSE), changed = structured(c);
  AttentionData exact_random = with_own_outputs(random), exact_changed = with_own_outputs(changed);
  run(context, exact_random);
  run(context, exact_changed);
  const AdaptivePlan plan(context, random.desc, adaptive_desc(ADAATTN_POLICY_SPEED));
  for (int call = 0; call < 12; ++call) {
    ASSERT_NO_FATAL_FAILURE(execute(plan, random));
    EXPECT_TRUE(same_outputs(random, exact_random)) << call;
    EXPECT_EQ(check_maps(plan, random), 0);
  }
  EXPECT_EQ(plan.stats().heads_dense, 12u * 8u);
  EXPECT_EQ(plan.stats().tiles, 12 * causal_tiles(c));
  EXPECT_EQ(plan.stats().tiles_kept, 12 * causal_tiles(c));
  EXPECT_GT(plan.stats().seconds_attend, 0);
  // Looked at in calls 0 and 8, so next in call 16, for call 17.
  for (int call = 12; call < 17; ++call) {
    ASSERT_NO_FATAL_FAILURE(execute(plan, changed));
    EXPECT_TRUE(same_outputs(changed, exact_changed)) << call;
  }
  ASSERT_NO_FATAL_FAILURE(execute(plan, changed));
  EXPECT_EQ(plan.stats().heads_dense, 17u * 8u);
  EXPECT_FALSE(same_outputs(changed, exact_changed));
}

// Replays launch what calls leave out where the host knows that it would do nothing: the results are the same.
TEST_F(TilePlans, ReplaysLookAtDenseHeadsWhenCallsDo) {
  const Context context(kCuda);
  const AttentionCase c = causal_case(2048);
  AttentionData data(c, kBf16All, run_seed(), ADAATTN_OUTPUT_LSE), changed = structured(c);
  const adaattn_adaptive_desc_t adaptive = adaptive_desc(ADAATTN_POLICY_SPEED);
  const AdaptivePlan captured(context, data.desc, adaptive), eager(context, data.desc, adaptive);
  ReplayedCall replay(captured, data);
  for (int call = 0; call < 10; ++call) {
    if (call == 3) copy_inputs(changed, data);
    AttentionData again = with_own_outputs(data);
    ASSERT_NO_FATAL_FAILURE(execute(eager, again));
    replay.run();
    EXPECT_TRUE(same_outputs(data, again)) << call;
  }
  EXPECT_EQ(captured.stats().heads_dense, 9u * 8u);
  EXPECT_EQ(eager.stats().heads_dense, 9u * 8u);
  EXPECT_EQ(captured.stats().tiles_kept, eager.stats().tiles_kept);
}

}  // namespace
}  // namespace adaattn::test
