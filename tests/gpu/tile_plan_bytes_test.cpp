// Adaptive plans on a CUDA device whose heads are computed in 8 bits: errors, statistics, capture, waves, what falls
// back to 16 bits and what is refused.
#include <cmath>
#include <limits>

#include "gpu/tile_plans.h"
#include "support/random.h"

namespace adaattn::test {
namespace {

class TilePlansInBytes : public TilePlans {};

adaattn_adaptive_desc_t with_precisions(double tile_mass, adaattn_precision_t least, adaattn_precision_t most) {
  adaattn_adaptive_desc_t adaptive = custom_desc(tile_mass);
  adaptive.far_field = ADAATTN_SWITCH_OFF;
  adaptive.rank_mode = ADAATTN_RANK_OFF;
  adaptive.min_precision = least;
  adaptive.max_precision = most;
  return adaptive;
}
adaattn_adaptive_desc_t in_bytes(double tile_mass) {
  return with_precisions(tile_mass, ADAATTN_PRECISION_I8, ADAATTN_PRECISION_I8);
}
adaattn_adaptive_desc_t in_bf16(double tile_mass) {
  return with_precisions(tile_mass, ADAATTN_PRECISION_BF16, ADAATTN_PRECISION_BF16);
}

// What walking every tile in 16 bits gives: the first call of a plan that finds nothing to leave out.
AttentionData of_every_tile(const Context& context, const AttentionData& data) {
  adaattn_adaptive_desc_t adaptive = in_bf16(0.85);
  adaptive.tolerance = 1e-9;
  AttentionData out = with_own_outputs(data);
  const AdaptivePlan plan(context, data.desc, adaptive);
  execute(plan, out);
  EXPECT_EQ(plan.stats().heads_dense, plan.stats().heads);
  return out;
}

// Of the heads of a plan, whose arithmetic each is.
void expect_precision(const AdaptivePlan& plan, adaattn_precision_t precision) {
  for (const adaattn_head_stats_t& head : plan.heads()) EXPECT_EQ(head.precision, precision) << "head " << head.head;
}

std::vector<AttentionCase> cases() {
  AttentionCase window = causal_case(2000);
  window.name = "Window";
  window.window_left = 1200;
  AttentionCase full = causal_case(1500);
  full.name = "Full";
  full.mask = ADAATTN_MASK_NONE;
  full.seqlen_q = 600;
  AttentionCase heads_first = causal_case(1600);
  heads_first.name = "HeadsFirst";
  heads_first.layout_q = heads_first.layout_kv = ADAATTN_LAYOUT_BHSD;
  heads_first.storage = Storage::kHeadsFirst;
  std::vector<AttentionCase> cases = cases_of_lengths();
  cases.insert(cases.end(), {causal_case(2500), window, full, heads_first});
  return cases;
}

TEST_F(TilePlansInBytes, KeepTheTilesOf16BitsAtTheErrorPredicted) {
  const Context host, context(kCuda);
  for (const AttentionCase& c : cases()) {
    SCOPED_TRACE(describe(c));
    AttentionData data = structured(c);
    const Tensor exact = exact_output(host, data);
    adaattn_adaptive_desc_t adaptive = in_bytes(0.85);
    adaptive.verify_rows = 4096;  // every row
    const AdaptivePlan plan(context, data.desc, adaptive), wide(context, data.desc, in_bf16(0.85));
    EXPECT_FALSE(plan.info().exact);
    EXPECT_EQ(std::string(plan.info().kernel), "sm90_walk_int8_bf16_d128");
    AttentionData in_16_bits = with_own_outputs(data);
    ASSERT_NO_FATAL_FAILURE(execute(wide, in_16_bits));
    ASSERT_NO_FATAL_FAILURE(execute(plan, data));
    const adaattn_plan_stats_t stats = plan.stats(), wide_stats = wide.stats();
    EXPECT_EQ(stats.heads_i8, stats.heads);
    EXPECT_EQ(stats.heads_bf16, 0u);
    EXPECT_EQ(stats.heads_dense, 0u);
    EXPECT_EQ(wide_stats.heads_i8, 0u);
    EXPECT_EQ(stats.tiles, wide_stats.tiles);
    EXPECT_EQ(stats.tiles_kept, wide_stats.tiles_kept);
    EXPECT_LT(stats.tiles_kept, stats.tiles);
    EXPECT_GT(stats.verified_heads, 0u);
    EXPECT_DOUBLE_EQ(stats.dropped_mass_sum, wide_stats.dropped_mass_sum);
    expect_precision(plan, ADAATTN_PRECISION_I8);
    expect_precision(wide, ADAATTN_PRECISION_BF16);
    EXPECT_GT(check_maps(plan, data), 0);
    const std::vector<adaattn_head_stats_t> heads = plan.heads(), wide_heads = wide.heads();
    for (size_t i = 0; i < heads.size(); ++i) {
      const adaattn_head_stats_t &head = heads[i], &other = wide_heads[i];
      // Rounding in quadrature with what the tiles leave out, which is the same.
      const double error = head_error(data, exact, head.batch, head.head);
      const double skipped = head_error(in_16_bits, exact, head.batch, head.head);
      EXPECT_LE(error, std::hypot(skipped, 0.0375) + 2e-3) << "b " << head.batch << " head " << head.head;
      EXPECT_NEAR(head.predicted_error, other.predicted_error + 0.0375, 1e-6);
      EXPECT_FALSE(head.dense);
      EXPECT_NEAR(head.measured_error, error, 0.02 * error + 2e-3) << "b " << head.batch << " head " << head.head;
    }
  }
}

TEST_F(TilePlansInBytes, RandomInputKeepsEveryTile) {
  const Context host, context(kCuda);
  AttentionData data(causal_case(1024), kBf16All, run_seed(), ADAATTN_OUTPUT_LSE);
  const Tensor exact = exact_output(host, data);
  const AdaptivePlan plan(context, data.desc, in_bytes(0.85));
  // However often: what is judged dense is not handed to the exact kernel.
  for (int call = 0; call < 10; ++call) ASSERT_NO_FATAL_FAILURE(execute(plan, data));
  const adaattn_plan_stats_t stats = plan.stats();
  EXPECT_EQ(stats.heads_i8, stats.heads);
  EXPECT_EQ(stats.heads_dense, 0u);
  EXPECT_EQ(stats.tiles_kept, stats.tiles);
  for (const adaattn_head_stats_t& head : plan.heads())
    EXPECT_LE(head_error(data, exact, head.batch, head.head), 0.0375) << "head " << head.head;
}

TEST_F(TilePlansInBytes, ReplaysOfACaptureGiveWhatCallsGive) {
  const Context context(kCuda);
  AttentionData data = structured(causal_case(2000));
  const AdaptivePlan captured(context, data.desc, in_bytes(0.9)), eager(context, data.desc, in_bytes(0.9));
  ReplayedCall replay(captured, data);
  for (uint64_t round = 0; round < 3; ++round) {
    AttentionData fresh = structured(causal_case(2000), {.topic = round == 1 ? 0.0 : 2.0}, 10 + round);
    copy_inputs(fresh, data);
    replay.run();
    ASSERT_NO_FATAL_FAILURE(execute(eager, fresh));
    EXPECT_TRUE(same_outputs(data, fresh)) << round;
  }
  EXPECT_EQ(captured.stats().tiles_kept, eager.stats().tiles_kept);
  EXPECT_EQ(captured.stats().heads_i8, eager.stats().heads_i8);
}

TEST_F(TilePlansInBytes, HeadsOverTheToleranceAreComputedAgainIn16Bits) {
  const Context context(kCuda);
  AttentionData data = structured(causal_case(1500));
  const AttentionData exact = of_every_tile(context, data);
  adaattn_adaptive_desc_t adaptive = in_bytes(0.85);
  adaptive.tolerance = 1e-3;  // under the rounding: every tile, and still over it
  adaptive.on_exceed = ADAATTN_ON_EXCEED_RECOMPUTE;
  const AdaptivePlan plan(context, data.desc, adaptive);
  ASSERT_NO_FATAL_FAILURE(execute(plan, data));
  const adaattn_plan_stats_t stats = plan.stats();
  EXPECT_EQ(stats.heads_i8, stats.heads);
  EXPECT_EQ(stats.tiles_kept, stats.tiles);
  EXPECT_EQ(stats.heads_over_tolerance, stats.heads);
  EXPECT_EQ(stats.heads_recomputed, stats.heads);
  EXPECT_TRUE(same_outputs(data, exact));
}

// The others keep to 8 bits, and their bits.
TEST_F(TilePlansInBytes, InputThatIsNotFiniteIsComputedExactly) {
  const Context context(kCuda);
  AttentionData data = structured(causal_case(1500)), whole = with_own_outputs(data);
  adaattn_adaptive_desc_t adaptive = in_bytes(0.85);
  adaptive.feedback = ADAATTN_SWITCH_OFF;
  const AdaptivePlan plan(context, data.desc, adaptive);
  ASSERT_NO_FATAL_FAILURE(execute(plan, whole));
  data.k.set(data.key_index(1, 1200, 0, 3), std::numeric_limits<double>::quiet_NaN());
  for (int call = 0; call < 10; ++call) {
    const uint64_t before = plan.stats().heads_i8;
    ASSERT_NO_FATAL_FAILURE(execute(plan, data));
    EXPECT_EQ(plan.stats().heads_i8 - before, 6u);
  }
  const AttentionData exact = of_every_tile(context, data);
  for (int64_t b = 0; b < 2; ++b)
    for (int64_t h = 0; h < 4; ++h) {
      const bool broken = b == 1 && h < 2;
      int64_t wrong = 0;
      for (int64_t i = 0; i < 1500; ++i)
        for (int64_t x = 0; x < 128; ++x) {
          const auto index = data.query_index(b, i, h, x);
          const double got = data.o.get(index), want = (broken ? exact : whole).o.get(index);
          wrong += !(got == want || (std::isnan(got) && std::isnan(want)));
        }
      EXPECT_EQ(wrong, 0) << "b " << b << " head " << h;
    }
}

// Of short lists nothing is gained, and another class is taken from 1.15 on.
TEST_F(TilePlansInBytes, WhereWiderOnesAreAllowedShortListsKeepTo16Bits) {
  const Context context(kCuda);
  AttentionData data = structured(causal_case(1500)), wide = with_own_outputs(data);
  const AdaptivePlan plan(context, data.desc, with_precisions(0.85, ADAATTN_PRECISION_I8, ADAATTN_PRECISION_BF16)),
      only(context, data.desc, in_bf16(0.85));
  ASSERT_NO_FATAL_FAILURE(execute(plan, data));
  ASSERT_NO_FATAL_FAILURE(execute(only, wide));
  EXPECT_EQ(plan.stats().heads_i8, 0u);
  EXPECT_EQ(plan.stats().heads_bf16, plan.stats().heads);
  EXPECT_TRUE(same_outputs(data, wide));
}

// A KV head that keeps few tiles, and one of random numbers, whose query heads keep all of 64: either as in a plan that
// allows but its own precision.
TEST_F(TilePlansInBytes, WhereWiderOnesAreAllowedLongListsTakeThem) {
  const Context context(kCuda);
  AttentionCase c = causal_case(8192);
  c.mask = ADAATTN_MASK_NONE;
  c.batch = 1;
  AttentionData data = structured(c);
  Random random(run_seed() + 2);
  const auto fill = [&](Tensor& x, int64_t first_head) {
    x.for_each([&](const std::vector<int64_t>& index, int64_t) {
      if (index[2] >= first_head) x.set(index, random.normal());
    });
  };
  fill(data.q, 2);
  fill(data.k, 1);
  fill(data.v, 1);
  const AdaptivePlan plan(context, data.desc, with_precisions(0.85, ADAATTN_PRECISION_I8, ADAATTN_PRECISION_BF16)),
      narrow(context, data.desc, in_bytes(0.85)), wide(context, data.desc, in_bf16(0.85));
  AttentionData in_8_bits = with_own_outputs(data), in_16_bits = with_own_outputs(data);
  ASSERT_NO_FATAL_FAILURE(execute(narrow, in_8_bits));
  ASSERT_NO_FATAL_FAILURE(execute(wide, in_16_bits));
  ASSERT_NO_FATAL_FAILURE(execute(plan, data));
  int64_t wrong = 0;
  data.o.for_each([&](const std::vector<int64_t>& index, int64_t) {
    const AttentionData& want = index[2] >= 2 ? in_8_bits : in_16_bits;
    wrong += data.o.get(index) != want.o.get(index);
  });
  EXPECT_EQ(wrong, 0);
  for (const adaattn_head_stats_t& head : plan.heads()) {
    EXPECT_EQ(head.precision, head.head >= 2 ? ADAATTN_PRECISION_I8 : ADAATTN_PRECISION_BF16) << head.head;
    EXPECT_EQ(head.kept_tiles == 1, head.head >= 2) << head.head;
    EXPECT_FALSE(head.dense);
  }
  for (int call = 0; call < 3; ++call) ASSERT_NO_FATAL_FAILURE(execute(plan, data));
  EXPECT_EQ(plan.stats().heads_i8, 4u * 2);
  EXPECT_EQ(plan.stats().heads_bf16, 4u * 2);
}

TEST_F(TilePlansInBytes, FrozenPlansRepeatThemselvesBitForBit) {
  const Context context(kCuda);
  AttentionData data = structured(causal_case(1500)), other = structured(causal_case(1500), {.topic = 0}, 10);
  adaattn_adaptive_desc_t adaptive = in_bytes(0.85);
  adaptive.freeze = ADAATTN_SWITCH_ON;
  const AdaptivePlan plan(context, data.desc, adaptive);
  ASSERT_NO_FATAL_FAILURE(execute(plan, data));
  ASSERT_NO_FATAL_FAILURE(execute(plan, other));
  AttentionData again = with_own_outputs(data);
  ASSERT_NO_FATAL_FAILURE(execute(plan, again));
  EXPECT_TRUE(same_outputs(data, again));
  EXPECT_EQ(plan.stats().heads_i8, plan.stats().heads);
  EXPECT_LT(plan.stats().tiles_kept, plan.stats().tiles);
}

// What the sanitizers see: in waves, verified and computed again.
TEST_F(TilePlansInBytes, ASmallCallInWaves) {
  const Context context(kCuda);
  AttentionData data = structured(small_case());
  adaattn_adaptive_desc_t adaptive = in_bytes(0.7);
  adaptive.on_exceed = ADAATTN_ON_EXCEED_RECOMPUTE;
  const AdaptivePlan whole(context, data.desc, adaptive);
  for (int call = 0; call < 2; ++call) ASSERT_NO_FATAL_FAILURE(execute(whole, data));
  adaptive.max_workspace_bytes = workspace_size(whole) - 1;
  const AdaptivePlan waves(context, data.desc, adaptive);
  AttentionData again = with_own_outputs(data);
  for (int call = 0; call < 2; ++call) ASSERT_NO_FATAL_FAILURE(execute(waves, again));
  EXPECT_TRUE(same_outputs(data, again));
  EXPECT_EQ(whole.stats().tiles_kept, waves.stats().tiles_kept);
  EXPECT_EQ(whole.stats().heads_i8, waves.stats().heads_i8);
}

TEST_F(TilePlansInBytes, WhatIsNotServedIsRefusedByName) {
  struct Refusal {
    const char* text;
    void (*change)(adaattn_attn_desc_t& desc, adaattn_adaptive_desc_t& adaptive);
  };
  const Refusal refusals[] = {
      {"adaptive.probe", [](adaattn_attn_desc_t&, adaattn_adaptive_desc_t& a) { a.probe = ADAATTN_PROBE_FULL; }},
      {"adaptive.far_field", [](adaattn_attn_desc_t&, adaattn_adaptive_desc_t& a) { a.far_field = 0; }},
      {"adaptive.rank_mode", [](adaattn_attn_desc_t&, adaattn_adaptive_desc_t& a) { a.rank_mode = 0; }},
      {"adaptive.max_precision",
       [](adaattn_attn_desc_t&, adaattn_adaptive_desc_t& a) {
         a = adaptive_desc(ADAATTN_POLICY_SPEED);
         a.max_precision = ADAATTN_PRECISION_I8;
       }},
      {"adaptive.max_workspace_bytes",
       [](adaattn_attn_desc_t&, adaattn_adaptive_desc_t& a) { a.max_workspace_bytes = 1000; }},
      {"head_dim_qk", [](adaattn_attn_desc_t& d, adaattn_adaptive_desc_t&) { d.head_dim_qk = d.head_dim_v = 64; }},
      {"dtype_q", [](adaattn_attn_desc_t& d,
                     adaattn_adaptive_desc_t&) { d.dtype_q = d.dtype_kv = d.dtype_o = ADAATTN_DTYPE_F16; }},
      {"softcap", [](adaattn_attn_desc_t& d, adaattn_adaptive_desc_t&) { d.softcap = 30; }},
      {"ALIBI", [](adaattn_attn_desc_t& d, adaattn_adaptive_desc_t&) { d.flags = ADAATTN_FLAG_ALIBI; }},
      {"PAGED",
       [](adaattn_attn_desc_t& d, adaattn_adaptive_desc_t&) {
         d.layout_kv = ADAATTN_LAYOUT_PAGED;
         d.page_size = 16;
       }},
  };
  const Context context(kCuda);
  const adaattn_attn_desc_t good = make_desc(causal_case(1024), kBf16All, 0);
  char reason[512] = {};
  adaattn_adaptive_desc_t adaptive = in_bytes(0.9);
  EXPECT_TRUE(succeeded(adaattn_check_support(context.get(), &good, &adaptive, reason, sizeof reason))) << reason;
  for (const Refusal& refusal : refusals) {
    adaattn_attn_desc_t desc = good;
    adaptive = in_bytes(0.9);
    refusal.change(desc, adaptive);
    EXPECT_EQ(adaattn_check_support(context.get(), &desc, &adaptive, reason, sizeof reason),
              ADAATTN_ERROR_NOT_SUPPORTED)
        << refusal.text;
    EXPECT_NE(std::string(reason).find(refusal.text), std::string::npos) << reason << "; expected " << refusal.text;
    EXPECT_NE(std::string(reason).find("; accepted"), std::string::npos) << reason;
  }
}

}  // namespace
}  // namespace adaattn::test
