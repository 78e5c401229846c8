// The far field: groups of 32 keys of the tiles that are not kept, each as one key at its centroid.
#pragma once

#include "cpu_fallback/isa/adaptive_scratch-inl.h"

namespace adaattn::cpu {
namespace {

#if defined(ADAATTN_UNIT_BF16)
// Makes the scores of groups out of their centroids' products: the products with the mean of K, the second-order term
// of the spread and log2 of the group's size come on top.
struct FarExtra {
  static constexpr bool kMasks = false;
  const TileScratch& x;
  int64_t d;  // padded
  float factor;

  HWY_INLINE void before_group() {}
  HWY_INLINE bool changes_scores() const { return true; }
  HWY_INLINE void add_values(Panel&, const uint32_t*, int64_t, int64_t) {}

  HWY_INLINE void change_scores(Panel& p, float* s, int64_t first, int64_t keys) {
    const int64_t panel = &p - x.panels;
    const int64_t rows = round_up(keys, kStepKeys);
    multiply_scores(x.far_variances + first * d, d, rows, x.squares[panel], d, x.far_s);
    const F32 limit = hn::Set(kF32, kSpreadLimit), one = hn::Set(kF32, 1.0f), f2 = hn::Set(kF32, factor * factor);
    for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
      const F32 base = hn::Add(hn::Load(kF32, x.base[panel] + lane), hn::Set(kF32, kGroupBonus));
      for (int64_t j = 0; j < rows; ++j) {
        float* at = s + j * kPanel + lane;
        const F32 spread = hn::Mul(hn::Load(kF32, x.far_s + j * kPanel + lane), f2);
        const F32 score =
            hn::Add(hn::Load(kF32, at), hn::Mul(spread, hn::ApproximateReciprocal(hn::MulAdd(limit, spread, one))));
        hn::Store(j < keys ? hn::Add(score, base) : hn::Set(kF32, -infinity()), kF32, at);
      }
    }
  }
};

// All n groups for every panel.
struct FarRuns {
  Panel* panels;
  int64_t count, n;
  int64_t at = 0;

  HWY_INLINE bool next(KeyRun& run) {
    if (at == count) return false;
    run = {panels + at++, 0, n};
    return true;
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
  FarExtra extra{x, d, factor};
  FarRuns groups{x.panels, panels, n};
  walk_keys(KeyWalk<FarExtra, FarRuns>{.k = x.far_means,
                                       .vt = x.far_values,
                                       .origin = 0,
                                       .d_qk = d,
                                       .d_v = round_up(values.width, 32),
                                       .s = x.s,
                                       .block_max = x.block_max,
                                       .factor = factor,
                                       .extra = extra,
                                       .runs = groups},
            args.rows.entropy.data != nullptr);
}

// Squares of the queries.
HWY_INLINE void prepare_far(const AdaptiveTileArgs& args, TileScratch& x, int64_t panel) {
  const int64_t pairs = round_up(args.rows.d_qk, 32) / 2;
  const __m512i high_half = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int64_t t = 0; t < pairs * kPanel; t += kLanes) {
    const __m512i word = _mm512_load_si512(x.words[panel] + t);
    const __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(word, 16));
    const __m512 high = _mm512_castsi512_ps(_mm512_and_si512(word, high_half));
    _mm512_store_si512(x.squares[panel] + t, pair_weights(_mm512_mul_ps(low, low), _mm512_mul_ps(high, high)));
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

}  // namespace
}  // namespace adaattn::cpu
