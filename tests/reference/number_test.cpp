#include "reference/number.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

namespace adaattn::reference {
namespace {

uint16_t bits_of(double value, adaattn_dtype_t dtype) {
  uint16_t bits = 0;
  store(&bits, dtype, 0, value);
  return bits;
}

double value_of(uint16_t bits, adaattn_dtype_t dtype) { return load(&bits, dtype, 0); }

TEST(Number, KnownHalfPrecisionBits) {
  EXPECT_EQ(bits_of(1.0, ADAATTN_DTYPE_F16), 0x3c00);
  EXPECT_EQ(bits_of(-2.0, ADAATTN_DTYPE_F16), 0xc000);
  EXPECT_EQ(bits_of(65504.0, ADAATTN_DTYPE_F16), 0x7bff);
  EXPECT_EQ(bits_of(65520.0, ADAATTN_DTYPE_F16), 0x7c00) << "halfway to the next power of two is infinity";
  EXPECT_EQ(bits_of(0x1p-24, ADAATTN_DTYPE_F16), 0x0001) << "the smallest subnormal";
  EXPECT_EQ(bits_of(0x1p-25, ADAATTN_DTYPE_F16), 0x0000) << "a tie goes to even";
  EXPECT_EQ(bits_of(0x1.004p0, ADAATTN_DTYPE_F16), 0x3c01);
  EXPECT_EQ(bits_of(0x1.002p0, ADAATTN_DTYPE_F16), 0x3c00) << "a tie goes to even";
  EXPECT_EQ(bits_of(0x1.006p0, ADAATTN_DTYPE_F16), 0x3c02) << "a tie goes to even";
  EXPECT_EQ(bits_of(0x1.ffep0, ADAATTN_DTYPE_F16), 0x4000) << "rounding carries into the exponent";
}

TEST(Number, KnownBfloatBits) {
  EXPECT_EQ(bits_of(1.0, ADAATTN_DTYPE_BF16), 0x3f80);
  EXPECT_EQ(bits_of(0x1.01p0, ADAATTN_DTYPE_BF16), 0x3f80) << "a tie goes to even";
  EXPECT_EQ(bits_of(0x1.03p0, ADAATTN_DTYPE_BF16), 0x3f82) << "a tie goes to even";
  EXPECT_EQ(bits_of(-0.0, ADAATTN_DTYPE_BF16), 0x8000);
  EXPECT_EQ(bits_of(1e39, ADAATTN_DTYPE_BF16), 0x7f80);
}

TEST(Number, EveryHalfAndBfloatValueSurvivesARoundTrip) {
  for (adaattn_dtype_t dtype : {ADAATTN_DTYPE_F16, ADAATTN_DTYPE_BF16}) {
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
      const double value = value_of(static_cast<uint16_t>(bits), dtype);
      if (std::isnan(value))
        EXPECT_TRUE(std::isnan(rounded(value, dtype)));
      else
        ASSERT_EQ(bits_of(value, dtype), bits) << value;
    }
  }
}

TEST(Number, KnownE4m3Bits) {
  EXPECT_EQ(bits_of(1.0, ADAATTN_DTYPE_E4M3), 0x38);
  EXPECT_EQ(bits_of(-1.5, ADAATTN_DTYPE_E4M3), 0xbc);
  EXPECT_EQ(bits_of(448.0, ADAATTN_DTYPE_E4M3), 0x7e);
  EXPECT_EQ(bits_of(1e9, ADAATTN_DTYPE_E4M3), 0x7e) << "there is no infinity";
  EXPECT_EQ(bits_of(0x1p-9, ADAATTN_DTYPE_E4M3), 0x01) << "the smallest subnormal";
  EXPECT_EQ(bits_of(0x1p-10, ADAATTN_DTYPE_E4M3), 0x00) << "a tie goes to even";
  EXPECT_EQ(bits_of(0x1.ep-7, ADAATTN_DTYPE_E4M3), 0x08) << "rounding carries out of the subnormals";
  EXPECT_EQ(bits_of(1.0625, ADAATTN_DTYPE_E4M3), 0x38) << "a tie goes to even";
  EXPECT_EQ(bits_of(1.1875, ADAATTN_DTYPE_E4M3), 0x3a) << "a tie goes to even";
  EXPECT_EQ(bits_of(1.99, ADAATTN_DTYPE_E4M3), 0x40) << "rounding carries into the exponent";
  for (uint16_t bits = 0; bits < 256; ++bits) {
    const double value = value_of(bits, ADAATTN_DTYPE_E4M3);
    ASSERT_EQ(std::isnan(value), (bits & 0x7f) == 0x7f) << bits;
    ASSERT_EQ(bits_of(value, ADAATTN_DTYPE_E4M3), bits);
  }
}

TEST(Number, BfloatIsTheUpperHalfOfAFloat) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const uint32_t wide = bits << 16;
    float expected;
    std::memcpy(&expected, &wide, sizeof expected);
    const double value = value_of(static_cast<uint16_t>(bits), ADAATTN_DTYPE_BF16);
    if (!std::isnan(expected)) {
      ASSERT_EQ(value, expected);
    }
  }
}

}  // namespace
}  // namespace adaattn::reference
