// Which heads take narrower products than their inputs, and what that does to them.
#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "adaptive/structured.h"
#include "support/cases.h"
#include "support/compare.h"
#include "support/random.h"

namespace adaattn::test {
namespace {

AttentionCase causal(int64_t seqlen) {
  AttentionCase c = {
      .name = "Causal", .heads_q = 6, .heads_kv = 2, .seqlen_q = seqlen, .seqlen_k = seqlen, .d_qk = 128};
  c.mask = ADAATTN_MASK_CAUSAL;
  return c;
}

class Precisions : public testing::TestWithParam<Target> {
 protected:
  void SetUp() override {
    if (const std::string why = missing(GetParam()); !why.empty()) GTEST_SKIP() << why;
  }
  bool has_bytes() const {
    const std::string name = GetParam().name;
    return name == "avx512" || name == "amx";
  }
};
INSTANTIATE_TEST_SUITE_P(Cpu, Precisions, testing::ValuesIn(listed_targets(ADAATTN_DEVICE_CPU)),
                         [](const auto& info) { return info.param.name; });

// All tiles, so that only arithmetic can gain anything.
adaattn_adaptive_desc_t every_tile(double tolerance, adaattn_precision_t least) {
  adaattn_adaptive_desc_t adaptive = adaptive_desc(ADAATTN_POLICY_CUSTOM);
  adaptive.tile_mass = 1;
  adaptive.rank_mode = ADAATTN_RANK_OFF;
  adaptive.tolerance = tolerance;
  adaptive.min_precision = least;
  return adaptive;
}

TEST_P(Precisions, BytesAreTakenWhereTheCallerAllowsThemAndCounted) {
  const Context context(GetParam());
  for (const Dtypes& dtypes : uniform_dtypes()) {
    AttentionData data(causal(1200), dtypes, run_seed(), 0);
    const Tensor exact = exact_output(context, data);
    const AdaptivePlan plan(context, data.desc, every_tile(0.1, ADAATTN_PRECISION_I8));
    data.poison_outputs();
    ASSERT_TRUE(succeeded(plan.execute(data)));
    const adaattn_plan_stats_t stats = plan.stats();
    EXPECT_EQ(stats.heads_f32 + stats.heads_f16 + stats.heads_bf16 + stats.heads_i8, stats.heads);
    // Elsewhere 8-bit products are no faster.
    const bool expected = has_bytes();
    EXPECT_EQ(stats.heads_i8 > 0, expected) << dtypes.name << " on " << GetParam().name;
    for (const adaattn_head_stats_t& head : plan.heads()) {
      EXPECT_EQ(head.kept_tiles, 1);
      if (head.precision != ADAATTN_PRECISION_I8) continue;
      EXPECT_FALSE(head.dense);
      const double error = head_error(data, exact, head.batch, head.head);
      EXPECT_GT(error, 1e-5);  // it is another arithmetic
      EXPECT_LE(error, head.predicted_error) << "the prediction is a bound";
      EXPECT_LE(head.predicted_error, 0.1);
      EXPECT_NEAR(head.measured_error, error, 0.5 * error + 2e-3);
    }
  }
}

TEST_P(Precisions, ExcludedClassesAreNotTaken) {
  const Context context(GetParam());
  for (const Dtypes& dtypes : uniform_dtypes()) {
    AttentionData data(causal(1200), dtypes, run_seed(), 0);
    const Tensor exact = exact_output(context, data);
    // The input's own precision is the default.
    const AdaptivePlan own(context, data.desc, every_tile(0.1, ADAATTN_PRECISION_DEFAULT));
    data.poison_outputs();
    ASSERT_TRUE(succeeded(own.execute(data)));
    EXPECT_EQ(own.stats().heads_i8, 0u) << dtypes.name;
    EXPECT_EQ(own.stats().heads_dense, own.stats().heads) << dtypes.name;
    EXPECT_TRUE(same_bits(exact, data.o)) << dtypes.name;
    if (data.desc.dtype_q != ADAATTN_DTYPE_F32) continue;
    const AdaptivePlan narrow(context, data.desc, every_tile(0.1, ADAATTN_PRECISION_BF16));
    data.poison_outputs();
    ASSERT_TRUE(succeeded(narrow.execute(data)));
    const adaattn_plan_stats_t stats = narrow.stats();
    EXPECT_EQ(stats.heads_i8, 0u);
    const bool has_bf16 = std::string(narrow.info().kernel).find("bf16") != std::string::npos;
    EXPECT_EQ(stats.heads_bf16, has_bf16 ? stats.heads : 0u) << narrow.info().kernel;
    for (const adaattn_head_stats_t& head : narrow.heads())
      EXPECT_LE(head_error(data, exact, head.batch, head.head), has_bf16 ? 0.01 : 0.0);
  }
}

// A tolerance under the rounding leaves heads to the precision of their inputs.
TEST_P(Precisions, ToleranceUnderTheRoundingRefusesBytes) {
  const Context context(GetParam());
  for (const Dtypes& dtypes : uniform_dtypes()) {
    AttentionData data(causal(1200), dtypes, run_seed(), 0);
    const AdaptivePlan plan(context, data.desc, every_tile(1e-4, ADAATTN_PRECISION_I8));
    data.poison_outputs();
    ASSERT_TRUE(succeeded(plan.execute(data)));
    EXPECT_EQ(plan.stats().heads_i8, 0u) << dtypes.name;
    EXPECT_EQ(plan.stats().heads_dense, plan.stats().heads) << dtypes.name;
  }
}

// Large scores make their rounding large.
TEST_P(Precisions, RoundingGrowsWithTheScores) {
  const Context context(GetParam());
  AttentionData data(causal(1200), uniform_dtypes()[0], run_seed(), 0);
  data.q.for_each([&](const std::vector<int64_t>& at, int64_t) { data.q.set(at, 60 * data.q.get(at)); });
  const AdaptivePlan plan(context, data.desc, every_tile(0.1, ADAATTN_PRECISION_I8));
  data.poison_outputs();
  ASSERT_TRUE(succeeded(plan.execute(data)));
  EXPECT_EQ(plan.stats().heads_i8, 0u);
}

TEST_P(Precisions, PoliciesKeepTheirToleranceWithBytes) {
  const Context context(GetParam());
  const struct {
    adaattn_policy_t policy;
    double tolerance;
  } policies[] = {{ADAATTN_POLICY_QUALITY, 0.1}, {ADAATTN_POLICY_BALANCED, 0.2}, {ADAATTN_POLICY_SPEED, 0.4}};
  for (const Dtypes& dtypes : uniform_dtypes()) {
    AttentionData data(causal(2048), dtypes, run_seed(), 0);
    make_structured(data, {}, run_seed() + 1);
    const Tensor exact = exact_output(context, data);
    for (const auto& [policy, tolerance] : policies) {
      adaattn_adaptive_desc_t adaptive = adaptive_desc(policy);
      adaptive.min_precision = ADAATTN_PRECISION_I8;
      const AdaptivePlan plan(context, data.desc, adaptive);
      for (int call = 0; call < 3; ++call) {
        data.poison_outputs();
        ASSERT_TRUE(succeeded(plan.execute(data)));
      }
      for (const adaattn_head_stats_t& head : plan.heads())
        EXPECT_LE(head_error(data, exact, head.batch, head.head), tolerance)
            << dtypes.name << ", policy " << policy << ", head " << head.head;
    }
  }
}

// A mean of K adds a constant to a row's scores, which bytes do not hold: it must come back in the row's LSE.
TEST_P(Precisions, MeanOfKeysStaysInTheLse) {
  const Context context(GetParam());
  for (const Dtypes& dtypes : uniform_dtypes()) {
    AttentionData data(causal(1200), dtypes, run_seed());
    data.k.for_each([&](const std::vector<int64_t>& at, int64_t) { data.k.set(at, data.k.get(at) + 4); });
    const AdaptivePlan wide(context, data.desc, every_tile(0.1, ADAATTN_PRECISION_DEFAULT));
    data.poison_outputs();
    ASSERT_TRUE(succeeded(wide.execute(data)));
    const std::vector<double> lse = data.lse.values(), entropy = data.entropy.values();
    const AdaptivePlan plan(context, data.desc, every_tile(0.2, ADAATTN_PRECISION_I8));
    data.poison_outputs();
    ASSERT_TRUE(succeeded(plan.execute(data)));
    EXPECT_EQ(plan.stats().heads_i8 > 0, has_bytes()) << dtypes.name;
    EXPECT_TRUE(close(data.lse.values(), lse, 0.1, 0, "lse")) << dtypes.name;
    EXPECT_TRUE(close(data.entropy.values(), entropy, 0.1, 0, "entropy")) << dtypes.name;
  }
}

TEST_P(Precisions, BytesDoNotDependOnTheNumberOfThreadsAndStayFrozen) {
  for (const Dtypes& dtypes : uniform_dtypes()) {
    AttentionData data(causal(1200), dtypes, run_seed(), 0);
    make_structured(data, {}, run_seed() + 1);
    std::vector<std::byte> first;
    for (const int threads : {1, 2, 5, 16}) {
      const Context context(GetParam(), threads);
      adaattn_adaptive_desc_t adaptive = adaptive_desc(ADAATTN_POLICY_QUALITY);
      adaptive.min_precision = ADAATTN_PRECISION_I8;
      adaptive.freeze = ADAATTN_SWITCH_ON;
      const AdaptivePlan plan(context, data.desc, adaptive);
      for (int call = 0; call < 2; ++call) {
        data.poison_outputs();
        ASSERT_TRUE(succeeded(plan.execute(data)));
        const std::vector<std::byte> bytes = data.o.bytes();
        if (first.empty()) first = bytes;
        EXPECT_EQ(bytes, first) << dtypes.name << ", " << threads << " threads, call " << call;
      }
    }
  }
}

}  // namespace
}  // namespace adaattn::test
