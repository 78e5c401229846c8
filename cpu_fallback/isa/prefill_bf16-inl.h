// Prefill with bf16 products (see products-inl.h). The panels, masks and the online softmax are those of the f32
// kernel; weights are rounded to bf16 pairs in place of the scores they come from.
#pragma once

#include "cpu_fallback/isa/products-inl.h"

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
  if (dtype == Dtype::kBF16) {
    memcpy(to, from, static_cast<size_t>(n) * sizeof(uint16_t));
  } else {
    store_row(static_cast<const float*>(from), to, Dtype::kBF16, n);
  }
  memset(to + n, 0, static_cast<size_t>(padded - n) * sizeof(uint16_t));
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  __mmask32 special = 0;
  for (int64_t i = 0; i < padded; i += 32)
    special |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(_mm512_loadu_si512(to + i), exponent), exponent);
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
                                     int64_t d_qk, int64_t d_v, int64_t k_stride) {
  uint16_t* k = reinterpret_cast<uint16_t*>(x.k);
  uint32_t* vt = reinterpret_cast<uint32_t*>(x.v);
  uint16_t* staging = reinterpret_cast<uint16_t*>(x.s);  // [32 keys][d_v]
  static_assert(kTileKeys * 512 / 2 <= kKeyBlock * kPanel);
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
        memset(k + j * k_stride, 0, static_cast<size_t>(d_qk) * sizeof(uint16_t));
        memset(v_row, 0, static_cast<size_t>(d_v) * sizeof(uint16_t));
        continue;
      }
      copy(args.k, first + j, args.rows.d_qk, k + j * k_stride, d_qk);
      if (!copy(args.v, first + j, args.rows.d_v, v_row, d_v)) {
        memset(v_row, 0, static_cast<size_t>(d_v) * sizeof(uint16_t));
        x.unusual[unusual++] = static_cast<uint8_t>(j);
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
      uint32_t* to = const_cast<uint32_t*>(value_tile(vt, c / kTileValues, tile));
      ADAATTN_UNROLL for (int r = 0; r < 16; ++r) _mm512_storeu_si512(to + r * 16, pair[r]);
    }
  }
  return unusual;
}

// Products to scores in units of log2 (before a softcap: of the cap), and the block's maximum.
HWY_NOINLINE void scale_block(float* s, int64_t keys, float factor, float* block_max) {
  const F32 f = hn::Set(kF32, factor);
  F32 max[kPanelVectors];
  ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) max[v] = hn::Set(kF32, -infinity());
  for (int64_t j = 0; j < keys; ++j) {
    ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) {
      float* at = s + j * kPanel + v * kLanes;
      const F32 x = hn::Mul(hn::Load(kF32, at), f);
      max[v] = hn::Max(x, max[v]);
      hn::Store(x, kF32, at);
    }
  }
  ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) hn::Store(max[v], kF32, block_max + v * kLanes);
}

// Two rows of weights as one row of words, the first in the low halves.
HWY_INLINE __m512i pair_weights(F32 low, F32 high) {
  alignas(64) static constexpr uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                           21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                           11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.raw, low.raw));
  return _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), both);
}

// weigh_block() of the f32 kernel with the weights leaving as words [keys / 2][kPanel]; keys is even. Word row t lies
// where score row t was, which has been read by then. O^T is rescaled here, unless no maximum moved.
template <bool kEntropy>
HWY_NOINLINE void weigh_pairs(Panel& p, float* s, int64_t keys, const float* block_max, int64_t d_v) {
  for (int v = 0; v < kPanelVectors; ++v) {
    const int64_t at = v * kLanes;
    const F32 none = hn::Set(kF32, -infinity()), zero = hn::Zero(kF32);
    const F32 old_max = hn::Load(kF32, p.max + at);
    const F32 max = hn::Max(hn::Load(kF32, block_max + at), old_max);
    const F32 reference = hn::IfThenElse(hn::Eq(max, none), zero, max);
    const F32 alpha = exp2(hn::Sub(old_max, reference));
    F32 sum0 = zero, sum1 = zero, entropy = zero;
    for (int64_t j = 0; j < keys; j += 2) {
      float* sj = s + j * kPanel + at;
      const F32 x0 = hn::Sub(hn::Load(kF32, sj), reference), x1 = hn::Sub(hn::Load(kF32, sj + kPanel), reference);
      const F32 w0 = exp2(x0), w1 = exp2(x1);
      sum0 = hn::Add(sum0, w0);
      sum1 = hn::Add(sum1, w1);
      if (kEntropy) {
        entropy = hn::Add(entropy, hn::IfThenElse(hn::Eq(w0, zero), zero, hn::Mul(w0, x0)));
        entropy = hn::Add(entropy, hn::IfThenElse(hn::Eq(w1, zero), zero, hn::Mul(w1, x1)));
      }
      _mm512_store_si512(s + j / 2 * kPanel + at, pair_weights(w0, w1));
    }
    const F32 old_sum = hn::Load(kF32, p.sum + at);
    hn::Store(max, kF32, p.max + at);
    hn::Store(hn::MulAdd(old_sum, alpha, hn::Add(sum0, sum1)), kF32, p.sum + at);
    if (kEntropy) {
      const F32 shift = hn::IfThenElse(hn::Eq(old_max, none), zero, hn::Sub(old_max, reference));
      const F32 moved = hn::MulAdd(shift, old_sum, hn::Load(kF32, p.entropy_sum + at));
      hn::Store(hn::MulAdd(moved, alpha, entropy), kF32, p.entropy_sum + at);
    }
    if (hn::AllTrue(kF32, hn::Eq(max, old_max))) continue;
    for (int64_t i = 0; i < d_v; ++i) {
      float* o = p.ot + i * kPanel + at;
      hn::Store(hn::Mul(hn::Load(kF32, o), alpha), kF32, o);
    }
  }
}

