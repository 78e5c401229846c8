// Needles (decide/needles.h): means of 16 queries and of 8 keys in 8 bits, and the tiles in which a product of them
// reaches its row's limit. A tile's 16 means of keys stand side by side. With 8-bit products the queries are shifted by
// 128 and what the shift adds is taken back; elsewhere bytes are kept as floats, whose sums are exact integers: the
// tiles are the same on every instruction set.
#pragma once

#include "cpu_fallback/adaptive/kernels.h"
#include "cpu_fallback/isa/analyze-inl.h"
#include "decide/needles.h"

namespace adaattn::cpu {
namespace {

static_assert(kNeedleLanes == 16 && kTileKeys == kNeedleLanes * decide::kNeedleKeys);
constexpr int64_t kNeedleRows = decide::kNeedleRowsOfTile;

// The largest |x - shift| of n neighbouring elements.
HWY_INLINE float largest_of(const float* x, const float* shift, int64_t n) {
  F32 most = hn::Zero(kF32);
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    F32 v = hn::LoadU(kF32, x + c);
    if (shift != nullptr) v = hn::Sub(v, hn::LoadU(kF32, shift + c));
    most = hn::Max(most, hn::Abs(v));
  }
  float top = hn::GetLane(hn::MaxOfLanes(kF32, most));
  for (; c < n; ++c) {
    const float size = ::fabsf(shift == nullptr ? x[c] : x[c] - shift[c]);
    top = size > top ? size : top;
  }
  return top;
}

#if defined(ADAATTN_UNIT_INT8)
[[maybe_unused]] size_t needle_block_bytes(int64_t d) { return static_cast<size_t>((quads_of(d) + 1) * 64); }
[[maybe_unused]] size_t needle_row_bytes(int64_t d) { return static_cast<size_t>(quads_of(d) * 4); }

// n elements as bytes, zeros up to a multiple of four; every byte flipped by `flip`.
HWY_INLINE void bytes_of(const float* x, const float* shift, float inverse, int64_t n, int flip, int8_t* to) {
  const __m512 scale = _mm512_set1_ps(inverse);
  for (int64_t c = 0; c < n; c += 16) {
    const int64_t left = n - c < 16 ? n - c : 16;
    const __mmask16 mask = static_cast<__mmask16>((1u << left) - 1);
    __m512 v = _mm512_maskz_loadu_ps(mask, x + c);
    if (shift != nullptr) v = _mm512_sub_ps(v, _mm512_maskz_loadu_ps(mask, shift + c));
    const __m512i q = _mm512_maskz_cvtps_epi32(mask, _mm512_mul_ps(v, scale));
    const __m128i bytes = _mm_xor_si128(_mm512_cvtepi32_epi8(q), _mm_set1_epi8(static_cast<char>(flip)));
    _mm_mask_storeu_epi8(to + c, static_cast<__mmask16>((1u << round_up(left, 4)) - 1), bytes);
  }
}

HWY_INLINE void put_block(const float* rows, int64_t d, int64_t stride, const float* shift, const float* inverse,
                          char* block) {
  const int64_t width = quads_of(d) * 4;
  HWY_ALIGN int8_t bytes[kNeedleLanes * 512];
  for (int64_t j = 0; j < kNeedleLanes; ++j) bytes_of(rows + j * stride, shift, inverse[j], d, 0, bytes + j * width);
  transpose_rows(bytes, width / 4, block, kNeedleLanes, width / 4);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t t = 0; t < width / 4; ++t) add_products(sum, _mm512_set1_epi8(1), _mm512_loadu_si512(block + t * 64));
  _mm512_storeu_si512(block + width * 16, _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sum, 7)));
}

HWY_INLINE void put_row(const float* row, int64_t d, float inverse, char* to) {
  bytes_of(row, nullptr, inverse, d, 128, reinterpret_cast<int8_t*>(to));
}

// Whether a product of the rows with the block reaches its limit.
HWY_NOINLINE bool block_hits(const NeedleArgs& args, const char* block, const float* key_scales) {
  const int64_t quads = quads_of(args.d);
  __m512i acc[kNeedleRows];
  const __m512i offset = _mm512_loadu_si512(block + quads * 64);
  ADAATTN_UNROLL for (int r = 0; r < kNeedleRows; ++r) acc[r] = offset;
  for (int64_t t = 0; t < quads; ++t) {
    const __m512i keys = _mm512_loadu_si512(block + t * 64);
    ADAATTN_UNROLL for (int r = 0; r < kNeedleRows; ++r) {
      add_products(acc[r], _mm512_set1_epi32(load_scalar<int32_t>(args.query_rows + (r * quads + t) * 4)), keys);
    }
  }
  const __m512 scales = _mm512_permutexvar_ps(_mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0),
                                              _mm512_castps128_ps512(_mm_loadu_ps(key_scales)));
  __mmask16 hits = 0;
  ADAATTN_UNROLL for (int r = 0; r < kNeedleRows; ++r) {
    const __m512 margin = _mm512_fmsub_ps(_mm512_cvtepi32_ps(acc[r]), scales, _mm512_set1_ps(args.limits[r]));
    hits |= _mm512_cmp_ps_mask(margin, _mm512_setzero_ps(), _CMP_GE_OQ);
  }
  return hits != 0;
}
#else
[[maybe_unused]] size_t needle_block_bytes(int64_t d) { return static_cast<size_t>(d * kNeedleLanes) * sizeof(float); }
[[maybe_unused]] size_t needle_row_bytes(int64_t d) { return static_cast<size_t>(d) * sizeof(float); }

