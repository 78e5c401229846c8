// Conversions to 8 bits, and the byte order of swizzled tiles.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace adaattn::cuda::sm90 {

__device__ __forceinline__ uint32_t pack_e4m3(float x0, float x1, float x2, float x3) {
  uint32_t word;
  asm("{\n.reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}"
      : "=r"(word)
      : "f"(x0), "f"(x1), "f"(x2), "f"(x3));
  return word;
}

__device__ __forceinline__ float max_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// Rounds to nearest and packs as int8; the products lie within +-127.
__device__ __forceinline__ uint32_t pack_int8(float x0, float x1, float x2, float x3, float factor) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: the sum's low byte is the integer in two's complement
  const uint32_t a = __float_as_uint(fmaf(x0, factor, kRound)), b = __float_as_uint(fmaf(x1, factor, kRound));
  const uint32_t c = __float_as_uint(fmaf(x2, factor, kRound)), d = __float_as_uint(fmaf(x3, factor, kRound));
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

__device__ __forceinline__ float2 unpack_pair(uint32_t pair, const __nv_bfloat16*) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
__device__ __forceinline__ float2 unpack_pair(uint32_t pair, const __half*) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

// Where a byte of a tile of kWidth-byte lines lies: 16-byte words permuted within eight lines.
template <int kWidth>
__device__ __forceinline__ int swizzled(int offset) {
  return offset ^ (offset >> 3 & (kWidth - 16));
}

}  // namespace adaattn::cuda::sm90
