// Large, small and non-finite numbers.
#include <cmath>
#include <limits>

#include "attention/fixture.h"

namespace adaattn::test {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
const double kNaN = std::numeric_limits<double>::quiet_NaN();

class Numerics : public OnEveryTarget {};
ADAATTN_ON_EVERY_TARGET(Numerics);

// One query of 1 and scale 1, so that the keys are the scores.
AttentionData with_scores(const std::vector<double>& scores, int64_t seqlen_q = 1) {
  AttentionCase c = {.name = "Scores",
                     .seqlen_q = seqlen_q,
                     .seqlen_k = static_cast<int64_t>(scores.size()),
                     .d_qk = 1,
                     .d_v = 3,
                     .scale = 1};
  AttentionData data(c, kF32All, run_seed());
  data.q.fill(1.0);
  for (size_t j = 0; j < scores.size(); ++j) data.k.set({0, static_cast<int64_t>(j), 0, 0}, scores[j]);
  return data;
}

TEST_P(Numerics, ScoresOfAThousandDoNotOverflow) {
  for (int64_t seqlen_q : {1, 40}) {
    AttentionData data = with_scores({1000, 1001, 1002}, seqlen_q);
    run(Context(target()), data);
    for (double lse : data.lse.values()) EXPECT_NEAR(lse, 1002.4076059644443, 1e-4);
    EXPECT_TRUE(matches(data, reference::attention(data.desc, data.io()), weights_of(target())));
  }
}

TEST_P(Numerics, ScoresFarApartOrVeryNegative) {
  for (const std::vector<double>& scores :
       {std::vector<double>{-1000, -1001, -1002}, {0, 200}, {200, 0}, {-3e4, 3e4}, {1e-30, -1e-30}, {88, 89, -104}}) {
    for (int64_t seqlen_q : {1, 40}) {
      AttentionData data = with_scores(scores, seqlen_q);
      run(Context(target()), data);
      EXPECT_TRUE(matches(data, reference::attention(data.desc, data.io()), weights_of(target())))
          << scores[0] << ", " << scores[1];
    }
  }
}

TEST_P(Numerics, RisingScoresRescaleWhatCameBefore) {
  std::vector<double> rising(700), falling(700);
  for (size_t j = 0; j < rising.size(); ++j) {
    rising[j] = 0.3 * static_cast<double>(j);
    falling[rising.size() - 1 - j] = rising[j];
  }
  for (const auto& scores : {rising, falling}) {
    for (int64_t seqlen_q : {1, 40}) {
      AttentionData data = with_scores(scores, seqlen_q);
      run(Context(target()), data);
      EXPECT_TRUE(matches(data, reference::attention(data.desc, data.io()), weights_of(target())));
    }
  }
}

// Scores that leave those of the blocks before far behind, in steps, all at once and for some rows only.
TEST_P(Numerics, ScoresThatOutgrowEarlierBlocksIn16Bits) {
  // In the dimension that products add last: tensor cores round every partial sum towards zero. On a
  // GPU more rows than a tile of queries has; the oracle takes most of this test's time on the CPU.
  constexpr int64_t kQueries = kOnCpu ? 70 : 300, kKeys = 1000, kLast = 127;
  const std::pair<const char*, double (*)(int64_t)> profiles[] = {
      {"to the first key", [](int64_t j) { return 0.5 * static_cast<double>(kKeys - j); }},
      {"to the last key", [](int64_t j) { return 0.5 * static_cast<double>(j); }},
      {"first key alone", [](int64_t j) { return j == 0 ? 300.0 : 0.0; }},
      {"one key in the middle", [](int64_t j) { return j == 400 ? 400.0 : -100.0; }},
  };
  for (const auto& [name, level] : profiles) {
    for (const adaattn_mask_t mask : {ADAATTN_MASK_NONE, ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT}) {
      for (const Dtypes& dtypes : {kBf16All, kF16All}) {
        for (int64_t only : {1, 7}) {
          SCOPED_TRACE(std::string(name) + " " + dtypes.name);
          const AttentionCase c = {.name = "Outgrow",
                                   .heads_q = 2,
                                   .heads_kv = 1,
                                   .seqlen_q = kQueries,
                                   .seqlen_k = kKeys,
                                   .d_qk = kLast + 1,
                                   .mask = mask};
          AttentionData data(c, dtypes, run_seed());
          for (int64_t h = 0; h < c.heads_q; ++h)
            for (int64_t i = 0; i < kQueries; ++i) data.q.set({0, i, h, kLast}, i % only == 0 ? 1 : 0);
          for (int64_t j = 0; j < kKeys; ++j) data.k.set({0, j, 0, kLast}, level(j));
          run(Context(target()), data);
          EXPECT_TRUE(matches(data, reference::attention(data.desc, data.io()), weights_of(target())));
        }
      }
    }
  }
}

TEST_P(Numerics, OneHotRowsOfAnyLengthHaveNoEntropy) {
  for (size_t n : {4096, 131072}) {
    std::vector<double> scores(n, 0);
    scores[n / 2] = 100;
    AttentionData data = with_scores(scores);
    run(Context(target()), data);
    EXPECT_LT(std::fabs(data.entropy.get({0, 0, 0})), 1e-6) << n;
    EXPECT_NEAR(data.lse.get({0, 0, 0}), 100, 1e-4);
  }
}

TEST_P(Numerics, NaNInAVisibleInputReachesExactlyItsRows) {
  for (const AttentionCase& c : invariant_cases()) {
    for (const Dtypes& dtypes : uniform_dtypes()) {
      for (int which = 0; which < 3; ++which) {
        SCOPED_TRACE(describe(c) + dtypes.name + " in " + "qkv"[which]);
        AttentionData data(c, dtypes, run_seed());
        if (which == 0) data.q.set({0, c.seqlen_q / 2, 1, 3}, kNaN);
        if (which == 1) data.k.set({1, 5, 0, 2}, kNaN);
        if (which == 2) data.v.set({1, 5, 1, 2}, kNaN);
        run(Context(target()), data);
        EXPECT_TRUE(matches(data, reference::attention(data.desc, data.io()), weights_of(target())));
      }
    }
  }
}

TEST_P(Numerics, NaNInBiasOrSinkShows) {
  AttentionCase c = invariant_cases()[0];
  for (int64_t seqlen_q : {1, 33}) {
    c.seqlen_q = seqlen_q;
    c.bias = Bias::kFull;
    c.flags = ADAATTN_FLAG_SINK;
    AttentionData data(c, kF32All, run_seed());
    data.bias.set({0, 1, 0, 7}, kNaN);
    run(Context(target()), data);
    EXPECT_TRUE(matches(data, reference::attention(data.desc, data.io()), weights_of(target())));
    data.sinks.set({2}, kNaN);
    run(Context(target()), data);
    EXPECT_TRUE(std::isnan(data.o.get({0, 0, 2, 0})));
    EXPECT_TRUE(std::isnan(data.lse.get({0, 2, 0})));
    EXPECT_FALSE(std::isnan(data.o.get({0, 0, 3, 0})));
  }
}

TEST_P(Numerics, InfiniteValuesComeThrough) {
  for (int64_t seqlen_q : {1, 40}) {
    AttentionData data = with_scores({0, 1, 2}, seqlen_q);
    data.v.set({0, 1, 0, 0}, kInf);
    data.v.set({0, 2, 0, 1}, -kInf);
    run(Context(target()), data);
    EXPECT_TRUE(matches(data, reference::attention(data.desc, data.io()), weights_of(target())));
  }
}

TEST_P(Numerics, SinksOfMinusInfinityAreAbsent) {
  for (int64_t seqlen_q : {1, 33}) {
    AttentionCase c = {.name = "Sink",
                       .heads_q = 2,
                       .heads_kv = 2,
                       .seqlen_q = seqlen_q,
                       .seqlen_k = 50,
                       .mask = ADAATTN_MASK_CAUSAL,
                       .flags = ADAATTN_FLAG_SINK,
                       .used_k = {20}};
    AttentionData data(c, kF32All, run_seed());
    data.sinks.fill(-kInf);
    run(Context(target()), data);
    EXPECT_TRUE(matches(data, reference::attention(data.desc, data.io()), weights_of(target())));
  }
}

TEST_P(Numerics, InputsTimesAHundredAndOverAHundred) {
  for (AttentionCase c : invariant_cases()) {
    for (double factor : {100.0, 0.01}) {
      c.input_scale = factor;
      for (const Dtypes& dtypes : uniform_dtypes()) {
        SCOPED_TRACE(describe(c) + dtypes.name);
        AttentionData data(c, dtypes, run_seed());
        run(Context(target()), data);
        EXPECT_TRUE(matches(data, reference::attention(data.desc, data.io()), weights_of(target())));
        for (double x : data.o.values()) ASSERT_TRUE(std::isfinite(x));
      }
    }
  }
}

TEST_P(Numerics, SoftcapAtItsLimits) {
  for (AttentionCase c : invariant_cases()) {
    c.softcap = 2;
    for (double factor : {1e-3, 1.0, 30.0}) {
      c.input_scale = factor;
      AttentionData data(c, kF32All, run_seed());
      run(Context(target()), data);
      EXPECT_TRUE(matches(data, reference::attention(data.desc, data.io()), weights_of(target()))) << factor;
    }
  }
}

TEST_P(Numerics, FullyMaskedRowsAreZeroWithLseMinusInfinity) {
  for (const Dtypes& dtypes : uniform_dtypes()) {
    AttentionCase c = {.name = "Masked",
                       .heads_q = 2,
                       .heads_kv = 2,
                       .seqlen_q = 200,
                       .seqlen_k = 30,
                       .mask = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT};
    AttentionData data(c, dtypes, run_seed());
    run(Context(target()), data);
    for (int64_t i = 0; i < 170; ++i) {
      for (int64_t d = 0; d < c.d_qk; ++d) ASSERT_EQ(data.o.get({0, i, 1, d}), 0);
      ASSERT_EQ(data.lse.get({0, 1, i}), -kInf);
      ASSERT_EQ(data.entropy.get({0, 1, i}), 0);
    }
  }
}

}  // namespace
}  // namespace adaattn::test
