// Few query rows against many keys: bound by reading K and V, so both are read once, as stored. Lanes run along
// head_dim; rows go in groups of four, so that the four scores of a key make one 128-bit block.
#pragma once

#include "cpu_fallback/isa/prefill-inl.h"

namespace adaattn::cpu {
namespace {

constexpr int kRowGroup = 4;
// Keys whose K (or V) stays in the first-level cache while all row groups use it.
constexpr int64_t kKeyChunk = 32;
#if defined(ADAATTN_UNIT_AVX512) || defined(ADAATTN_UNIT_NEON)
constexpr int kKeysAtOnce = 4;
constexpr int kValueVectors = 4;
#else
constexpr int kKeysAtOnce = 2;
constexpr int kValueVectors = 2;
#endif

struct DecodeScratch {
  float* q;  // [row groups * 4][q_stride], widened, zeros behind d_qk
  float* s;  // [row groups][kSplitKeys][4]
  float* o;  // [row groups * 4][o_stride]
  float* row;
  int64_t q_stride, o_stride;
  int64_t base;  // the key at s[..][0]
};

HWY_INLINE void lay_out(Arena& arena, DecodeScratch& x, int64_t d_qk, int64_t d_v) {
  x.q_stride = round_up(d_qk, kLanes);
  x.o_stride = round_up(d_v, kLanes * kValueVectors);
  x.q = arena.take<float>(kDecodeRows * x.q_stride);
  x.s = arena.take<float>(kDecodeRows * kSplitKeys);
  x.o = arena.take<float>(kDecodeRows * x.o_stride);
  x.row = arena.take<float>(round_up(d_v, 16));
}

size_t decode_scratch(int64_t d_qk, int64_t d_v) {
  Arena arena{nullptr};
  DecodeScratch unused;
  lay_out(arena, unused, d_qk, d_v);
  return arena.used;
}

// The sums of the lanes of a, b, c, d, in this order.
HWY_INLINE hn::Vec128<float, 4> sums_of_lanes(F32 a, F32 b, F32 c, F32 d) {
  const hn::Repartition<double, decltype(kF32)> kF64;
  const F32 ab = hn::Add(hn::InterleaveLower(kF32, a, b), hn::InterleaveUpper(kF32, a, b));
  const F32 cd = hn::Add(hn::InterleaveLower(kF32, c, d), hn::InterleaveUpper(kF32, c, d));
  const auto low = hn::InterleaveLower(kF64, hn::BitCast(kF64, ab), hn::BitCast(kF64, cd));
  const auto high = hn::InterleaveUpper(kF64, hn::BitCast(kF64, ab), hn::BitCast(kF64, cd));
  const F32 sums = hn::Add(hn::BitCast(kF32, low), hn::BitCast(kF32, high));
#if defined(ADAATTN_UNIT_AVX512)
  const hn::Half<decltype(kF32)> kHalf;
  const hn::Half<decltype(kHalf)> kQuarter;
  const auto half = hn::Add(hn::LowerHalf(kHalf, sums), hn::UpperHalf(kHalf, sums));
  return hn::Add(hn::LowerHalf(kQuarter, half), hn::UpperHalf(kQuarter, half));
#elif defined(ADAATTN_UNIT_AVX2)
  const hn::Half<decltype(kF32)> kHalf;
  return hn::Add(hn::LowerHalf(kHalf, sums), hn::UpperHalf(kHalf, sums));
#else
  return sums;
#endif
}

// Scores of kKeys keys with four rows: s[key * 4 + row].
template <typename T, int kKeys>
HWY_INLINE void score_keys(const T* const* k, const float* HWY_RESTRICT q, int64_t q_stride, int64_t d,
                           float* HWY_RESTRICT s) {
  F32 acc[kKeys][kRowGroup];
  ADAATTN_UNROLL for (int j = 0; j < kKeys; ++j) {
    ADAATTN_UNROLL for (int r = 0; r < kRowGroup; ++r) acc[j][r] = hn::Zero(kF32);
  }
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    F32 x[kKeys];
    ADAATTN_UNROLL for (int j = 0; j < kKeys; ++j) x[j] = load(k[j] + i);
    ADAATTN_UNROLL for (int r = 0; r < kRowGroup; ++r) {
      const F32 y = hn::Load(kF32, q + r * q_stride + i);
      ADAATTN_UNROLL for (int j = 0; j < kKeys; ++j) acc[j][r] = hn::MulAdd(x[j], y, acc[j][r]);
    }
  }
  if (i < d) {
    ADAATTN_UNROLL for (int j = 0; j < kKeys; ++j) {
      const F32 x = load_head(k[j] + i, d - i);
      ADAATTN_UNROLL for (int r = 0; r < kRowGroup; ++r) {
        acc[j][r] = hn::MulAdd(x, hn::Load(kF32, q + r * q_stride + i), acc[j][r]);
      }
    }
  }
  const hn::FixedTag<float, 4> kBlock;
  ADAATTN_UNROLL for (int j = 0; j < kKeys; ++j) {
    hn::Store(sums_of_lanes(acc[j][0], acc[j][1], acc[j][2], acc[j][3]), kBlock, s + j * 4);
  }
}

template <typename T>
HWY_NOINLINE void score_split(const DecodeArgs& args, DecodeScratch& x, int64_t first, int64_t last, int64_t groups) {
  const int64_t d = args.rows.d_qk;
  for (int64_t chunk = first; chunk < last; chunk += kKeyChunk) {
    const int64_t chunk_last = chunk + kKeyChunk < last ? chunk + kKeyChunk : last;
    const T* keys[kKeyChunk];
    for (int64_t j = chunk; j < chunk_last; ++j) keys[j - chunk] = reinterpret_cast<const T*>(key_address(args.k, j));
    for (int64_t g = 0; g < groups; ++g) {
      const float* q = x.q + g * kRowGroup * x.q_stride;
      float* s = x.s + (g * kSplitKeys + chunk - x.base) * kRowGroup;
      int64_t j = 0;
      const int64_t n = chunk_last - chunk;
      for (; j + kKeysAtOnce <= n; j += kKeysAtOnce)
        score_keys<T, kKeysAtOnce>(keys + j, q, x.q_stride, d, s + j * kRowGroup);
      for (; j < n; ++j) score_keys<T, 1>(keys + j, q, x.q_stride, d, s + j * kRowGroup);
    }
  }
}

// Four values, one per row, repeated over the vector.
HWY_INLINE F32 per_row(const float* four) { return hn::LoadDup128(kF32, four); }

struct GroupState {
  HWY_ALIGN float max[4];
  HWY_ALIGN float sum[4];
  HWY_ALIGN float entropy_sum[4];
};

HWY_INLINE void fold_rows(F32 x, float* out) {
  HWY_ALIGN float lanes[kLanes];
  hn::Store(x, kF32, lanes);
  for (int64_t i = 0; i < kRowGroup; ++i) {
    out[i] = 0;
    for (int64_t v = i; v < kLanes; v += kRowGroup) out[i] += lanes[v];
  }
}

// Score terms, mask, maximum, weights and their sums for the four rows at s[key][4], keys [first, last).
HWY_NOINLINE void weigh_group(const DecodeArgs& args, const ScoreRule& rule, float* HWY_RESTRICT s, int64_t group,
                              int64_t first, int64_t last, GroupState* state) {
  const RowOperands& rows = args.rows;
  HWY_ALIGN int32_t begin[4], end[4], position[4];
  HWY_ALIGN float slope[4];
  for (int64_t i = 0; i < kRowGroup; ++i) {
    const bool real = group * kRowGroup + i < args.row_count;
    const int64_t r = args.row_begin + group * kRowGroup + i;
    begin[i] = real ? args.key_begin[group * kRowGroup + i] : 0;
    end[i] = real ? args.key_end[group * kRowGroup + i] : 0;
    position[i] = real ? static_cast<int32_t>(r / rows.group + rows.off) : 0;
    slope[i] = real && rows.alibi != nullptr ? rows.alibi[r % rows.group * rows.alibi_stride] * kLog2E : 0;
  }
  const int64_t keys = last - first;
  const int64_t padded = round_up(keys * kRowGroup, kLanes);
  for (int64_t i = keys * kRowGroup; i < padded; ++i) s[i] = 0;

  if (rule.special) {
    const F32 slopes = per_row(slope), cap = hn::Set(kF32, rule.cap);
    const auto positions = hn::LoadDup128(kI32, position);
    const auto lane_key = hn::ShiftRight<2>(hn::Iota(kI32, 0));
    for (int64_t i = 0; i < padded; i += kLanes) {
      F32 x = hn::Load(kF32, s + i);
      if (rule.cap > 0) x = hn::Mul(tanh(x), cap);
      if (rows.alibi != nullptr) {
        const auto key = hn::Add(lane_key, hn::Set(kI32, static_cast<int32_t>(first + i / kRowGroup)));
        x = hn::NegMulAdd(slopes, hn::Abs(hn::ConvertTo(kF32, hn::Sub(positions, key))), x);
      }
      hn::Store(x, kF32, s + i);
    }
    const BiasOperand& bias = rows.bias;
    for (int64_t i = 0; bias.data != nullptr && i < kRowGroup; ++i) {
      if (group * kRowGroup + i >= args.row_count) break;
      const int64_t r = args.row_begin + group * kRowGroup + i, bytes = element_bytes(bias.dtype);
      const char* at =
          static_cast<const char*>(bias.data) +
          (r / rows.group * bias.stride_q + r % rows.group * bias.stride_h + first * bias.stride_k) * bytes;
      for (int64_t j = 0; j < keys; ++j)
        s[j * kRowGroup + i] += load_any(at + j * bias.stride_k * bytes, bias.dtype) * kLog2E;
    }
  }

  const F32 none = hn::Set(kF32, -infinity()), zero = hn::Zero(kF32);
  const auto begins = hn::LoadDup128(kI32, begin), ends = hn::LoadDup128(kI32, end);
  const auto lane_key = hn::ShiftRight<2>(hn::Iota(kI32, 0));
  F32 max = none;
  for (int64_t i = 0; i < padded; i += kLanes) {
    const auto key = hn::Add(lane_key, hn::Set(kI32, static_cast<int32_t>(first + i / kRowGroup)));
    const auto visible = hn::AndNot(hn::Lt(key, begins), hn::Lt(key, ends));
    const F32 x = hn::IfThenElse(hn::RebindMask(kF32, visible), hn::Load(kF32, s + i), none);
    max = hn::Max(x, max);
    hn::Store(x, kF32, s + i);
  }
  HWY_ALIGN float lanes[kLanes];
  hn::Store(max, kF32, lanes);
  HWY_ALIGN float reference[4];
  for (int64_t i = 0; i < kRowGroup; ++i) {
    float m = lanes[i];
    for (int64_t v = i + kRowGroup; v < kLanes; v += kRowGroup) m = lanes[v] > m || lanes[v] != lanes[v] ? lanes[v] : m;
    state->max[i] = m;
    reference[i] = m == -infinity() ? 0 : m;
  }
  const F32 references = per_row(reference);
  const bool entropy_wanted = rows.entropy.data != nullptr;
  F32 sum = zero, entropy = zero;
  for (int64_t i = 0; i < padded; i += kLanes) {
    const F32 x = hn::Sub(hn::Load(kF32, s + i), references);
    const F32 w = exp2(x);
    sum = hn::Add(sum, w);
    if (entropy_wanted) entropy = hn::Add(entropy, hn::IfThenElse(hn::Eq(w, zero), zero, hn::Mul(w, x)));
    hn::Store(w, kF32, s + i);
  }
  fold_rows(sum, state->sum);
  fold_rows(entropy, state->entropy_sum);
}

// o[4 rows][kVectors vectors] += w^T V for n keys.
template <typename T, int kVectors>
HWY_INLINE void add_values(const T* const* v, int64_t column, const float* HWY_RESTRICT w, int64_t n,
                           float* HWY_RESTRICT o, int64_t o_stride) {
  F32 acc[kRowGroup][kVectors];
  ADAATTN_UNROLL for (int r = 0; r < kRowGroup; ++r) {
    ADAATTN_UNROLL for (int i = 0; i < kVectors; ++i) acc[r][i] = hn::Load(kF32, o + r * o_stride + i * kLanes);
  }
  for (int64_t j = 0; j < n; ++j) {
    F32 x[kVectors];
    ADAATTN_UNROLL for (int i = 0; i < kVectors; ++i) x[i] = load(v[j] + column + i * kLanes);
    ADAATTN_UNROLL for (int r = 0; r < kRowGroup; ++r) {
      const F32 weight = hn::Set(kF32, w[j * kRowGroup + r]);
      ADAATTN_UNROLL for (int i = 0; i < kVectors; ++i) acc[r][i] = hn::MulAdd(weight, x[i], acc[r][i]);
    }
  }
  ADAATTN_UNROLL for (int r = 0; r < kRowGroup; ++r) {
    ADAATTN_UNROLL for (int i = 0; i < kVectors; ++i) hn::Store(acc[r][i], kF32, o + r * o_stride + i * kLanes);
  }
}

template <typename T>
HWY_NOINLINE void add_chunk(const T* const* v, int64_t d, const float* w, int64_t n, float* o, int64_t o_stride) {
  int64_t column = 0;
  for (; column + kValueVectors * kLanes <= d; column += kValueVectors * kLanes)
    add_values<T, kValueVectors>(v, column, w, n, o + column, o_stride);
  for (; column + kLanes <= d; column += kLanes) add_values<T, 1>(v, column, w, n, o + column, o_stride);
  for (int64_t j = 0; column < d && j < n; ++j) {
    const F32 x = load_head(v[j] + column, d - column);
    for (int r = 0; r < kRowGroup; ++r) {
      float* at = o + r * o_stride + column;
      hn::Store(hn::MulAdd(hn::Set(kF32, w[j * kRowGroup + r]), x, hn::Load(kF32, at)), kF32, at);
    }
  }
}

// The same for keys that some row must not see: V may hold anything there, so weights of 0 are skipped, not multiplied.
HWY_NOINLINE void add_guarded(const DecodeArgs& args, DecodeScratch& x, int64_t first, int64_t last, int64_t groups) {
  const int64_t d = args.rows.d_v;
  for (int64_t j = first; j < last; ++j) {
    widen_row(key_address(args.v, j), args.v.dtype, x.row, d, 1.0f);
    for (int64_t r = 0; r < groups * kRowGroup; ++r) {
      const float w = x.s[((r / kRowGroup) * kSplitKeys + j - x.base) * kRowGroup + r % kRowGroup];
      if (w == 0) continue;
      float* o = x.o + r * x.o_stride;
      for (int64_t i = 0; i < d; ++i) o[i] += w * x.row[i];
    }
  }
}

template <typename T>
HWY_NOINLINE void add_split(const DecodeArgs& args, DecodeScratch& x, int64_t first, int64_t last, int64_t groups) {
  for (int64_t chunk = first; chunk < last; chunk += kKeyChunk) {
    const int64_t n = chunk + kKeyChunk < last ? kKeyChunk : last - chunk;
    const T* values[kKeyChunk];
    for (int64_t j = 0; j < n; ++j) values[j] = reinterpret_cast<const T*>(key_address(args.v, chunk + j));
    for (int64_t g = 0; g < groups; ++g) {
      const float* w = x.s + (g * kSplitKeys + chunk - x.base) * kRowGroup;
      add_chunk<T>(values, args.rows.d_v, w, n, x.o + g * kRowGroup * x.o_stride, x.o_stride);
    }
  }
}

void decode(const DecodeArgs& args) {
  const RowOperands& rows = args.rows;
  const ScoreRule rule = score_rule(rows);
  const int64_t groups = (args.row_count + kRowGroup - 1) / kRowGroup;
  Arena arena{args.scratch};
  DecodeScratch x;
  lay_out(arena, x, rows.d_qk, rows.d_v);

  int64_t first = args.split_end, last = args.split_begin, all_first = args.split_begin, all_last = args.split_end;
  for (int64_t r = 0; r < args.row_count; ++r) {
    const int64_t begin = args.key_begin[r], end = args.key_end[r];
    if (begin < end) {
      first = begin < first ? begin : first;
      last = end > last ? end : last;
    }
    all_first = begin > all_first ? begin : all_first;
    all_last = end < all_last ? end : all_last;
  }
  first = first < args.split_begin ? args.split_begin : first;
  last = last > args.split_end ? args.split_end : last;

  x.base = first;
  memset(x.q, 0, static_cast<size_t>(groups * kRowGroup * x.q_stride) * sizeof(float));
  memset(x.o, 0, static_cast<size_t>(groups * kRowGroup * x.o_stride) * sizeof(float));
  for (int64_t r = 0; r < args.row_count; ++r)
    widen_row(row_address(rows.q, rows.group, args.row_begin + r), rows.q.dtype, x.q + r * x.q_stride, rows.d_qk,
              rule.query_factor);

  const int64_t stride = partial_floats(rows.d_v);
  if (first >= last) {
    for (int64_t r = 0; r < args.row_count; ++r) {
      float* out = args.partial + r * stride;
      memset(out, 0, static_cast<size_t>(stride) * sizeof(float));
      out[0] = -infinity();
    }
    return;
  }

  if (args.k.dtype == Dtype::kF32) {
    score_split<float>(args, x, first, last, groups);
  } else if (args.k.dtype == Dtype::kBF16) {
    score_split<Brain>(args, x, first, last, groups);
  } else {
    score_split<Half>(args, x, first, last, groups);
  }

  // Keys that every row sees need no guard; with a bias any key may be shut out by -inf.
  const bool guard_all = rows.bias.data != nullptr || all_first >= all_last;
  const int64_t plain_first = guard_all ? last : all_first > first ? (all_first < last ? all_first : last) : first;
  const int64_t plain_last = guard_all         ? last
                             : all_last < last ? (all_last > plain_first ? all_last : plain_first)
                                               : last;
  GroupState states[kDecodeRows / kRowGroup];
  for (int64_t g = 0; g < groups; ++g) {
    float* s = x.s + g * kSplitKeys * kRowGroup;
    weigh_group(args, rule, s, g, first, last, &states[g]);
  }
  add_guarded(args, x, first, plain_first, groups);
  if (args.v.dtype == Dtype::kF32) {
    add_split<float>(args, x, plain_first, plain_last, groups);
  } else if (args.v.dtype == Dtype::kBF16) {
    add_split<Brain>(args, x, plain_first, plain_last, groups);
  } else {
    add_split<Half>(args, x, plain_first, plain_last, groups);
  }
  add_guarded(args, x, plain_last, last, groups);

  for (int64_t r = 0; r < args.row_count; ++r) {
    float* out = args.partial + r * stride;
    out[0] = states[r / kRowGroup].max[r % kRowGroup];
    out[1] = states[r / kRowGroup].sum[r % kRowGroup];
    out[2] = states[r / kRowGroup].entropy_sum[r % kRowGroup];
    out[3] = 0;
    memcpy(out + kPartialHeader, x.o + r * x.o_stride, static_cast<size_t>(rows.d_v) * sizeof(float));
  }
}

// Joins the splits of each row, in key order.
void combine(const CombineArgs& args) {
  const RowOperands& rows = args.rows;
  const int64_t stride = partial_floats(rows.d_v);
  float* o = reinterpret_cast<float*>(args.scratch);
  for (int64_t r = 0; r < args.row_count; ++r) {
    float max = -infinity();
    for (int64_t i = 0; i < args.splits; ++i) {
      const float m = args.partials[(i * args.row_count + r) * stride];
      max = m > max || m != m ? m : max;
    }
    const float reference = max == -infinity() ? 0 : max;
    float sum = 0, entropy_sum = 0;
    memset(o, 0, static_cast<size_t>(rows.d_v) * sizeof(float));
    for (int64_t i = 0; i < args.splits; ++i) {
      const float* part = args.partials + (i * args.row_count + r) * stride;
      const float m = part[0], shift = m == -infinity() ? 0 : m - reference;
      const float factor = m == -infinity() && part[1] == 0 ? 0.0f : ::exp2f(m - reference);
      sum += factor * part[1];
      entropy_sum += factor * (part[2] + shift * part[1]);
      for (int64_t c = 0; c < rows.d_v; ++c) o[c] += factor * part[kPartialHeader + c];
    }
    const int64_t row = args.row_begin + r;
    const float* sink = rows.sinks == nullptr ? nullptr : rows.sinks + row % rows.group * rows.sinks_stride;
    const RowResult result = finish_row(max, sum, entropy_sum, sink);
    for (int64_t c = 0; c < rows.d_v; ++c) o[c] *= result.factor;
    store_row(o, row_address(rows.o, rows.group, row), rows.o.dtype, rows.d_v);
    store_statistics(rows, row, result);
  }
}

}  // namespace
}  // namespace adaattn::cpu
