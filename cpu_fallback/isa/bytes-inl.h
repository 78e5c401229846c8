// Scores of 8-bit products: keys less their mean as bytes with a scale for 32 of them, queries with one each. What the
// mean of K takes from a query's scores is the same for all of them; its reference gets it back when they are summed
// up.
#pragma once

#include "cpu_fallback/adaptive/kernels.h"

namespace adaattn::cpu {
namespace {

// Of one panel.
struct ByteQueries {
  uint8_t* q = nullptr;    // [byte_width(d) / 4][kPanel][4]
  float* scale = nullptr;  // [kPanel]: times that of the keys
  float* base = nullptr;   // [kPanel]: products with the mean of K, in units of log2
};

HWY_INLINE void lay_out(Arena& arena, ByteQueries& x, int64_t d) {
  x.q = arena.take<uint8_t>(byte_width(d) * kPanel);
  x.scale = arena.take<float>(kPanel);
  x.base = arena.take<float>(kPanel);
}

// Products on tiles take both operands with a sign, vpdpbusd takes queries without one.
#if defined(ADAATTN_UNIT_AMX)
constexpr char kByteFlip = 0;
#else
constexpr char kByteFlip = static_cast<char>(128);
#endif

// Queries to bytes. four(i): dimensions 4 i to 4 i + 3 of the lanes from `lane` on, not yet multiplied by `factor`.
template <class Four>
HWY_INLINE void quantize_lanes(const Four& four, int64_t lane, int64_t d, float factor, const float* k_mean,
                               const ByteQueries& x) {
  const int64_t quads = (d + 3) / 4, width = byte_width(d) / 4;
  __m512 most = _mm512_setzero_ps(), wrong = _mm512_setzero_ps(), base = _mm512_setzero_ps();
  for (int64_t i = 0; i < quads; ++i) {
    __m512 q[4];
    four(i, q);
    for (int c = 0; c < 4; ++c) {
      most = _mm512_max_ps(most, _mm512_abs_ps(q[c]));
      wrong = _mm512_add_ps(wrong, _mm512_sub_ps(q[c], q[c]));  // NaN where q is NaN or infinite
      if (4 * i + c < d) base = _mm512_fmadd_ps(q[c], _mm512_set1_ps(k_mean[4 * i + c]), base);
    }
  }
  const __mmask16 some = _mm512_cmp_ps_mask(most, _mm512_setzero_ps(), _CMP_GT_OQ);
  const __m512 inverse = _mm512_maskz_div_ps(some, _mm512_set1_ps(127.0f), most);
  const __m512 scale = _mm512_mul_ps(most, _mm512_set1_ps(factor / 127.0f));
  _mm512_store_ps(x.scale + lane, _mm512_add_ps(scale, wrong));
  _mm512_store_ps(x.base + lane, _mm512_mul_ps(base, _mm512_set1_ps(factor)));
  const __m512i flip = _mm512_set1_epi8(kByteFlip), low = _mm512_set1_epi32(255);
  for (int64_t i = 0; i < width; ++i) {
    __m512i bytes = _mm512_setzero_si512();
    if (i < quads) {
      __m512 q[4];
      four(i, q);
      for (int c = 3; c >= 0; --c) {
        const __m512i byte = _mm512_and_si512(_mm512_cvtps_epi32(_mm512_mul_ps(q[c], inverse)), low);
        bytes = _mm512_or_si512(_mm512_slli_epi32(bytes, 8), byte);
      }
    }
    _mm512_store_si512(x.q + (i * kPanel + lane) * 4, _mm512_xor_si512(bytes, flip));
  }
}

HWY_INLINE const ByteTile& byte_head(const char* tile) { return *reinterpret_cast<const ByteTile*>(tile); }
HWY_INLINE const int8_t* byte_rows(const char* tile) { return reinterpret_cast<const int8_t*>(tile + kByteTileHead); }

#if !defined(ADAATTN_UNIT_AMX)
// Scores of kRows keys of a tile from `row` on. Not inlined: 24 sums, 4 queries and a key leave no register free.
template <int kRows>
HWY_NOINLINE void score_bytes_rows(const char* tile, int64_t row, int64_t width, const ByteQueries& x,
                                   float* HWY_RESTRICT s, float* HWY_RESTRICT max) {
  const ByteTile& head = byte_head(tile);
  const int8_t* rows = byte_rows(tile) + row * width;
  __m512i acc[kRows][kPanelVectors];
  ADAATTN_UNROLL for (int r = 0; r < kRows; ++r) {
    ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) acc[r][v] = _mm512_set1_epi32(head.offset[row + r]);
  }
  for (int64_t t = 0; t < width / 4; ++t) {
    __m512i q[kPanelVectors];
    ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) {
      q[v] = _mm512_load_si512(x.q + (t * kPanel + v * kLanes) * 4);
    }
    ADAATTN_UNROLL for (int r = 0; r < kRows; ++r) {
      const __m512i k = _mm512_set1_epi32(load_scalar<int32_t>(rows + r * width + t * 4));
      ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) add_products(acc[r][v], q[v], k);
    }
  }
  ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) {
    const __m512 scale = _mm512_load_ps(x.scale + v * kLanes);
    F32 most = hn::Load(kF32, max + v * kLanes);
    ADAATTN_UNROLL for (int r = 0; r < kRows; ++r) {
      const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(head.scale[(row + r) / decide::kGroupK]));
      const F32 score{_mm512_mul_ps(_mm512_cvtepi32_ps(acc[r][v]), both)};
      hn::Store(score, kF32, s + r * kPanel + v * kLanes);
      most = hn::Max(score, most);
    }
    hn::Store(most, kF32, max + v * kLanes);
  }
}

