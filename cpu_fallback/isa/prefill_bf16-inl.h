// Prefill with bf16 products (see products-inl.h). Panels and masks are those of the f32 kernel. Weights are rounded to
// bf16 pairs; a row's reference follows its maximum with some slack, so that O^T is hardly ever rescaled.
#pragma once

#include "cpu_fallback/isa/softmax_bf16-inl.h"

namespace adaattn::cpu {
namespace {

// bf16 as stored, or f32 that the caller allows to be rounded.
HWY_INLINE bool takes_bf16(const PrefillArgs& args) {
  const auto narrow = [&](Dtype dtype) {
    return dtype == Dtype::kBF16 || (args.rows.fast_f32 && dtype == Dtype::kF32);
  };
  return narrow(args.rows.q.dtype) && narrow(args.k.dtype) && narrow(args.v.dtype);
}

// n elements of a row as bf16, zeros up to `padded`. Returns false if some element is NaN or infinite.
HWY_INLINE bool narrow_row(const void* from, Dtype dtype, uint16_t* to, int64_t n, int64_t padded) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  __mmask32 special = 0;
  if (dtype == Dtype::kF32) store_row(static_cast<const float*>(from), to, Dtype::kBF16, n);
  const void* source = dtype == Dtype::kF32 ? to : from;
  for (int64_t i = 0; i < padded; i += 32) {
    const int64_t count = n - i < 32 ? n - i : 32;
    const __mmask32 used = static_cast<__mmask32>((uint64_t{1} << (count > 0 ? count : 0)) - 1);
    const __m512i x = _mm512_maskz_loadu_epi16(used, static_cast<const uint16_t*>(source) + i);
    special |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
    _mm512_storeu_si512(to + i, x);
  }
  return special == 0;
}

// Q^T as words [d / 2][kPanel].
HWY_INLINE void fill_query_words(const PrefillArgs& args, PrefillScratch& x, Panel& p, int64_t d) {
  const RowOperands& rows = args.rows;
  uint16_t* staging = reinterpret_cast<uint16_t*>(x.s);
  for (int64_t lane = 0; lane < kPanel; lane += 16) {
    for (int64_t i = 0; i < 16; ++i) {
      uint16_t* to = staging + i * d;
      if (lane + i < p.rows) {
        const int64_t r = args.row_begin + p.row + lane + i;
        // f32 rows need not be aligned: they go through an aligned copy.
        const void* from = row_address(rows.q, rows.group, r);
        if (rows.q.dtype == Dtype::kF32) {
          memcpy(x.row, from, static_cast<size_t>(rows.d_qk) * sizeof(float));
          from = x.row;
        }
        narrow_row(from, rows.q.dtype, to, rows.d_qk, d);
      } else {
        memset(to, 0, static_cast<size_t>(d) * sizeof(uint16_t));
      }
    }
    transpose_rows(staging, d / 2, p.qt + lane, kPanel, d / 2);
  }
}

// K as rows of bf16, V as tiles; keys [first, first + keys), zeros up to the next multiple of 32. V rows that hold NaN
// or infinity are handled as in pack_block().
HWY_NOINLINE int64_t pack_block_bf16(const PrefillArgs& args, PrefillScratch& x, int64_t first, int64_t keys,
                                     int64_t d_qk, int64_t d_v) {
  uint16_t* k = reinterpret_cast<uint16_t*>(x.k);
  uint32_t* vt = reinterpret_cast<uint32_t*>(x.v);
  uint16_t* staging = reinterpret_cast<uint16_t*>(x.s);  // [32 keys][d_v]
  static_assert(kTileKeys * 512 / 2 <= kScoreFloats);
  const auto copy = [&](const KeyOperand& operand, int64_t key, int64_t n, uint16_t* to, int64_t padded) {
    const void* from = key_address(operand, key);
    if (operand.dtype == Dtype::kF32) {
      memcpy(x.row, from, static_cast<size_t>(n) * sizeof(float));
      from = x.row;
    }
    return narrow_row(from, operand.dtype, to, n, padded);
  };
  int64_t unusual = 0;
  for (int64_t tile = 0; tile * kTileKeys < keys; ++tile) {
    for (int64_t i = 0; i < kTileKeys; ++i) {
      const int64_t j = tile * kTileKeys + i;
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
    for (int64_t c = 0; c < d_v; c += kTileValues) {
      __m512i pair[16];
      ADAATTN_UNROLL for (int w = 0; w < 16; ++w) {
        const uint16_t* even = staging + 2 * w * d_v + c;
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)));
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even + d_v)));
        pair[w] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
      }
      transpose16(pair);
      uint32_t* to = value_tile(vt, d_v, c / kTileValues, tile);
      ADAATTN_UNROLL for (int r = 0; r < 16; ++r) _mm512_storeu_si512(to + r * 16, pair[r]);
    }
  }
  return unusual;
}

