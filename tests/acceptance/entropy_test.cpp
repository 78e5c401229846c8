// The entropy tool: exact and sampled, in nats and normalized.
#include <cmath>

#include "acceptance/tools.h"

namespace adaattn::test {
namespace {

class EntropyTool : public OnEveryTarget {};
ADAATTN_ON_EVERY_TARGET(EntropyTool);

// Queries of 1 and scale 1, so that the keys are the scores.
AttentionData with_scores(const std::vector<double>& scores) {
  AttentionCase c = {.name = "Scores", .seqlen_k = static_cast<int64_t>(scores.size()), .d_qk = 1, .scale = 1};
  AttentionData data(c, kF32All, run_seed());
  data.q.fill(1.0);
  for (size_t j = 0; j < scores.size(); ++j) data.k.set({0, static_cast<int64_t>(j), 0, 0}, scores[j]);
  return data;
}

TEST_P(EntropyTool, UniformOverTenKeysIsLnTenAndNormalizedOne) {
  const Context context(target());
  const AttentionData data = with_scores(std::vector<double>(10, 0.5));
  const Entropies nats = entropy(context, data, entropy_desc(false));
  EXPECT_NEAR(nats.rows.get({0, 0, 0}), std::log(10), 1e-6 * std::log(10));
  EXPECT_NEAR(nats.heads.get({0, 0}), std::log(10), 1e-6 * std::log(10));
  const Entropies normalized = entropy(context, data, entropy_desc(true));
  EXPECT_NEAR(normalized.rows.get({0, 0, 0}), 1, 1e-6);
  EXPECT_NEAR(normalized.heads.get({0, 0}), 1, 1e-6);
}

TEST_P(EntropyTool, OneHotRowsHaveNone) {
  const Context context(target());
  for (size_t n : {4096, 131072}) {
    std::vector<double> scores(n, 0);
    scores[n / 3] = 100;
    const AttentionData data = with_scores(scores);
    for (bool normalized : {false, true}) {
      const Entropies result = entropy(context, data, entropy_desc(normalized));
      EXPECT_LT(std::fabs(result.rows.get({0, 0, 0})), 1e-6) << n;
      EXPECT_LT(std::fabs(result.heads.get({0, 0})), 1e-6) << n;
    }
  }
}

TEST_P(EntropyTool, OneKeyHasNoneInEitherForm) {
  const Context context(target());
  for (bool normalized : {false, true}) {
    const Entropies result = entropy(context, with_scores({3}), entropy_desc(normalized));
    EXPECT_EQ(result.rows.get({0, 0, 0}), 0);
    EXPECT_EQ(result.heads.get({0, 0}), 0);
  }
}

TEST_P(EntropyTool, AgreesWithTheOracleOverTheTable) {
  const Context context(target());
  for (const AttentionCase& c : attention_cases()) {
    if (!c.reduced) continue;
    for (const Dtypes& dtypes : uniform_dtypes()) {
      SCOPED_TRACE(describe(c) + dtypes.name);
      const AttentionData data(c, dtypes, run_seed());
      const auto expected = reference::attention(data.desc, data.io());
      const Tolerance tolerance = tolerance_of(data.desc, weights_of(target()));
      for (bool normalized : {false, true}) {
        const Entropies result = entropy(context, data, entropy_desc(normalized));
        std::vector<double> rows = expected.entropy;
        for (size_t i = 0; normalized && i < rows.size(); ++i)
          rows[i] = expected.keys[i] < 2 ? rows[i] * 0 : rows[i] / std::log(expected.keys[i]);
        EXPECT_TRUE(close(result.rows.values(), rows, 2 * tolerance.entropy, 0, "entropy"));
        EXPECT_TRUE(close(result.heads.values(), reference::head_entropy(data.desc, data.io(), normalized),
                          2 * tolerance.entropy, 0, "head entropy"));
      }
    }
  }
}

TEST_P(EntropyTool, SampledMeansAreCloseToTheExactOnes) {
  const Context context(target());
  const AttentionCase c = {.name = "Sampled",
                           .batch = 2,
                           .heads_q = 4,
                           .heads_kv = 2,
                           .seqlen_q = 700,
                           .seqlen_k = 700,
                           .mask = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT};
  const AttentionData data(c, kF32All, run_seed());
  const auto exact = reference::head_entropy(data.desc, data.io(), false);
  adaattn_entropy_desc_t desc = entropy_desc(false);
  desc.mode = ADAATTN_ENTROPY_SAMPLED;
  desc.sample_rows = 100;
  desc.seed = run_seed();
  const Entropies sampled = entropy(context, data, desc);
  // Rows of a causal head differ by about 1 nat; one row from each of 100 strata leaves a few hundredths.
  EXPECT_TRUE(close(sampled.heads.values(), exact, 0.1, 0, "sampled head entropy"));
  EXPECT_FALSE(close(sampled.heads.values(), exact, 1e-7, 0, "")) << "sampling 100 of 700 rows cannot be exact";

  EXPECT_TRUE(same_bits(sampled.heads, entropy(context, data, desc).heads)) << "the same seed";
  desc.seed += 1;
  EXPECT_FALSE(same_bits(sampled.heads, entropy(context, data, desc).heads)) << "another seed draws other rows";
  desc.sample_rows = 5000;
  EXPECT_TRUE(close(entropy(context, data, desc).heads.values(), exact, 1e-4, 0, "all rows sampled"));
}

TEST_P(EntropyTool, ThreadCountsGiveTheSameBits) {
  const AttentionData data(invariant_cases()[0], kF32All, run_seed());
  const Entropies one = entropy(Context(target(), 1), data, entropy_desc(true));
  for (int32_t threads : {2, 5}) {
    const Entropies other = entropy(Context(target(), threads), data, entropy_desc(true));
    EXPECT_TRUE(same_bits(one.rows, other.rows));
    EXPECT_TRUE(same_bits(one.heads, other.heads));
  }
}

}  // namespace
}  // namespace adaattn::test
