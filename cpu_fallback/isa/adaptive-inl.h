// Adaptive attention over the panels of prefill: a tile of queries walks the key tiles that decide kept, searches the
// others for single heavy keys, and takes what is left as centroids.
#pragma once

#include "cpu_fallback/isa/far_field-inl.h"
#include "decide/cells.h"

namespace adaattn::cpu {
namespace {

#if defined(ADAATTN_UNIT_BF16)
// Tiles of [at, end) in the mask, in order; mask null: all.
struct KeptTiles {
  const uint64_t* mask;
  int64_t at, end;

  HWY_INLINE void find() {
    while (at < end && mask != nullptr && !tile_bit(mask, at)) ++at;
  }
};

// The visible keys of every panel, one run of neighbouring kept tiles after another. Runs are short, so that their keys
// are still in second-level cache for the last panel.
struct KeptRuns {
  static constexpr int64_t kMostTiles = 4;
  PanelRuns panels;
  KeptTiles tiles;
  int64_t len;  // keys
  int64_t kept = 0;

  HWY_INLINE bool next(KeyRun& run) {
    while (!panels.next(run)) {
      tiles.find();
      if (tiles.at >= tiles.end) return false;
      const int64_t first = tiles.at;
      do {
        ++tiles.at;
        ++kept;
      } while (tiles.at < tiles.end && tiles.at < first + kMostTiles &&
               (tiles.mask == nullptr || tile_bit(tiles.mask, tiles.at)));
      panels.start(first * kTileKeys, tiles.at * kTileKeys < len ? tiles.at * kTileKeys : len);
    }
    return true;
  }
};

// Brings kept tiles into second-level cache, a part with each group of keys, so that one comes while the one before is
// walked: skipped tiles lie between them, over which the processor does not look ahead.
struct TilePrefetch : NothingElse {
  const char *k, *v;
  int64_t k_bytes, v_bytes;  // of a tile
  KeptTiles tiles;
  int64_t part = 0;

  HWY_INLINE TilePrefetch(const uint16_t* keys, int64_t key_bytes, const uint32_t* values, int64_t value_bytes,
                          const KeptTiles& kept)
      : k(reinterpret_cast<const char*>(keys)),
        v(reinterpret_cast<const char*>(values)),
        k_bytes(key_bytes),
        v_bytes(value_bytes),
        tiles(kept) {
    tiles.find();
    ++tiles.at;
    tiles.find();
  }

  HWY_INLINE void touch(const char* all, int64_t bytes, int64_t parts) const {
    const char* from = all + tiles.at * bytes + part * (bytes / parts);
    for (int64_t at = 0; at < bytes / parts; at += 64) _mm_prefetch(from + at, _MM_HINT_T1);
  }

