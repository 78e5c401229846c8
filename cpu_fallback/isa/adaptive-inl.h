// Adaptive attention over the panels of prefill: a tile of queries walks the key tiles that decide kept, searches the
// others for single heavy keys, and takes what is left as centroids.
#pragma once

#include "cpu_fallback/adaptive/kernels.h"
#include "cpu_fallback/isa/simd-inl.h"
#if defined(ADAATTN_UNIT_BF16)
#include "cpu_fallback/isa/tiles_bf16-inl.h"
#else
#include "cpu_fallback/isa/analyze-inl.h"
#endif

namespace adaattn::cpu {
namespace {

constexpr int64_t kGroupsPerTile = decide::kTileK / decide::kGroupK;
constexpr float kGroupBonus = 5.0f;  // log2(kGroupK)
// The second-order term v/2 of a group's log weight overshoots where scores spread over more than a few nats, because
// 32 keys have no Gaussian tail: it is taken as v/2 / (1 + v/8), here in units of log2.
constexpr float kSpreadLimit = 0.17328679513998632f;  // ln(2) / 4
static_assert(decide::kGroupK == 32 && kTileKeys <= kKeyBlock && kTileRows == decide::kTileQ);

// Neighbouring groups of skipped tiles.
struct GroupRun {
  int64_t first, count;
};

struct TileScratch {
  Panel* panels;
  float *s, *row, *alpha, *block_max, *threshold, *far_v, *far_s, *up;
  GroupRun* far_runs;
  float **far_q, **probe_q;  // per panel
#if defined(ADAATTN_UNIT_INT8)
  Int8Queries* int8_q;  // per panel
#endif
#if defined(ADAATTN_UNIT_BF16)
  uint32_t **words, **squares;  // per panel: queries as fill_query_words() leaves them, and their squares
  float** far_base;             // per panel: products with the mean of K
  uint16_t *far_means, *far_variances;
  uint32_t* far_values;
#endif
  float* before;  // per panel: maximum and sum before the far field
};

constexpr int64_t kPanelsPerTile = kTileRows / kPanel;

HWY_INLINE void lay_out(Arena& arena, TileScratch& x, int64_t d_qk, int64_t d_v, int64_t probe_rank) {
  x.panels = arena.take<Panel>(kPanelsPerTile);
  x.far_q = arena.take<float*>(kPanelsPerTile);
  x.probe_q = arena.take<float*>(kPanelsPerTile);
#if defined(ADAATTN_UNIT_INT8)
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
  x.up = arena.take<float>(d_v * kPanel);
  x.before = arena.take<float>(kPanelsPerTile * 2 * kPanel);
#if defined(ADAATTN_UNIT_BF16)
  x.words = arena.take<uint32_t*>(kPanelsPerTile);
  x.squares = arena.take<uint32_t*>(kPanelsPerTile);
  x.far_base = arena.take<float*>(kPanelsPerTile);
  for (int64_t i = 0; i < kPanelsPerTile; ++i) {
    uint32_t* words = arena.take<uint32_t>(round_up(d_qk, 32) / 2 * kPanel);
    uint32_t* squares = arena.take<uint32_t>(round_up(d_qk, 32) / 2 * kPanel);
    float* base = arena.take<float>(kPanel);
    if (x.words == nullptr) continue;
    x.words[i] = words;
    x.squares[i] = squares;
    x.far_base[i] = base;
  }
  x.far_means = arena.take<uint16_t>(packed_elements(d_qk));
  x.far_variances = arena.take<uint16_t>(packed_elements(d_qk));
  x.far_values = arena.take<uint32_t>(packed_elements(d_v) / 2);
#endif
  for (int64_t i = 0; i < kPanelsPerTile; ++i) {
    Panel unused;
    Panel& p = x.panels == nullptr ? unused : x.panels[i];
    lay_out(arena, p, d_qk, d_v);
    float* far_q = arena.take<float>((2 * d_qk + 1) * kPanel);
    float* probe_q = arena.take<float>((probe_rank + 1) * kPanel);
    if (x.far_q != nullptr) {
      x.far_q[i] = far_q;
      x.probe_q[i] = probe_q;
    }
  }
}

size_t tile_scratch(int64_t d_qk, int64_t d_v, int64_t probe_rank) {
  Arena arena{nullptr};
  TileScratch unused;
  lay_out(arena, unused, d_qk, d_v, probe_rank);
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

#if defined(ADAATTN_UNIT_BF16)
// Neighbouring tiles, as one walk.
HWY_INLINE void exact_tiles(const AdaptiveTileArgs& args, TileScratch& x, const Values& values, int64_t panels,
                            int64_t tile, int64_t count) {
  const int64_t first = tile * kTileKeys, behind = first + count * kTileKeys;
  const int64_t last = behind < args.keys.len ? behind : args.keys.len;
  NothingElse nothing;
  for (int64_t i = 0; i < panels; ++i) {
    Panel& p = x.panels[i];
    const int64_t begin = p.first > first ? p.first / kStepKeys * kStepKeys : first,
                  end = p.last < last ? p.last : last;
    if (begin >= end) continue;
    KeyWalk<NothingElse> walk{p,
                              x.words[i],
                              args.keys.packed_k,
                              values.packed,
                              0,
                              round_up(args.rows.d_qk, 32),
                              round_up(values.width, 32),
                              x.s,
                              x.block_max,
                              score_rule(args.rows).query_factor,
                              nothing};
    if (args.rows.entropy.data != nullptr) {
      walk.run<true>(begin, end);
    } else {
      walk.run<false>(begin, end);
    }
  }
}

// The largest score of each query over a tile's 128 keys.
HWY_INLINE void tile_maximum(const AdaptiveTileArgs& args, TileScratch& x, int64_t panel, int64_t tile) {
  const int64_t d = round_up(args.rows.d_qk, 32);
  TileProduct scores;
  scores.start_scores(args.keys.packed_k + tile * kTileKeys * d, d, kTileKeys, x.words[panel], d, x.s);
  scores.finish();
  scale_scores(x.s, kTileKeys, score_rule(args.rows).query_factor);
  block_maximum(x.s, kTileKeys, x.block_max);
}
#else
HWY_INLINE void exact_tile(const AdaptiveTileArgs& args, TileScratch& x, const Values& values, int64_t panels,
                           int64_t tile) {
  const int64_t first = tile * kTileKeys;
  const int64_t last = first + kTileKeys < args.keys.len ? first + kTileKeys : args.keys.len;
  for (int64_t i = 0; i < panels; ++i) {
    Panel& p = x.panels[i];
    const int64_t begin = p.first > first ? p.first : first, end = p.last < last ? p.last : last;
    if (begin >= end) continue;
    clear_max(x.block_max);
    score_panel(args.keys.k + begin * args.keys.k_stride, args.keys.k_stride, end - begin, p.qt, args.rows.d_qk, x.s,
                x.block_max);
    if (begin < p.all_first || end > p.all_last) mask_block(p, x.s, begin, end - begin, x.block_max);
    absorb(args, x, p, values.v + begin * values.stride, values.stride, values.width, end - begin);
  }
}

HWY_INLINE void exact_tiles(const AdaptiveTileArgs& args, TileScratch& x, const Values& values, int64_t panels,
                            int64_t tile, int64_t count) {
  for (int64_t t = tile; t < tile + count; ++t) exact_tile(args, x, values, panels, t);
}

HWY_INLINE void tile_maximum(const AdaptiveTileArgs& args, TileScratch& x, int64_t panel, int64_t tile) {
  score_panel(args.keys.k + tile * kTileKeys * args.keys.k_stride, args.keys.k_stride, kTileKeys, x.panels[panel].qt,
              args.rows.d_qk, x.s, x.block_max);
}
#endif

// log2 of the weight at which a key holds the needle's share of a row. The denominator so far is below the final one,
// so no such key stays under the threshold.
HWY_INLINE void set_thresholds(const AdaptiveTileArgs& args, TileScratch& x, int64_t panels) {
  for (int64_t i = 0; i < panels; ++i) {
    const Panel& p = x.panels[i];
    for (int64_t lane = 0; lane < kPanel; ++lane)
      x.threshold[i * kPanel + lane] =
          lane < p.rows ? p.max[lane] + ::log2f(p.sum[lane]) + args.log2_needle : infinity();
  }
}

// Whether some key of a tile reaches the threshold of some row.
HWY_INLINE bool probe_tile(const AdaptiveTileArgs& args, TileScratch& x, int64_t panels, int64_t tile) {
  const KeyTables& keys = args.keys;
  const char* probe = keys.probe_tiles == nullptr ? nullptr : keys.probe_tiles + tile * keys.probe_tile_bytes;
  for (int64_t i = 0; i < panels; ++i) {
    clear_max(x.block_max);
    if (probe != nullptr) {
#if defined(ADAATTN_UNIT_INT8)
      int8_maximum(probe, keys.probe_rank, x.int8_q[i], x.block_max);
#else
      score_panel(reinterpret_cast<const float*>(probe), packed_stride(keys.probe_rank + 1), kTileKeys, x.probe_q[i],
                  keys.probe_rank + 1, x.s, x.block_max);
#endif
    } else {
      tile_maximum(args, x, i, tile);
    }
    for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
      const auto hit = hn::Ge(hn::Load(kF32, x.block_max + lane), hn::Load(kF32, x.threshold + i * kPanel + lane));
      if (!hn::AllFalse(kF32, hit)) return true;
    }
  }
  return false;
}

#if defined(ADAATTN_UNIT_BF16)
// Makes the scores of groups out of their centroids' products: the products with the mean of K, the second-order term
// of the spread and log2 of the group's size come on top.
struct FarExtra {
  static constexpr bool kMasks = false;
  const TileScratch& x;
  int64_t panel, n, d;  // d padded
  float factor;

