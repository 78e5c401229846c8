// 16 x 16 transposition of 32-bit words in AVX-512 registers, and the copies between rows and panels built on it.
#pragma once

#include "cpu_fallback/isa/micro-inl.h"

namespace adaattn::cpu {
namespace {

#if defined(ADAATTN_UNIT_AVX512)
// Pairs of rows are interleaved by words, then by double words; what is left is a 4 x 4 transposition of 128-bit
// blocks.
HWY_INLINE void transpose16(__m512i* r) {
  __m512i t[16];
  ADAATTN_UNROLL for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  ADAATTN_UNROLL for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // Now r[4g + c] holds, in block b, column 4b + c of rows 4g .. 4g + 3.
  ADAATTN_UNROLL for (int c = 0; c < 4; ++c) {
    const __m512i low01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88),
                  high01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
    const __m512i low23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
    const __m512i high23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    t[c] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    t[4 + c] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    t[12 + c] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
  ADAATTN_UNROLL for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// to[c * to_stride + r] = from[r * from_stride + c] for 16 rows r and n columns c, in words.
HWY_NOINLINE void transpose_rows(const void* from, int64_t from_stride, void* to, int64_t to_stride, int64_t n) {
  const uint32_t* in = static_cast<const uint32_t*>(from);
  uint32_t* out = static_cast<uint32_t*>(to);
  for (int64_t c = 0; c < n; c += 16) {
    const int64_t columns = n - c < 16 ? n - c : 16;
    const __mmask16 mask = static_cast<__mmask16>((1u << columns) - 1);
    __m512i r[16];
    ADAATTN_UNROLL for (int i = 0; i < 16; ++i) r[i] = _mm512_maskz_loadu_epi32(mask, in + i * from_stride + c);
    transpose16(r);
    for (int64_t i = 0; i < columns; ++i) _mm512_storeu_si512(out + (c + i) * to_stride, r[i]);
  }
}
#endif

}  // namespace
}  // namespace adaattn::cpu
