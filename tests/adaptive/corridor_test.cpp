// What every adaptive call promises: the tolerance, an honest measurement, statistics that add up, repeatability.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "adaptive/structured.h"
#include "decide/feedback.h"
#include "support/cases.h"
#include "support/compare.h"
#include "support/random.h"

namespace adaattn::test {
namespace {

const Dtypes& kF32 = uniform_dtypes()[0];

AttentionCase causal(int64_t seqlen, int64_t d = 64, int64_t heads_q = 4, int64_t heads_kv = 2) {
  return {.name = "Causal",
          .heads_q = heads_q,
          .heads_kv = heads_kv,
          .seqlen_q = seqlen,
          .seqlen_k = seqlen,
          .d_qk = d,
          .mask = ADAATTN_MASK_CAUSAL};
}

AttentionData structured(const AttentionCase& c, const Structure& structure = {}, const Dtypes& dtypes = kF32,
                         uint32_t outputs = 0) {
  AttentionData data(c, dtypes, run_seed(), outputs);
  make_structured(data, structure, run_seed() + 1);
  return data;
}

class Policies : public testing::TestWithParam<adaattn_policy_t> {};
INSTANTIATE_TEST_SUITE_P(All, Policies,
                         testing::Values(ADAATTN_POLICY_QUALITY, ADAATTN_POLICY_BALANCED, ADAATTN_POLICY_SPEED));

TEST_P(Policies, KeepTheirToleranceOnceFeedbackIsWarmAndSkipMostTiles) {
  const Context context;
  AttentionData data = structured(causal(4096));
  const adaattn_adaptive_desc_t adaptive = adaptive_desc(GetParam());
  const AdaptivePlan plan(context, data.desc, adaptive);
  const Tensor exact = exact_output(context, data);
  for (int call = 0; call < 4; ++call) {
    data.poison_outputs();
    ASSERT_TRUE(succeeded(plan.execute(data)));
  }
  const double tolerance = GetParam() == ADAATTN_POLICY_QUALITY    ? 0.1
                           : GetParam() == ADAATTN_POLICY_BALANCED ? 0.2
                                                                   : 0.4;
  for (const adaattn_head_stats_t& head : plan.heads()) {
    EXPECT_LE(head_error(data, exact, head.batch, head.head), tolerance) << "head " << head.head;
    EXPECT_LT(head.kept_tiles, 0.7) << "head " << head.head;
  }
}

TEST(Corridor, MeasuredErrorOfEveryRowIsTheTrueError) {
  const Context context;
  AttentionData data = structured(causal(1024));
  adaattn_adaptive_desc_t adaptive = adaptive_desc(ADAATTN_POLICY_CUSTOM);
  adaptive.tolerance = 10;
  adaptive.tile_mass = 0.7;
  adaptive.verify_rows = 1024;
  const AdaptivePlan plan(context, data.desc, adaptive);
  const Tensor exact = exact_output(context, data);
  ASSERT_TRUE(succeeded(plan.execute(data)));
  const auto heads = plan.heads();
  ASSERT_EQ(heads.size(), 4u);
  double sum = 0, max = 0;
  for (const adaattn_head_stats_t& head : heads) {
    const double error = head_error(data, exact, 0, head.head);
    EXPECT_FALSE(head.dense);
    EXPECT_GT(error, 1e-4);
    EXPECT_NEAR(head.measured_error, error, 1e-3 * error);
    sum += error;
    max = std::max(max, error);
  }
  const adaattn_plan_stats_t stats = plan.stats();
  EXPECT_EQ(stats.verified_heads, 4u);
  EXPECT_EQ(stats.verified_rows, 4u * 1024u);
  EXPECT_NEAR(stats.measured_error_sum, sum, 1e-3 * sum);
  EXPECT_NEAR(stats.measured_error_max, max, 1e-3 * max);
  EXPECT_GE(stats.measured_row_error_max, stats.measured_error_max);
}

TEST(Corridor, StatisticsAddUp) {
  const Context context;
  AttentionData data = structured(causal(2048));
  const AdaptivePlan plan(context, data.desc, adaptive_desc(ADAATTN_POLICY_BALANCED));
  for (int call = 0; call < 3; ++call) ASSERT_TRUE(succeeded(plan.execute(data)));
  const adaattn_plan_stats_t stats = plan.stats();
  const uint64_t blocks = 2048 / 128, pairs = 2048 * 2049 / 2;
  EXPECT_EQ(stats.calls, 3u);
  EXPECT_EQ(stats.heads, 3u * 4u);
  EXPECT_EQ(stats.tiles, 3u * 4u * blocks * (blocks + 1) / 2);
  EXPECT_LT(stats.tiles_kept, stats.tiles);
  EXPECT_LE(stats.tiles_probed_in, stats.tiles_kept);
  EXPECT_EQ(stats.query_rows, 3u * 4u * 2048u);
  EXPECT_EQ(stats.score_pairs, 3u * 4u * pairs);
  EXPECT_EQ(stats.heads_f32, stats.heads);
  EXPECT_EQ(stats.heads_f16 + stats.heads_bf16 + stats.heads_i8, 0u);
  EXPECT_LE(stats.heads_dense + stats.heads_low_rank, stats.heads);
  EXPECT_LT(stats.flops_done, stats.flops);
  EXPECT_GE(stats.entropy_min, 0);
  EXPECT_LE(stats.entropy_max, 1);
  double kept = 0;
  for (const adaattn_head_stats_t& head : plan.heads()) kept += head.kept_tiles;
  EXPECT_GT(kept, 0);
  EXPECT_EQ(plan.stats(ADAATTN_STATS_RESET).calls, 3u);
  const adaattn_plan_stats_t empty = plan.stats();
  EXPECT_EQ(empty.calls + empty.heads + empty.tiles + empty.tiles_kept, 0u);
  EXPECT_EQ(empty.flops_done, 0);
}

// Without far field, probe and projection, the work is that of the kept tiles and nothing else.
TEST(Corridor, FlopsAreThoseOfTheKeptTiles) {
  const Context context;
  AttentionData data = structured(causal(2048));
  adaattn_adaptive_desc_t adaptive = adaptive_desc(ADAATTN_POLICY_CUSTOM);
  adaptive.tolerance = 10;
  adaptive.far_field = ADAATTN_SWITCH_OFF;
  adaptive.probe = ADAATTN_PROBE_OFF;
  adaptive.rank_mode = ADAATTN_RANK_OFF;
  const AdaptivePlan plan(context, data.desc, adaptive);
  ASSERT_TRUE(succeeded(plan.execute(data)));
  const adaattn_plan_stats_t stats = plan.stats();
  EXPECT_EQ(stats.heads_dense, 0u);
  EXPECT_EQ(stats.flops_done, 2.0 * 128 * 128 * (64 + 64) * static_cast<double>(stats.tiles_kept));
}

TEST(Corridor, ResultsAndDecisionsDoNotDependOnTheNumberOfThreads) {
  AttentionData data = structured(causal(1500));
  std::vector<Tensor> outputs;
  std::vector<std::vector<adaattn_head_stats_t>> decisions;
  for (int32_t threads : {1, 2, 5}) {
    const Context context(Target{}, threads);
    const AdaptivePlan plan(context, data.desc, adaptive_desc(ADAATTN_POLICY_BALANCED));
    data.poison_outputs();
    for (int call = 0; call < 2; ++call) ASSERT_TRUE(succeeded(plan.execute(data)));
    Tensor o(ADAATTN_DTYPE_F32, data.o.shape());
    o.for_each([&](const std::vector<int64_t>& index, int64_t) { o.set(index, data.o.get(index)); });
    outputs.push_back(o);
    decisions.push_back(plan.heads());
  }
  for (size_t i = 1; i < outputs.size(); ++i) {
    EXPECT_TRUE(same_bits(outputs[0], outputs[i]));
    for (size_t h = 0; h < decisions[0].size(); ++h) {
      EXPECT_EQ(decisions[0][h].kept_tiles, decisions[i][h].kept_tiles);
      EXPECT_EQ(decisions[0][h].rank_v, decisions[i][h].rank_v);
      EXPECT_EQ(decisions[0][h].measured_error, decisions[i][h].measured_error);
      EXPECT_EQ(decisions[0][h].feedback, decisions[i][h].feedback);
    }
  }
}

TEST(Corridor, EveryInstructionSetKeepsNearlyTheSameTiles) {
  AttentionData data = structured(causal(2048));
  double first = -1;
  for (const Target& target : available_targets(ADAATTN_DEVICE_CPU)) {
    const Context context(target);
    const AdaptivePlan plan(context, data.desc, adaptive_desc(ADAATTN_POLICY_QUALITY));
    data.poison_outputs();
    ASSERT_TRUE(succeeded(plan.execute(data)));
    const Tensor exact = exact_output(context, data);
    for (int64_t h = 0; h < 4; ++h) EXPECT_LT(head_error(data, exact, 0, h), 0.1) << target.name;
    const adaattn_plan_stats_t stats = plan.stats();
    const double kept = static_cast<double>(stats.tiles_kept) / static_cast<double>(stats.tiles);
    if (first < 0) first = kept;
    EXPECT_NEAR(kept, first, 0.01) << target.name;
  }
}

TEST(Corridor, LseAndEntropyComeCloseToTheExactOnes) {
  const Context context;
  AttentionData data = structured(causal(2048), {}, kF32, ADAATTN_OUTPUT_ALL);
  const AdaptivePlan plan(context, data.desc, adaptive_desc(ADAATTN_POLICY_QUALITY));
  ASSERT_TRUE(succeeded(plan.execute(data)));
  const std::vector<double> lse = data.lse.values(), entropy = data.entropy.values();
  ASSERT_TRUE(succeeded(attention(context, data)));
  const std::vector<double> exact_lse = data.lse.values(), exact_entropy = data.entropy.values();
  double lse_error = 0, entropy_error = 0;
  for (size_t i = 0; i < lse.size(); ++i) {
    lse_error += std::abs(lse[i] - exact_lse[i]);
    entropy_error += std::abs(entropy[i] - exact_entropy[i]);
  }
  EXPECT_LT(lse_error / static_cast<double>(lse.size()), 0.02);
  EXPECT_LT(entropy_error / static_cast<double>(lse.size()), 0.1);
}

TEST(Corridor, HeadsOverTheToleranceAreRecomputedExactly) {
  const Context context;
  AttentionData data = structured(causal(2048));
  adaattn_adaptive_desc_t adaptive = adaptive_desc(ADAATTN_POLICY_CUSTOM);
  adaptive.tolerance = 0.05;
  adaptive.tile_mass = 0.7;
  adaptive.far_field = ADAATTN_SWITCH_OFF;
  adaptive.probe = ADAATTN_PROBE_OFF;
  adaptive.rank_mode = ADAATTN_RANK_OFF;
  const Tensor exact = exact_output(context, data);
  const AdaptivePlan report(context, data.desc, adaptive);
  ASSERT_TRUE(succeeded(report.execute(data)));
  const uint64_t over = report.stats().heads_over_tolerance;
  EXPECT_EQ(report.stats().heads_recomputed, 0u);
  adaptive.on_exceed = ADAATTN_ON_EXCEED_RECOMPUTE;
  const AdaptivePlan recompute(context, data.desc, adaptive);
  data.poison_outputs();
  ASSERT_TRUE(succeeded(recompute.execute(data)));
  EXPECT_EQ(recompute.stats().heads_recomputed, over);
  for (const adaattn_head_stats_t& head : recompute.heads()) {
    if (head.measured_error > 0.05) {
      EXPECT_EQ(head_error(data, exact, 0, head.head), 0);
    }
  }
}

// What one sample said of a head is forgotten slowly while nothing is skipped, and nothing of what was not sampled.
TEST(Corridor, RefusedHeadsAreTriedAgain) {
  const Context context;
  AttentionData data = structured(causal(2048, 64, 4, 4), {.topic = 2.5});
  adaattn_adaptive_desc_t adaptive = adaptive_desc(ADAATTN_POLICY_CUSTOM);
  adaptive.tile_mass = 0.995;  // one level beside the dense one
  adaptive.tolerance = 10;
  adaptive.verify_rows = 2048;
  adaptive.far_field = ADAATTN_SWITCH_OFF;
  adaptive.probe = ADAATTN_PROBE_OFF;
  adaptive.rank_mode = ADAATTN_RANK_OFF;
  const AdaptivePlan loose(context, data.desc, adaptive);
  ASSERT_TRUE(succeeded(loose.execute(data)));
  double most = 0, predicted = 0;
  for (const adaattn_head_stats_t& head : loose.heads()) {
    ASSERT_LT(head.kept_tiles, 0.8);
    predicted = std::max(predicted, head.predicted_error);
    const double learned =
        std::min<double>(decide::kFeedbackMargin * head.measured_error, decide::kFeedbackMax * head.predicted_error);
    most = std::max({most, predicted, learned});
  }
  adaptive.tolerance = 0.85 * most;
  for (const bool verified : {true, false}) {
    if (!verified) adaptive.verify_rows = -1;
    const AdaptivePlan plan(context, data.desc, adaptive);
    std::vector<float> multiplier(4, 1.0f);
    std::vector<bool> refused(4);
    int refusals = 0, returns = 0;
    for (int call = 0; call < 40; ++call) {
      ASSERT_TRUE(succeeded(plan.execute(data)));
      const std::vector<adaattn_head_stats_t> heads = plan.heads();
      for (size_t h = 0; h < heads.size(); ++h) {
        const auto now = static_cast<float>(heads[h].feedback);
        SCOPED_TRACE("call " + std::to_string(call) + " head " + std::to_string(h));
        if (heads[h].dense) {
          EXPECT_TRUE(now == multiplier[h] || (verified && now == decide::rested_feedback(multiplier[h])))
              << now << " after " << multiplier[h];
          refusals += !refused[h];
        } else {
          EXPECT_EQ(now, verified ? decide::next_feedback(multiplier[h], static_cast<float>(heads[h].predicted_error),
                                                          static_cast<float>(heads[h].measured_error))
                                  : 1.0f);
          returns += refused[h];
        }
        refused[h] = heads[h].dense;
        multiplier[h] = now;
      }
    }
    EXPECT_EQ(refusals > 0, verified || predicted > adaptive.tolerance);
    EXPECT_EQ(returns > 0, verified);
  }
}

// By the first call that brings a sequence, whatever comes in between.
TEST(Corridor, FrozenDecisionsAreKept) {
  const Context context;
  AttentionCase c = causal(1024);
  c.batch = 2;
  AttentionData data = structured(c), random(c, kF32, run_seed(), 0), broken = structured(c);
  broken.k.set(broken.key_index(1, 500, 0, 3), std::numeric_limits<double>::infinity());
  AttentionCase one = c;
  one.batch = 1;
  AttentionData shorter = structured(one);
  adaattn_adaptive_desc_t adaptive = adaptive_desc(ADAATTN_POLICY_CUSTOM);
  adaptive.tile_mass = 0.8;
  adaptive.tolerance = 1;
  adaptive.freeze = ADAATTN_SWITCH_ON;
  adaptive.rank_mode = ADAATTN_RANK_OFF;  // a rank that later input does not have gives way to the exact products
  const AdaptivePlan plan(context, data.desc, adaptive);
  ASSERT_TRUE(succeeded(plan.execute(shorter)));
  const auto first = plan.heads();
  ASSERT_TRUE(succeeded(plan.execute(data)));
  const auto then = plan.heads();
  const std::vector<std::byte> output = data.o.bytes();
  ASSERT_EQ(then.size(), 2 * first.size());
  for (size_t h = 0; h < then.size(); ++h) {
    EXPECT_FALSE(then[h].dense) << h;
    if (h < first.size()) {
      EXPECT_EQ(then[h].predicted_error, first[h].predicted_error) << h;
    }
  }
  for (int round = 0; round < 2; ++round) {
    ASSERT_TRUE(succeeded(plan.execute(random)));
    const auto of_random = plan.heads();
    for (size_t h = 0; h < then.size(); ++h) EXPECT_EQ(of_random[h].dense, then[h].dense) << h;
    ASSERT_TRUE(succeeded(plan.execute(broken)));
    // Two query heads read it.
    for (const adaattn_head_stats_t& head : plan.heads())
      EXPECT_EQ(head.dense, head.batch == 1 && head.head < 2) << head.head;
    data.poison_outputs();
    ASSERT_TRUE(succeeded(plan.execute(data)));
    const auto now = plan.heads();
    for (size_t h = 0; h < then.size(); ++h) {
      EXPECT_EQ(now[h].kept_tiles, then[h].kept_tiles) << h;
      EXPECT_EQ(now[h].predicted_error, then[h].predicted_error) << h;
    }
    EXPECT_EQ(data.o.bytes(), output);
  }
}

TEST(Corridor, SmallBudgetGivesTheSameResultInGroups) {
  const Context context;
  AttentionCase c = causal(1024, 64, 6, 3);
  c.batch = 2;
  AttentionData data = structured(c);
  const AdaptivePlan free_plan(context, data.desc, adaptive_desc(ADAATTN_POLICY_QUALITY));
  ASSERT_TRUE(succeeded(free_plan.execute(data)));
  Tensor expected(ADAATTN_DTYPE_F32, data.o.shape());
  expected.for_each([&](const std::vector<int64_t>& index, int64_t) { expected.set(index, data.o.get(index)); });

  adaattn_adaptive_desc_t adaptive = adaptive_desc(ADAATTN_POLICY_QUALITY);
  adaptive.max_workspace_bytes = 1;
  adaattn_plan_t* refused = nullptr;
  EXPECT_EQ(adaattn_plan_create(context.get(), &data.desc, &adaptive, &refused), ADAATTN_ERROR_NOT_SUPPORTED);
  const std::string text = last_error();
  EXPECT_NE(text.find("adaptive.max_workspace_bytes"), std::string::npos) << text;
  const size_t at = text.find("at least ");
  ASSERT_NE(at, std::string::npos) << text;
  adaptive.max_workspace_bytes = std::stoull(text.substr(at + 9));
  const AdaptivePlan plan(context, data.desc, adaptive);
  EXPECT_LE(plan.info().workspace_bytes, adaptive.max_workspace_bytes);
  EXPECT_LT(plan.info().workspace_bytes, free_plan.info().workspace_bytes);
  data.poison_outputs();
  ASSERT_TRUE(succeeded(plan.execute(data)));
  EXPECT_TRUE(same_bits(expected, data.o));
}

TEST(Corridor, MemoryGrowsWithTheLengthAndNotWithItsSquare) {
  const Context context;
  const auto bytes = [&](int64_t seqlen) {
    const AttentionCase c = causal(seqlen, 128, 6, 2);
    const adaattn_attn_desc_t desc = make_desc(c, kF32, 0);
    return static_cast<double>(
        AdaptivePlan(context, desc, adaptive_desc(ADAATTN_POLICY_BALANCED)).info().workspace_bytes);
  };
  for (int64_t seqlen : {8192, 65536, 524288}) EXPECT_LT(bytes(2 * seqlen), 2.1 * bytes(seqlen)) << seqlen;
}

}  // namespace
}  // namespace adaattn::test
