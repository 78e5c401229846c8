#include "core/philox.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <set>

namespace adaattn {
namespace {

struct KnownAnswer {
  PhiloxBlock counter;
  uint32_t key0, key1;
  PhiloxBlock expected;
};

// Published with Random123 1.x, examples/kat_vectors, rows "philox4x32 10".
constexpr KnownAnswer kKnownAnswers[] = {
    {{{0, 0, 0, 0}}, 0, 0, {{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}}},
    {{{0xffffffffu, 0xffffffffu, 0xffffffffu, 0xffffffffu}},
     0xffffffffu,
     0xffffffffu,
     {{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}}},
    {{{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}},
     0xa4093822u,
     0x299f31d0u,
     {{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}}},
};

TEST(Philox, AgreesWithThePublishedVectors) {
  for (const KnownAnswer& row : kKnownAnswers) {
    const PhiloxBlock got = philox4x32_10(row.counter, row.key0, row.key1);
    for (int i = 0; i < 4; ++i) EXPECT_EQ(got.word[i], row.expected.word[i]) << "word " << i;
  }
}

TEST(Philox, SeedStreamAndIndexTakeTheirPlacesInKeyAndCounter) {
  const PhiloxBlock got = philox(0x299f31d0a4093822u, 0x0370734413198a2eu, 0x85a308d3243f6a88u);
  for (int i = 0; i < 4; ++i) EXPECT_EQ(got.word[i], kKnownAnswers[2].expected.word[i]) << "word " << i;
  EXPECT_EQ(random_u32(0, 0, 2), 0xbc57ac4cu);
  EXPECT_EQ(random_u64(0, 0, 1), 0x9b00dbd8bc57ac4cu);
}

TEST(Philox, HighProductAgreesWith128BitArithmetic) {
  const uint64_t values[] = {0, 1, 0xffffffffu, 0x100000000u, 0x123456789abcdef0u, ~uint64_t{0}, ~uint64_t{0} - 1};
  for (uint64_t a : values)
    for (uint64_t b : values)
      EXPECT_EQ(mul_hi64(a, b), static_cast<uint64_t>((static_cast<__uint128_t>(a) * b) >> 64)) << a << " * " << b;
}

TEST(Philox, BoundedDrawsCoverTheRangeAndStayInside) {
  std::set<int64_t> seen;
  for (uint64_t i = 0; i < 500; ++i) {
    const int64_t x = random_below(7, 3, i, 10);
    ASSERT_GE(x, 0);
    ASSERT_LT(x, 10);
    seen.insert(x);
  }
  EXPECT_EQ(seen.size(), 10u);
  EXPECT_EQ(random_below(7, 3, 0, 1), 0);
}

TEST(Philox, SignsAreBalancedAndDifferBetweenStreams) {
  int sum = 0, equal = 0;
  constexpr int kCount = 4096;
  for (uint64_t i = 0; i < kCount; ++i) {
    const float a = random_sign(11, 0, i), b = random_sign(11, 1, i);
    ASSERT_TRUE(a == 1.0f || a == -1.0f);
    sum += static_cast<int>(a);
    equal += a == b;
  }
  // Six standard deviations of a fair coin.
  EXPECT_LT(std::abs(sum), 6 * 64);
  EXPECT_LT(std::abs(2 * equal - kCount), 6 * 64);
}

}  // namespace
}  // namespace adaattn
