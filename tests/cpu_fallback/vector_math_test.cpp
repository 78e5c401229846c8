// The vector functions of every instruction set against float64.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "cpu_fallback/isa/registry.h"

namespace adaattn::cpu {
namespace {

class VectorMath : public testing::TestWithParam<adaattn_isa_t> {
 protected:
  void SetUp() override {
    if (!isa_available(GetParam())) GTEST_SKIP() << isa_name(GetParam()) << " is not available on this machine";
    kernels_ = kernels_of(GetParam());
  }
  // A length that leaves a tail in every vector width.
  static std::vector<float> range(float low, float high, size_t n = 100'003) {
    std::vector<float> x(n);
    for (size_t i = 0; i < n; ++i) x[i] = low + (high - low) * static_cast<float>(i) / static_cast<float>(n - 1);
    return x;
  }
  const KernelTable* kernels_ = nullptr;
};

TEST_P(VectorMath, Exp2IsWithinTwoUlp) {
  const std::vector<float> x = range(-126, 127);
  std::vector<float> y(x.size());
  kernels_->exp2(x.data(), y.data(), static_cast<int64_t>(x.size()));
  for (size_t i = 0; i < x.size(); ++i) {
    const double expected = std::exp2(static_cast<double>(x[i]));
    ASSERT_LT(std::fabs(y[i] / expected - 1), 2.4e-7) << "2^" << x[i] << " = " << y[i];
  }
}

TEST_P(VectorMath, Exp2OfSpecialValues) {
  const float inf = std::numeric_limits<float>::infinity();
  const std::vector<float> x = {-inf, -1000.0f, -127.0f, 0.0f, -0.0f, std::nanf(""), 1.0f};
  std::vector<float> y(x.size());
  kernels_->exp2(x.data(), y.data(), static_cast<int64_t>(x.size()));
  EXPECT_EQ(y[0], 0);
  EXPECT_EQ(y[1], 0);
  EXPECT_LT(y[2], 1e-37f);
  EXPECT_NEAR(y[3], 1, 2e-7);
  EXPECT_NEAR(y[4], 1, 2e-7);
  EXPECT_TRUE(std::isnan(y[5]));
  EXPECT_NEAR(y[6], 2, 4e-7);
}

TEST_P(VectorMath, TanhHasSmallRelativeErrorEverywhere) {
  std::vector<float> x = range(-12, 12);
  for (float tiny = 1; tiny > 1e-30f; tiny *= 0.37f) x.insert(x.end(), {tiny, -tiny});
  std::vector<float> y(x.size());
  kernels_->tanh(x.data(), y.data(), static_cast<int64_t>(x.size()));
  for (size_t i = 0; i < x.size(); ++i) {
    const double expected = std::tanh(static_cast<double>(x[i]));
    ASSERT_LE(std::fabs(y[i] - expected), 4e-7 * std::fabs(expected)) << "tanh(" << x[i] << ") = " << y[i];
  }
}

TEST_P(VectorMath, TanhOfSpecialValues) {
  const float inf = std::numeric_limits<float>::infinity();
  const std::vector<float> x = {inf, -inf, std::nanf(""), 0.0f};
  std::vector<float> y(x.size());
  kernels_->tanh(x.data(), y.data(), static_cast<int64_t>(x.size()));
  EXPECT_EQ(y[0], 1);
  EXPECT_EQ(y[1], -1);
  EXPECT_TRUE(std::isnan(y[2]));
  EXPECT_EQ(y[3], 0);
}

INSTANTIATE_TEST_SUITE_P(Isa, VectorMath, testing::ValuesIn(compiled_isa_list()),
                         [](const auto& info) { return std::string(isa_name(info.param)); });

}  // namespace
}  // namespace adaattn::cpu
