// How a panel walks over keys packed for bf16 products (see products-inl.h), in prefill and in adaptive calls.
#pragma once

#include "cpu_fallback/isa/softmax_bf16-inl.h"

namespace adaattn::cpu {
namespace {

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

// Rows of bf16 that need no padding.
HWY_NOINLINE void fill_whole_words(const PrefillArgs& args, const Panel& p, int64_t d, uint32_t* words) {
  for (int64_t lane = 0; lane < kPanel; lane += 16) {
    const char* rows[16];
    for (int64_t i = 0; i < 16; ++i) {
      const bool there = lane + i < p.rows;
      rows[i] = there ? row_address(args.rows.q, args.rows.group, row_of(args, p.row + lane + i)) : nullptr;
    }
    for (int64_t c = 0; c < d; c += 32) {
      __m512i r[16];
      ADAATTN_UNROLL for (int i = 0; i < 16; ++i) {
        r[i] = rows[i] == nullptr ? _mm512_setzero_si512() : _mm512_loadu_si512(rows[i] + c * 2);
      }
      transpose16(r);
      ADAATTN_UNROLL for (int i = 0; i < 16; ++i) _mm512_store_si512(words + (c / 2 + i) * kPanel + lane, r[i]);
    }
  }
}

// Q^T as words [d / 2][kPanel].
HWY_INLINE void fill_query_words(const PrefillArgs& args, PrefillScratch& x, const Panel& p, int64_t d,
                                 uint32_t* words) {
  const RowOperands& rows = args.rows;
  if (rows.q.dtype == Dtype::kBF16 && rows.d_qk == d) return fill_whole_words(args, p, d, words);
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
    transpose_rows(staging, d / 2, words + lane, kPanel, d / 2);
  }
}

// Sixteen vectors of words, pairs of neighbouring keys, as one tile of V^T.
HWY_INLINE void store_value_tile(__m512i* pairs, uint32_t* tile) {
  transpose16(pairs);
  ADAATTN_UNROLL for (int r = 0; r < 16; ++r) _mm512_storeu_si512(tile + r * 16, pairs[r]);
}

// Pairs of rows of V, 16 columns of them, as one tile; kCheck: returns which columns hold NaN or infinity.
template <bool kCheck, class RowAt>
HWY_INLINE __mmask16 pack_value_tile(const RowAt& row_at, uint32_t* tile) {
  const __m512i exponent = _mm512_set1_epi32(0x7f80), high_exponent = _mm512_set1_epi32(0x7f800000);
  __mmask16 special = 0;
  __m512i pair[16];
  ADAATTN_UNROLL for (int w = 0; w < 16; ++w) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row_at(2 * w))));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row_at(2 * w + 1))));
    pair[w] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    if (kCheck) {
      special |= _mm512_cmpeq_epi32_mask(_mm512_and_si512(low, exponent), exponent);
      special |= _mm512_cmpeq_epi32_mask(_mm512_and_si512(pair[w], high_exponent), high_exponent);
    }
  }
  store_value_tile(pair, tile);
  return special;
}

// What a walk does beside the products and the softmax: nothing here.
struct NothingElse {
  HWY_INLINE void before_group() {}
  // Scores of keys [key, key + keys), after their scaling.
  HWY_INLINE void change_scores(Panel&, float*, int64_t, int64_t) {}
  HWY_INLINE bool changes_scores() const { return false; }
  static constexpr bool kMasks = true;  // keys that some lane does not see
  // Weights of `keys` keys from `first` on, before their product with V.
  HWY_INLINE void add_values(Panel&, const uint32_t*, int64_t, int64_t) {}
};

// Neighbouring keys [begin, end) of one panel; begin is a multiple of 32, and keys are packed up to the next multiple
// of it.
struct KeyRun {
  Panel* p = nullptr;
  int64_t begin = 0, end = 0;
};

// The panels' visible part of keys [first, last), one panel after another; begins are rounded down to whole tiles.
class PanelRuns {
 public:
  HWY_INLINE PanelRuns(Panel* panels, int64_t count) : panels_(panels), count_(count), at_(count) {}

  HWY_INLINE void start(int64_t first, int64_t last) {
    first_ = first;
    last_ = last;
    at_ = 0;
  }

  HWY_INLINE bool next(KeyRun& run) {
    while (at_ < count_) {
      Panel& p = panels_[at_++];
      const int64_t begin = p.first > first_ ? p.first / kStepKeys * kStepKeys : first_;
      const int64_t end = p.last < last_ ? p.last : last_;
      if (begin >= end || p.first >= p.last) continue;
      run = {&p, begin, end};
      return true;
    }
    return false;
  }

 private:
  Panel* panels_;
  int64_t count_, at_, first_ = 0, last_ = 0;
};

// Packed keys, walked by the runs that Runs::next() hands out.
template <class Extra, class Runs>
struct KeyWalk {
  const uint16_t* k;          // rows from key `origin` on
  const uint32_t* vt;         // tiles from key `origin` on
  int64_t origin, d_qk, d_v;  // a multiple of 32, all three
  float *s, *block_max;       // kScoreFloats, kPanel
  float factor;               // of the products, to units of log2
  Extra& extra;
  Runs& runs;
  // Weights that wait for the product with V: of neighbouring keys, one run after another.
  ValueRun batch[kValueKeys / kStepKeys] = {};
  int64_t batches = 0;
  int64_t waiting = 0;  // keys

  HWY_INLINE uint32_t* weights() {
    uint32_t* base = reinterpret_cast<uint32_t*>(kScoresStay ? s + kScoreKeys * kPanel : s);
    return base + waiting / 2 * kPanel;
  }

