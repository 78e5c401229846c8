// bf16, f16 and E4M3 as bit patterns. Branch-free, so that loops over them vectorise; rounding is to nearest, ties to
// even.
#pragma once

#include <bit>
#include <cstdint>

namespace generate {

inline float bf16_to_f32(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

inline uint16_t f32_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const uint32_t quiet_nan = bits >> 16 | 0x40u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}

inline float f16_to_f32(uint16_t half) {
  // Shifted into place the exponent is 112 too small; the product with 2^112 repairs it, subnormals included.
  const uint32_t magnitude = (half & 0x7fffu) << 13;
  const uint32_t finite = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;
  return std::bit_cast<float>((half & 0x8000u) << 16 | ((half & 0x7c00u) == 0x7c00u ? special : finite));
}

inline uint16_t f32_to_f16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the spacing is 2^-24, which is that of f32 numbers in [0.5, 1): the sum rounds where f16 would.
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  // From 65520 on values round to infinity.
  return static_cast<uint16_t>((bits >> 16 & 0x8000u) | (magnitude >= 0x477ff000u ? special : finite));
}

// OCP FP8 E4M3; numbers beyond 448 become 448.
inline uint8_t f32_to_e4m3(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffffu;
  // Below 2^-6 the spacing is 2^-9, which is that of f32 numbers in [2^14, 2^15): the sum rounds where E4M3 would.
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0x1p14f) - 0x46800000u;
  const uint32_t normal = (magnitude - (120u << 23) + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20;
  const uint32_t finite = magnitude < 0x3c800000u ? subnormal : normal;
  const uint32_t saturated = magnitude > 0x43e00000u ? 0x7eu : finite;
  return static_cast<uint8_t>((bits >> 24 & 0x80u) | (magnitude > 0x7f800000u ? 0x7fu : saturated));
}

}  // namespace generate
