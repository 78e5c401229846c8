// The two bf16 matrix products of prefill, on AMX tiles or on vdpbf16ps, over the same operands:
//   S^T [keys][kPanel] = K Q^T         K: rows of bf16; Q^T: words [d / 2][kPanel], each a pair of neighbouring
//   dimensions O^T [d_v][kPanel] += V^T P^T       V^T: tiles of 16 rows x 32 keys, see value_tile(); P^T: words [keys /
//   2][kPanel]
// keys, d and d_v are multiples of 32 here; the packing pads with zeros.
#pragma once

#include "cpu_fallback/isa/prefill-inl.h"

namespace adaattn::cpu {
namespace {

constexpr int64_t kStepKeys = 32, kTileValues = 16, kTileWords = kTileValues * kStepKeys / 2;
static_assert(kKeyBlock % kStepKeys == 0);

// The tile of rows [16 row, 16 row + 16) and keys [32 key, 32 key + 32): 16 rows of 16 words.
template <typename Word>
HWY_INLINE Word* value_tile(Word* vt, int64_t d_v, int64_t row, int64_t key) {
  return vt + (key * (d_v / kTileValues) + row) * kTileWords;
}

// Neighbouring keys of V^T, from the tiles of key 32 `tile` on; a multiple of 32 of them.
struct ValueRun {
  int64_t tile, keys;
};

#if defined(ADAATTN_UNIT_AMX)

// Scores exist for so many keys at a time; O^T passes through the tiles once for kValueKeys of them.
constexpr int64_t kScoreKeys = 64, kValueKeys = 2 * kKeyBlock;

// Layout of the operand of LDTILECFG: Intel SDM volume 2.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles belong to the thread; they are given back so that context switches stay cheap for the application.
struct TileScope {
  HWY_INLINE TileScope() {
    TileConfig config;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = 16;
    }
    // To the compiler the instruction reads eight bytes of the operand only.
    __asm__ volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  HWY_INLINE ~TileScope() { _tile_release(); }
};

// The compiler does not know that a tile load reads memory.
HWY_INLINE void finish_stores() { __asm__ volatile("" ::: "memory"); }

static_assert(kPanel % 32 == 0);

// Columns of C are 32 of a panel's. Tiles 0 to 3 are 32 rows of C, 4 and 5 hold rows of A, 6 and 7 columns of B, 32
// terms of the sum at a time. A streams by: keys and values come from second-level cache, and its hint leaves
// first-level cache to what panels keep there. Memory is read and written behind the compiler's back: callers begin and
// end with finish_stores().
HWY_INLINE void multiply_tiles(const char* a, int64_t a_row, int64_t a_tile, int64_t a_step, const char* b,
                               int64_t steps) {
  constexpr int64_t kBytes = kPanel * 4;
  for (int64_t t = 0; t < steps; ++t) {
    _tile_stream_loadd(4, a, a_row);
    _tile_loadd(6, b, kBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + 64, kBytes);
    _tile_dpbf16ps(1, 4, 7);
    _tile_stream_loadd(5, a + a_tile, a_row);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    a += a_step;
    b += 16 * kBytes;
  }
}

HWY_INLINE void store_tiles(float* c) {
  constexpr int64_t kBytes = kPanel * 4;
  _tile_stored(0, c, kBytes);
  _tile_stored(1, c + 16, kBytes);
  _tile_stored(2, c + 16 * kPanel, kBytes);
  _tile_stored(3, c + 16 * kPanel + 16, kBytes);
}

HWY_NOINLINE void multiply_scores(const uint16_t* k, int64_t k_stride, int64_t keys, const uint32_t* q, int64_t d,
                                  float* s) {
  finish_stores();
  const int64_t row = k_stride * 2;
  for (int64_t j = 0; j < keys; j += 32) {
    for (int64_t column = 0; column < kPanel; column += 32) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      multiply_tiles(reinterpret_cast<const char*>(k + j * k_stride), row, 16 * row, 64,
                     reinterpret_cast<const char*>(q + column), d / 32);
      store_tiles(s + j * kPanel + column);
    }
  }
  finish_stores();
}

// Sums of products of bytes: K rows of d bytes, Q^T words [d / 4][kPanel] of four neighbouring dimensions each; d is a
// multiple of 64. The sums are integers in the place of scores.
[[maybe_unused]] HWY_NOINLINE void multiply_bytes(const int8_t* k, int64_t keys, const uint8_t* q, int64_t d,
                                                  float* s) {
  constexpr int64_t kBytes = kPanel * 4;
  finish_stores();
  for (int64_t j = 0; j < keys; j += 32) {
    for (int64_t column = 0; column < kPanel; column += 32) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      const int8_t* a = k + j * d;
      const uint8_t* b = q + column * 4;
      for (int64_t t = 0; t < d; t += 64, b += 16 * kBytes) {
        _tile_stream_loadd(4, a + t, d);
        _tile_loadd(6, b, kBytes);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(7, b + 64, kBytes);
        _tile_dpbssd(1, 4, 7);
        _tile_stream_loadd(5, a + 16 * d + t, d);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      }
      store_tiles(s + j * kPanel + column);
    }
  }
  finish_stores();
}