// Brings the keys of the next block into second-level cache, some at a time: the rows of one head may lie far apart,
// where the processor does not look ahead.
struct KeyPrefetch {
  const PrefillArgs& args;
  int64_t key, end, step;

  HWY_INLINE void run() {
    const int64_t last = key + step < end ? key + step : end;
    for (; key < last; ++key) {
      touch(args.k, args.rows.d_qk);
      touch(args.v, args.rows.d_v);
    }
  }

  HWY_INLINE void touch(const KeyOperand& operand, int64_t d) const {
    const char* row = key_address(operand, key);
    for (int64_t at = 0; at < d * element_bytes(operand.dtype); at += 64) _mm_prefetch(row + at, _MM_HINT_T1);
  }
};

// A block of packed keys, as one panel walks it.
struct BlockWalk {
  const PrefillArgs& args;
  const ScoreRule& rule;
  PrefillScratch& x;
  Panel& p;
  int64_t d_qk, d_v;    // padded
  int64_t block_first;  // key of the first packed row
  int64_t unusual;      // rows of V in x.unusual
  KeyPrefetch& prefetch;
  TileProduct scores = {}, values = {};
  int64_t batch = 0;    // first key of the weights that wait for the product with V
  int64_t waiting = 0;  // their number
  int64_t buffer = 0;   // of the weights

  HWY_INLINE float* score_buffer(int64_t i) { return x.s + (kProductsOverlap ? i % 2 * kScoreKeys * kPanel : 0); }

  HWY_INLINE uint32_t* weights() {
    uint32_t* base = reinterpret_cast<uint32_t*>(x.s);
    // In place of the scores, unless those of the next keys are under way.
    return kProductsOverlap ? base + 2 * kScoreKeys * kPanel + buffer * kValueKeys / 2 * kPanel : base;
  }

  HWY_INLINE void start_scores(int64_t key, int64_t keys, int64_t i) {
    scores.start_scores(reinterpret_cast<const uint16_t*>(x.k) + (key - block_first) * d_qk, d_qk, keys,
                        reinterpret_cast<const uint32_t*>(p.qt), d_qk, score_buffer(i));
  }

  // Weighs the V rows that hold NaN or infinity, as add_unusual() of the f32 kernel does.
  HWY_NOINLINE void add_unusual() {
    const uint16_t* w = reinterpret_cast<const uint16_t*>(weights());
    for (int64_t u = 0; u < unusual; ++u) {
      const int64_t key = block_first + x.unusual[u], j = key - batch;
      if (j < 0 || j >= waiting) continue;
      widen_row(key_address(args.v, key), args.v.dtype, x.row, args.rows.d_v, 1.0f);
      for (int64_t lane = 0; lane < p.rows; ++lane) {
        const float weight = to_float(Brain{w[(j / 2 * kPanel + lane) * 2 + j % 2]});
        if (weight == 0) continue;
        for (int64_t i = 0; i < args.rows.d_v; ++i) p.ot[i * kPanel + lane] += weight * x.row[i];
      }
    }
  }

  HWY_INLINE void start_values() {
    values.finish();
    if (waiting == 0) return;
    if (unusual > 0) add_unusual();
    values.start_values(reinterpret_cast<uint32_t*>(x.v), (batch - block_first) / kTileKeys, d_v, weights(), waiting,
                        p.ot);
    buffer ^= 1;
    batch += waiting;
    waiting = 0;
  }