  HWY_INLINE void add_values(Panel& p) {
    if (waiting == 0) return;
    waiting = 0;
    const uint32_t* w = weights();
    for (int64_t i = 0; i < batches; ++i) {
      extra.add_values(p, w, origin + batch[i].tile * kStepKeys, batch[i].keys);
      w += batch[i].keys / 2 * kPanel;
    }
    multiply_values(vt, batch, batches, d_v, weights(), p.ot);
    batches = 0;
  }

  // Weights of `keys` keys from `key` on have been taken.
  HWY_INLINE void wait(int64_t key, int64_t keys) {
    const int64_t tile = (key - origin) / kStepKeys;
    if (batches > 0 && batch[batches - 1].tile * kStepKeys + batch[batches - 1].keys == key - origin) {
      batch[batches - 1].keys += keys;
    } else {
      batch[batches++] = {tile, keys};
    }
    waiting += keys;
  }

  // Before weights are taken: references that the maxima in block_max have left behind.
  HWY_INLINE void settle(Panel& p, float f) {
    if (!reference_moves(p, block_max, f)) return;
    add_values(p);
    move_reference(p, block_max, f, d_v);
  }

  template <bool kEntropy>
  HWY_INLINE void run_panel(const KeyRun& run) {
    Panel& p = *run.p;
    const bool plain = !extra.changes_scores() && factor > 0;
    const float f = plain ? factor : 1.0f;
    const uint32_t* q = reinterpret_cast<const uint32_t*>(p.qt);
    const int64_t packed = round_up(run.end, kStepKeys);
    for (int64_t key = run.begin; key < run.end;) {
      // Scores are taken in groups anchored at key 0: references do not depend on where a panel begins.
      const int64_t group = (key / kScoreKeys + 1) * kScoreKeys;
      const int64_t next = group < packed ? group : packed, keys = next - key;
      extra.before_group();
      multiply_scores(k + (key - origin) * d_qk, d_qk, keys, q, d_qk, s);
      if (!plain) {
        scale_scores(s, keys, factor);
        extra.change_scores(p, s, key, (next < run.end ? next : run.end) - key);
      }
      const bool masked = Extra::kMasks && (!plain || key < p.all_first || next > p.all_last);
      if (masked) mask_block(p, s, key, keys, block_max);
      const bool looked = masked || !kScoresStay || is_fresh(p);
      if (looked) {
        if (!masked) block_maximum(s, keys, block_max);
        settle(p, f);
      }
      if (!weigh_pairs<kEntropy>(p, s, keys, f, looked ? infinity() : kMostWeight, weights())) {
        block_maximum(s, keys, block_max);
        settle(p, f);
        weigh_pairs<kEntropy>(p, s, keys, f, infinity(), weights());
      }
      wait(key, keys);
      if (waiting > kValueKeys - kScoreKeys || !kScoresStay) add_values(p);
      key = next;
    }
  }

#if defined(ADAATTN_UNIT_AMX)
  // Weights of some keys, from products of bytes.
  template <bool kEntropy, class Queries>
  HWY_INLINE void weigh_bytes(Panel& p, const Queries& q, int64_t key, int64_t keys, bool masked) {
    float factors[kScoreKeys / kStepKeys];
    extra.multiply(q, key, keys, s, factors);
    if (!masked && !is_fresh(p) && weigh_pairs<kEntropy, true>(p, s, keys, 0, kMostWeight, weights(), factors, q.scale))
      return;
    scale_bytes(s, keys, factors, q.scale);
    if (masked) {
      mask_block(p, s, key, keys, block_max);
    } else {
      block_maximum(s, keys, block_max);
    }
    settle(p, 1.0f);
    weigh_pairs<kEntropy>(p, s, keys, 1.0f, infinity(), weights());
  }
#else
  template <bool kEntropy, class Queries>
  HWY_INLINE void weigh_bytes(Panel& p, const Queries& q, int64_t key, int64_t keys, bool masked) {
    extra.multiply(q, key, keys, s, block_max);
    if (masked) mask_block(p, s, key, keys, block_max);
    settle(p, 1.0f);
    weigh_pairs<kEntropy>(p, s, keys, 1.0f, infinity(), weights());
  }
#endif

  // As run_panel() for a panel whose queries are bytes too.
  template <bool kEntropy, class Queries>
  HWY_INLINE void run_bytes(const KeyRun& run, const Queries& q) {
    Panel& p = *run.p;
    const int64_t packed = round_up(run.end, kStepKeys);
    for (int64_t key = run.begin; key < run.end;) {
      const int64_t group = (key / kScoreKeys + 1) * kScoreKeys;
      const int64_t next = group < packed ? group : packed;
      extra.before_group();
      weigh_bytes<kEntropy>(p, q, key, next - key, key < p.all_first || next > p.all_last);
      wait(key, next - key);
      if (waiting > kValueKeys - kScoreKeys || !kScoresStay) add_values(p);
      key = next;
    }
  }

  // Weights wait as long as the runs are of one panel, so that its O^T passes through the tiles once for many keys.
  template <bool kEntropy>
  HWY_INLINE void run() {
    Panel* current = nullptr;
    for (KeyRun run; runs.next(run);) {
      if (current != nullptr && run.p != current) add_values(*current);
      current = run.p;
      if constexpr (requires { extra.queries(*run.p); }) {
        const auto* q = extra.queries(*run.p);
        if (q != nullptr) {
          run_bytes<kEntropy>(run, *q);
          continue;
        }
      }
      run_panel<kEntropy>(run);
    }
    if (current != nullptr) add_values(*current);
  }
};

template <class Extra, class Runs>
HWY_INLINE void walk_keys(KeyWalk<Extra, Runs>&& walk, bool entropy) {
  if (entropy) {
    walk.template run<true>();
  } else {
    walk.template run<false>();
  }
}

}  // namespace
}  // namespace adaattn::cpu
