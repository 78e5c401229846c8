// Tiles computed with bf16 products, where the instruction set has them, against the same tiles computed in f32.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "adaptive/structured.h"
#include "support/cases.h"
#include "support/compare.h"
#include "support/random.h"

namespace adaattn::test {
namespace {

const Dtypes& kBf16 = uniform_dtypes()[2];

struct Variant {
  const char* name;
  adaattn_probe_t probe;
  adaattn_switch_t far_field;
  adaattn_rank_mode_t rank_mode;
};

AttentionCase problem(const char* name, int64_t d_qk, int64_t d_v, adaattn_mask_t mask) {
  AttentionCase c = {
      .name = name, .heads_q = 4, .heads_kv = 2, .seqlen_q = 1450, .seqlen_k = 1450, .d_qk = d_qk, .mask = mask};
  c.d_v = d_v;
  return c;
}

bool has_bf16(const char* kernel) { return std::string(kernel).find("bf16") != std::string::npos; }

bool exact_plan_has_bf16(const Context& context, const AttentionData& data) {
  return has_bf16(Plan(context, data.desc).info().kernel);
}

class Bf16Tiles : public testing::TestWithParam<Target> {
 protected:
  void SetUp() override {
    if (const std::string why = missing(GetParam()); !why.empty()) GTEST_SKIP() << why;
  }
};
INSTANTIATE_TEST_SUITE_P(Cpu, Bf16Tiles, testing::ValuesIn(listed_targets(ADAATTN_DEVICE_CPU)),
                         [](const auto& info) { return info.param.name; });

adaattn_adaptive_desc_t custom(const Variant& variant) {
  adaattn_adaptive_desc_t adaptive = adaptive_desc(ADAATTN_POLICY_CUSTOM);
  adaptive.tolerance = 0.5;
  adaptive.tile_mass = 0.9;
  adaptive.probe = variant.probe;
  adaptive.needle_share = 0.05;
  adaptive.far_field = variant.far_field;
  adaptive.rank_mode = variant.rank_mode;
  return adaptive;
}

TEST_P(Bf16Tiles, TakeTheSameTilesAsF32AndAgreeWithinRounding) {
  const Context context(GetParam());
  const Variant variants[] = {
      {"tiles", ADAATTN_PROBE_OFF, ADAATTN_SWITCH_OFF, ADAATTN_RANK_OFF},
      {"far field", ADAATTN_PROBE_OFF, ADAATTN_SWITCH_ON, ADAATTN_RANK_OFF},
      {"low rank", ADAATTN_PROBE_OFF, ADAATTN_SWITCH_ON, ADAATTN_RANK_ENERGY},
      {"probes", ADAATTN_PROBE_FULL, ADAATTN_SWITCH_ON, ADAATTN_RANK_OFF},
      {"rank probe", ADAATTN_PROBE_RANK, ADAATTN_SWITCH_ON, ADAATTN_RANK_ENERGY},
  };
  AttentionCase window = problem("Window", 64, 64, ADAATTN_MASK_CAUSAL);
  window.window_left = 1000;
  const AttentionCase cases[] = {problem("Full", 64, 64, ADAATTN_MASK_NONE),
                                 problem("Causal", 128, 128, ADAATTN_MASK_CAUSAL),
                                 problem("OddWidths", 72, 80, ADAATTN_MASK_CAUSAL), window};
  for (const AttentionCase& c : cases) {
    for (const Variant& variant : variants) {
      SCOPED_TRACE(std::string(c.name) + ", " + variant.name);
      AttentionData data(c, kBf16, run_seed());
      if (!exact_plan_has_bf16(context, data)) GTEST_SKIP() << GetParam().name << " has no bf16 products here";
      make_structured(data, {}, run_seed() + 1);
      adaattn_adaptive_desc_t adaptive = custom(variant);
      const AdaptivePlan narrow(context, data.desc, adaptive);
      adaptive.min_precision = adaptive.max_precision = ADAATTN_PRECISION_F32;
      const AdaptivePlan wide(context, data.desc, adaptive);
      EXPECT_FALSE(has_bf16(wide.info().kernel)) << wide.info().kernel;

      data.poison_outputs();
      ASSERT_TRUE(succeeded(wide.execute(data)));
      Tensor o(data.desc.dtype_q, data.o.shape());
      o.for_each([&](const std::vector<int64_t>& at, int64_t) { o.set(at, data.o.get(at)); });
      const auto lse = data.lse.values(), entropy = data.entropy.values();
      const auto wide_heads = wide.heads();
      data.poison_outputs();
      ASSERT_TRUE(succeeded(narrow.execute(data)));
      const auto heads = narrow.heads();
      ASSERT_EQ(heads.size(), wide_heads.size());
      bool some_sparse = false;
      for (size_t h = 0; h < heads.size(); ++h) {
        EXPECT_EQ(heads[h].dense, wide_heads[h].dense);
        EXPECT_EQ(heads[h].rank_v, wide_heads[h].rank_v);
        // A probe may see another score at its threshold.
        EXPECT_NEAR(heads[h].kept_tiles, wide_heads[h].kept_tiles, variant.probe == ADAATTN_PROBE_OFF ? 0 : 0.03);
        EXPECT_LT(head_error(data, o, 0, static_cast<int64_t>(h)), variant.probe == ADAATTN_PROBE_OFF ? 1e-2 : 3e-2)
            << "head " << h;
        some_sparse = some_sparse || (!heads[h].dense && heads[h].kept_tiles < 0.9);
      }
      EXPECT_TRUE(some_sparse);
      // A tile that a probe brings in changes the sums of its rows.
      auto narrow_lse = data.lse.values(), narrow_entropy = data.entropy.values();
      int64_t same = 0;
      for (int64_t h = 0; h < c.heads_q; ++h) {
        const AdaptivePlan::TileMap map = narrow.tile_map(0, h), wide_map = wide.tile_map(0, h);
        for (int64_t q = 0; q < map.query_tiles; ++q) {
          const bool equal = std::equal(map.row(q), map.row(q + 1), wide_map.row(q));
          same += equal;
          for (int64_t i = q * 128; i < std::min((q + 1) * 128, c.seqlen_q) && !equal; ++i) {
            const auto at = static_cast<size_t>(h * c.seqlen_q + i);
            narrow_lse[at] = lse[at];
            narrow_entropy[at] = entropy[at];
          }
        }
      }
      EXPECT_GE(same, c.heads_q * 9);
      EXPECT_TRUE(close(narrow_lse, lse, 5e-3, 0, "lse"));
      EXPECT_TRUE(close(narrow_entropy, entropy, 2e-2, 0, "entropy"));
    }
  }
}

TEST_P(Bf16Tiles, AreUsedWhereTheExactPlanUsesThem) {
  const Context context(GetParam());
  const AttentionData data(problem("Full", 64, 64, ADAATTN_MASK_NONE), kBf16, run_seed(), 0);
  const AdaptivePlan plan(context, data.desc, adaptive_desc(ADAATTN_POLICY_BALANCED));
  EXPECT_EQ(has_bf16(plan.info().kernel), exact_plan_has_bf16(context, data)) << plan.info().kernel;
}

// Few threads take the heads of a group together, many one by one.
TEST_P(Bf16Tiles, DoNotDependOnTheNumberOfThreads) {
  AttentionCase of_six = problem("SixHeadsOfOneKeyHead", 64, 64, ADAATTN_MASK_CAUSAL);
  of_six.heads_q = 6;
  of_six.heads_kv = 1;
  for (const AttentionCase& c : {problem("Causal", 64, 64, ADAATTN_MASK_CAUSAL), of_six}) {
    for (const adaattn_policy_t policy : {ADAATTN_POLICY_QUALITY, ADAATTN_POLICY_BALANCED}) {
      SCOPED_TRACE(std::string(c.name) + ", policy " + std::to_string(policy));
      AttentionData data(c, kBf16, run_seed());
      make_structured(data, {}, run_seed() + 1);
      std::vector<std::byte> first;
      for (const int threads : {1, 2, 5, 16}) {
        const Context context(GetParam(), threads);
        const AdaptivePlan plan(context, data.desc, adaptive_desc(policy));
        data.poison_outputs();
        ASSERT_TRUE(succeeded(plan.execute(data)));
        std::vector<std::byte> bytes = data.o.bytes();
        if (first.empty()) first = bytes;
        EXPECT_EQ(bytes, first) << threads << " threads";
      }
    }
  }
}

class Bf16Policies : public testing::TestWithParam<adaattn_policy_t> {};
INSTANTIATE_TEST_SUITE_P(All, Bf16Policies,
                         testing::Values(ADAATTN_POLICY_QUALITY, ADAATTN_POLICY_BALANCED, ADAATTN_POLICY_SPEED));

TEST_P(Bf16Policies, KeepTheirToleranceOnceFeedbackIsWarm) {
  for (const Target& target : available_targets(ADAATTN_DEVICE_CPU)) {
    SCOPED_TRACE(target.name);
    const Context context(target);
    AttentionCase c = problem("Causal", 64, 64, ADAATTN_MASK_CAUSAL);
    c.seqlen_q = c.seqlen_k = 2048;
    AttentionData data(c, kBf16, run_seed(), 0);
    make_structured(data, {}, run_seed() + 1);
    const AdaptivePlan plan(context, data.desc, adaptive_desc(GetParam()));
    const Tensor exact = exact_output(context, data);
    for (int call = 0; call < 3; ++call) {
      data.poison_outputs();
      ASSERT_TRUE(succeeded(plan.execute(data)));
    }
    const double tolerance = GetParam() == ADAATTN_POLICY_QUALITY    ? 0.1
                             : GetParam() == ADAATTN_POLICY_BALANCED ? 0.2
                                                                     : 0.4;
    for (const adaattn_head_stats_t& head : plan.heads())
      EXPECT_LE(head_error(data, exact, head.batch, head.head), tolerance) << "head " << head.head;
  }
}

// A policy's tolerance on inputs that block means say little about.
TEST_P(Bf16Policies, KeepTheirToleranceOnMisleadingInputs) {
  using Index = std::vector<int64_t>;
  AttentionCase c = problem("Causal", 128, 128, ADAATTN_MASK_CAUSAL);
  c.heads_q = 2;
  c.heads_kv = 1;
  c.seqlen_q = c.seqlen_k = 2048;
  const auto structured = [&](double value_mean) {
    AttentionData data(c, kBf16, run_seed(), 0);
    Structure structure;
    structure.value_mean = value_mean;
    make_structured(data, structure, run_seed() + 1);
    return data;
  };
  const auto for_keys = [&](AttentionData& data, auto&& set) {
    for (int64_t j = 0; j < c.seqlen_k; ++j) {
      for (int64_t x = 0; x < 128; ++x) set(data.key_index(0, j, 0, x), j, x);
    }
  };
  AttentionData mean_of_v = structured(10), mean_of_k = structured(0), duplicated = structured(0);
  for_keys(mean_of_k, [&](const Index& at, int64_t, int64_t) { mean_of_k.k.set(at, mean_of_k.k.get(at) + 20); });
  for_keys(duplicated, [&](const Index& at, int64_t j, int64_t x) {
    const Index from = duplicated.key_index(0, j / 256 * 256 + j % 4, 0, x);
    duplicated.k.set(at, duplicated.k.get(from));
    duplicated.v.set(at, duplicated.v.get(from));
  });
  const double tolerance = GetParam() == ADAATTN_POLICY_QUALITY    ? 0.1
                           : GetParam() == ADAATTN_POLICY_BALANCED ? 0.2
                                                                   : 0.4;
  for (const Target& target : available_targets(ADAATTN_DEVICE_CPU)) {
    const Context context(target);
    for (AttentionData* data : {&mean_of_v, &mean_of_k, &duplicated}) {
      SCOPED_TRACE(std::string(target.name) + (data == &mean_of_v   ? ", huge mean of V"
                                               : data == &mean_of_k ? ", huge mean of K"
                                                                    : ", duplicated tokens"));
      const Tensor exact = exact_output(context, *data);
      const AdaptivePlan plan(context, data->desc, adaptive_desc(GetParam()));
      for (int call = 0; call < 3; ++call) {
        data->poison_outputs();
        ASSERT_TRUE(succeeded(plan.execute(*data)));
      }
      for (int64_t h = 0; h < c.heads_q; ++h) EXPECT_LE(head_error(*data, exact, 0, h), tolerance) << "head " << h;
    }
  }
}

}  // namespace
}  // namespace adaattn::test
