// Adaptive attention over the panels of prefill: a tile of queries walks the key tiles that decide kept, searches the
// others for single heavy keys, and takes what is left as centroids.
#pragma once

#include "cpu_fallback/isa/far_field-inl.h"
#if defined(ADAATTN_UNIT_BF16)
#include "cpu_fallback/isa/kept_tiles_bf16-inl.h"
#endif
#include "decide/cells.h"

namespace adaattn::cpu {
namespace {

#if !defined(ADAATTN_UNIT_BF16)
HWY_INLINE void exact_tile(const AdaptiveTileArgs& args, TileScratch& x, const Values& values, int64_t first_panel,
                           int64_t panels, int64_t tile) {
  const int64_t first = tile * kTileKeys;
  const int64_t last = first + kTileKeys < args.keys.len ? first + kTileKeys : args.keys.len;
  for (int64_t i = 0; i < panels; ++i) {
    Panel& p = x.panels[first_panel + i];
    const int64_t begin = p.first > first ? p.first : first, end = p.last < last ? p.last : last;
    if (begin >= end) continue;
    clear_max(x.block_max);
#if defined(ADAATTN_BYTE_SCORES)
    if (args.bytes) {
      score_bytes(args.keys.byte_tiles + tile * byte_tile_bytes(args.rows.d_qk), begin - first, end - begin,
                  byte_width(args.rows.d_qk), x.byte_q[first_panel + i], x.s, x.block_max);
    }
#endif
    if (!args.bytes)
      score_panel(args.keys.k + begin * args.keys.k_stride, args.keys.k_stride, end - begin, p.qt, args.rows.d_qk, x.s,
                  x.block_max);
    if (begin < p.all_first || end > p.all_last) mask_block(p, x.s, begin, end - begin, x.block_max);
    absorb(args, x, p, values.v + begin * values.stride, values.stride, values.width, end - begin);
  }
}

// The tiles of [first, last) that are in each head's mask (null: all), for panels_of_head panels of each; adds their
// number to `kept`.
HWY_INLINE void exact_tiles(const AdaptiveTileArgs* each, TileScratch& x, const Values& values, int64_t heads,
                            int64_t panels_of_head, const uint64_t* const* masks, int64_t first, int64_t last,
                            int64_t* kept) {
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t t = first; t < last; ++t) {
      if (masks[h] != nullptr && !tile_bit(masks[h], t)) continue;
      exact_tile(each[h], x, values, h * panels_of_head, panels_of_head, t);
      ++kept[h];
    }
  }
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

// The keys of dropped tiles as one more key of each row, of their mean value: O += w v and sum += w, where w is the
// weight that the row's block gives them by its mean query, times `remainder`, and at most what so many
// times their share of the block's mass would be.
HWY_INLINE float add_dropped_mean(const AdaptiveTileArgs& args, Panel& p) {
  const int64_t d_v = args.rows.d_v;
  float mass = 0;
  for (int64_t lane = 0; lane < kPanel && lane < p.rows; lane += kLanes) {
    const float* block = args.dropped + (p.row + lane) / decide::kCell * dropped_stride(d_v);
    if (!(block[0] > 0)) continue;
    const F32 sum = hn::Load(kF32, p.sum + lane), most = hn::Set(kF32, 100.0f);
    const F32 log2_weight = hn::Sub(hn::Set(kF32, block[1] + ::log2f(args.remainder)), hn::Load(kF32, p.max + lane));
    const float share = block[0] < 0.5f ? block[0] : 0.5f, odds = args.remainder * share / (1 - share);
    const F32 weight = hn::Min(exp2(hn::Min(log2_weight, most)), hn::Mul(sum, hn::Set(kF32, odds < 1 ? odds : 1.0f)));
    HWY_ALIGN float weights[kLanes];
    hn::Store(weight, kF32, weights);
    hn::Store(hn::Add(sum, weight), kF32, p.sum + lane);
    for (int64_t c = 0; c < d_v; ++c) {
      float* o = p.ot + c * kPanel + lane;
      hn::Store(hn::MulAdd(weight, hn::Set(kF32, block[kDroppedHead + c]), hn::Load(kF32, o)), kF32, o);
    }
    for (int64_t i = 0; i < kLanes && lane + i < p.rows; ++i) {
      const float w = weights[i];
      if (!(w > 0)) continue;
      mass += w / p.sum[lane + i];
      // As if the weight were spread evenly over the dropped keys.
      if (args.rows.entropy.data != nullptr)
        p.entropy_sum[lane + i] += w * ::log2f(w / static_cast<float>(args.dropped_keys));
    }
  }
  return mass;
}

// What follows the kept tiles, for the panels of one head.
HWY_INLINE void finish_head(const AdaptiveTileArgs& args, const PrefillArgs& prefill, TileScratch& x,
                            const Values& values, int64_t panels, AdaptiveTileResult& result) {
  const KeyTables& keys = args.keys;
  const int64_t skipped = args.tile_end - args.tile_begin - result.kept;
  if (skipped > 0 && (args.far_field || args.probe))
    project_queries(args, x, panels, args.probe && keys.probe_tiles != nullptr);
  if (args.probe && skipped > 0) {
    set_thresholds(args, x, panels);
    for (int64_t t = args.tile_begin; t < args.tile_end; ++t) {
      if (tile_bit(args.mask, t) || !probe_tile(args, x, panels, t)) continue;
      const uint64_t* all = nullptr;
      AdaptiveTileArgs own = args;
      own.bytes = false;  // the references have the mean of K by now
      exact_tiles(&own, x, values, 1, panels, &all, t, t + 1, &result.probed_in);
      args.mask[t / 64] |= uint64_t{1} << t % 64;
      set_thresholds(args, x, panels);
    }
    result.kept += result.probed_in;
  }
  if (args.far_field && result.probed_in < skipped) result.far_mass = far_field(args, x, values, panels);
  const bool low_rank = keys.rank > 0;
  if (low_rank) prepare_up(keys, x);
  PrefillScratch finish;
  finish.row = x.row;
  finish.s = x.s;
  for (int64_t i = 0; i < panels; ++i) {
    if (low_rank) project_up(args, x, x.panels[i]);
    if (args.dropped != nullptr && skipped > 0) result.far_mass += add_dropped_mean(args, x.panels[i]);
    finish_panel(prefill, finish, x.panels[i]);
  }
}

// `count` heads of one query tile, at most kMostHeads, which share everything but their rows, masks and what stands for
// the dropped tiles.
void adaptive_tiles(const AdaptiveTileArgs* heads, int64_t count, AdaptiveTileResult* results) {
  const AdaptiveTileArgs& first = heads[0];
  const KeyTables& keys = first.keys;
  Arena arena{first.scratch};
  TileScratch x;
  lay_out(arena, x, first.rows.d_qk, first.rows.d_v, keys.probe_rank, count);
  PrefillScratch fill;
  fill.row = x.row;
  fill.s = x.s;
#if defined(ADAATTN_UNIT_BF16)
  [[maybe_unused]] const TileScope scope;
#endif
  const int64_t panels = (first.row_count + kPanel - 1) / kPanel;
  PrefillArgs prefill[kMostHeads];
  const uint64_t* masks[kMostHeads];
  int64_t kept[kMostHeads] = {};
  for (int64_t h = 0; h < count; ++h) {
    prefill[h].rows = heads[h].rows;
    prefill[h].row_begin = first.row_begin;
    prefill[h].row_count = first.row_count;
    prefill[h].key_begin = first.key_begin;
    prefill[h].key_end = first.key_end;
    masks[h] = heads[h].mask;
    for (int64_t i = 0; i < panels; ++i) {
      const int64_t at = h * panels + i;
      start_panel(prefill[h], x.panels[at], i * kPanel);
#if defined(ADAATTN_UNIT_BF16)
      fill_query_words(prefill[h], fill, x.panels[at], round_up(first.rows.d_qk, 32), x.words[at]);
      if (heads[h].bytes)
        quantize_words(x.words[at], first.rows.d_qk, score_rule(first.rows).query_factor, keys.k_mean, x.byte_q[at]);
#else
      fill_queries(prefill[h], score_rule(first.rows), fill, x.panels[at]);
#if defined(ADAATTN_BYTE_SCORES)
      if (heads[h].bytes) quantize_panel(x.panels[at], first.rows.d_qk, keys.k_mean, x.byte_q[at]);
#endif
#endif
    }
  }
  const Values values = keys.rank > 0
                            ? Values{keys.v_low, keys.group_v_low, keys.v_low_stride, keys.rank, keys.packed_v_low}
                            : Values{keys.v, keys.group_v, keys.v_stride, keys.d_v, keys.packed_v};
  exact_tiles(heads, x, values, count, panels, masks, first.tile_begin, first.tile_end, kept);
  for (int64_t h = 0; h < count; ++h) {
    results[h] = {};
    results[h].kept = kept[h];
#if defined(ADAATTN_BYTE_SCORES)
    for (int64_t at = h * panels; at < (h + 1) * panels && heads[h].bytes; ++at) {
      for (int64_t lane = 0; lane < kPanel; ++lane) x.panels[at].max[lane] += x.byte_q[at].base[lane];
    }
#endif
    TileScratch of_head = x;
    of_head.panels = x.panels + h * panels;
#if defined(ADAATTN_UNIT_BF16)
    of_head.words = x.words + h * panels;
#endif
    finish_head(heads[h], prefill[h], of_head, values, panels, results[h]);
  }
}

}  // namespace
}  // namespace adaattn::cpu
