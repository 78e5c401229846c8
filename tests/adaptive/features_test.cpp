// Every policy on every kind of problem.
#include <gtest/gtest.h>

#include "adaptive/structured.h"
#include "reference/attention.h"
#include "support/cases.h"
#include "support/compare.h"
#include "support/random.h"

namespace adaattn::test {
namespace {

struct Feature {
  AttentionCase problem;
  bool always_exact = false;
};

std::vector<Feature> features() {
  const AttentionCase base = {
      .name = "Full", .heads_q = 4, .heads_kv = 2, .seqlen_q = 1100, .seqlen_k = 1100, .d_qk = 64};
  const auto with = [&](const char* name, auto&& change, bool always_exact = false) {
    Feature f{base, always_exact};
    f.problem.name = name;
    change(f.problem);
    return f;
  };
  return {
      with("Full", [](AttentionCase&) {}),
      with("Causal", [](AttentionCase& c) { c.mask = ADAATTN_MASK_CAUSAL; }),
      with("CausalTopLeft",
           [](AttentionCase& c) {
             c.mask = ADAATTN_MASK_CAUSAL_TOP_LEFT;
             c.seqlen_k = 1400;
           }),
      with("BottomRightWithShorterQuery",
           [](AttentionCase& c) {
             c.mask = ADAATTN_MASK_CAUSAL;
             c.seqlen_q = 333;
           }),
      with("MoreQueriesThanKeys",
           [](AttentionCase& c) {
             c.mask = ADAATTN_MASK_CAUSAL;
             c.seqlen_q = 1500;
           }),
      with("Window",
           [](AttentionCase& c) {
             c.mask = ADAATTN_MASK_CAUSAL;
             c.window_left = 700;
           }),
      with("TwoSidedWindow",
           [](AttentionCase& c) {
             c.window_left = 500;
             c.window_right = 400;
           }),
      with("HeadFirst", [](AttentionCase& c) { c.layout_q = c.layout_kv = ADAATTN_LAYOUT_BHSD; }),
      with("Packed",
           [](AttentionCase& c) {
             c.layout_q = c.layout_kv = ADAATTN_LAYOUT_THD;
             c.batch = 3;
             c.lens_q = {700, 1, 650};
             c.lens_k = {700, 900, 1300};
             c.mask = ADAATTN_MASK_CAUSAL;
           }),
      with("Paged",
           [](AttentionCase& c) {
             c.layout_kv = ADAATTN_LAYOUT_PAGED;
             c.page_size = 48;
             c.used_k = {1003};
             c.mask = ADAATTN_MASK_CAUSAL;
           }),
      with("Sinks",
           [](AttentionCase& c) {
             c.flags = ADAATTN_FLAG_SINK;
             c.mask = ADAATTN_MASK_CAUSAL;
           }),
      with("UnequalHeadDims", [](AttentionCase& c) { c.d_v = 96; }),
      with("OddHeadDim", [](AttentionCase& c) { c.d_qk = 72; }),
      with("HeadDimBelowAVector", [](AttentionCase& c) { c.d_qk = 5; }),
      with("HeadDimOne",
           [](AttentionCase& c) {
             c.d_qk = 1;
             c.mask = ADAATTN_MASK_CAUSAL;
           }),
      with("NarrowKeysAndWideValues",
           [](AttentionCase& c) {
             c.d_qk = 12;
             c.d_v = 160;
           }),
      with(
          "OneQuery", [](AttentionCase& c) { c.seqlen_q = 1; }, true),
      with(
          "FewKeys", [](AttentionCase& c) { c.seqlen_q = c.seqlen_k = 200; }, true),
      with(
          "NoKeys", [](AttentionCase& c) { c.seqlen_k = 0; }, true),
      with(
          "Softcap", [](AttentionCase& c) { c.softcap = 20; }, true),
      with(
          "Alibi", [](AttentionCase& c) { c.flags = ADAATTN_FLAG_ALIBI; }, true),
      with(
          "AdditiveBias", [](AttentionCase& c) { c.bias = Bias::kPerHead; }, true),
  };
}

void PrintTo(const Feature& feature, std::ostream* out) { *out << feature.problem.name; }

class AdaptiveFeatures : public testing::TestWithParam<Feature> {};
INSTANTIATE_TEST_SUITE_P(All, AdaptiveFeatures, testing::ValuesIn(features()),
                         [](const auto& info) { return info.param.problem.name; });

// With every tile computed exactly the adaptive kernel must agree with the oracle like any other.
TEST_P(AdaptiveFeatures, DenseLevelAgreesWithTheOracle) {
  const Context context;
  AttentionData data(GetParam().problem, uniform_dtypes()[0], run_seed());
  adaattn_adaptive_desc_t adaptive = adaptive_desc(ADAATTN_POLICY_CUSTOM);
  adaptive.tile_mass = 1;
  adaptive.tolerance = 1e-6;
  const AdaptivePlan plan(context, data.desc, adaptive);
  ASSERT_TRUE(succeeded(plan.execute(data)));
  EXPECT_TRUE(matches(data, reference::attention(data.desc, data.io())));
}

// Narrower products than the inputs ask for, where the caller allows them: within their own rounding of the oracle.
TEST_P(AdaptiveFeatures, NarrowerProductsAgreeWithTheOracleWithinTheirRounding) {
  for (const Dtypes& dtypes : uniform_dtypes()) {
    AttentionData data(GetParam().problem, dtypes, run_seed());
    const reference::AttentionResult oracle = reference::attention(data.desc, data.io());
    Tensor exact(ADAATTN_DTYPE_F32, data.o.shape());
    exact.for_each([&](const std::vector<int64_t>& at, int64_t i) { exact.set(at, oracle.o[static_cast<size_t>(i)]); });
    for (const Target& target : available_targets(ADAATTN_DEVICE_CPU)) {
      const Context context(target);
      for (const adaattn_precision_t least : {ADAATTN_PRECISION_BF16, ADAATTN_PRECISION_I8}) {
        SCOPED_TRACE(std::string(target.name) + ", " + dtypes.name + ", least precision " + std::to_string(least));
        adaattn_adaptive_desc_t adaptive = adaptive_desc(ADAATTN_POLICY_CUSTOM);
        adaptive.tile_mass = 1;
        adaptive.tolerance = 0.1;
        adaptive.rank_mode = ADAATTN_RANK_OFF;
        adaptive.min_precision = least;
        const AdaptivePlan plan(context, data.desc, adaptive);
        data.poison_outputs();
        ASSERT_TRUE(succeeded(plan.execute(data)));
        // A row of one key has the error of a single score, 0.01 in the mean.
        EXPECT_TRUE(close(data.lse.values(), oracle.lse, 7e-2, 5e-3, "lse"));
        for (const adaattn_head_stats_t& head : plan.heads()) {
          if (data.len_q(head.batch) == 0 || data.len_k(head.batch) == 0) continue;
          EXPECT_LE(head_error(data, exact, head.batch, head.head), 0.02) << "head " << head.head;
          if (GetParam().always_exact) {
            EXPECT_TRUE(head.dense);
          }
        }
      }
    }
  }
}

TEST_P(AdaptiveFeatures, EveryPolicyStaysWithinItsTolerance) {
  const Context context;
  AttentionData data(GetParam().problem, uniform_dtypes()[0], run_seed());
  if (data.len_k(0) > 0) make_structured(data, {}, run_seed() + 1);
  const Tensor exact = exact_output(context, data);
  const struct {
    adaattn_policy_t policy;
    double tolerance;
  } policies[] = {{ADAATTN_POLICY_QUALITY, 0.1}, {ADAATTN_POLICY_BALANCED, 0.2}, {ADAATTN_POLICY_SPEED, 0.4}};
  for (const auto& [policy, tolerance] : policies) {
    const AdaptivePlan plan(context, data.desc, adaptive_desc(policy));
    for (int call = 0; call < 3; ++call) {
      data.poison_outputs();
      ASSERT_TRUE(succeeded(plan.execute(data)));
    }
    const auto heads = plan.heads();
    ASSERT_EQ(heads.size(), static_cast<size_t>(data.batch() * data.desc.heads_q));
    for (const adaattn_head_stats_t& head : heads) {
      if (data.len_q(head.batch) == 0 || data.len_k(head.batch) == 0) continue;
      EXPECT_LE(head_error(data, exact, head.batch, head.head), tolerance) << "policy " << policy;
      if (GetParam().always_exact) {
        EXPECT_TRUE(head.dense);
      }
    }
    if (GetParam().always_exact) {
      EXPECT_TRUE(same_bits(exact, data.o));
    }
  }
}

TEST(AdaptiveDtypes, HalfPrecisionInputs) {
  const Context context;
  for (const Dtypes& dtypes : uniform_dtypes()) {
    AttentionCase c = {.name = "Causal", .heads_q = 2, .heads_kv = 1, .seqlen_q = 1500, .seqlen_k = 1500, .d_qk = 64};
    c.mask = ADAATTN_MASK_CAUSAL;
    AttentionData data(c, dtypes, run_seed(), 0);
    make_structured(data, {}, run_seed() + 1);
    const Tensor exact = exact_output(context, data);
    const AdaptivePlan plan(context, data.desc, adaptive_desc(ADAATTN_POLICY_BALANCED));
    data.poison_outputs();
    ASSERT_TRUE(succeeded(plan.execute(data)));
    for (int64_t h = 0; h < 2; ++h) EXPECT_LT(head_error(data, exact, 0, h), 0.2) << dtypes.name;
    const adaattn_plan_stats_t stats = plan.stats();
    EXPECT_EQ(stats.heads_f32 + stats.heads_f16 + stats.heads_bf16, stats.heads);
  }
}

}  // namespace
}  // namespace adaattn::test
