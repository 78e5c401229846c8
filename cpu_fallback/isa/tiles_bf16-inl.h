// Keys and values of adaptive calls in the form that bf16 products take.
#pragma once

#include "cpu_fallback/adaptive/kernels.h"
#include "cpu_fallback/isa/walk_bf16-inl.h"

namespace adaattn::cpu {
namespace {

constexpr int64_t kTileKeys = decide::kTileK;
static_assert(kTileKeys % kStepKeys == 0);

// Sixteen columns of row j from column c on, zeros beyond the matrix.
HWY_INLINE __m512 load_corner(const float* rows, int64_t n, int64_t d, int64_t stride, int64_t j, int64_t c) {
  const int64_t columns = d - c < kLanes ? d - c : kLanes;
  const __mmask16 mask = j < n && columns > 0 ? static_cast<__mmask16>((1u << columns) - 1) : __mmask16{0};
  return _mm512_maskz_loadu_ps(mask, rows + j * stride + c);
}

// n rows as rows of round_up(d, 32), followed by zeros up to `count` rows.
HWY_INLINE void pack_rows(const float* rows, int64_t n, int64_t count, int64_t d, int64_t stride, uint16_t* out) {
  const int64_t padded = round_up(d, 32);
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t c = 0; c < padded; c += kLanes) {
      const __m256bh x = _mm512_cvtneps_pbh(load_corner(rows, n, d, stride, j, c));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + j * padded + c), reinterpret_cast<__m256i>(x));
    }
  }
}

void pack_keys(const float* rows, int64_t n, int64_t d, int64_t stride, uint16_t* out) {
  pack_rows(rows, n, kTileKeys, d, stride, out);
}

void pack_values(const float* rows, int64_t n, int64_t d, int64_t stride, uint32_t* out) {
  const int64_t padded = round_up(d, 32);
  for (int64_t key = 0; key < kTileKeys; key += kStepKeys) {
    for (int64_t c = 0; c < padded; c += kTileValues) {
      __m512i pairs[16];
      ADAATTN_UNROLL for (int w = 0; w < 16; ++w) {
        pairs[w] = pair_weights(load_corner(rows, n, d, stride, key + 2 * w, c),
                                load_corner(rows, n, d, stride, key + 2 * w + 1, c));
      }
      store_value_tile(pairs, value_tile(out, padded, c / kTileValues, key / kStepKeys));
    }
  }
}

// Sixteen elements of a row of bf16.
HWY_INLINE __m512 load_brains(const uint16_t* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// Eight neighbouring rows of K: copied, and their mean; bits of `special` are set where an element is not finite.
HWY_INLINE void pack_needle(const char* const* rows, int64_t d, uint16_t* to, float* mean, __mmask32& special) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  const __m512 inverse = _mm512_set1_ps(1.0f / 8);
  for (int64_t c = 0; c < d; c += 32) {
    __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
    ADAATTN_UNROLL for (int i = 0; i < 8; ++i) {
      const uint16_t* from = reinterpret_cast<const uint16_t*>(rows[i]) + c;
      const __m512i x = _mm512_loadu_si512(from);
      special |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
      _mm512_storeu_si512(to + i * d + c, x);
      low = _mm512_add_ps(low, load_brains(from));
      high = _mm512_add_ps(high, load_brains(from + 16));
    }
    _mm512_storeu_ps(mean + c, _mm512_mul_ps(low, inverse));
    _mm512_storeu_ps(mean + c + 16, _mm512_mul_ps(high, inverse));
  }
}

bool pack_tile(PackArgs& args) {
  constexpr int64_t kMean = decide::kCell;
  const auto touch = [](const char* row, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) _mm_prefetch(row + at, _MM_HINT_T0);
  };
  const char* rows[kMean];
  __mmask32 special = 0;
  __mmask16 special_values = 0;
  __m512 within = _mm512_setzero_ps();
  for (int64_t j = 0; j < kTileKeys; j += kMean) {
    for (int64_t i = 0; i < kMean; ++i) {
      rows[i] = key_address(args.k, args.first + j + i);
      touch(rows[i], args.d_qk * 2);
    }
    for (int64_t i = 0; i < kMean; ++i) touch(key_address(args.v, args.first + j + i), args.d_v * 2);
    for (int64_t i = 0; i < kMean; i += 8)
      pack_needle(rows + i, args.d_qk, args.packed_k + (j + i) * args.d_qk, args.key_means + (j + i) / 8 * args.d_qk,
                  special);
    for (int64_t i = 0; i < kMean; ++i) rows[i] = key_address(args.v, args.first + j + i);
    static_assert(kMean == kStepKeys);
    float* const mean = args.value_means + j / kMean * args.value_stride;
    for (int64_t c = 0; c < args.d_v; c += kTileValues) {
      const auto row_at = [&](int64_t i) { return reinterpret_cast<const uint16_t*>(rows[i]) + c; };
      special_values |=
          pack_value_tile<true>(row_at, value_tile(args.packed_v, args.d_v, c / kTileValues, j / kStepKeys));
      __m512 sum = _mm512_setzero_ps();
      for (int64_t i = 0; i < kMean; ++i) sum = _mm512_add_ps(sum, load_brains(row_at(i)));
      sum = _mm512_mul_ps(sum, _mm512_set1_ps(1.0f / kMean));
      for (int64_t i = 0; i < kMean; ++i) {
        const __m512 x = _mm512_sub_ps(load_brains(row_at(i)), sum);
        within = _mm512_fmadd_ps(x, x, within);
      }
      _mm512_storeu_ps(mean + c, sum);
    }
  }
  args.within = static_cast<double>(_mm512_reduce_add_ps(within));
  return special == 0 && special_values == 0;
}

// Of each group of keys, its centroid less the mean of all keys, then its variances; rows of 2 round_up(d, 32).
void pack_groups(const float* groups, int64_t n, int64_t d, int64_t stride, const float* k_mean, uint16_t* out) {
  const int64_t padded = round_up(d, 32);
  for (int64_t g = 0; g < n; ++g, groups += stride, out += 2 * padded) {
    for (int64_t c = 0; c < padded; c += kLanes) {
      const __m512 centroid = _mm512_sub_ps(load_corner(groups, 1, d, 0, 0, c), load_corner(k_mean, 1, d, 0, 0, c));
      const __m512 variance = load_corner(groups + d + 1, 1, d, 0, 0, c);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + c), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(centroid)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + padded + c),
                          reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(variance)));
    }
  }
}

#include "cpu_fallback/isa/analyze_bf16-inl.h"
#include "cpu_fallback/isa/probe_bf16-inl.h"
#if !defined(ADAATTN_UNIT_AMX)
#include "cpu_fallback/isa/probe_int8-inl.h"
#endif

}  // namespace
}  // namespace adaattn::cpu
