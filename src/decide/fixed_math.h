// exp2 and log2 that give the same bits on every device: explicit fma, no library call whose rounding may differ, no
// contraction left to the compiler (the units that include this are built with -ffp-contract=off and -fmad=false).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/host_device.h"

namespace adaattn::decide {

ADAATTN_HD inline float fixed_fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

ADAATTN_HD inline uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
#endif
}

ADAATTN_HD inline float float_of(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
#endif
}

// Conversions by additions: a GPU's own run at a quarter of the rate.
// |x| <= 2^22.
ADAATTN_HD inline float float_of_integer(int32_t x) {
#if defined(__CUDA_ARCH__)
  return __int_as_float(0x4b400000 + x) - 12582912.0f;  // 1.5 * 2^23
#else
  return static_cast<float>(x);
#endif
}
// The integer part of 0 <= x < 2^23.
ADAATTN_HD inline uint32_t integer_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(__fadd_rd(x, 8388608.0f)) - 0x4b000000u;
#else
  return static_cast<uint32_t>(x);
#endif
}

// 2^x for x <= 127, 0 below -126 and for NaN; relative error under 3e-7 (Taylor series of 2^f on |f| <= 1/2, degree 6).
ADAATTN_HD inline float fixed_exp2(float x) {
  const bool any = x >= -126.0f;
  if (x > 127.0f) x = 127.0f;
  const float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const float shifted = x + shifter;
  const float n = shifted - shifter;
  const float f = x - n;
  float p = 1.5403530e-4f;
  p = fixed_fma(p, f, 1.3333558e-3f);
  p = fixed_fma(p, f, 9.6181291e-3f);
  p = fixed_fma(p, f, 5.5504109e-2f);
  p = fixed_fma(p, f, 2.4022651e-1f);
  p = fixed_fma(p, f, 6.9314718e-1f);
  p = fixed_fma(p, f, 1.0f);
  return any ? float_of(bits_of(p) + (bits_of(shifted) << 23)) : 0.0f;
}

// log2(x) for positive normal x; -127 for 0, denormals and anything negative. Absolute error under 3e-7 near 1, else
// relative. With x = 2^e m, m in [sqrt(1/2), sqrt(2)): ln m = 2 artanh(s), s = (m - 1) / (m + 1).
ADAATTN_HD inline float fixed_log2(float x) {
  if (!(x >= 1.17549435e-38f)) return -127.0f;
  const uint32_t u = bits_of(x);
  const uint32_t shifted = u - 0x3f3504f3u;  // bits of sqrt(1/2)
  const int32_t e = static_cast<int32_t>(shifted) >> 23;
  const float m = float_of((shifted & 0x007fffffu) + 0x3f3504f3u);
  const float s = (m - 1.0f) / (m + 1.0f);
  const float z = s * s;
  float p = 0.32059889f;  // 2 / (9 ln 2)
  p = fixed_fma(p, z, 0.41219858f);
  p = fixed_fma(p, z, 0.57707802f);
  p = fixed_fma(p, z, 0.96179669f);
  p = fixed_fma(p, z, 2.8853900f);
  return fixed_fma(p, s, static_cast<float>(e));
}

}  // namespace adaattn::decide