// add_unusual() of the f32 kernel, weights read from their words.
HWY_NOINLINE void add_unusual_bf16(const PrefillArgs& args, PrefillScratch& x, Panel& p, int64_t block_first,
                                   int64_t unusual, int64_t first, int64_t last) {
  const uint16_t* weights = reinterpret_cast<const uint16_t*>(x.s);
  for (int64_t u = 0; u < unusual; ++u) {
    const int64_t key = block_first + x.unusual[u], j = key - first;
    if (key < first || key >= last) continue;
    widen_row(key_address(args.v, key), args.v.dtype, x.row, args.rows.d_v, 1.0f);
    for (int64_t lane = 0; lane < p.rows; ++lane) {
      const float w = to_float(Brain{weights[(j / 2 * kPanel + lane) * 2 + j % 2]});
      if (w == 0) continue;
      for (int64_t i = 0; i < args.rows.d_v; ++i) p.ot[i * kPanel + lane] += w * x.row[i];
    }
  }
}

void prefill_bf16(const PrefillArgs& args) {
  const RowOperands& rows = args.rows;
  const ScoreRule rule = score_rule(rows);
  const int64_t panels = (args.row_count + kPanel - 1) / kPanel;
  const int64_t d_qk = round_up(rows.d_qk, 32), d_v = round_up(rows.d_v, 32);
  // In 16-bit elements; within the floats that the f32 kernel would take.
  const int64_t k_stride = d_qk + 32;
  Arena arena{args.scratch};
  PrefillScratch x;
  lay_out(arena, x, rows.d_qk, rows.d_v, panels);
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

  for (int64_t block = first / kKeyBlock * kKeyBlock; block < last; block += kKeyBlock) {
    // Tiles of keys are anchored at key 0, like blocks.
    const int64_t block_first = block > first ? block : first / kTileKeys * kTileKeys;
    const int64_t block_last = block + kKeyBlock < last ? block + kKeyBlock : last;
    const int64_t unusual = pack_block_bf16(args, x, block_first, block_last - block_first, d_qk, d_v, k_stride);
    for (int64_t i = 0; i < panels; ++i) {
      Panel& p = x.panels[i];
      if (p.first >= block_last || p.last <= block_first || p.first >= p.last) continue;
      const int64_t begin = p.first > block_first ? p.first / kTileKeys * kTileKeys : block_first;
      const int64_t end = p.last < block_last ? p.last : block_last;
      const int64_t keys = round_up(end - begin, kTileKeys), skip = begin - block_first;
      multiply_scores(reinterpret_cast<const uint16_t*>(x.k) + skip * k_stride, k_stride, keys,
                      reinterpret_cast<const uint32_t*>(p.qt), d_qk, x.s);
      scale_block(x.s, keys, rule.query_factor, x.block_max);
      if (rule.special) apply_score_terms(args, rule, p, x.s, begin, end - begin);
      if (rule.special || begin < p.all_first || begin + keys > p.all_last)
        mask_block(p, x.s, begin, keys, x.block_max);
      if (rows.entropy.data != nullptr) {
        weigh_pairs<true>(p, x.s, keys, x.block_max, rows.d_v);
      } else {
        weigh_pairs<false>(p, x.s, keys, x.block_max, rows.d_v);
      }
      multiply_values(reinterpret_cast<const uint32_t*>(x.v), skip / kTileKeys, d_v,
                      reinterpret_cast<const uint32_t*>(x.s), keys, p.ot);
      if (unusual > 0) add_unusual_bf16(args, x, p, block_first, unusual, begin, end);
    }
  }
  for (int64_t i = 0; i < panels; ++i) finish_panel(args, x, x.panels[i]);
}

void prefill_any(const PrefillArgs& args) {
  if (args.row_entropy == nullptr && takes_bf16(args)) {
    prefill_bf16(args);
  } else {
    prefill(args);
  }
}

}  // namespace
}  // namespace adaattn::cpu
