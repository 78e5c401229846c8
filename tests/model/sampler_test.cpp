#include "engine/sampler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "model/expect_error.h"

namespace {

using generate::Sampler;
using generate::SamplingOptions;
using model_test::expect_error;

SamplingOptions plain() {
  SamplingOptions options;
  options.temperature = 1.0;
  options.top_p = 1.0;
  return options;
}

std::vector<int> histogram(const SamplingOptions& options, const std::vector<float>& logits, int draws) {
  Sampler sampler(options);
  std::vector<int> counts(logits.size());
  for (int i = 0; i < draws; ++i) ++counts[sampler.next(logits)];
  return counts;
}

TEST(Sampler, GreedyTakesTheLargestLogitAndTheLowerIdOfATie) {
  SamplingOptions options;
  options.greedy = true;
  Sampler sampler(options);
  EXPECT_EQ(sampler.next(std::vector<float>{0.0f, 3.0f, -1.0f, 3.0f}), 1);
}

TEST(Sampler, DrawsWithTheProbabilitiesOfTheSoftmax) {
  constexpr int kDraws = 20000;
  const std::vector<float> logits = {std::log(5.0f), std::log(3.0f), std::log(2.0f)};
  const std::vector<int> counts = histogram(plain(), logits, kDraws);
  const double expected[] = {0.5, 0.3, 0.2};
  // Five standard deviations of a binomial count.
  for (int i = 0; i < 3; ++i)
    EXPECT_NEAR(counts[i], kDraws * expected[i], 5 * std::sqrt(kDraws * expected[i] * (1 - expected[i])));
}

TEST(Sampler, TemperatureSharpens) {
  constexpr int kDraws = 20000;
  SamplingOptions options = plain();
  options.temperature = 0.5;  // squares the odds: 25 to 9 to 4
  const std::vector<int> counts = histogram(options, {std::log(5.0f), std::log(3.0f), std::log(2.0f)}, kDraws);
  const double expected = 25.0 / 38;
  EXPECT_NEAR(counts[0], kDraws * expected, 5 * std::sqrt(kDraws * expected * (1 - expected)));
}

TEST(Sampler, TopKKeepsTheLikeliest) {
  SamplingOptions options = plain();
  options.top_k = 2;
  const std::vector<int> counts = histogram(options, {0.0f, 0.2f, -0.1f, 0.1f}, 2000);
  EXPECT_EQ(counts[0] + counts[2], 0);
  EXPECT_GT(counts[1], 0);
  EXPECT_GT(counts[3], 0);
  options.top_k = 1;
  EXPECT_EQ(histogram(options, {0.0f, 0.2f, -0.1f, 0.1f}, 50)[1], 50);
}

TEST(Sampler, TopPKeepsTheFewestThatReachTheShare) {
  SamplingOptions options = plain();
  options.top_p = 0.75;  // 0.5 falls short, 0.5 + 0.3 reaches it
  const std::vector<int> counts = histogram(options, {std::log(2.0f), std::log(5.0f), std::log(3.0f)}, 2000);
  EXPECT_EQ(counts[0], 0);
  EXPECT_GT(counts[2], 0);
  options.top_p = 1e-9;
  EXPECT_EQ(histogram(options, {0.0f, 0.5f}, 50)[1], 50);
}

TEST(Sampler, ASeedRepeatsItsDrawsAndAnotherDoesNot) {
  const std::vector<float> logits(64, 0.0f);
  const auto draws = [&](uint64_t seed) {
    SamplingOptions options = plain();
    options.seed = seed;
    Sampler sampler(options);
    std::vector<int32_t> result;
    for (int i = 0; i < 100; ++i) result.push_back(sampler.next(logits));
    return result;
  };
  EXPECT_EQ(draws(3), draws(3));
  EXPECT_NE(draws(3), draws(4));
}

TEST(Sampler, RefusesBadOptionsAndLogits) {
  const auto with = [](auto member, auto value) {
    return [=] {
      SamplingOptions options;
      options.*member = value;
      Sampler sampler(options);
    };
  };
  expect_error(with(&SamplingOptions::temperature, 0.0), "temperature is 0");
  expect_error(with(&SamplingOptions::temperature, std::nan("")), "temperature is");
  expect_error(with(&SamplingOptions::top_k, int64_t{-1}), "top-k is -1");
  expect_error(with(&SamplingOptions::top_p, 0.0), "top-p is 0");
  expect_error(with(&SamplingOptions::top_p, 1.5), "top-p is 1.5");
  expect_error([] { Sampler(SamplingOptions()).next(std::vector<float>{0.0f, NAN}); }, "not finite");
}

}  // namespace
