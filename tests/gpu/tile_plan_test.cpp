// Adaptive plans on a CUDA device, through the C API: errors, capture, waves.
#include "gpu/tile_plans.h"

namespace adaattn::test {
namespace {

TEST_F(TilePlans, PoliciesKeepTheirToleranceAndSkipTiles) {
  const Context host, context(kCuda);
  const AttentionCase c = causal_case(3000);
  AttentionData data = structured(c);
  const Tensor exact = exact_output(host, data);
  const std::pair<adaattn_policy_t, double> policies[] = {
      {ADAATTN_POLICY_QUALITY, 0.1}, {ADAATTN_POLICY_BALANCED, 0.2}, {ADAATTN_POLICY_SPEED, 0.4}};
  for (const auto& [policy, tolerance] : policies) {
    SCOPED_TRACE(policy);
    const AdaptivePlan plan(context, data.desc, adaptive_desc(policy));
    EXPECT_FALSE(plan.info().exact);
    ASSERT_NO_FATAL_FAILURE(execute(plan, data));
    const uint64_t kept_before = plan.stats().tiles_kept;
    ASSERT_NO_FATAL_FAILURE(execute(plan, data));
    const std::vector<adaattn_head_stats_t> heads = plan.heads();
    ASSERT_EQ(heads.size(), 8u);
    double kept = 0;
    for (const adaattn_head_stats_t& head : heads) {
      EXPECT_LE(head_error(data, exact, head.batch, head.head), tolerance) << "head " << head.head;
      EXPECT_LT(head.kept_tiles, 0.8) << "head " << head.head;
      EXPECT_GT(head.entropy, 0);
      EXPECT_GT(head.dropped_mass, 0);
      EXPECT_LT(head.dropped_mass, 0.5);
      kept += head.kept_tiles;
    }
    const adaattn_plan_stats_t stats = plan.stats();
    EXPECT_EQ(stats.calls, 2u);
    EXPECT_EQ(stats.heads, 16u);
    EXPECT_EQ(stats.heads_bf16, 16u);
    EXPECT_EQ(stats.tiles, 2 * causal_tiles(c));
    EXPECT_NEAR(static_cast<double>(stats.tiles_kept - kept_before) / static_cast<double>(causal_tiles(c)), kept / 8,
                1e-6);
    EXPECT_EQ(stats.query_rows, 2u * 8u * 3000u);
    EXPECT_LT(stats.flops_done, stats.flops);
    EXPECT_EQ(plan.stats(ADAATTN_STATS_RESET).calls, 2u);
    const adaattn_plan_stats_t empty = plan.stats();
    EXPECT_EQ(empty.calls + empty.heads + empty.tiles + empty.tiles_kept, 0u);
  }
}

// Tiles alone, and V in a basis at a tolerance that asks for it.
TEST_F(TilePlans, ClassesOfCustomPlans) {
  const Context host, context(kCuda);
  AttentionData data = structured(causal_case(2048), {.value_mean = 1.0});
  const Tensor exact = exact_output(host, data);
  for (const bool far_field : {false, true})
    for (const bool rank : {false, true}) {
      SCOPED_TRACE(testing::Message() << "far " << far_field << " rank " << rank);
      adaattn_adaptive_desc_t adaptive = adaptive_desc(ADAATTN_POLICY_CUSTOM);
      adaptive.tolerance = 1;
      adaptive.tile_mass = 0.9;
      adaptive.probe = ADAATTN_PROBE_OFF;
      adaptive.far_field = far_field ? ADAATTN_SWITCH_ON : ADAATTN_SWITCH_OFF;
      adaptive.rank_mode = rank ? ADAATTN_RANK_ENERGY : ADAATTN_RANK_OFF;
      const AdaptivePlan plan(context, data.desc, adaptive);
      ASSERT_NO_FATAL_FAILURE(execute(plan, data));
      const adaattn_plan_stats_t stats = plan.stats();
      EXPECT_EQ(stats.heads_dense, 0u);
      EXPECT_EQ(stats.heads_low_rank > 0, rank);
      for (const adaattn_head_stats_t& head : plan.heads()) {
        EXPECT_LE(head_error(data, exact, head.batch, head.head), 0.4) << "head " << head.head;
        EXPECT_GT(head.dropped_mass, 0);
        EXPECT_LT(head.dropped_mass, 0.2);
        EXPECT_EQ(head.rank_v < 128, rank);
      }
    }
}

TEST_F(TilePlans, RandomInputIsComputedExactly) {
  const Context context(kCuda);
  AttentionData data(causal_case(1024), kBf16All, run_seed(), ADAATTN_OUTPUT_LSE);
  const AdaptivePlan plan(context, data.desc, adaptive_desc(ADAATTN_POLICY_QUALITY));
  ASSERT_NO_FATAL_FAILURE(execute(plan, data));
  EXPECT_EQ(plan.stats().heads_dense, 8u);
  AttentionData exact = with_own_outputs(data);
  run(context, exact);
  EXPECT_TRUE(same_outputs(data, exact));
}

TEST_F(TilePlans, LengthsAndMasks) {
  const Context host, context(kCuda);
  AttentionCase window = causal_case(2000);
  window.name = "Window";
  window.seqlen_q = 1500;
  window.window_left = 1200;
  AttentionCase both = causal_case(1500);
  both.name = "BothSides";
  both.mask = ADAATTN_MASK_NONE;
  both.seqlen_q = 600;
  AttentionCase uneven = causal_case(4100);
  uneven.name = "Uneven";
  uneven.batch = 4;
  uneven.heads_q = 8;
  uneven.heads_kv = 1;
  uneven.layout_q = uneven.layout_kv = ADAATTN_LAYOUT_THD;
  uneven.lens_q = {4100, 40, 129, 700};
  uneven.lens_k = {4100, 2500, 129, 900};
  AttentionCase sides = causal_case(1500);
  sides.name = "WindowOfBothSides";
  sides.mask = ADAATTN_MASK_NONE;
  sides.window_left = 900;
  sides.window_right = 300;
  AttentionCase top_left = causal_case(1300);
  top_left.name = "TopLeft";
  top_left.mask = ADAATTN_MASK_CAUSAL_TOP_LEFT;
  top_left.seqlen_q = 1700;
  std::vector<AttentionCase> cases = cases_of_lengths();
  cases.insert(cases.end(), {window, both, uneven, sides, top_left});
  for (const AttentionCase& c : cases) {
    SCOPED_TRACE(describe(c));
    AttentionData data = structured(c);
    const Tensor exact = exact_output(host, data);
    const AdaptivePlan plan(context, data.desc, adaptive_desc(ADAATTN_POLICY_SPEED));
    for (int call = 0; call < 2; ++call) ASSERT_NO_FATAL_FAILURE(execute(plan, data));
    EXPECT_LT(plan.stats().tiles_kept, plan.stats().tiles);
    for (const adaattn_head_stats_t& head : plan.heads())
      EXPECT_LE(head_error(data, exact, head.batch, head.head), 0.4) << "b " << head.batch << " head " << head.head;
  }
}

// What the sanitizers see of adaptive calls: each rule and both lists, in waves, verified and computed again.
TEST_F(TilePlans, ASmallCallOfEachKind) {
  const Context context(kCuda);
  AttentionData data = structured(small_case());
  adaattn_adaptive_desc_t custom = custom_desc(0.7), frozen = adaptive_desc(ADAATTN_POLICY_BALANCED);
  custom.on_exceed = ADAATTN_ON_EXCEED_RECOMPUTE;
  custom.tolerance = 0.02;
  frozen.freeze = ADAATTN_SWITCH_ON;
  for (adaattn_adaptive_desc_t adaptive :
       {adaptive_desc(ADAATTN_POLICY_QUALITY), adaptive_desc(ADAATTN_POLICY_SPEED), frozen, custom}) {
    const AdaptivePlan whole(context, data.desc, adaptive);
    for (int call = 0; call < 2; ++call) ASSERT_NO_FATAL_FAILURE(execute(whole, data));
    adaptive.max_workspace_bytes = workspace_size(whole) - 1;
    const AdaptivePlan waves(context, data.desc, adaptive);
    AttentionData again = with_own_outputs(data);
    for (int call = 0; call < 2; ++call) ASSERT_NO_FATAL_FAILURE(execute(waves, again));
    EXPECT_TRUE(same_outputs(data, again));
    EXPECT_EQ(whole.stats().tiles_kept, waves.stats().tiles_kept);
  }
}

TEST_F(TilePlans, ReplaysOfACaptureGiveWhatCallsGive) {
  const Context context(kCuda);
  AttentionData data = structured(causal_case(2000));
  const adaattn_adaptive_desc_t adaptive = adaptive_desc(ADAATTN_POLICY_BALANCED);
  const AdaptivePlan captured(context, data.desc, adaptive), eager(context, data.desc, adaptive);
  ReplayedCall replay(captured, data);
  for (uint64_t round = 0; round < 3; ++round) {
    AttentionData fresh = structured(causal_case(2000), {}, 10 + round);
    copy_inputs(fresh, data);
    replay.run();
    ASSERT_NO_FATAL_FAILURE(execute(eager, fresh));
    EXPECT_TRUE(same_outputs(data, fresh)) << round;
  }
  EXPECT_EQ(captured.stats().tiles_kept, eager.stats().tiles_kept);
}

// One plan, and calls of other lengths than its maxima: each gives what a plan of its own gives.
TEST_F(TilePlans, LengthsThatChangeFromCallToCall) {
  const Context context(kCuda);
  adaattn_adaptive_desc_t adaptive = custom_desc(0.7);
  // What a plan keeps from call to call.
  adaptive.feedback = ADAATTN_SWITCH_OFF;
  adaptive.rank_mode = ADAATTN_RANK_OFF;
  const AdaptivePlan plan(context, structured(causal_case(2300)).desc, adaptive);
  const std::pair<int64_t, int64_t> lengths[] = {{2300, 2300}, {900, 2100}, {1281, 1281}, {130, 1999}, {2300, 2300}};
  for (const auto& [q, k] : lengths) {
    SCOPED_TRACE(testing::Message() << q << " queries, " << k << " keys");
    AttentionCase c = causal_case(k);
    c.seqlen_q = q;
    AttentionData data = structured(c, {}, static_cast<uint64_t>(q));
    const uint64_t kept = plan.stats().tiles_kept, tiles = plan.stats().tiles;
    ASSERT_NO_FATAL_FAILURE(execute(plan, data));
    const AdaptivePlan own(context, data.desc, adaptive);
    AttentionData again = with_own_outputs(data);
    ASSERT_NO_FATAL_FAILURE(execute(own, again));
    EXPECT_TRUE(same_outputs(data, again));
    EXPECT_EQ(plan.stats().tiles_kept - kept, own.stats().tiles_kept);
    EXPECT_EQ(plan.stats().tiles - tiles, own.stats().tiles);
    EXPECT_LT(own.stats().tiles_kept, own.stats().tiles);
  }
}

TEST_F(TilePlans, ALimitOnTheWorkspaceMakesWavesOfTheSameResult) {
  const Context context(kCuda);
  AttentionData data = structured(causal_case(2500));
  adaattn_adaptive_desc_t adaptive = adaptive_desc(ADAATTN_POLICY_SPEED);
  for (const adaattn_policy_t policy : {ADAATTN_POLICY_QUALITY, ADAATTN_POLICY_SPEED}) {
    adaptive = adaptive_desc(policy);
    const AdaptivePlan whole(context, data.desc, adaptive);
    ASSERT_NO_FATAL_FAILURE(execute(whole, data));
    adaptive.max_workspace_bytes = workspace_size(whole) - 1;
    const AdaptivePlan waves(context, data.desc, adaptive);
    ASSERT_LT(workspace_size(waves), workspace_size(whole));
    AttentionData again = with_own_outputs(data);
    ASSERT_NO_FATAL_FAILURE(execute(waves, again));
    EXPECT_TRUE(same_outputs(data, again));
    EXPECT_EQ(waves.stats().tiles_kept, whole.stats().tiles_kept);
    EXPECT_EQ(waves.stats().tiles, whole.stats().tiles);
    EXPECT_EQ(waves.stats().dropped_mass_sum, whole.stats().dropped_mass_sum);
  }

  adaptive.max_workspace_bytes = 1000;
  EXPECT_THROW(AdaptivePlan(context, data.desc, adaptive), std::runtime_error);
  EXPECT_NE(last_error().find("max_workspace_bytes"), std::string::npos) << last_error();
}

TEST_F(TilePlans, WhatIsNotServedIsRefusedByName) {
  const Context context(kCuda);
  const AttentionData data(causal_case(1024), kBf16All, run_seed(), 0);
  const auto expect_refused = [&](const adaattn_attn_desc_t& desc, const adaattn_adaptive_desc_t& adaptive,
                                  const char* field) {
    adaattn_plan_t* plan = nullptr;
    EXPECT_EQ(adaattn_plan_create(context.get(), &desc, &adaptive, &plan), ADAATTN_ERROR_NOT_SUPPORTED) << field;
    EXPECT_NE(last_error().find(field), std::string::npos) << last_error();
    EXPECT_NE(last_error().find("; accepted"), std::string::npos) << last_error();
  };
  const adaattn_adaptive_desc_t speed = adaptive_desc(ADAATTN_POLICY_SPEED);
  adaattn_attn_desc_t desc = data.desc;
  desc.head_dim_qk = desc.head_dim_v = 64;
  expect_refused(desc, speed, "head_dim_qk");
  desc = data.desc;
  desc.dtype_q = desc.dtype_kv = desc.dtype_o = ADAATTN_DTYPE_F16;
  expect_refused(desc, speed, "dtype_q");
}

TEST_F(TilePlans, ShortSequencesRunTheExactPlanAndSaySo) {
  const Context context(kCuda);
  AttentionData data(causal_case(300), kBf16All, run_seed(), ADAATTN_OUTPUT_LSE);
  const AdaptivePlan plan(context, data.desc, adaptive_desc(ADAATTN_POLICY_SPEED));
  EXPECT_TRUE(plan.info().exact);
  ASSERT_NO_FATAL_FAILURE(execute(plan, data));
  EXPECT_EQ(plan.stats().heads_dense, 8u);
  AttentionData exact = with_own_outputs(data);
  run(context, exact);
  EXPECT_TRUE(same_outputs(data, exact));
}

}  // namespace
}  // namespace adaattn::test
