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