  // Keys [begin, end); begin is a multiple of 32, and rows are packed up to the next multiple of it.
  template <bool kEntropy>
  HWY_INLINE void run(int64_t begin, int64_t end) {
    const bool plain = !rule.special && rule.query_factor > 0;
    const float factor = plain ? rule.query_factor : 1.0f;
    // Scores are taken in groups anchored at key 0: references do not depend on where a panel begins.
    const auto group_end = [&](int64_t key) {
      const int64_t next = (key / kScoreKeys + 1) * kScoreKeys;
      return next < round_up(end, kTileKeys) ? next : round_up(end, kTileKeys);
    };
    batch = begin;
    start_scores(begin, group_end(begin) - begin, 0);
    scores.finish();
    for (int64_t key = begin, i = 0; key < end; ++i) {
      const int64_t next = group_end(key), keys = next - key;
      float* s = score_buffer(i);
      prefetch.run();
      if (!plain) scale_scores(s, keys, rule.query_factor);
      if (rule.special) apply_score_terms(args, rule, p, s, key, (next < end ? next : end) - key);
      if (rule.special || key < p.all_first || next > p.all_last) {
        mask_block(p, s, key, keys, x.block_max);
      } else {
        block_maximum(s, keys, x.block_max);
      }
      if (reference_moves(p, x.block_max, factor)) {
        start_values();
        values.finish();
        move_reference(p, x.block_max, factor, args.rows.d_v);
      }
      if (kProductsOverlap && next < end) start_scores(next, group_end(next) - next, i + 1);
      // Whole blocks of O^T, so that the scores find the tiles free again.
      const int64_t blocks = values.left / values.steps, groups = (kValueKeys - waiting) / kScoreKeys;
      Interleave products(scores, values, (blocks + groups - 1) / groups * values.steps, keys / 2);
      weigh_pairs<kEntropy>(p, s, keys, factor, weights() + waiting / 2 * kPanel, products);
      scores.finish();
      waiting += keys;
      if (waiting == kValueKeys || !kProductsOverlap || next >= end) start_values();
      if (!kProductsOverlap && next < end) start_scores(next, group_end(next) - next, i + 1);
      key = next;
    }
    values.finish();
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
    fill_query_words(args, x, p, d_qk);
    if (p.first >= p.last) continue;
    first = p.first < first ? p.first : first;
    last = p.last > last ? p.last : last;
  }

  for (int64_t block = first / kBlockKeys * kBlockKeys; block < last; block += kBlockKeys) {
    // Tiles of keys are anchored at key 0, like blocks.
    const int64_t block_first = block > first ? block : first / kTileKeys * kTileKeys;
    const int64_t block_last = block + kBlockKeys < last ? block + kBlockKeys : last;
    const int64_t unusual = pack_block_bf16(args, x, block_first, block_last - block_first, d_qk, d_v);
    const int64_t groups = panels * (kBlockKeys / kScoreKeys);
    const int64_t to_come = last - block_last < kBlockKeys ? last - block_last : kBlockKeys;
    KeyPrefetch prefetch{args, block_last, block_last + to_come, (to_come + groups - 1) / groups};
    for (int64_t i = 0; i < panels; ++i) {
      Panel& p = x.panels[i];
      if (p.first >= block_last || p.last <= block_first || p.first >= p.last) continue;
      const int64_t begin = p.first > block_first ? p.first / kTileKeys * kTileKeys : block_first;
      const int64_t end = p.last < block_last ? p.last : block_last;
      BlockWalk walk{args, rule, x, p, d_qk, d_v, block_first, unusual, prefetch};
      if (rows.entropy.data != nullptr) {
        walk.run<true>(begin, end);
      } else {
        walk.run<false>(begin, end);
      }
    }
  }
  for (int64_t i = 0; i < panels; ++i) finish_panel(args, x, x.panels[i]);
}

}  // namespace
}  // namespace adaattn::cpu
