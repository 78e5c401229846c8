#include "engine/elementwise.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "engine/float_types.h"

namespace {

// The value of an f16 by its definition (IEEE 754 binary16).
double f16_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double sign = bits >> 15 != 0 ? -1.0 : 1.0;
  if (exponent == 31) return mantissa != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * HUGE_VAL;
  if (exponent == 0) return sign * std::ldexp(mantissa, -24);
  return sign * std::ldexp(1024 + mantissa, exponent - 25);
}

TEST(FloatTypes, EveryF16WidensToItsValueAndBack) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float wide = generate::f16_to_f32(half);
    if (std::isnan(f16_value(half))) {
      EXPECT_TRUE(std::isnan(wide)) << bits;
      EXPECT_TRUE(std::isnan(f16_value(generate::f32_to_f16(wide)))) << bits;
    } else {
      ASSERT_EQ(wide, f16_value(half)) << bits;
      ASSERT_EQ(generate::f32_to_f16(wide), half) << bits;
    }
  }
}

TEST(FloatTypes, F16RoundsToTheNearerNeighbourAndTiesToEven) {
  // Between each pair of neighbours: the middle, and one f32 step to either side of it.
  for (uint16_t low = 0; low < 0x7bff; ++low) {
    const double middle = (f16_value(low) + f16_value(static_cast<uint16_t>(low + 1))) / 2;
    const auto tie = static_cast<float>(middle);
    ASSERT_EQ(tie, middle);
    ASSERT_EQ(generate::f32_to_f16(tie), low % 2 == 0 ? low : low + 1) << low;
    ASSERT_EQ(generate::f32_to_f16(std::nextafter(tie, 0.0f)), low) << low;
    ASSERT_EQ(generate::f32_to_f16(std::nextafter(tie, 1e9f)), low + 1) << low;
    ASSERT_EQ(generate::f32_to_f16(-tie), 0x8000 | (low % 2 == 0 ? low : low + 1)) << low;
  }
  EXPECT_EQ(generate::f32_to_f16(65519.996f), 0x7bff);
  EXPECT_EQ(generate::f32_to_f16(65520.0f), 0x7c00);
  EXPECT_EQ(generate::f32_to_f16(1e30f), 0x7c00);
  EXPECT_EQ(generate::f32_to_f16(-HUGE_VALF), 0xfc00);
}

// The value of an E4M3 by its definition (OCP 8-bit floating point specification).
double e4m3_value(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  const double sign = bits >> 7 != 0 ? -1.0 : 1.0;
  if (exponent == 15 && mantissa == 7) return std::numeric_limits<double>::quiet_NaN();
  return sign * (exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10));
}

TEST(FloatTypes, E4m3RoundsToTheNearerNeighbourAndTiesToEvenAndSaturates) {
  for (uint8_t low = 0; low < 0x7e; ++low) {
    ASSERT_EQ(generate::f32_to_e4m3(static_cast<float>(e4m3_value(low))), low);
    const auto tie = static_cast<float>((e4m3_value(low) + e4m3_value(static_cast<uint8_t>(low + 1))) / 2);
    ASSERT_EQ(generate::f32_to_e4m3(tie), low % 2 == 0 ? low : low + 1) << +low;
    ASSERT_EQ(generate::f32_to_e4m3(std::nextafter(tie, 0.0f)), low) << +low;
    ASSERT_EQ(generate::f32_to_e4m3(std::nextafter(tie, 1e9f)), low + 1) << +low;
    ASSERT_EQ(generate::f32_to_e4m3(-tie), 0x80 | (low % 2 == 0 ? low : low + 1)) << +low;
  }
  for (const float large : {448.0f, 449.0f, 1e30f, HUGE_VALF}) EXPECT_EQ(generate::f32_to_e4m3(large), 0x7e);
  EXPECT_EQ(generate::f32_to_e4m3(-1e30f), 0xfe);
  EXPECT_EQ(generate::f32_to_e4m3(std::nanf("")) & 0x7f, 0x7f);
}

TEST(FloatTypes, Bf16RoundsToTheNearerNeighbourAndTiesToEven) {
  for (uint32_t low = 0; low < 0x7f7f; ++low) {
    const auto half = static_cast<uint16_t>(low);
    ASSERT_EQ(generate::f32_to_bf16(generate::bf16_to_f32(half)), half);
    const float tie = std::bit_cast<float>(low << 16 | 0x8000u);
    ASSERT_EQ(generate::f32_to_bf16(tie), low % 2 == 0 ? low : low + 1) << low;
    ASSERT_EQ(generate::f32_to_bf16(std::nextafter(tie, 0.0f)), low) << low;
    ASSERT_EQ(generate::f32_to_bf16(std::nextafter(tie, HUGE_VALF)), low + 1) << low;
  }
  EXPECT_EQ(generate::f32_to_bf16(std::numeric_limits<float>::max()), 0x7f80);
  EXPECT_TRUE(std::isnan(generate::bf16_to_f32(generate::f32_to_bf16(std::nanf("1")))));
  EXPECT_TRUE(std::isnan(generate::bf16_to_f32(generate::f32_to_bf16(std::bit_cast<float>(0x7f800001u)))));
}

TEST(Elementwise, SwigluMatchesFloat64OverTheWholeRange) {
  // Sizes around vector widths; gates from where e^-x overflows to where it vanishes.
  for (const int64_t size : {1, 7, 16, 33, 1000}) {
    std::vector<float> gate_up(2 * size), out(size, NAN);
    for (int64_t i = 0; i < size; ++i) {
      gate_up[i] = -120.0f + 240.0f * static_cast<float>(i) / static_cast<float>(size);
      gate_up[size + i] = 1.0f + static_cast<float>(i % 5);
    }
    generate::swiglu(gate_up.data(), 1, size, out.data());
    for (int64_t i = 0; i < size; ++i) {
      const double gate = gate_up[i], expected = gate / (1.0 + std::exp(-gate)) * gate_up[size + i];
      ASSERT_NEAR(out[i], expected, 1e-6 * std::abs(expected) + 1e-30) << "gate " << gate;
    }
  }
}

TEST(Elementwise, RmsNormMatchesFloat64) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  for (const int64_t size : {1, 5, 32, 45, 384}) {
    std::vector<float> x(3 * size), weight(size), out(3 * size, NAN);
    for (float& value : x) value = normal(random);
    for (float& value : weight) value = normal(random);
    generate::rms_norm(x.data(), weight.data(), 1e-5f, 3, size, out.data());
    for (int64_t row = 0; row < 3; ++row) {
      double squares = 0;
      for (int64_t i = 0; i < size; ++i) squares += static_cast<double>(x[row * size + i]) * x[row * size + i];
      const double scale = 1 / std::sqrt(squares / static_cast<double>(size) + 1e-5);
      for (int64_t i = 0; i < size; ++i)
        ASSERT_NEAR(out[row * size + i], x[row * size + i] * scale * weight[i], 2e-6) << size;
    }
  }
}

TEST(Elementwise, LossOfALogitFarFromTheOthersIsExact) {
  const std::vector<float> logits = {100.0f, 0.0f, -100.0f};
  EXPECT_NEAR(generate::negative_log_likelihood(logits.data(), 3, 0), std::log1p(std::exp(-100.0)), 1e-15);
  EXPECT_NEAR(generate::negative_log_likelihood(logits.data(), 3, 2), 200.0, 1e-12);
}

}  // namespace