// The weights of the runs stand one after another.
HWY_NOINLINE void multiply_values(const uint32_t* vt, const ValueRun* runs, int64_t count, int64_t d_v,
                                  const uint32_t* p, float* ot) {
  constexpr int64_t kBytes = kPanel * 4, kTileBytes = kTileWords * 4;
  finish_stores();
  for (int64_t row = 0; row < d_v; row += 32) {
    for (int64_t column = 0; column < kPanel; column += 32) {
      float* c = ot + row * kPanel + column;
      _tile_loadd(0, c, kBytes);
      _tile_loadd(1, c + 16, kBytes);
      _tile_loadd(2, c + 16 * kPanel, kBytes);
      _tile_loadd(3, c + 16 * kPanel + 16, kBytes);
      const uint32_t* weights = p + column;
      for (int64_t i = 0; i < count; ++i) {
        const uint32_t* tile = value_tile(vt, d_v, row / kTileValues, runs[i].tile);
        multiply_tiles(reinterpret_cast<const char*>(tile), 64, kTileBytes, d_v / kTileValues * kTileBytes,
                       reinterpret_cast<const char*>(weights), runs[i].keys / 32);
        weights += runs[i].keys / 2 * kPanel;
      }
      store_tiles(c);
    }
  }
  finish_stores();
}

#else

constexpr int64_t kScoreKeys = kKeyBlock, kValueKeys = kKeyBlock;

struct TileScope {};

// Rows of pairs, row r and pair t at a[r * row_step + t], times the panel b [pairs][kPanel].
template <int kRows>
HWY_INLINE void multiply_pairs(const uint32_t* HWY_RESTRICT a, int64_t row_step, const uint32_t* HWY_RESTRICT b,
                               int64_t pairs, __m512 (*acc)[kPanelVectors]) {
  for (int64_t t = 0; t < pairs; ++t) {
    __m512bh row[kPanelVectors];
    ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) {
      row[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + t * kPanel + v * kLanes));
    }
    ADAATTN_UNROLL for (int r = 0; r < kRows; ++r) {
      const __m512bh x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(load_scalar<int32_t>(a + r * row_step + t)));
      ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], x, row[v]);
    }
  }
}

template <int kRows>
HWY_NOINLINE void score_pairs(const uint32_t* k, int64_t k_stride, const uint32_t* q, int64_t pairs, float* s) {
  __m512 acc[kRows][kPanelVectors];
  ADAATTN_UNROLL for (int r = 0; r < kRows; ++r) {
    ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) acc[r][v] = _mm512_setzero_ps();
  }
  multiply_pairs<kRows>(k, k_stride, q, pairs, acc);
  ADAATTN_UNROLL for (int r = 0; r < kRows; ++r) {
    ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) _mm512_store_ps(s + r * kPanel + v * kLanes, acc[r][v]);
  }
}

template <int kRows>
HWY_NOINLINE void value_pairs(const uint32_t* vt, int64_t row, int64_t first_tile, int64_t d_v, const uint32_t* p,
                              int64_t keys, float* ot) {
  __m512 acc[kRows][kPanelVectors];
  float* c = ot + row * kPanel;
  ADAATTN_UNROLL for (int r = 0; r < kRows; ++r) {
    ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) acc[r][v] = _mm512_load_ps(c + r * kPanel + v * kLanes);
  }
  for (int64_t t = 0; t < keys / kStepKeys; ++t) {
    const uint32_t* tile = value_tile(vt, d_v, row / kTileValues, first_tile + t) + row % kTileValues * (kStepKeys / 2);
    multiply_pairs<kRows>(tile, kStepKeys / 2, p + t * (kStepKeys / 2) * kPanel, kStepKeys / 2, acc);
  }
  ADAATTN_UNROLL for (int r = 0; r < kRows; ++r) {
    ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) _mm512_store_ps(c + r * kPanel + v * kLanes, acc[r][v]);
  }
}

HWY_INLINE void multiply_scores(const uint16_t* k, int64_t k_stride, int64_t keys, const uint32_t* q, int64_t d,
                                float* s) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(k);
  const int64_t stride = k_stride / 2;
  for (int64_t j = 0; j < keys;) {
    if (next_rows(keys - j) == 6) {
      score_pairs<6>(words + j * stride, stride, q, d / 2, s + j * kPanel);
      j += 6;
    } else {
      score_pairs<2>(words + j * stride, stride, q, d / 2, s + j * kPanel);
      j += 2;
    }
  }
}

HWY_INLINE void multiply_values(const uint32_t* vt, const ValueRun* runs, int64_t count, int64_t d_v, const uint32_t* p,
                                float* ot) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t row = 0; row < d_v; row += kTileValues) {
      value_pairs<6>(vt, row, runs[i].tile, d_v, p, runs[i].keys, ot);
      value_pairs<6>(vt, row + 6, runs[i].tile, d_v, p, runs[i].keys, ot);
      value_pairs<4>(vt, row + 12, runs[i].tile, d_v, p, runs[i].keys, ot);
    }
    p += runs[i].keys / 2 * kPanel;
  }
}

#endif

static_assert(kValueKeys % kScoreKeys == 0 && kScoreKeys % kStepKeys == 0);
// Weights lie behind the scores where a batch of them is longer, and in the place of the scores otherwise.
constexpr bool kScoresStay = kValueKeys > kScoreKeys;
static_assert(kScoreFloats >= (kScoresStay ? kScoreKeys + kValueKeys / 2 : kScoreKeys) * kPanel);

}  // namespace
}  // namespace adaattn::cpu
