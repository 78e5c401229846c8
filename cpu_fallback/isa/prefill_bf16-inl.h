// Prefill with bf16 products (see products-inl.h). Panels and masks are those of the f32 kernel. Weights are rounded to
// bf16 pairs; a row's reference follows its maximum with some slack, so that O^T is hardly ever rescaled.
#pragma once

#include "cpu_fallback/isa/walk_bf16-inl.h"

namespace adaattn::cpu {
namespace {

// bf16 as stored, or f32 that the caller allows to be rounded.
HWY_INLINE bool takes_bf16(const PrefillArgs& args) {
  const auto narrow = [&](Dtype dtype) {
    return dtype == Dtype::kBF16 || (args.rows.fast_f32 && dtype == Dtype::kF32);
  };
  return narrow(args.rows.q.dtype) && narrow(args.k.dtype) && narrow(args.v.dtype);
}

// 32 keys of bf16 whose rows need no padding, from `key` on; false if some value is NaN or infinite.
HWY_INLINE bool pack_whole_tile(const PrefillArgs& args, int64_t key, uint16_t* k, uint32_t* vt, int64_t tile) {
  const int64_t d_qk = args.rows.d_qk, d_v = args.rows.d_v;
  const uint16_t* rows[kStepKeys];
  for (int64_t i = 0; i < kStepKeys; ++i) {
    const char* from = key_address(args.k, key + i);
    for (int64_t c = 0; c < d_qk; c += 32) _mm512_storeu_si512(k + i * d_qk + c, _mm512_loadu_si512(from + c * 2));
    rows[i] = reinterpret_cast<const uint16_t*>(key_address(args.v, key + i));
  }
  __mmask16 special = 0;
  for (int64_t c = 0; c < d_v; c += kTileValues)
    special |= pack_value_tile<true>([&](int i) { return rows[i] + c; }, value_tile(vt, d_v, c / kTileValues, tile));
  return special == 0;
}

// K as rows of bf16, V as tiles; keys [first, first + keys), zeros up to the next multiple of 32. V rows that hold NaN
// or infinity are handled as in pack_block().
HWY_NOINLINE int64_t pack_block_bf16(const PrefillArgs& args, PrefillScratch& x, int64_t first, int64_t keys,
                                     int64_t d_qk, int64_t d_v) {
  uint16_t* k = reinterpret_cast<uint16_t*>(x.k);
  uint32_t* vt = reinterpret_cast<uint32_t*>(x.v);
  uint16_t* staging = reinterpret_cast<uint16_t*>(x.s);  // [32 keys][d_v]
  static_assert(kStepKeys * 512 / 2 <= kScoreFloats);
  const auto copy = [&](const KeyOperand& operand, int64_t key, int64_t n, uint16_t* to, int64_t padded) {
    const void* from = key_address(operand, key);
    if (operand.dtype == Dtype::kF32) {
      memcpy(x.row, from, static_cast<size_t>(n) * sizeof(float));
      from = x.row;
    }
    return narrow_row(from, operand.dtype, to, n, padded);
  };
  const bool direct =
      args.k.dtype == Dtype::kBF16 && args.v.dtype == Dtype::kBF16 && args.rows.d_qk == d_qk && args.rows.d_v == d_v;
  int64_t unusual = 0;
  for (int64_t tile = 0; tile * kStepKeys < keys; ++tile) {
    if (direct && (tile + 1) * kStepKeys <= keys &&
        pack_whole_tile(args, first + tile * kStepKeys, k + tile * kStepKeys * d_qk, vt, tile))
      continue;
    for (int64_t i = 0; i < kStepKeys; ++i) {
      const int64_t j = tile * kStepKeys + i;
      uint16_t* v_row = staging + i * d_v;
      if (j >= keys) {
        memset(k + j * d_qk, 0, static_cast<size_t>(d_qk) * sizeof(uint16_t));
        memset(v_row, 0, static_cast<size_t>(d_v) * sizeof(uint16_t));
        continue;
      }
      copy(args.k, first + j, args.rows.d_qk, k + j * d_qk, d_qk);
      if (!copy(args.v, first + j, args.rows.d_v, v_row, d_v)) {
        memset(v_row, 0, static_cast<size_t>(d_v) * sizeof(uint16_t));
        x.unusual[unusual++] = static_cast<uint16_t>(j);
      }
    }
    for (int64_t c = 0; c < d_v; c += kTileValues)
      pack_value_tile<false>([&](int i) { return staging + i * d_v + c; }, value_tile(vt, d_v, c / kTileValues, tile));
  }
  return unusual;
}

// Into second-level cache: the rows of one head may lie far apart, where the processor does not look ahead.
HWY_INLINE void touch_row(const char* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) _mm_prefetch(row + at, _MM_HINT_T1);
}

// Brings keys into second-level cache, some at a time.
struct KeyPrefetch {
  const PrefillArgs& args;
  int64_t key, end, step;

