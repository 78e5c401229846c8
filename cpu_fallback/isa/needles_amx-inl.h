// Needles by tile products of bytes, four tiles of keys at a time. The layouts are those of needles-inl.h: a block is
// the second operand as it stands, the rows of queries the first, and the block's offsets are where the sums begin.
#pragma once

#include "cpu_fallback/adaptive/kernels.h"
#include "cpu_fallback/isa/products-inl.h"
#include "decide/needles.h"

namespace adaattn::cpu {
namespace {

constexpr int64_t kNeedleQuads = 16;  // of a product: four dimensions each
constexpr int kNeedleBlocks = 4;

// Tiles 0 to 3: sums of a block; 4 and 5: queries; 6 and 7: keys. Their last product may be short.
struct NeedleTiles {
  HWY_INLINE explicit NeedleTiles(int64_t quads) {
    TileConfig config;
    const auto rows = static_cast<uint8_t>(decide::kNeedleRowsOfTile);
    for (int i = 0; i < 6; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = rows;
    }
    for (int i = 0; i < 2; ++i) {
      int64_t left = quads - i * kNeedleQuads;
      left = left < 1 ? 1 : left > kNeedleQuads ? kNeedleQuads : left;
      config.row_bytes[4 + i] = static_cast<uint16_t>(left * 4);
      config.row_bytes[6 + i] = 64;
      config.rows[6 + i] = static_cast<uint8_t>(left);
    }
    __asm__ volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  HWY_INLINE ~NeedleTiles() { _tile_release(); }
};

// A product of up to 32 quads.
#define ADAATTN_NEEDLE_BLOCK(sum, block)             \
  _tile_loadd(sum, (block) + quads * 64, 0);         \
  _tile_loadd(6, block, 64);                         \
  _tile_dpbusd(sum, 4, 6);                           \
  if (kSteps == 2) {                                 \
    _tile_loadd(7, (block) + kNeedleQuads * 64, 64); \
    _tile_dpbusd(sum, 5, 7);                         \
  }                                                  \
  _tile_stored(sum, sums[sum], 64)

template <int kSteps>
HWY_NOINLINE void find_needles_tiles(const NeedleArgs& args) {
  constexpr int kRows = decide::kNeedleRowsOfTile;
  const int64_t quads = (args.d + 3) / 4, bytes = (quads + 1) * 64;
  alignas(64) int32_t sums[kNeedleBlocks][kRows][kNeedleLanes];
  const NeedleTiles scope(quads);
  finish_stores();
  _tile_loadd(4, args.query_rows, quads * 4);
  if (kSteps == 2) _tile_loadd(5, args.query_rows + kNeedleQuads * 4, quads * 4);
  __m512 limits[kRows];
  ADAATTN_UNROLL for (int r = 0; r < kRows; ++r) limits[r] = _mm512_set1_ps(args.limits[r]);
  const __m512i of_four = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  for (int64_t t = args.tile_begin; t < args.tile_end;) {
    int64_t tiles[kNeedleBlocks];
    int count = 0;
    for (; t < args.tile_end && count < kNeedleBlocks; ++t) {
      if (!tile_bit(args.mask, t)) tiles[count++] = t;
    }
    if (count == 0) break;
    for (int i = count; i < kNeedleBlocks; ++i) tiles[i] = tiles[0];
    const char* blocks[kNeedleBlocks];
    for (int i = 0; i < kNeedleBlocks; ++i) blocks[i] = args.key_blocks + tiles[i] * bytes;
    ADAATTN_NEEDLE_BLOCK(0, blocks[0]);
    ADAATTN_NEEDLE_BLOCK(1, blocks[1]);
    ADAATTN_NEEDLE_BLOCK(2, blocks[2]);
    ADAATTN_NEEDLE_BLOCK(3, blocks[3]);
    finish_stores();
    for (int i = 0; i < count; ++i) {
      const __m128 scales = _mm_loadu_ps(args.key_scales + tiles[i] * decide::kCellsOfTile);
      const __m512 each = _mm512_permutexvar_ps(of_four, _mm512_castps128_ps512(scales));
      __mmask16 hits = 0;
      ADAATTN_UNROLL for (int r = 0; r < kRows; ++r) {
        const __m512 margin = _mm512_fmsub_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums[i][r])), each, limits[r]);
        hits |= _mm512_cmp_ps_mask(margin, _mm512_setzero_ps(), _CMP_GE_OQ);
      }
      if (hits != 0) args.mask[tiles[i] / 64] |= uint64_t{1} << tiles[i] % 64;
    }
  }
}
#undef ADAATTN_NEEDLE_BLOCK

void find_needles(const NeedleArgs& args) {
  const int64_t quads = (args.d + 3) / 4;
  if (quads <= kNeedleQuads) {
    find_needles_tiles<1>(args);
  } else if (quads <= 2 * kNeedleQuads) {
    find_needles_tiles<2>(args);
  } else {
    kAvx512VnniAdaptive.find_needles(args);
  }
}

}  // namespace
}  // namespace adaattn::cpu
