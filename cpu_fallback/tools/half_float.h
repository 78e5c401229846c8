// f16 and bf16 to f32 and back, rounding to nearest even, as branch-free integer code that compilers vectorise.
#pragma once

#include <cstdint>
#include <cstring>

namespace adaattn::cpu {

static inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

static inline float float_of_bf16(uint16_t h) { return float_of_bits(static_cast<uint32_t>(h) << 16); }

static inline uint16_t bf16_of_float(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const uint32_t quiet_nan = bits >> 16 | 0x40u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}

static inline float float_of_f16(uint16_t h) {
  const uint32_t magnitude = h & 0x7fffu;
  // Moving the fields into place leaves the exponent short by 127 - 15; the product repairs subnormals as well.
  const uint32_t finite = float_bits(float_of_bits(magnitude << 13) * 0x1p112f);
  const uint32_t bits = magnitude >= 0x7c00u ? 0x7f800000u | magnitude << 13 : finite;
  return float_of_bits(bits | static_cast<uint32_t>(h & 0x8000u) << 16);
}

static inline uint16_t f16_of_float(float x) {
  const uint32_t bits = float_bits(x), magnitude = bits & 0x7fffffffu;
  // The spacing of floats just above 1/2 is that of f16 subnormals, so the addition rounds to it.
  const uint32_t subnormal = float_bits(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  return static_cast<uint16_t>(result | (bits >> 16 & 0x8000u));
}

}  // namespace adaattn::cpu