  HWY_INLINE void before_group() {}
  HWY_INLINE bool changes_scores() const { return true; }
  HWY_INLINE void add_values(const uint32_t*, int64_t, int64_t) {}

  HWY_INLINE void change_scores(float* s, int64_t first, int64_t keys) {
    TileProduct spreads;
    const int64_t rows = round_up(keys, kStepKeys);
    spreads.start_scores(x.far_variances + first * d, d, rows, x.squares[panel], d, x.far_s);
    spreads.finish();
    const F32 limit = hn::Set(kF32, kSpreadLimit), one = hn::Set(kF32, 1.0f), f2 = hn::Set(kF32, factor * factor);
    for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
      const F32 base = hn::Add(hn::Load(kF32, x.far_base[panel] + lane), hn::Set(kF32, kGroupBonus));
      for (int64_t j = 0; j < rows; ++j) {
        float* at = s + j * kPanel + lane;
        const F32 spread = hn::Mul(hn::Load(kF32, x.far_s + j * kPanel + lane), f2);
        const F32 score = hn::Add(hn::Load(kF32, at), hn::Div(spread, hn::MulAdd(limit, spread, one)));
        hn::Store(j < keys ? hn::Add(score, base) : hn::Set(kF32, -infinity()), kF32, at);
      }
    }
  }
};

// The groups of some runs, n <= 128 in all, as one key each; their values stand in x.far_v.
HWY_INLINE void absorb_far(const AdaptiveTileArgs& args, TileScratch& x, const Values& values, int64_t panels,
                           int64_t runs, int64_t n) {
  const int64_t d = round_up(args.rows.d_qk, 32), bytes = d * static_cast<int64_t>(sizeof(uint16_t));
  int64_t to = 0;
  for (int64_t r = 0; r < runs; ++r) {
    for (int64_t g = x.far_runs[r].first; g < x.far_runs[r].first + x.far_runs[r].count; ++g, ++to) {
      const uint16_t* group = args.keys.packed_groups + g * 2 * d;
      memcpy(x.far_means + to * d, group, static_cast<size_t>(bytes));
      memcpy(x.far_variances + to * d, group + d, static_cast<size_t>(bytes));
    }
  }
  for (; to % kStepKeys != 0; ++to) {
    memset(x.far_means + to * d, 0, static_cast<size_t>(bytes));
    memset(x.far_variances + to * d, 0, static_cast<size_t>(bytes));
  }
  pack_values(x.far_v, n, values.width, packed_stride(args.rows.d_v), x.far_values);
  const float factor = score_rule(args.rows).query_factor;
  for (int64_t i = 0; i < panels; ++i) {
    FarExtra extra{x, i, n, d, factor};
    KeyWalk<FarExtra> walk{x.panels[i], x.words[i],  x.far_means, x.far_values, 0, d, round_up(values.width, 32),
                           x.s,         x.block_max, factor,      extra};
    if (args.rows.entropy.data != nullptr) {
      walk.run<true>(0, n);
    } else {
      walk.run<false>(0, n);
    }
  }
}

// Squares of the queries, and their products with the mean of K.
HWY_INLINE void prepare_far(const AdaptiveTileArgs& args, TileScratch& x, int64_t panel) {
  const int64_t pairs = round_up(args.rows.d_qk, 32) / 2;
  const __m512i high_half = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int64_t t = 0; t < pairs * kPanel; t += kLanes) {
    const __m512i word = _mm512_load_si512(x.words[panel] + t);
    const __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(word, 16));
    const __m512 high = _mm512_castsi512_ps(_mm512_and_si512(word, high_half));
    _mm512_store_si512(x.squares[panel] + t, pair_weights(_mm512_mul_ps(low, low), _mm512_mul_ps(high, high)));
  }
  for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
    F32 sum = hn::Zero(kF32);
    for (int64_t c = 0; c < args.rows.d_qk; ++c)
      sum = hn::MulAdd(hn::Set(kF32, args.keys.k_mean[c]), hn::Load(kF32, x.panels[panel].qt + c * kPanel + lane), sum);
    hn::Store(sum, kF32, x.far_base[panel] + lane);
  }
}
#else
// The groups of some runs, n <= 128 in all, as one key each; their values stand in x.far_v.
HWY_INLINE void absorb_far(const AdaptiveTileArgs& args, TileScratch& x, const Values& values, int64_t panels,
                           int64_t runs, int64_t n) {
  const int64_t d = args.rows.d_qk, stride = args.keys.group_k_stride;
  const F32 limit = hn::Set(kF32, kSpreadLimit), one = hn::Set(kF32, 1.0f);
  for (int64_t i = 0; i < panels; ++i) {
    clear_max(x.block_max);
    int64_t at_group = 0;
    for (int64_t r = 0; r < runs; ++r) {
      const GroupRun& run = x.far_runs[r];
      const float* k = args.keys.group_k + run.first * stride;
      score_panel(k, stride, run.count, x.far_q[i], d + 1, x.s + at_group * kPanel, x.block_max);
      score_panel(k + d + 1, stride, run.count, x.far_q[i] + (d + 1) * kPanel, d, x.far_s + at_group * kPanel,
                  x.block_max);
      at_group += run.count;
    }
    for (int v = 0; v < kPanelVectors; ++v) {
      F32 max = hn::Set(kF32, -infinity());
      for (int64_t j = 0; j < n; ++j) {
        float* at = x.s + j * kPanel + v * kLanes;
        const F32 spread = hn::Load(kF32, x.far_s + j * kPanel + v * kLanes);
        const F32 s = hn::Add(hn::Load(kF32, at), hn::Div(spread, hn::MulAdd(limit, spread, one)));
        max = hn::Max(s, max);
        hn::Store(s, kF32, at);
      }
      hn::Store(max, kF32, x.block_max + v * kLanes);
    }
    absorb(args, x, x.panels[i], x.far_v, packed_stride(args.rows.d_v), values.width, n);
  }
}

