// The comparison itself: it must accept rounding and see everything else.
#include "support/compare.h"

#include <cmath>
#include <limits>

#include "support/context.h"

namespace adaattn::test {
namespace {

// Data whose outputs are the oracle's own, rounded to their formats.
struct Perfect {
  AttentionData data;
  reference::AttentionResult expected;
};

Perfect perfect(const Dtypes& dtypes) {
  const AttentionCase c = {.name = "Perfect",
                           .heads_q = 2,
                           .heads_kv = 1,
                           .seqlen_q = 9,
                           .seqlen_k = 30,
                           .mask = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT};
  Perfect p{AttentionData(c, dtypes, 1), {}};
  p.expected = reference::attention(p.data.desc, p.data.io());
  p.data.o.for_each([&](const auto& i, int64_t flat) { p.data.o.set(i, p.expected.o[flat]); });
  p.data.lse.for_each([&](const auto& i, int64_t flat) { p.data.lse.set(i, p.expected.lse[flat]); });
  p.data.entropy.for_each([&](const auto& i, int64_t flat) { p.data.entropy.set(i, p.expected.entropy[flat]); });
  return p;
}

TEST(Comparison, AcceptsTheOracleRoundedToEachFormat) {
  for (const Dtypes& dtypes : uniform_dtypes()) {
    const Perfect p = perfect(dtypes);
    EXPECT_TRUE(matches(p.data, p.expected, Weights::kFloat)) << dtypes.name;
    EXPECT_TRUE(matches(p.data, p.expected, Weights::kInputType)) << dtypes.name;
  }
}

TEST(Comparison, SeesOneWrongElementAndNamesIt) {
  for (const Dtypes& dtypes : uniform_dtypes()) {
    Perfect p = perfect(dtypes);
    const double right = p.data.o.get({0, 4, 1, 17});
    p.data.o.set({0, 4, 1, 17}, right + 0.1);
    const auto result = matches(p.data, p.expected);
    EXPECT_FALSE(result);
    EXPECT_NE(std::string(result.message()).find("o[0, 4, 1, 17]"), std::string::npos) << result.message();
  }
}

TEST(Comparison, SeesASmallErrorOfAWholeRow) {
  for (const Dtypes& dtypes : uniform_dtypes()) {
    Perfect p = perfect(dtypes);
    const double factor = 1 + 3 * tolerance_of(p.data.desc).o;  // of each element less than kElementFactor allows
    for (int64_t c = 0; c < 64; ++c) p.data.o.set({0, 4, 1, c}, p.data.o.get({0, 4, 1, c}) * factor);
    EXPECT_FALSE(matches(p.data, p.expected)) << dtypes.name;
  }
}

TEST(Comparison, SeesNaNInfinityAndPoisonThatStayed) {
  for (double wrong : {std::nan(""), std::numeric_limits<double>::infinity()}) {
    Perfect p = perfect(uniform_dtypes()[0]);
    p.data.o.set({0, 0, 0, 0}, wrong);
    EXPECT_FALSE(matches(p.data, p.expected));
    p = perfect(uniform_dtypes()[0]);
    p.data.lse.set({0, 1, 8}, wrong);
    EXPECT_FALSE(matches(p.data, p.expected));
  }
}

TEST(Comparison, SeesNumbersWhereNaNOrInfinityIsDue) {
  Perfect p = perfect(uniform_dtypes()[0]);
  p.expected.o[5] = std::nan("");
  EXPECT_FALSE(matches(p.data, p.expected));
  p = perfect(uniform_dtypes()[0]);
  p.expected.lse[3] = -std::numeric_limits<double>::infinity();
  EXPECT_FALSE(matches(p.data, p.expected));
}

TEST(Comparison, SeesWrongLseAndEntropy) {
  Perfect p = perfect(uniform_dtypes()[0]);
  p.data.lse.set({0, 1, 3}, p.data.lse.get({0, 1, 3}) + 1e-4);
  EXPECT_FALSE(matches(p.data, p.expected));
  p = perfect(uniform_dtypes()[0]);
  p.data.entropy.set({0, 1, 3}, p.data.entropy.get({0, 1, 3}) + 1e-4);
  EXPECT_FALSE(matches(p.data, p.expected));
}

TEST(Comparison, SeesOneChangedBit) {
  const Tensor a(ADAATTN_DTYPE_F32, {3, 4}), b(ADAATTN_DTYPE_F32, {3, 4});
  Tensor c = b;
  c.fill(1.0);
  Tensor d = a;
  d.fill(1.0);
  EXPECT_TRUE(same_bits(a, b));
  c.set({2, 1}, 1 + 0x1p-23);
  const auto result = same_bits(a, b);
  EXPECT_FALSE(result);
  EXPECT_NE(std::string(result.message()).find("[2, 1]"), std::string::npos) << result.message();
}

}  // namespace
}  // namespace adaattn::test
