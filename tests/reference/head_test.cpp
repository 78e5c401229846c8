// The oracle itself, on cases small enough to compute by hand.
#include "reference/head.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>

namespace adaattn::reference {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
const double kNaN = std::numeric_limits<double>::quiet_NaN();

Matrix column(std::vector<double> values) {
  Matrix m(static_cast<int64_t>(values.size()), 1);
  m.data = std::move(values);
  return m;
}

// One query of 1, so that the scores are the keys.
Head head_with_scores(std::vector<double> scores, std::vector<double> values) {
  Head head;
  head.q = column({1});
  head.k = column(std::move(scores));
  head.v = column(std::move(values));
  return head;
}

TEST(Reference, TwoKeysWithWeightsOneAndThree) {
  const HeadResult r = attend(head_with_scores({0, std::log(3)}, {10, 20}));
  EXPECT_NEAR(r.o(0, 0), 10 * 0.25 + 20 * 0.75, 1e-12);
  EXPECT_NEAR(r.lse[0], std::log(4), 1e-12);
  EXPECT_NEAR(r.entropy[0], 0.25 * std::log(4) + 0.75 * std::log(4.0 / 3), 1e-12);
  EXPECT_EQ(r.keys[0], 2);
  EXPECT_NEAR(r.score_scale[0], std::log(3), 1e-12);
  EXPECT_NEAR(r.o_scale[0], std::sqrt(17.5 * 17.5 + 2.5 * 2.5 + 15 * 15), 1e-12);
}

TEST(Reference, ScaleSoftcapAlibiAndBiasApplyInThisOrder) {
  Head head = head_with_scores({3, 5}, {1, 0});
  head.scale = 0.5;
  head.softcap = 2;
  head.alibi_slope = 0.25;
  head.off = 1;  // the query stands at key 1
  head.bias = Matrix(1, 2);
  head.bias(0, 0) = 0.125;
  const double s0 = 2 * std::tanh(3 * 0.5 / 2) - 0.25 + 0.125, s1 = 2 * std::tanh(5 * 0.5 / 2);
  EXPECT_NEAR(score(head, 0, 0), s0, 1e-12);
  EXPECT_NEAR(score(head, 0, 1), s1, 1e-12);
  EXPECT_NEAR(attend(head).o(0, 0), std::exp(s0) / (std::exp(s0) + std::exp(s1)), 1e-12);
}

TEST(Reference, ASinkTakesWeightButNoPartInTheEntropy) {
  Head head = head_with_scores({0, 0}, {4, 8});
  head.sink = std::log(2);
  const HeadResult r = attend(head);
  EXPECT_NEAR(r.o(0, 0), 3, 1e-12);  // weights 1/4, 1/4 and 1/2 for the sink
  EXPECT_NEAR(r.lse[0], std::log(4), 1e-12);
  EXPECT_NEAR(r.entropy[0], std::log(2), 1e-12);
}

TEST(Reference, ARowWithoutKeysIsZeroWithLseMinusInfinityOrTheSink) {
  Head head = head_with_scores({1, 2}, {kNaN, kNaN});
  head.causal = true;
  head.off = -1;
  HeadResult r = attend(head);
  EXPECT_EQ(r.o(0, 0), 0);
  EXPECT_EQ(r.lse[0], -kInf);
  EXPECT_EQ(r.entropy[0], 0);
  EXPECT_EQ(r.keys[0], 0);
  head.sink = 0.75;
  r = attend(head);
  EXPECT_EQ(r.o(0, 0), 0);
  EXPECT_DOUBLE_EQ(r.lse[0], 0.75);
}

TEST(Reference, ABiasOfMinusInfinityOnEveryKeyIsLikeNoKey) {
  Head head = head_with_scores({1, 2}, {3, 4});
  head.bias = Matrix(1, 2, -kInf);
  const HeadResult r = attend(head);
  EXPECT_EQ(r.o(0, 0), 0);
  EXPECT_EQ(r.lse[0], -kInf);
  EXPECT_EQ(r.entropy[0], 0);
}

TEST(Reference, LargeScoresDoNotOverflow) {
  const HeadResult r = attend(head_with_scores({1000, 1001, 1002}, {1, 2, 3}));
  EXPECT_NEAR(r.lse[0], 1002.4076059644443, 1e-10);
  EXPECT_NEAR(r.o(0, 0), (std::exp(-2) + 2 * std::exp(-1) + 3) / (std::exp(-2) + std::exp(-1) + 1), 1e-12);
}

TEST(Reference, CausalAndWindowMasksAsTables) {
  Head head;
  head.q = Matrix(3, 1);
  head.k = Matrix(5, 1);
  const auto picture = [&] {
    std::string rows;
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 5; ++j) rows += visible(head, i, j) ? 'x' : '.';
      rows += '\n';
    }
    return rows;
  };
  EXPECT_EQ(picture(), "xxxxx\nxxxxx\nxxxxx\n");
  head.causal = true;  // top left
  EXPECT_EQ(picture(), "x....\nxx...\nxxx..\n");
  head.off = 2;  // bottom right
  EXPECT_EQ(picture(), "xxx..\nxxxx.\nxxxxx\n");
  head.window_left = 1;
  EXPECT_EQ(picture(), ".xx..\n..xx.\n...xx\n");
  head.window_right = 0;
  EXPECT_EQ(picture(), ".xx..\n..xx.\n...xx\n");
  head.causal = false;
  head.window_right = 1;
  EXPECT_EQ(picture(), ".xxx.\n..xxx\n...xx\n");
  head.window_left = -1;
  head.off = -1;  // fewer keys than queries: the first rows see little
  EXPECT_EQ(picture(), "x....\nxx...\nxxx..\n");
}

TEST(Reference, NaNInAVisibleKeyReachesExactlyTheRowsThatSeeIt) {
  Head head;
  head.q = column({1, 1});
  head.k = column({1, kNaN});
  head.v = column({1, 2});
  head.causal = true;
  const HeadResult r = attend(head);
  EXPECT_EQ(r.o(0, 0), 1);
  EXPECT_TRUE(std::isnan(r.o(1, 0)));
  EXPECT_TRUE(std::isnan(r.lse[1]));
}

}  // namespace
}  // namespace adaattn::reference