// Rows [row, row + n) of a tile; max follows.
HWY_INLINE void score_bytes(const char* tile, int64_t row, int64_t n, int64_t width, const ByteQueries& x, float* s,
                            float* max) {
  for (int64_t j = 0; j < n;) {
    const int rows = next_rows(n - j);
    float* to = s + j * kPanel;
    ADAATTN_WITH_ROWS(rows, score_bytes_rows<kRows>(tile, row + j, width, x, to, max))
    j += rows;
  }
}
#endif

#if defined(ADAATTN_UNIT_BF16)
// Queries as fill_query_words() leaves them.
HWY_NOINLINE void quantize_words(const uint32_t* words, int64_t d, float factor, const float* k_mean,
                                 const ByteQueries& x) {
  const __m512i high_half = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
    const auto four = [&](int64_t i, __m512* q) {
      ADAATTN_UNROLL for (int64_t c = 0; c < 2; ++c) {
        const __m512i word = _mm512_load_si512(words + (2 * i + c) * kPanel + lane);
        q[2 * c] = _mm512_castsi512_ps(_mm512_slli_epi32(word, 16));
        q[2 * c + 1] = _mm512_castsi512_ps(_mm512_and_si512(word, high_half));
      }
    };
    quantize_lanes(four, lane, d, factor, k_mean, x);
  }
}
#else
HWY_INLINE void quantize_panel(const Panel& p, int64_t d, const float* k_mean, const ByteQueries& x) {
  for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
    const auto four = [&](int64_t i, __m512* q) {
      for (int64_t c = 0; c < 4; ++c)
        q[c] = 4 * i + c < d ? _mm512_load_ps(p.qt + (4 * i + c) * kPanel + lane) : _mm512_setzero_ps();
    };
    quantize_lanes(four, lane, d, 1.0f, k_mean, x);
  }
}

// n <= 128 keys less their mean, as a tile. squares: of their elements; steps: of the distances between neighbouring
// bytes; both added up over the keys.
void pack_bytes(const float* rows, int64_t n, int64_t d, int64_t stride, const float* mean, char* tile, double* squares,
                double* steps) {
  ByteTile& head = *reinterpret_cast<ByteTile*>(tile);
  int8_t* to = reinterpret_cast<int8_t*>(tile + kByteTileHead);
  const int64_t width = byte_width(d);
  memset(tile, 0, static_cast<size_t>(kByteTileHead + kTileKeys * width));
  *squares = *steps = 0;
  for (int64_t first = 0; first < n; first += decide::kGroupK) {
    const int64_t last = first + decide::kGroupK < n ? first + decide::kGroupK : n;
    __m512 most = _mm512_setzero_ps(), sum = _mm512_setzero_ps();
    const auto load = [&](int64_t j, int64_t c) {
      const int64_t left = d - c < 16 ? d - c : 16;
      const __mmask16 mask = static_cast<__mmask16>((1u << left) - 1);
      return _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, rows + j * stride + c), _mm512_maskz_loadu_ps(mask, mean + c));
    };
    for (int64_t j = first; j < last; ++j) {
      for (int64_t c = 0; c < d; c += 16) {
        const __m512 x = load(j, c);
        most = _mm512_max_ps(most, _mm512_abs_ps(x));
        sum = _mm512_fmadd_ps(x, x, sum);
      }
    }
    const float top = _mm512_reduce_max_ps(most), step = top * (1.0f / 127.0f);
    head.scale[first / decide::kGroupK] = step;
    *squares += static_cast<double>(_mm512_reduce_add_ps(sum));
    *steps += static_cast<double>(last - first) * step * step;
    const __m512 inverse = _mm512_set1_ps(top > 0 ? 127.0f / top : 0.0f);
    for (int64_t j = first; j < last; ++j) {
      __m512i total = _mm512_setzero_si512();
      for (int64_t c = 0; c < d; c += 16) {
        const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(load(j, c), inverse));
        total = _mm512_add_epi32(total, q);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j * width + c), _mm512_cvtepi32_epi8(q));
      }
      head.offset[j] = -128 * _mm512_reduce_add_epi32(total);
    }
  }
}
#endif

}  // namespace
}  // namespace adaattn::cpu
