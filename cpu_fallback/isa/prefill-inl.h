// Exact attention over tiles of query rows: keys are packed block by block, and every panel of queries that sees the
// block updates its running maximum, sum and O^T (the online softmax). Scores exist for one block and panel at a time.
#pragma once

#include "cpu_fallback/isa/transpose-inl.h"

namespace adaattn::cpu {
namespace {

HWY_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// One vector line beyond the row keeps rows of a power-of-two length out of each other's cache sets.
HWY_INLINE int64_t packed_stride(int64_t d) { return round_up(d, 16) + 16; }

// Hands out 64-byte aligned pieces; with base null it only counts.
struct Arena {
  char* base;
  size_t used = 0;

  template <typename T>
  HWY_INLINE T* take(int64_t n) {
    T* p = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += static_cast<size_t>(round_up(n * static_cast<int64_t>(sizeof(T)), 64));
    return p;
  }
};

// State of kPanel queries.
struct Panel {
  float* qt;           // [d_qk][kPanel]
  float* ot;           // [d_v][kPanel]
  float *max, *sum;    // of the scores seen so far and of their 2^(s - max)
  float* entropy_sum;  // sum of 2^(s - max) (s - max)
  float* slope;        // ALiBi, in units of log2
  int32_t *begin, *end, *position;
  int64_t first, last;          // keys that some lane sees lie in [first, last)
  int64_t all_first, all_last;  // keys in [all_first, all_last) are seen by every lane
  int64_t row, rows;            // rows of the chunk in the lanes
};

// Rows of O^T are padded to what transpositions and tiles work in.
#if defined(ADAATTN_UNIT_BF16)
constexpr int64_t kPaddedRows = 32;
#elif defined(ADAATTN_UNIT_AVX512)
constexpr int64_t kPaddedRows = 16;
#else
constexpr int64_t kPaddedRows = 1;
#endif

// Of PrefillScratch::s, for 16 rows of the largest head_dim on their way through a transposition.
#if defined(ADAATTN_UNIT_AVX512)
constexpr int64_t kStagingFloats = 16 * 512;
#else
constexpr int64_t kStagingFloats = 0;
#endif
// Scores of a block of keys; with tiles, those of 64 keys and the weights of two blocks.
#if defined(ADAATTN_UNIT_AMX)
constexpr int64_t kWalkRows = 64 + kKeyBlock;
#else
constexpr int64_t kWalkRows = kKeyBlock;
#endif
constexpr int64_t kScoreFloats = kWalkRows * kPanel > kStagingFloats ? kWalkRows* kPanel : kStagingFloats;

struct PrefillScratch {
  Panel* panels;
  float *k, *v, *s, *row, *alpha, *block_max;
  uint16_t* unusual;  // keys of the block whose V holds NaN or infinity
};

HWY_INLINE void lay_out(Arena& arena, Panel& p, int64_t d_qk, int64_t d_v) {
  p.qt = arena.take<float>((d_qk > 16 ? d_qk : 16) * kPanel);
  p.ot = arena.take<float>(round_up(d_v, kPaddedRows) * kPanel);
  p.max = arena.take<float>(kPanel);
  p.sum = arena.take<float>(kPanel);
  p.entropy_sum = arena.take<float>(kPanel);
  p.slope = arena.take<float>(kPanel);
  p.begin = arena.take<int32_t>(kPanel);
  p.end = arena.take<int32_t>(kPanel);
  p.position = arena.take<int32_t>(kPanel);
}

HWY_INLINE void lay_out(Arena& arena, PrefillScratch& x, int64_t d_qk, int64_t d_v, int64_t panels) {
  x.panels = arena.take<Panel>(panels);
  x.k = arena.take<float>(kKeyBlock * packed_stride(d_qk));
  x.v = arena.take<float>(kKeyBlock * packed_stride(d_v));
  x.s = arena.take<float>(kScoreFloats);  // also the staging area of transpositions
  x.row = arena.take<float>(round_up(d_qk > d_v ? d_qk : d_v, 16));
  x.alpha = arena.take<float>(kPanel);
  x.block_max = arena.take<float>(kPanel);
  x.unusual = arena.take<uint16_t>(2 * kKeyBlock);
  for (int64_t i = 0; i < panels; ++i) {
    Panel unused;
    Panel& p = x.panels == nullptr ? unused : x.panels[i];
    lay_out(arena, p, d_qk, d_v);
  }
}

[[maybe_unused]] size_t prefill_scratch(int64_t d_qk, int64_t d_v, int64_t tiles) {
  Arena arena{nullptr};
  PrefillScratch unused;
  lay_out(arena, unused, d_qk, d_v, tiles * (kTileRows / kPanel));
  return arena.used;
}

HWY_INLINE int64_t row_of(const PrefillArgs& args, int64_t at) {
  return args.row_map == nullptr ? args.row_begin + at : args.row_map[at];
}

// Everything but the queries themselves.
HWY_INLINE void start_panel(const PrefillArgs& args, Panel& p, int64_t row) {
  const RowOperands& rows = args.rows;
  p.row = row;
  p.rows = args.row_count - row < kPanel ? args.row_count - row : kPanel;
  p.first = INT32_MAX;
  p.last = 0;
  p.all_first = 0;
  p.all_last = INT32_MAX;
  for (int64_t lane = 0; lane < kPanel; ++lane) {
    // Lanes without a row repeat the last one: they constrain nothing and are not stored.
    const int64_t at = row + (lane < p.rows ? lane : p.rows - 1);
    const int64_t r = row_of(args, at);
    const int32_t begin = args.key_begin[at], end = args.key_end[at];
    p.begin[lane] = begin;
    p.end[lane] = end;
    p.position[lane] = static_cast<int32_t>(r / rows.group + rows.off);
    p.slope[lane] = rows.alibi == nullptr ? 0 : rows.alibi[r % rows.group * rows.alibi_stride] * kLog2E;
    if (begin < end) {
      p.first = begin < p.first ? begin : p.first;
      p.last = end > p.last ? end : p.last;
    }
    p.all_first = begin > p.all_first ? begin : p.all_first;
    p.all_last = end < p.all_last ? end : p.all_last;
    p.max[lane] = -infinity();
    p.sum[lane] = 0;
    p.entropy_sum[lane] = 0;
  }
  if (p.first > p.last) p.first = p.last;
  memset(p.ot, 0, static_cast<size_t>(round_up(rows.d_v, kPaddedRows) * kPanel) * sizeof(float));
}

HWY_INLINE void widen_query(const PrefillArgs& args, const Panel& p, int64_t lane, float factor, float* to) {
  const RowOperands& rows = args.rows;
  if (lane < p.rows) {
    const int64_t r = row_of(args, p.row + lane);
    widen_row(row_address(rows.q, rows.group, r), rows.q.dtype, to, rows.d_qk, factor);
  } else {
    memset(to, 0, static_cast<size_t>(rows.d_qk) * sizeof(float));
  }
}

// Q^T, multiplied by the rule's factor.
HWY_INLINE void fill_queries(const PrefillArgs& args, const ScoreRule& rule, PrefillScratch& x, Panel& p) {
  const int64_t d = args.rows.d_qk;
#if defined(ADAATTN_UNIT_AVX512)
  for (int64_t lane = 0; lane < kPanel; lane += 16) {
    for (int64_t i = 0; i < 16; ++i) widen_query(args, p, lane + i, rule.query_factor, x.s + i * d);
    transpose_rows(x.s, d, p.qt + lane, kPanel, d);
  }
#else
  for (int64_t lane = 0; lane < kPanel; ++lane) {
    widen_query(args, p, lane, rule.query_factor, x.row);
    for (int64_t i = 0; i < d; ++i) p.qt[i * kPanel + lane] = x.row[i];
  }
#endif
}

// V rows that hold NaN or infinity are packed as zeros, so that a weight of 0 silences them; add_unusual() accounts for
// them where the weight is not 0. Returns their number.
HWY_INLINE int64_t pack_block(const PrefillArgs& args, PrefillScratch& x, int64_t first, int64_t keys) {
  const int64_t d_qk = args.rows.d_qk, d_v = args.rows.d_v;
  const int64_t k_stride = packed_stride(d_qk), v_stride = packed_stride(d_v);
  int64_t unusual = 0;
  for (int64_t j = 0; j < keys; ++j) {
    widen_row(key_address(args.k, first + j), args.k.dtype, x.k + j * k_stride, d_qk, 1.0f);
    if (args.row_entropy != nullptr) continue;
    if (!widen_row(key_address(args.v, first + j), args.v.dtype, x.v + j * v_stride, d_v, 1.0f)) {
      memset(x.v + j * v_stride, 0, static_cast<size_t>(d_v) * sizeof(float));
      x.unusual[unusual++] = static_cast<uint16_t>(j);
    }
  }
  return unusual;
}

// Softcap, ALiBi and bias, in this order, on the scores of keys [first, first + keys).
HWY_NOINLINE void apply_score_terms(const PrefillArgs& args, const ScoreRule& rule, const Panel& p, float* s,
                                    int64_t first, int64_t keys) {
  const RowOperands& rows = args.rows;
  for (int64_t j = 0; j < keys; ++j) {
    for (int v = 0; v < kPanelVectors; ++v) {
      float* at = s + j * kPanel + v * kLanes;
      F32 x = hn::Load(kF32, at);
      if (rule.cap > 0) x = hn::Mul(tanh(x), hn::Set(kF32, rule.cap));
      if (rows.alibi != nullptr) {
        const auto distance =
            hn::Sub(hn::Load(kI32, p.position + v * kLanes), hn::Set(kI32, static_cast<int32_t>(first + j)));
        x = hn::NegMulAdd(hn::Load(kF32, p.slope + v * kLanes), hn::Abs(hn::ConvertTo(kF32, distance)), x);
      }
      hn::Store(x, kF32, at);
    }
  }
  const BiasOperand& bias = rows.bias;
  if (bias.data == nullptr) return;
  const int64_t bytes = element_bytes(bias.dtype);
  for (int64_t lane = 0; lane < p.rows; ++lane) {
    const int64_t r = row_of(args, p.row + lane);
    const char* at = static_cast<const char*>(bias.data) +
                     (r / rows.group * bias.stride_q + r % rows.group * bias.stride_h + first * bias.stride_k) * bytes;
    for (int64_t j = 0; j < keys; ++j)
      s[j * kPanel + lane] += load_any(at + j * bias.stride_k * bytes, bias.dtype) * kLog2E;
  }
}

// -inf where a lane does not see the key, and the block's maximum. Selecting keeps NaN in unseen keys out.
HWY_NOINLINE void mask_block(const Panel& p, float* s, int64_t first, int64_t keys, float* block_max) {
  const F32 none = hn::Set(kF32, -infinity());
  for (int v = 0; v < kPanelVectors; ++v) {
    const auto begin = hn::Load(kI32, p.begin + v * kLanes), end = hn::Load(kI32, p.end + v * kLanes);
    F32 max = none;
    for (int64_t j = 0; j < keys; ++j) {
      const auto key = hn::Set(kI32, static_cast<int32_t>(first + j));
      const auto visible = hn::AndNot(hn::Lt(key, begin), hn::Lt(key, end));
      float* at = s + j * kPanel + v * kLanes;
      const F32 x = hn::IfThenElse(hn::RebindMask(kF32, visible), hn::Load(kF32, at), none);
      max = hn::Max(x, max);
      hn::Store(x, kF32, at);
    }
    hn::Store(max, kF32, block_max + v * kLanes);
  }
}

// Scores to weights, and the running state to the new maximum.
template <bool kEntropy>
HWY_NOINLINE void weigh_block(Panel& p, float* HWY_RESTRICT s, int64_t keys, const float* HWY_RESTRICT block_max,
                              float* HWY_RESTRICT alpha_out) {
  for (int v = 0; v < kPanelVectors; ++v) {
    const int64_t at = v * kLanes;
    const F32 none = hn::Set(kF32, -infinity()), zero = hn::Zero(kF32);
    const F32 old_max = hn::Load(kF32, p.max + at);
    const F32 max = hn::Max(hn::Load(kF32, block_max + at), old_max);
    // A lane that has seen nothing yet: any finite reference gives weights 2^-inf = 0.
    const F32 reference = hn::IfThenElse(hn::Eq(max, none), zero, max);
    const F32 alpha = exp2(hn::Sub(old_max, reference));
    F32 sum0 = zero, sum1 = zero, entropy = zero;
    int64_t j = 0;
    for (; j + 2 <= keys; j += 2) {
      float* sj = s + j * kPanel + at;
      const F32 x0 = hn::Sub(hn::Load(kF32, sj), reference), x1 = hn::Sub(hn::Load(kF32, sj + kPanel), reference);
      const F32 w0 = exp2(x0), w1 = exp2(x1);
      sum0 = hn::Add(sum0, w0);
      sum1 = hn::Add(sum1, w1);
      if (kEntropy) {
        entropy = hn::Add(entropy, hn::IfThenElse(hn::Eq(w0, zero), zero, hn::Mul(w0, x0)));
        entropy = hn::Add(entropy, hn::IfThenElse(hn::Eq(w1, zero), zero, hn::Mul(w1, x1)));
      }
      hn::Store(w0, kF32, sj);
      hn::Store(w1, kF32, sj + kPanel);
    }
    if (j < keys) {
      float* sj = s + j * kPanel + at;
      const F32 x0 = hn::Sub(hn::Load(kF32, sj), reference);
      const F32 w0 = exp2(x0);
      sum0 = hn::Add(sum0, w0);
      if (kEntropy) entropy = hn::Add(entropy, hn::IfThenElse(hn::Eq(w0, zero), zero, hn::Mul(w0, x0)));
      hn::Store(w0, kF32, sj);
    }
    const F32 old_sum = hn::Load(kF32, p.sum + at);
    hn::Store(max, kF32, p.max + at);
    hn::Store(alpha, kF32, alpha_out + at);
    hn::Store(hn::MulAdd(old_sum, alpha, hn::Add(sum0, sum1)), kF32, p.sum + at);
    if (kEntropy) {
      const F32 shift = hn::IfThenElse(hn::Eq(old_max, none), zero, hn::Sub(old_max, reference));
      const F32 moved = hn::MulAdd(shift, old_sum, hn::Load(kF32, p.entropy_sum + at));
      hn::Store(hn::MulAdd(moved, alpha, entropy), kF32, p.entropy_sum + at);
    }
  }
}

HWY_NOINLINE void add_unusual(const PrefillArgs& args, PrefillScratch& x, Panel& p, int64_t block_first,
                              int64_t unusual, int64_t first, int64_t last) {
  for (int64_t u = 0; u < unusual; ++u) {
    const int64_t key = block_first + x.unusual[u];
    if (key < first || key >= last) continue;
    widen_row(key_address(args.v, key), args.v.dtype, x.row, args.rows.d_v, 1.0f);
    for (int v = 0; v < kPanelVectors; ++v) {
      const F32 w = hn::Load(kF32, x.s + (key - first) * kPanel + v * kLanes);
      const auto silent = hn::Eq(w, hn::Zero(kF32));
      for (int64_t i = 0; i < args.rows.d_v; ++i) {
        float* at = p.ot + i * kPanel + v * kLanes;
        const F32 o = hn::Load(kF32, at);
        hn::Store(hn::IfThenElse(silent, o, hn::MulAdd(hn::Set(kF32, x.row[i]), w, o)), kF32, at);
      }
    }
  }
}

// O of one lane, from o[i * stride], to the tensor, with the row's statistics.
HWY_INLINE void finish_lane(const PrefillArgs& args, PrefillScratch& x, const Panel& p, int64_t lane, const float* o,
                            int64_t stride) {
  const RowOperands& rows = args.rows;
  const int64_t r = row_of(args, p.row + lane);
  const float* sink = rows.sinks == nullptr ? nullptr : rows.sinks + r % rows.group * rows.sinks_stride;
  const RowResult result = finish_row(p.max[lane], p.sum[lane], p.entropy_sum[lane], sink);
  if (args.row_entropy != nullptr) {
    args.row_entropy[p.row + lane] = result.entropy;
    return;
  }
  for (int64_t i = 0; i < rows.d_v; ++i) x.row[i] = o[i * stride] * result.factor;
  store_row(x.row, row_address(rows.o, rows.group, r), rows.o.dtype, rows.d_v);
  store_statistics(rows, r, result);
}

#if defined(ADAATTN_UNIT_BF16)
// Columns of O^T go in pairs through the transposition, as words that are neighbours in a row of O. Rows of whole pairs
// of vectors.
HWY_NOINLINE void finish_panel_bf16(const PrefillArgs& args, const Panel& p) {
  const RowOperands& rows = args.rows;
  const bool wanted = rows.lse.data != nullptr || rows.entropy.data != nullptr;
  for (int64_t lane = 0; lane < p.rows; lane += 16) {
    const int64_t count = p.rows - lane < 16 ? p.rows - lane : 16;
    HWY_ALIGN float factor[16] = {};
    char* to[16];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = lane + i, r = row_of(args, p.row + at);
      to[i] = row_address(rows.o, rows.group, r);
      if (!wanted && rows.sinks == nullptr && p.sum[at] > 0) {
        factor[i] = 1.0f / p.sum[at];
        continue;
      }
      const float* sink = rows.sinks == nullptr ? nullptr : rows.sinks + r % rows.group * rows.sinks_stride;
      const RowResult result = finish_row(p.max[at], p.sum[at], p.entropy_sum[at], sink);
      factor[i] = result.factor;
      store_statistics(rows, r, result);
    }
    const __m512 f = _mm512_load_ps(factor);
    for (int64_t c = 0; c < rows.d_v; c += 32) {
      __m512i words[16];
      ADAATTN_UNROLL for (int w = 0; w < 16; ++w) {
        const float* pair = p.ot + (c + 2 * w) * kPanel + lane;
        const __m256i low = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_load_ps(pair), f)));
        const __m256i high =
            reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_load_ps(pair + kPanel), f)));
        words[w] = _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
      }
      transpose16(words);
      for (int64_t i = 0; i < count; ++i) _mm512_storeu_si512(to[i] + c * 2, words[i]);
    }
  }
}
#endif