// Queries followed by a 1, then their squares.
HWY_INLINE void prepare_far(const AdaptiveTileArgs& args, TileScratch& x, int64_t panel) {
  const int64_t d = args.rows.d_qk;
  float* far_q = x.far_q[panel];
  for (int64_t t = 0; t < d * kPanel; t += kLanes) {
    const F32 q = hn::Load(kF32, x.panels[panel].qt + t);
    hn::Store(q, kF32, far_q + t);
    hn::Store(hn::Mul(q, q), kF32, far_q + (d + 1) * kPanel + t);
  }
  for (int64_t lane = 0; lane < kPanel; ++lane) far_q[d * kPanel + lane] = 1;
}
#endif

// The groups of every tile that is not kept. Returns the sum over rows of their share.
HWY_INLINE float far_field(const AdaptiveTileArgs& args, TileScratch& x, const Values& values, int64_t panels) {
  const int64_t v_stride = packed_stride(args.rows.d_v);
  for (int64_t i = 0; i < panels; ++i) {
    const Panel& p = x.panels[i];
    prepare_far(args, x, i);
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      x.before[i * 2 * kPanel + lane] = p.max[lane];
      x.before[(i * 2 + 1) * kPanel + lane] = p.sum[lane];
    }
  }
  int64_t n = 0, runs = 0;
  for (int64_t t = args.tile_begin; t < args.tile_end; ++t) {
    if (tile_bit(args.mask, t)) continue;
    const int64_t first = t * kGroupsPerTile;
    const bool joins = runs > 0 && x.far_runs[runs - 1].first + x.far_runs[runs - 1].count == first;
    if (!joins) x.far_runs[runs++] = {first, 0};
    x.far_runs[runs - 1].count += kGroupsPerTile;
    for (int64_t g = first; g < first + kGroupsPerTile; ++g, ++n)
      memcpy(x.far_v + n * v_stride, values.group_v + g * values.stride,
             static_cast<size_t>(values.width) * sizeof(float));
    if (n + kGroupsPerTile > kTileKeys) {
      absorb_far(args, x, values, panels, runs, n);
      n = runs = 0;
    }
  }
  if (n > 0) absorb_far(args, x, values, panels, runs, n);
  float mass = 0;
  for (int64_t i = 0; i < panels; ++i) {
    Panel& p = x.panels[i];
    for (int64_t lane = 0; lane < p.rows; ++lane) {
      const float before =
          x.before[(i * 2 + 1) * kPanel + lane] * ::exp2f(x.before[i * 2 * kPanel + lane] - p.max[lane]);
      const float far = p.sum[lane] - before;
      mass += far / p.sum[lane];
      // A group's weight is spread over 32 keys, each with a score lower by log2(32).
      p.entropy_sum[lane] -= kGroupBonus * far;
    }
  }
  return mass;
}

