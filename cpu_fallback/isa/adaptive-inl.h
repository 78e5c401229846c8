// Adaptive attention over the panels of prefill: a tile of queries walks the key tiles that decide kept, searches the
// others for single heavy keys, and takes what is left as centroids.
#pragma once

#include "cpu_fallback/isa/far_field-inl.h"

namespace adaattn::cpu {
namespace {

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
