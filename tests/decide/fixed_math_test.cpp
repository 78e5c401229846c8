#include "decide/fixed_math.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace adaattn::decide {
namespace {

TEST(FixedMath, Exp2IsAccurateOverItsRange) {
  double worst = 0;
  for (double x = -125.99; x <= 127.0; x += 0.001037) {
    const float xf = static_cast<float>(x);
    worst = std::max(worst, std::abs(fixed_exp2(xf) / std::exp2(static_cast<double>(xf)) - 1));
  }
  EXPECT_LT(worst, 3e-7);
}

TEST(FixedMath, Exp2OfIntegersIsExact) {
  for (int n = -126; n <= 127; ++n) EXPECT_EQ(fixed_exp2(static_cast<float>(n)), std::ldexp(1.0f, n)) << n;
}

TEST(FixedMath, Exp2OfVeryNegativeOrNaNIsZero) {
  EXPECT_EQ(fixed_exp2(-127.0f), 0.0f);
  EXPECT_EQ(fixed_exp2(-std::numeric_limits<float>::infinity()), 0.0f);
  EXPECT_EQ(fixed_exp2(std::numeric_limits<float>::quiet_NaN()), 0.0f);
}

TEST(FixedMath, Log2IsAccurateOverTheNormalNumbers) {
  for (double x = 1.2e-38; x < 3e38; x *= 1.00731) {
    const float xf = static_cast<float>(x);
    const double exact = std::log2(static_cast<double>(xf));
    EXPECT_LT(std::abs(fixed_log2(xf) - exact), 3e-7 * std::max(1.0, std::abs(exact))) << xf;
  }
}

TEST(FixedMath, Log2OfZeroDenormalAndNegativeIsItsFloor) {
  EXPECT_EQ(fixed_log2(0.0f), -127.0f);
  EXPECT_EQ(fixed_log2(1e-39f), -127.0f);
  EXPECT_EQ(fixed_log2(-1.0f), -127.0f);
}

TEST(FixedMath, Log2UndoesExp2) {
  for (float x = -120; x < 120; x += 0.37f) EXPECT_NEAR(fixed_log2(fixed_exp2(x)), x, 1e-5f);
}

}  // namespace
}  // namespace adaattn::decide