  HWY_INLINE void before_group() {
    constexpr int64_t kParts = kTileRows / kPanel * (kTileKeys > kScoreKeys ? kTileKeys / kScoreKeys : 1);
    if (tiles.at >= tiles.end) return;
    touch(k, k_bytes, kParts);
    touch(v, v_bytes, kParts);
    if (++part < kParts) return;
    part = 0;
    ++tiles.at;
    tiles.find();
  }
};

// The tiles of [first, last) that are in the mask; returns their number.
HWY_INLINE int64_t exact_tiles(const AdaptiveTileArgs& args, TileScratch& x, const Values& values, int64_t panels,
                               const uint64_t* mask, int64_t first, int64_t last) {
  const int64_t width = round_up(values.width, 32);
  const KeptTiles tiles{mask, first, last};
  TilePrefetch prefetch(args.keys.packed_k, packed_elements(args.rows.d_qk) * 2, values.packed, kTileKeys * width * 2,
                        tiles);
  KeptRuns runs{PanelRuns(x.panels, panels), tiles, args.keys.len};
  walk_keys(KeyWalk<TilePrefetch, KeptRuns>{.k = args.keys.packed_k,
                                            .vt = values.packed,
                                            .origin = 0,
                                            .d_qk = round_up(args.rows.d_qk, 32),
                                            .d_v = width,
                                            .s = x.s,
                                            .block_max = x.block_max,
                                            .factor = score_rule(args.rows).query_factor,
                                            .extra = prefetch,
                                            .runs = runs},
            args.rows.entropy.data != nullptr);
  return runs.kept;
}

// The largest score of each query over a tile's 128 keys.
HWY_INLINE void tile_maximum(const AdaptiveTileArgs& args, TileScratch& x, int64_t panel, int64_t tile) {
  const int64_t d = round_up(args.rows.d_qk, 32);
  multiply_scores(args.keys.packed_k + tile * kTileKeys * d, d, kTileKeys, x.words[panel], d, x.s);
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

HWY_INLINE int64_t exact_tiles(const AdaptiveTileArgs& args, TileScratch& x, const Values& values, int64_t panels,
                               const uint64_t* mask, int64_t first, int64_t last) {
  int64_t kept = 0;
  for (int64_t t = first; t < last; ++t) {
    if (mask != nullptr && !tile_bit(mask, t)) continue;
    exact_tile(args, x, values, panels, t);
    ++kept;
  }
  return kept;
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
#if defined(ADAATTN_UNIT_AMX)
  const bool ranked = probe != nullptr;
  const float query_factor = score_rule(args.rows).query_factor;
  if (ranked || query_factor > 0) {
    const int64_t d = round_up(ranked ? keys.probe_rank : args.rows.d_qk, 32);
    RowMaximum rows{ranked ? reinterpret_cast<const uint16_t*>(probe) : keys.packed_k + tile * kTileKeys * d, d,
                    ranked ? x.probe_words : x.words, x.s};
    const F32 factor = hn::Set(kF32, ranked ? 1.0f : query_factor);
    return rows.any(panels, [&](int64_t panel, const F32* max) {
      bool hit = false;
      for (int v = 0; v < kPanelVectors; ++v) {
        const F32 base = ranked ? hn::Load(kF32, x.base[panel] + v * kLanes) : hn::Zero(kF32);
        const F32 threshold = hn::Load(kF32, x.threshold + panel * kPanel + v * kLanes);
        hit = hit || !hn::AllFalse(kF32, hn::Ge(hn::MulAdd(max[v], factor, base), threshold));
      }
      return hit;
    });
  }
#endif
  for (int64_t i = 0; i < panels; ++i) {
    clear_max(x.block_max);
    if (probe != nullptr) {
#if defined(ADAATTN_PROBE_INT8)
      int8_maximum(probe, keys.probe_rank, x.int8_q[i], x.block_max);
#elif !defined(ADAATTN_UNIT_AMX)
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
// Rows of f32, n by kPanel with n even, as words of pairs.
HWY_INLINE void pair_rows(const float* rows, int64_t n, uint32_t* words) {
  for (int64_t t = 0; t < n / 2 * kPanel; t += kLanes) {
    const float* row = rows + t / kPanel * 2 * kPanel + t % kPanel;
    _mm512_store_si512(words + t, pair_weights(_mm512_load_ps(row), _mm512_load_ps(row + kPanel)));
  }
}

// Products of the queries, in units of log2, with the mean of K, and those that the rank probe takes.
HWY_INLINE void project_queries(const AdaptiveTileArgs& args, TileScratch& x, int64_t panels, bool probe) {
  const KeyTables& keys = args.keys;
  const int64_t d = round_up(keys.d_qk, 32), rank = probe ? keys.probe_rank : 0;
  const int64_t rows = kMeanRows + round_up(rank, 32);
  pack_rows(keys.k_mean, 1, kMeanRows, keys.d_qk, 0, x.query_rows);
  // What rounding the mean to bf16 took away: queries move all their scores by it.
  for (int64_t c = 0; c < keys.d_qk; ++c)
    x.query_rows[d + c] = round_to_brain(keys.k_mean[c] - to_float(Brain{x.query_rows[c]}));
  if (rank > 0) pack_rows(keys.probe_basis, rank, rows - kMeanRows, keys.d_qk, keys.d_qk, x.query_rows + kMeanRows * d);
  const F32 factor = hn::Set(kF32, score_rule(args.rows).query_factor);
  for (int64_t i = 0; i < panels; ++i) {
    multiply_scores(x.query_rows, d, rows, x.words[i], d, x.query_products);
    float* projected = x.query_products + kMeanRows * kPanel;
    for (int64_t t = 0; t < (rows - kMeanRows) * kPanel; t += kLanes)
      hn::Store(hn::Mul(hn::Load(kF32, projected + t), factor), kF32, projected + t);
    for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
      const float* mean = x.query_products + lane;
      const F32 base = hn::Mul(hn::Add(hn::Load(kF32, mean), hn::Load(kF32, mean + kPanel)), factor);
      hn::Store(base, kF32, x.base[i] + lane);
    }
    if (rank == 0) continue;
#if defined(ADAATTN_UNIT_AMX)
    pair_rows(projected, rows - kMeanRows, x.probe_words[i]);
#else
    memcpy(projected + rank * kPanel, x.base[i], kPanel * sizeof(float));
    quantize_queries(projected, rank, x.int8_q[i]);
#endif
  }
}

HWY_INLINE void prepare_up(const KeyTables& keys, TileScratch& x) {
  pack_rows(keys.basis, keys.d_v, round_up(keys.d_v, 32), keys.rank, keys.rank, x.up_rows);
}

// The product with the basis of V, [d_v][kPanel]. Ranks are multiples of 32.
HWY_INLINE void multiply_up(const KeyTables& keys, TileScratch& x, const Panel& p) {
  uint32_t* words = reinterpret_cast<uint32_t*>(x.s);
  static_assert(kScoreFloats >= 128 / 2 * kPanel);
  pair_rows(p.ot, keys.rank, words);
  multiply_scores(x.up_rows, keys.rank, round_up(keys.d_v, 32), words, keys.rank, x.up);
}
#else
HWY_INLINE void project_queries(const AdaptiveTileArgs& args, TileScratch& x, int64_t panels, bool probe) {
  const KeyTables& keys = args.keys;
  for (int64_t i = 0; i < panels && probe; ++i) {
    score_panel(keys.probe_basis, keys.d_qk, keys.probe_rank + 1, x.panels[i].qt, keys.d_qk, x.probe_q[i], x.block_max);
#if defined(ADAATTN_PROBE_INT8)
    quantize_queries(x.probe_q[i], keys.probe_rank, x.int8_q[i]);
#endif
  }
}

HWY_INLINE void prepare_up(const KeyTables&, TileScratch&) {}

HWY_INLINE void multiply_up(const KeyTables& keys, TileScratch& x, const Panel& p) {
  score_panel(keys.basis, keys.rank, keys.d_v, p.ot, keys.rank, x.up, x.block_max);
}
#endif

// O' of rank r back to d_v columns: U O' + (sum of weights) mean of V.
HWY_INLINE void project_up(const AdaptiveTileArgs& args, TileScratch& x, Panel& p) {
  const KeyTables& keys = args.keys;
  multiply_up(keys, x, p);
  for (int64_t c = 0; c < keys.d_v; ++c) {
    const F32 mean = hn::Set(kF32, keys.v_mean[c]);
    for (int64_t lane = 0; lane < kPanel; lane += kLanes)
      hn::Store(hn::MulAdd(mean, hn::Load(kF32, p.sum + lane), hn::Load(kF32, x.up + c * kPanel + lane)), kF32,
                p.ot + c * kPanel + lane);
  }
}

// The keys of dropped tiles as one of their mean value: O += w v and sum += w, w being their share of the row's mass.
HWY_INLINE float add_dropped_mean(const AdaptiveTileArgs& args, Panel& p) {
  const int64_t d_v = args.rows.d_v;
  float mass = 0;
  for (int64_t lane = 0; lane < kPanel && lane < p.rows; lane += kLanes) {
    const float* block = args.dropped + (p.row + lane) / decide::kCell * dropped_stride(d_v);
    const float share = block[0];
    if (!(share > 0 && share < 1)) continue;
    const int64_t rows = p.rows - lane < kLanes ? p.rows - lane : kLanes;
    mass += share * static_cast<float>(rows);
    const F32 sum = hn::Load(kF32, p.sum + lane), most = hn::Mul(sum, hn::Set(kF32, share / (1 - share)));
    const F32 weight = hn::Min(
        exp2(hn::Min(hn::Sub(hn::Set(kF32, block[1]), hn::Load(kF32, p.max + lane)), hn::Set(kF32, 100.0f))), most);
    hn::Store(hn::Add(sum, weight), kF32, p.sum + lane);
    for (int64_t c = 0; c < d_v; ++c) {
      float* o = p.ot + c * kPanel + lane;
      hn::Store(hn::MulAdd(weight, hn::Set(kF32, block[kDroppedHead + c]), hn::Load(kF32, o)), kF32, o);
    }
    if (args.rows.entropy.data == nullptr) continue;
    // As if the weight were spread evenly over the dropped keys.
    for (int64_t i = lane; i < lane + rows; ++i) {
      const float w = p.sum[i] * share;
      if (w > 0) p.entropy_sum[i] += w * ::log2f(w / static_cast<float>(args.dropped_keys));
    }
  }
  return mass;
}

AdaptiveTileResult adaptive_tile(const AdaptiveTileArgs& args) {
  const KeyTables& keys = args.keys;
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
#if defined(ADAATTN_UNIT_BF16)
    fill_query_words(prefill, finish, x.panels[i], round_up(args.rows.d_qk, 32), x.words[i]);
#else
    fill_queries(prefill, score_rule(args.rows), finish, x.panels[i]);
#endif
  }

  const bool low_rank = keys.rank > 0;
  const Values values = low_rank ? Values{keys.v_low, keys.group_v_low, keys.v_low_stride, keys.rank, keys.packed_v_low}
                                 : Values{keys.v, keys.group_v, keys.v_stride, keys.d_v, keys.packed_v};
  AdaptiveTileResult result;
  result.kept = exact_tiles(args, x, values, panels, args.mask, args.tile_begin, args.tile_end);
  const int64_t skipped = args.tile_end - args.tile_begin - result.kept;
  if (skipped > 0) project_queries(args, x, panels, args.probe && keys.probe_tiles != nullptr);
  if (args.probe && skipped > 0) {
    set_thresholds(args, x, panels);
    for (int64_t t = args.tile_begin; t < args.tile_end; ++t) {
      if (tile_bit(args.mask, t) || !probe_tile(args, x, panels, t)) continue;
      exact_tiles(args, x, values, panels, nullptr, t, t + 1);
      args.mask[t / 64] |= uint64_t{1} << t % 64;
      set_thresholds(args, x, panels);
      ++result.probed_in;
    }
    result.kept += result.probed_in;
  }
  if (args.far_field && result.probed_in < skipped) result.far_mass = far_field(args, x, values, panels);
  if (low_rank) prepare_up(keys, x);
  for (int64_t i = 0; i < panels; ++i) {
    if (low_rank) project_up(args, x, x.panels[i]);
    if (args.dropped != nullptr && skipped > 0) result.far_mass += add_dropped_mean(args, x.panels[i]);
    finish_panel(prefill, finish, x.panels[i]);
  }
  return result;
}

}  // namespace
}  // namespace adaattn::cpu