  HWY_INLINE void run() {
    const int64_t last = key + step < end ? key + step : end;
    for (; key < last; ++key) {
      touch_row(key_address(args.k, key), args.rows.d_qk * element_bytes(args.k.dtype));
      touch_row(key_address(args.v, key), args.rows.d_v * element_bytes(args.v.dtype));
    }
  }
};

// What prefill adds to a walk: score terms, V rows that hold NaN or infinity, and a look ahead.
struct PrefillExtra {
  const PrefillArgs& args;
  const ScoreRule& rule;
  PrefillScratch& x;
  int64_t block_first, unusual;  // rows of V in x.unusual, relative to this key
  KeyPrefetch& prefetch;

  HWY_INLINE void before_group() { prefetch.run(); }
  HWY_INLINE bool changes_scores() const { return rule.special; }
  static constexpr bool kMasks = true;

  HWY_INLINE void change_scores(Panel& p, float* s, int64_t key, int64_t keys) {
    if (rule.special) apply_score_terms(args, rule, p, s, key, keys);
  }

  // As add_unusual() of the f32 kernel.
  HWY_INLINE void add_values(Panel& p, const uint32_t* weights, int64_t first, int64_t keys) {
    if (unusual > 0) add_unusual_bf16(p, weights, first, keys);
  }

  HWY_NOINLINE void add_unusual_bf16(Panel& p, const uint32_t* weights, int64_t first, int64_t keys) {
    const uint16_t* w = reinterpret_cast<const uint16_t*>(weights);
    for (int64_t u = 0; u < unusual; ++u) {
      const int64_t key = block_first + x.unusual[u], j = key - first;
      if (j < 0 || j >= keys) continue;
      widen_row(key_address(args.v, key), args.v.dtype, x.row, args.rows.d_v, 1.0f);
      for (int64_t lane = 0; lane < p.rows; ++lane) {
        const float weight = to_float(Brain{w[(j / 2 * kPanel + lane) * 2 + j % 2]});
        if (weight == 0) continue;
        for (int64_t i = 0; i < args.rows.d_v; ++i) p.ot[i * kPanel + lane] += weight * x.row[i];
      }
    }
  }
};

void prefill_bf16(const PrefillArgs& args) {
  const RowOperands& rows = args.rows;
  const ScoreRule rule = score_rule(rows);
  const int64_t panels = (args.row_count + kPanel - 1) / kPanel;
  const int64_t d_qk = round_up(rows.d_qk, 32), d_v = round_up(rows.d_v, 32);
  Arena arena{args.scratch};
  PrefillScratch x;
  lay_out(arena, x, rows.d_qk, rows.d_v, panels);
  // The floats of the f32 kernel's block hold twice as many keys.
  constexpr int64_t kBlockKeys = 2 * kKeyBlock;
  static_assert(kBlockKeys % kScoreKeys == 0);
  [[maybe_unused]] const TileScope scope;

  int64_t first = INT32_MAX, last = 0;
  for (int64_t i = 0; i < panels; ++i) {
    Panel& p = x.panels[i];
    start_panel(args, p, i * kPanel);
    for (int64_t r = 0; r < p.rows; ++r)
      touch_row(row_address(rows.q, rows.group, row_of(args, p.row + r)), rows.d_qk * element_bytes(rows.q.dtype));
    if (p.first >= p.last) continue;
    first = p.first < first ? p.first : first;
    last = p.last > last ? p.last : last;
  }
  if (first < last) {
    const int64_t block_last = (first / kBlockKeys + 1) * kBlockKeys;
    KeyPrefetch{args, first, block_last < last ? block_last : last, kBlockKeys}.run();
  }
  for (int64_t i = 0; i < panels; ++i)
    fill_query_words(args, x, x.panels[i], d_qk, reinterpret_cast<uint32_t*>(x.panels[i].qt));

  for (int64_t block = first / kBlockKeys * kBlockKeys; block < last; block += kBlockKeys) {
    // Tiles of keys are anchored at key 0, like blocks.
    const int64_t block_first = block > first ? block : first / kStepKeys * kStepKeys;
    const int64_t block_last = block + kBlockKeys < last ? block + kBlockKeys : last;
    const int64_t unusual = pack_block_bf16(args, x, block_first, block_last - block_first, d_qk, d_v);
    const int64_t groups = panels * (kBlockKeys / kScoreKeys);
    const int64_t to_come = last - block_last < kBlockKeys ? last - block_last : kBlockKeys;
    KeyPrefetch prefetch{args, block_last, block_last + to_come, (to_come + groups - 1) / groups};
    PrefillExtra extra{args, rule, x, block_first, unusual, prefetch};
    PanelRuns runs(x.panels, panels);
    runs.start(block_first, block_last);
    walk_keys(KeyWalk<PrefillExtra, PanelRuns>{.k = reinterpret_cast<const uint16_t*>(x.k),
                                               .vt = reinterpret_cast<const uint32_t*>(x.v),
                                               .origin = block_first,
                                               .d_qk = d_qk,
                                               .d_v = d_v,
                                               .s = x.s,
                                               .block_max = x.block_max,
                                               .factor = rule.query_factor,
                                               .extra = extra,
                                               .runs = runs},
              rows.entropy.data != nullptr);
  }
  for (int64_t i = 0; i < panels; ++i) finish_panel(args, x, x.panels[i]);
}

}  // namespace
}  // namespace adaattn::cpu
