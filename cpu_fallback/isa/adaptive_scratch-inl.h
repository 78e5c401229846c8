// The working memory of an adaptive tile, and the step that every source of scores ends in.
#pragma once

#include "cpu_fallback/adaptive/kernels.h"
#include "cpu_fallback/isa/simd-inl.h"
#if defined(ADAATTN_UNIT_BF16)
#include "cpu_fallback/isa/tiles_bf16-inl.h"
#else
#include "cpu_fallback/isa/analyze-inl.h"
#endif

#if defined(ADAATTN_UNIT_INT8) || defined(ADAATTN_UNIT_BF16)
#define ADAATTN_BYTE_SCORES
#include "cpu_fallback/isa/bytes-inl.h"
#endif

namespace adaattn::cpu {
namespace {

constexpr int64_t kGroupsPerTile = decide::kTileK / decide::kGroupK;
constexpr float kGroupBonus = 5.0f;  // log2(kGroupK)
// The second-order term v/2 of a group's log weight overshoots where scores spread over more than a few nats, because
// 32 keys have no Gaussian tail: it is taken as v/2 / (1 + v/8), here in units of log2.
constexpr float kSpreadLimit = 0.17328679513998632f;  // ln(2) / 4
#if defined(ADAATTN_UNIT_BF16)
constexpr int64_t kMeanRows = 32;  // of TileScratch::query_rows
#endif
static_assert(decide::kGroupK == 32 && kTileKeys <= kKeyBlock && kTileRows == decide::kTileQ);

// With tiles the rank probe takes bf16 instead.
#if defined(ADAATTN_UNIT_INT8) && !defined(ADAATTN_UNIT_AMX)
#define ADAATTN_PROBE_INT8
#endif

// Neighbouring groups of skipped tiles.
struct GroupRun {
  int64_t first, count;
};

struct TileScratch {
  Panel* panels;
  float *s, *row, *alpha, *block_max, *threshold, *far_v, *far_s, *up;
#if defined(ADAATTN_BYTE_SCORES)
  ByteQueries* byte_q;  // per panel of every head
#endif
  GroupRun* far_runs;
  float **far_q, **probe_q;  // per panel
#if defined(ADAATTN_PROBE_INT8)
  Int8Queries* int8_q;  // per panel
#endif
#if defined(ADAATTN_UNIT_BF16)
  // Queries as fill_query_words() leaves them, per panel of every head; projected for the rank probe, and squared, per
  // panel of one.
  uint32_t **words, **probe_words, **squares;
  float** base;           // per panel: products with the mean of K
  uint16_t* query_rows;   // the mean of K as two rows that add up to it, 30 zeros, and the basis of the rank probe
  float* query_products;  // of query_rows with one panel
  uint16_t* up_rows;      // the basis of V
  uint16_t *far_means, *far_variances;
  uint32_t* far_values;
#endif
  float* before;  // per panel: maximum and sum before the far field
};

constexpr int64_t kPanelsPerTile = kTileRows / kPanel;

HWY_INLINE void lay_out(Arena& arena, TileScratch& x, int64_t d_qk, int64_t d_v, int64_t probe_rank, int64_t heads) {
  const int64_t panels = heads * kPanelsPerTile;
  x.panels = arena.take<Panel>(panels);
#if defined(ADAATTN_BYTE_SCORES)
  x.byte_q = arena.take<ByteQueries>(panels);
  for (int64_t i = 0; i < panels; ++i) {
    ByteQueries unused;
    lay_out(arena, x.byte_q == nullptr ? unused : x.byte_q[i], d_qk);
  }
#endif
  x.far_q = arena.take<float*>(kPanelsPerTile);
  x.probe_q = arena.take<float*>(kPanelsPerTile);
#if defined(ADAATTN_PROBE_INT8)
  x.int8_q = arena.take<Int8Queries>(kPanelsPerTile);
  for (int64_t i = 0; i < kPanelsPerTile; ++i) {
    Int8Queries unused;
    lay_out(arena, x.int8_q == nullptr ? unused : x.int8_q[i], probe_rank);
  }
#endif
  x.s = arena.take<float>(kTileKeys * kPanel > kScoreFloats ? kTileKeys * kPanel : kScoreFloats);
  x.row = arena.take<float>(round_up(d_qk > d_v ? d_qk : d_v, 16));
  x.alpha = arena.take<float>(kPanel);
  x.block_max = arena.take<float>(kPanel);
  x.threshold = arena.take<float>(kTileRows);
  x.far_runs = arena.take<GroupRun>(kTileKeys / kGroupsPerTile);
  x.far_v = arena.take<float>(kTileKeys * packed_stride(d_v));
  x.far_s = arena.take<float>(kTileKeys * kPanel);
  x.up = arena.take<float>(round_up(d_v, 32) * kPanel);
  x.before = arena.take<float>(kPanelsPerTile * 2 * kPanel);
#if defined(ADAATTN_UNIT_BF16)
  x.words = arena.take<uint32_t*>(panels);
  x.probe_words = arena.take<uint32_t*>(kPanelsPerTile);
  x.squares = arena.take<uint32_t*>(kPanelsPerTile);
  x.base = arena.take<float*>(kPanelsPerTile);
  for (int64_t i = 0; i < kPanelsPerTile; ++i) {
    uint32_t* probe_words = arena.take<uint32_t>(round_up(probe_rank, 32) / 2 * kPanel);
    uint32_t* squares = arena.take<uint32_t>(round_up(d_qk, 32) / 2 * kPanel);
    float* base = arena.take<float>(kPanel);
    if (x.words == nullptr) continue;
    x.probe_words[i] = probe_words;
    x.squares[i] = squares;
    x.base[i] = base;
  }
  const int64_t query_rows = kMeanRows + round_up(probe_rank, 32);
  x.query_rows = arena.take<uint16_t>(query_rows * round_up(d_qk, 32));
  x.query_products = arena.take<float>((query_rows + 1) * kPanel);
  x.up_rows = arena.take<uint16_t>(round_up(d_v, 32) * packed_width(d_v));
  x.far_means = arena.take<uint16_t>(packed_elements(d_qk));
  x.far_variances = arena.take<uint16_t>(packed_elements(d_qk));
  x.far_values = arena.take<uint32_t>(packed_elements(d_v) / 2);
#endif
  for (int64_t i = 0; i < kPanelsPerTile; ++i) {
    float* far_q = arena.take<float>((2 * d_qk + 1) * kPanel);
    float* probe_q = arena.take<float>((probe_rank + 1) * kPanel);
    if (x.far_q == nullptr) continue;
    x.far_q[i] = far_q;
    x.probe_q[i] = probe_q;
  }
  for (int64_t i = 0; i < panels; ++i) {
    Panel unused;
    Panel& p = x.panels == nullptr ? unused : x.panels[i];
    lay_out(arena, p, d_qk, d_v);
#if defined(ADAATTN_UNIT_BF16)
    if (x.words != nullptr) x.words[i] = reinterpret_cast<uint32_t*>(p.qt);
#endif
  }
}

size_t tile_scratch(int64_t d_qk, int64_t d_v, int64_t probe_rank, int64_t heads) {
  Arena arena{nullptr};
  TileScratch unused;
  lay_out(arena, unused, d_qk, d_v, probe_rank, heads);
  return arena.used;
}

HWY_INLINE void clear_max(float* block_max) {
  for (int v = 0; v < kPanelVectors; ++v) hn::Store(hn::Set(kF32, -infinity()), kF32, block_max + v * kLanes);
}

// Scores of n <= 128 keys stand in x.s and their maximum in x.block_max: weights, then O.
HWY_INLINE void absorb(const AdaptiveTileArgs& args, TileScratch& x, Panel& p, const float* v, int64_t v_stride,
                       int64_t d_v, int64_t n) {
  if (args.rows.entropy.data != nullptr) {
    weigh_block<true>(p, x.s, n, x.block_max, x.alpha);
  } else {
    weigh_block<false>(p, x.s, n, x.block_max, x.alpha);
  }
  value_panel(v, v_stride, n, x.s, d_v, x.alpha, p.ot);
}

struct Values {
  const float *v, *group_v;
  int64_t stride, width;
  const uint32_t* packed;
};

}  // namespace
}  // namespace adaattn::cpu
