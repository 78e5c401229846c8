// Comparison with the oracle: first the positions of inf and NaN must agree, then errors are measured against what
// rounding acts on, and the worst element is named.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "reference/attention.h"
#include "support/attention_data.h"

namespace adaattn::test {

// o: relative to a row's o_scale (see reference::HeadResult), for the whole row; single elements may be off by
// kElementFactor as much. lse and entropy: absolute.
struct Tolerance {
  double o, lse, entropy;
  double o_floor = 0;  // absolute: weights and outputs below it are subnormal or zero in the format
};
inline constexpr double kElementFactor = 4;

// Whether the weights enter the second product as floats or rounded to the input type, and to f16 where that is E4M3.
enum class Weights { kFloat, kInputType, kInputTypeOrF16 };

// The tolerance belongs to the number formats: of o, and of q, k and v where weights are rounded to them.
Tolerance tolerance_of(const adaattn_attn_desc_t& desc, Weights weights = Weights::kInputType);

// expected has NaN where the output must still hold its poison.
testing::AssertionResult matches(const AttentionData& data, const reference::AttentionResult& expected,
                                 const Tolerance& tolerance);
inline testing::AssertionResult matches(const AttentionData& data, const reference::AttentionResult& expected,
                                        Weights weights = Weights::kInputType) {
  return matches(data, expected, tolerance_of(data.desc, weights));
}

// Element by element within absolute or relative tolerance.
testing::AssertionResult close(const std::vector<double>& actual, const std::vector<double>& expected, double absolute,
                               double relative, const char* what);

// Bytewise; names the first element that differs.
testing::AssertionResult same_bits(const Tensor& a, const Tensor& b);

}  // namespace adaattn::test