HWY_INLINE void put_block(const float* rows, int64_t d, int64_t stride, const float* shift, const float* inverse,
                          char* block) {
  float* to = reinterpret_cast<float*>(block);
  for (int64_t j = 0; j < kNeedleLanes; ++j) {
    for (int64_t c = 0; c < d; ++c) to[c * kNeedleLanes + j] = ::rintf((rows[j * stride + c] - shift[c]) * inverse[j]);
  }
}

HWY_INLINE void put_row(const float* row, int64_t d, float inverse, char* to) {
  for (int64_t c = 0; c < d; ++c) reinterpret_cast<float*>(to)[c] = ::rintf(row[c] * inverse);
}

__attribute__((flatten)) HWY_NOINLINE bool block_hits(const NeedleArgs& args, const char* block,
                                                      const float* key_scales) {
  constexpr int kVectors = static_cast<int>(kNeedleLanes / kLanes), kAtOnce = 2;
  const float* keys = reinterpret_cast<const float*>(block);
  HWY_ALIGN float scales[kNeedleLanes];
  for (int64_t j = 0; j < kNeedleLanes; ++j) scales[j] = key_scales[j / decide::kNeedlesOfCell];
  for (int64_t first = 0; first < kNeedleRows; first += kAtOnce) {
    const float* rows = reinterpret_cast<const float*>(args.query_rows) + first * args.d;
    F32 acc[kAtOnce][kVectors];
    for (int r = 0; r < kAtOnce; ++r) {
      for (int v = 0; v < kVectors; ++v) acc[r][v] = hn::Zero(kF32);
    }
    for (int64_t c = 0; c < args.d; ++c) {
      for (int r = 0; r < kAtOnce; ++r) {
        const F32 q = hn::Set(kF32, rows[r * args.d + c]);
        for (int v = 0; v < kVectors; ++v)
          acc[r][v] = hn::MulAdd(q, hn::Load(kF32, keys + c * kNeedleLanes + v * kLanes), acc[r][v]);
      }
    }
    for (int r = 0; r < kAtOnce; ++r) {
      const float limit = args.limits[first + r];
#if HWY_TARGET == HWY_SSE4 || HWY_TARGET == HWY_SSSE3 || HWY_TARGET == HWY_SSE2 || HWY_TARGET == HWY_EMU128 || \
    HWY_TARGET == HWY_SCALAR
      // No fused multiply-add.
      HWY_ALIGN float dots[kNeedleLanes];
      for (int v = 0; v < kVectors; ++v) hn::Store(acc[r][v], kF32, dots + v * kLanes);
      for (int64_t j = 0; j < kNeedleLanes; ++j)
        if (decide::needle_margin(dots[j], scales[j], limit) >= 0) return true;
#else
      for (int v = 0; v < kVectors; ++v) {
        const F32 margin = hn::MulSub(acc[r][v], hn::Load(kF32, scales + v * kLanes), hn::Set(kF32, limit));
        if (!hn::AllFalse(kF32, hn::Ge(margin, hn::Zero(kF32)))) return true;
      }
#endif
    }
  }
  return false;
}
#endif

// The 16 means of a tile's keys less `shift`, four neighbours with a scale in common, to a block.
void quantize_needles(const float* rows, int64_t d, int64_t stride, const float* shift, char* block, float* scales) {
  float inverse[kNeedleLanes];
  for (int64_t j = 0; j < kNeedleLanes; j += decide::kNeedlesOfCell) {
    float top = 0;
    for (int64_t i = j; i < j + decide::kNeedlesOfCell; ++i) {
      const float of_row = largest_of(rows + i * stride, shift, d);
      top = of_row > top ? of_row : top;
    }
    scales[j / decide::kNeedlesOfCell] = top * (1.0f / 127.0f);
    for (int64_t i = j; i < j + decide::kNeedlesOfCell; ++i) inverse[i] = top > 0 && top <= FLT_MAX ? 127.0f / top : 0;
  }
  put_block(rows, d, stride, shift, inverse, block);
}

// n means of queries, times `factor`, to rows; zeros from n to 8.
void quantize_needle_rows(const float* rows, int64_t n, int64_t d, int64_t stride, float factor, char* to,
                          float* scales) {
  const int64_t bytes = static_cast<int64_t>(needle_row_bytes(d));
  for (int64_t j = 0; j < kNeedleRows; ++j) {
    const float* row = rows + (j < n ? j : 0) * stride;
    const float top = j < n ? largest_of(row, nullptr, d) : 0;
    scales[j] = factor * top * (1.0f / 127.0f);
    put_row(row, d, top > 0 && top <= FLT_MAX ? 127.0f / top : 0, to + j * bytes);
  }
}

// Sets the bits of the tiles of [begin, end) that hold a needle.
void find_needles(const NeedleArgs& args) {
  const int64_t bytes = static_cast<int64_t>(needle_block_bytes(args.d));
  for (int64_t t = args.tile_begin; t < args.tile_end; ++t) {
    if (tile_bit(args.mask, t)) continue;
    if (block_hits(args, args.key_blocks + t * bytes, args.key_scales + t * decide::kCellsOfTile))
      args.mask[t / 64] |= uint64_t{1} << t % 64;
  }
}

}  // namespace
}  // namespace adaattn::cpu
