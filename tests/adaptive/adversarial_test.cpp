// Inputs made to mislead block statistics.
#include <gtest/gtest.h>

#include <cmath>

#include "adaptive/structured.h"
#include "support/cases.h"
#include "support/compare.h"
#include "support/random.h"

namespace adaattn::test {
namespace {

constexpr int64_t kSeqlen = 2048, kDim = 64;

AttentionCase causal() {
  return {.name = "Causal",
          .heads_q = 2,
          .heads_kv = 1,
          .seqlen_q = kSeqlen,
          .seqlen_k = kSeqlen,
          .d_qk = kDim,
          .mask = ADAATTN_MASK_CAUSAL};
}

AttentionData structured(const Structure& structure = {}) {
  AttentionData data(causal(), uniform_dtypes()[0], run_seed(), 0);
  make_structured(data, structure, run_seed() + 1);
  return data;
}

// Plants keys that single queries point at: query i of head 0 gives key j nearly all of its weight, while the tile's
// other keys look like nothing. Returns the pairs.
std::vector<std::pair<int64_t, int64_t>> plant_needles(AttentionData& data, Random& random, int count) {
  std::vector<std::pair<int64_t, int64_t>> pairs;
  for (int n = 0; n < count; ++n) {
    const int64_t j = 128 * (2 + 2 * n) + random.between(5, 120), i = kSeqlen - 1 - random.between(0, 300);
    std::vector<double> direction(kDim);
    for (double& x : direction) x = random.normal();
    for (int64_t c = 0; c < kDim; ++c) {
      data.k.set(data.key_index(0, j, 0, c), 4.0 * direction[static_cast<size_t>(c)]);
      data.q.set(data.query_index(0, i, 0, c), 1.2 * direction[static_cast<size_t>(c)]);
      data.v.set(data.key_index(0, j, 0, c), 3.0 * random.normal());
    }
    pairs.emplace_back(i, j);
  }
  return pairs;
}

// How many of the planted keys kept their weight, by the rows' error against the exact output.
double recall(const AttentionData& data, const Tensor& exact, const std::vector<std::pair<int64_t, int64_t>>& pairs) {
  int found = 0;
  for (const auto& [i, j] : pairs) {
    double error = 0, norm = 0;
    for (int64_t c = 0; c < kDim; ++c) {
      const auto at = data.query_index(0, i, 0, c);
      error += std::pow(data.o.get(at) - exact.get(at), 2);
      norm += std::pow(exact.get(at), 2);
    }
    found += error < 0.04 * norm ? 1 : 0;
  }
  return found / static_cast<double>(pairs.size());
}

adaattn_adaptive_desc_t probing(adaattn_probe_t probe) {
  adaattn_adaptive_desc_t adaptive = adaptive_desc(ADAATTN_POLICY_CUSTOM);
  adaptive.tolerance = 10;
  adaptive.tile_mass = 0.7;
  adaptive.probe = probe;
  adaptive.needle_share = 0.1;
  adaptive.rank_mode = ADAATTN_RANK_OFF;
  return adaptive;
}

TEST(Adversarial, IsolatedNeedlesAreNeverDroppedByTheFullProbe) {
  const Context context;
  Random random(run_seed());
  for (int trial = 0; trial < 5; ++trial) {
    AttentionData data = structured();
    const auto pairs = plant_needles(data, random, 6);
    const Tensor exact = exact_output(context, data);
    const AdaptivePlan plan(context, data.desc, probing(ADAATTN_PROBE_FULL));
    data.poison_outputs();
    ASSERT_TRUE(succeeded(plan.execute(data)));
    EXPECT_LT(plan.heads()[0].kept_tiles, 0.9);
    EXPECT_EQ(recall(data, exact, pairs), 1.0);
  }
}

TEST(Adversarial, RankProbeFindsNineNeedlesOfTen) {
  const Context context;
  Random random(run_seed());
  double sum = 0, without = 0;
  constexpr int kTrials = 8;
  for (int trial = 0; trial < kTrials; ++trial) {
    AttentionData data = structured();
    const auto pairs = plant_needles(data, random, 6);
    const Tensor exact = exact_output(context, data);
    const AdaptivePlan plan(context, data.desc, probing(ADAATTN_PROBE_RANK));
    ASSERT_TRUE(succeeded(plan.execute(data)));
    sum += recall(data, exact, pairs);
    const AdaptivePlan blind(context, data.desc, probing(ADAATTN_PROBE_OFF));
    ASSERT_TRUE(succeeded(blind.execute(data)));
    without += recall(data, exact, pairs);
  }
  EXPECT_GE(sum / kTrials, 0.9);
  EXPECT_LT(without, sum);  // the needles do need a probe
}

TEST(Adversarial, RandomNormalInputIsComputedDenseAndExactly) {
  const Context context;
  Structure none;
  none.topic = 0;
  AttentionData data = structured(none);
  const Tensor exact = exact_output(context, data);
  const auto expect_dense = [&](const adaattn_adaptive_desc_t& adaptive, const char* what) {
    SCOPED_TRACE(what);
    const AdaptivePlan plan(context, data.desc, adaptive);
    for (int call = 0; call < 2; ++call) {
      data.poison_outputs();
      ASSERT_TRUE(succeeded(plan.execute(data)));
      const auto heads = plan.heads();
      ASSERT_EQ(heads.size(), 2u);
      for (const adaattn_head_stats_t& head : heads) EXPECT_TRUE(head.dense) << "head " << head.head;
      EXPECT_TRUE(same_bits(exact, data.o));
    }
  };
  expect_dense(adaptive_desc(ADAATTN_POLICY_QUALITY), "quality");
  expect_dense(adaptive_desc(ADAATTN_POLICY_BALANCED), "balanced");
  expect_dense(adaptive_desc(ADAATTN_POLICY_SPEED), "speed");
  // Nor is there a choice of tiles that any tolerance could justify.
  adaattn_adaptive_desc_t adaptive = adaptive_desc(ADAATTN_POLICY_CUSTOM);
  adaptive.tolerance = 10;
  adaptive.tile_mass = 0.7;
  adaptive.probe = ADAATTN_PROBE_OFF;
  expect_dense(adaptive, "custom");
  adaptive.far_field = ADAATTN_SWITCH_OFF;
  expect_dense(adaptive, "custom without the far field");
}

void expect_within(const AttentionData& data, double tolerance, const char* what) {
  const Context context;
  AttentionData copy = data;
  const Tensor exact = exact_output(context, copy);
  const AdaptivePlan plan(context, copy.desc, adaptive_desc(ADAATTN_POLICY_BALANCED));
  for (int call = 0; call < 3; ++call) {
    copy.poison_outputs();
    ASSERT_TRUE(succeeded(plan.execute(copy)));
  }
  for (int64_t h = 0; h < copy.desc.heads_q; ++h)
    EXPECT_LE(head_error(copy, exact, 0, h), tolerance) << what << ", head " << h;
}

TEST(Adversarial, OutlierChannel) {
  AttentionData data = structured();
  for (int64_t j = 0; j < kSeqlen; ++j) {
    const auto at = data.key_index(0, j, 0, 7);
    data.k.set(at, 1e5 * (1 + 1e-7 * data.k.get(at)));
  }
  for (int64_t i = 0; i < kSeqlen; ++i) {
    for (int64_t h = 0; h < 2; ++h) {
      const auto at = data.query_index(0, i, h, 7);
      data.q.set(at, 1e-5 * data.q.get(at));
    }
  }
  expect_within(data, 0.2, "outlier channel");
}

TEST(Adversarial, HugeMeanOfV) {
  Structure structure;
  structure.value_mean = 1000;
  expect_within(structured(structure), 0.2, "mean of V");
}

TEST(Adversarial, DuplicatedTokens) {
  AttentionData data = structured();
  for (int64_t j = 0; j < kSeqlen; ++j) {
    for (int64_t c = 0; c < kDim; ++c) {
      const int64_t from = j / 256 * 256 + j % 4;
      data.k.set(data.key_index(0, j, 0, c), data.k.get(data.key_index(0, from, 0, c)));
      data.v.set(data.key_index(0, j, 0, c), data.v.get(data.key_index(0, from, 0, c)));
    }
  }
  expect_within(data, 0.2, "duplicated tokens");
}

TEST(Adversarial, RowsSplitBetweenTwoDistantKeys) {
  AttentionData data = structured();
  Random random(run_seed() + 5);
  std::vector<double> direction(kDim);
  for (double& x : direction) x = random.normal();
  for (int64_t c = 0; c < kDim; ++c) {
    const double x = 5 * direction[static_cast<size_t>(c)];
    data.k.set(data.key_index(0, 300, 0, c), x);
    data.k.set(data.key_index(0, 1300, 0, c), x);
    for (int64_t i = 1400; i < kSeqlen; ++i)
      data.q.set(data.query_index(0, i, 0, c), direction[static_cast<size_t>(c)]);
  }
  expect_within(data, 0.2, "p = 1/2, 1/2");
}

TEST(Adversarial, FutureValuesThatAreNaNDoNotReachThePast) {
  const Context context;
  AttentionData data = structured();
  const int64_t cut = 1500;
  const AdaptivePlan plan(context, data.desc, adaptive_desc(ADAATTN_POLICY_BALANCED));
  for (int64_t j = cut; j < kSeqlen; ++j) {
    for (int64_t c = 0; c < kDim; ++c) data.v.set(data.key_index(0, j, 0, c), std::numeric_limits<double>::quiet_NaN());
  }
  ASSERT_TRUE(succeeded(plan.execute(data)));
  for (int64_t i = 0; i < kSeqlen; ++i) {
    for (int64_t c = 0; c < kDim; ++c)
      ASSERT_EQ(std::isnan(data.o.get(data.query_index(0, i, 1, c))), i >= cut) << "row " << i;
  }
}

}  // namespace
}  // namespace adaattn::test