HWY_INLINE void finish_panel(const PrefillArgs& args, PrefillScratch& x, const Panel& p) {
#if defined(ADAATTN_UNIT_BF16)
  if (args.rows.o.dtype == Dtype::kBF16 && args.row_entropy == nullptr && args.rows.d_v % 32 == 0)
    return finish_panel_bf16(args, p);
#endif
#if defined(ADAATTN_UNIT_AVX512)
  const int64_t d = round_up(args.rows.d_v, 16);
  for (int64_t lane = 0; lane < p.rows; lane += 16) {
    for (int64_t c = 0; c < d; c += 16) transpose_rows(p.ot + c * kPanel + lane, kPanel, x.s + c, d, 16);
    for (int64_t i = 0; i < 16 && lane + i < p.rows; ++i) finish_lane(args, x, p, lane + i, x.s + i * d, 1);
  }
#else
  for (int64_t lane = 0; lane < p.rows; ++lane) finish_lane(args, x, p, lane, p.ot + lane, kPanel);
#endif
}

[[maybe_unused]] void prefill(const PrefillArgs& args) {
  const RowOperands& rows = args.rows;
  const ScoreRule rule = score_rule(rows);
  const int64_t panels = (args.row_count + kPanel - 1) / kPanel;
  const int64_t k_stride = packed_stride(rows.d_qk), v_stride = packed_stride(rows.d_v);
  Arena arena{args.scratch};
  PrefillScratch x;
  lay_out(arena, x, rows.d_qk, rows.d_v, panels);

  int64_t first = INT32_MAX, last = 0;
  for (int64_t i = 0; i < panels; ++i) {
    start_panel(args, x.panels[i], i * kPanel);
    fill_queries(args, rule, x, x.panels[i]);
    if (x.panels[i].first >= x.panels[i].last) continue;
    first = x.panels[i].first < first ? x.panels[i].first : first;
    last = x.panels[i].last > last ? x.panels[i].last : last;
  }

  for (int64_t block = first / kKeyBlock * kKeyBlock; block < last; block += kKeyBlock) {
    const int64_t block_first = block > first ? block : first;
    const int64_t block_last = block + kKeyBlock < last ? block + kKeyBlock : last;
    const int64_t unusual = pack_block(args, x, block_first, block_last - block_first);
    for (int64_t i = 0; i < panels; ++i) {
      Panel& p = x.panels[i];
      const int64_t begin = p.first > block_first ? p.first : block_first;
      const int64_t end = p.last < block_last ? p.last : block_last;
      if (begin >= end) continue;
      const int64_t keys = end - begin, skip = begin - block_first;
      for (int v = 0; v < kPanelVectors; ++v) hn::Store(hn::Set(kF32, -infinity()), kF32, x.block_max + v * kLanes);
      score_panel(x.k + skip * k_stride, k_stride, keys, p.qt, rows.d_qk, x.s, x.block_max);
      if (rule.special) apply_score_terms(args, rule, p, x.s, begin, keys);
      if (rule.special || begin < p.all_first || end > p.all_last) mask_block(p, x.s, begin, keys, x.block_max);
      if (rows.entropy.data != nullptr || args.row_entropy != nullptr) {
        weigh_block<true>(p, x.s, keys, x.block_max, x.alpha);
      } else {
        weigh_block<false>(p, x.s, keys, x.block_max, x.alpha);
      }
      value_panel(x.v + skip * v_stride, v_stride, keys, x.s, rows.d_v, x.alpha, p.ot);
      if (unusual > 0) add_unusual(args, x, p, block_first, unusual, begin, end);
    }
  }
  for (int64_t i = 0; i < panels; ++i) finish_panel(args, x, x.panels[i]);
}

}  // namespace
}  // namespace adaattn::cpu