// O' of rank r back to d_v columns: U O' + (sum of weights) mean of V.
HWY_INLINE void project_up(const AdaptiveTileArgs& args, TileScratch& x, Panel& p) {
  const KeyTables& keys = args.keys;
  clear_max(x.block_max);
  score_panel(keys.basis, keys.rank, keys.d_v, p.ot, keys.rank, x.up, x.block_max);
  for (int64_t c = 0; c < keys.d_v; ++c) {
    const F32 mean = hn::Set(kF32, keys.v_mean[c]);
    for (int64_t lane = 0; lane < kPanel; lane += kLanes)
      hn::Store(hn::MulAdd(mean, hn::Load(kF32, p.sum + lane), hn::Load(kF32, x.up + c * kPanel + lane)), kF32,
                p.ot + c * kPanel + lane);
  }
}

AdaptiveTileResult adaptive_tile(const AdaptiveTileArgs& args) {
  const KeyTables& keys = args.keys;
  const ScoreRule rule = score_rule(args.rows);
  Arena arena{args.scratch};
  TileScratch x;
  lay_out(arena, x, args.rows.d_qk, args.rows.d_v, keys.probe_rank);

  PrefillArgs prefill;
  prefill.rows = args.rows;
  prefill.row_begin = args.row_begin;
  prefill.row_count = args.row_count;
  prefill.key_begin = args.key_begin;
  prefill.key_end = args.key_end;
  PrefillScratch finish;
  finish.row = x.row;
  finish.s = x.s;
#if defined(ADAATTN_UNIT_BF16)
  [[maybe_unused]] const TileScope scope;
#endif
  const int64_t panels = (args.row_count + kPanel - 1) / kPanel;
  for (int64_t i = 0; i < panels; ++i) {
    start_panel(prefill, x.panels[i], i * kPanel);
    fill_queries(prefill, rule, finish, x.panels[i]);
#if defined(ADAATTN_UNIT_BF16)
    fill_query_words(prefill, finish, x.panels[i], round_up(args.rows.d_qk, 32), x.words[i]);
#endif
  }

  const bool low_rank = keys.v_low != nullptr;
  const Values values = low_rank ? Values{keys.v_low, keys.group_v_low, keys.v_low_stride, keys.rank, keys.packed_v_low}
                                 : Values{keys.v, keys.group_v, keys.v_stride, keys.d_v, keys.packed_v};
  AdaptiveTileResult result;
  for (int64_t t = args.tile_begin; t < args.tile_end; ++t) {
    if (!tile_bit(args.mask, t)) continue;
    int64_t count = 1;
    while (t + count < args.tile_end && tile_bit(args.mask, t + count)) ++count;
    exact_tiles(args, x, values, panels, t, count);
    result.kept += count;
    t += count;  // not kept, or behind the last
  }
  const int64_t skipped = args.tile_end - args.tile_begin - result.kept;
  if (args.probe && skipped > 0) {
    if (keys.probe_tiles != nullptr) {
      for (int64_t i = 0; i < panels; ++i) {
        clear_max(x.block_max);
        score_panel(keys.probe_basis, keys.d_qk, keys.probe_rank + 1, x.panels[i].qt, keys.d_qk, x.probe_q[i],
                    x.block_max);
#if defined(ADAATTN_UNIT_INT8)
        quantize_queries(x.probe_q[i], keys.probe_rank, x.int8_q[i]);
#endif
      }
    }
    set_thresholds(args, x, panels);
    for (int64_t t = args.tile_begin; t < args.tile_end; ++t) {
      if (tile_bit(args.mask, t) || !probe_tile(args, x, panels, t)) continue;
      exact_tiles(args, x, values, panels, t, 1);
      args.mask[t / 64] |= uint64_t{1} << t % 64;
      set_thresholds(args, x, panels);
      ++result.probed_in;
    }
    result.kept += result.probed_in;
  }
  if (args.far_field && result.probed_in < skipped) result.far_mass = far_field(args, x, values, panels);
  for (int64_t i = 0; i < panels; ++i) {
    if (low_rank) project_up(args, x, x.panels[i]);
    finish_panel(prefill, finish, x.panels[i]);
  }
  return result;
}

}  // namespace
}  // namespace adaattn::cpu
