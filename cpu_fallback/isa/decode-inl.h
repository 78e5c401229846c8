// Few query rows against many keys: bound by reading K and V, so both are read once, as stored. Lanes run along
// head_dim; rows go in groups of four, so that the four scores of a key make one 128-bit block.
#pragma once

#include "cpu_fallback/isa/prefill-inl.h"

namespace adaattn::cpu {
namespace {

constexpr int kRowGroup = 4;
// Keys whose K (or V) stays in the first-level cache while all row groups of a head use it.
constexpr int64_t kKeyChunk = 16;
#if defined(ADAATTN_UNIT_AVX512) || defined(ADAATTN_UNIT_NEON)
constexpr int kKeysAtOnce = 4;
constexpr int kValueVectors = 4;
#else
constexpr int kKeysAtOnce = 2;
constexpr int kValueVectors = 2;
#endif

// A unit is a group of four rows of one head; unit u belongs to head u / groups.
struct DecodeScratch {
  float* q;  // [units * 4][q_stride], widened, zeros behind d_qk
  float* s;  // [units][kSplitKeys][4]
  float* o;  // [units * 4][o_stride]
  float* row;
  int64_t q_stride, o_stride;
  int64_t groups;  // of a head
  int64_t base;    // the key at s[..][0]
};
constexpr int64_t kMaxUnits = kDecodeItemRows / kRowGroup;

HWY_INLINE void lay_out(Arena& arena, DecodeScratch& x, int64_t d_qk, int64_t d_v) {
  x.q_stride = round_up(d_qk, kLanes);
  x.o_stride = round_up(d_v, kLanes * kValueVectors);
  x.q = arena.take<float>(kDecodeItemRows * x.q_stride);
  x.s = arena.take<float>(kDecodeItemRows * kSplitKeys);
  x.o = arena.take<float>(kDecodeItemRows * x.o_stride);
  x.row = arena.take<float>(round_up(d_v, 16));
}

size_t decode_scratch(int64_t d_qk, int64_t d_v) {
  Arena arena{nullptr};
  DecodeScratch unused;
  lay_out(arena, unused, d_qk, d_v);
  return arena.used;
}

// The rows of the item's KV head `head`.
HWY_INLINE RowOperands rows_of_head(const RowOperands& first, int64_t head) {
  RowOperands rows = first;
  const int64_t h = head * first.group;
  const Operand* from[] = {&first.q, &first.o, &first.lse, &first.entropy};
  Operand* to[] = {&rows.q, &rows.o, &rows.lse, &rows.entropy};
  for (int i = 0; i < 4; ++i) {
    if (from[i]->data != nullptr)
      to[i]->data = static_cast<char*>(from[i]->data) + h * from[i]->stride_h * element_bytes(from[i]->dtype);
  }
  if (rows.bias.data != nullptr)
    rows.bias.data =
        static_cast<const char*>(first.bias.data) + h * first.bias.stride_h * element_bytes(first.bias.dtype);
  if (rows.alibi != nullptr) rows.alibi += h * first.alibi_stride;
  if (rows.sinks != nullptr) rows.sinks += h * first.sinks_stride;
  return rows;
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

// The hardware does not follow rows that lie pages apart. Into the second level only: it has room for many more
// outstanding lines than the first.
HWY_INLINE void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i, 0, 2);
}

// Addresses of the keys of one chunk and of the next.
struct ChunkAddresses {
  const char* key[2 * kKeyChunk];

  HWY_INLINE void fill(const KeyOperand& operand, int64_t chunk, int64_t last) {
    for (int64_t i = 0; i < 2 * kKeyChunk; ++i) key[i] = key_address(operand, chunk + i < last ? chunk + i : last - 1);
  }
};

// Scores of kKeys keys with kRows rows: s[key * 4 + row].
template <typename T, int kKeys, int kRows>
HWY_INLINE void score_keys(const char* const* keys, int64_t offset, const float* HWY_RESTRICT q, int64_t q_stride,
                           int64_t d, float* HWY_RESTRICT s) {
  const T* k[kKeys];
  ADAATTN_UNROLL for (int j = 0; j < kKeys; ++j) k[j] = reinterpret_cast<const T*>(keys[j] + offset);
  F32 acc[kKeys][kRows];
  ADAATTN_UNROLL for (int j = 0; j < kKeys; ++j) {
    ADAATTN_UNROLL for (int r = 0; r < kRows; ++r) acc[j][r] = hn::Zero(kF32);
  }
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    F32 x[kKeys];
    ADAATTN_UNROLL for (int j = 0; j < kKeys; ++j) x[j] = load(k[j] + i);
    ADAATTN_UNROLL for (int r = 0; r < kRows; ++r) {
      const F32 y = hn::Load(kF32, q + r * q_stride + i);
      ADAATTN_UNROLL for (int j = 0; j < kKeys; ++j) acc[j][r] = hn::MulAdd(x[j], y, acc[j][r]);
    }
  }
  if (i < d) {
    ADAATTN_UNROLL for (int j = 0; j < kKeys; ++j) {
      const F32 x = load_head(k[j] + i, d - i);
      ADAATTN_UNROLL for (int r = 0; r < kRows; ++r) {
        acc[j][r] = hn::MulAdd(x, hn::Load(kF32, q + r * q_stride + i), acc[j][r]);
      }
    }
  }
  const hn::FixedTag<float, 4> kBlock;
  const F32 zero = hn::Zero(kF32);
  ADAATTN_UNROLL for (int j = 0; j < kKeys; ++j) {
    const auto sums = sums_of_lanes(acc[j][0], kRows > 1 ? acc[j][1 % kRows] : zero,
                                    kRows > 2 ? acc[j][2 % kRows] : zero, kRows > 3 ? acc[j][3 % kRows] : zero);
    hn::Store(sums, kBlock, s + j * 4);
  }
}

template <typename T, int kRows>
HWY_NOINLINE void score_chunk(const ChunkAddresses& keys, int64_t offset, int64_t n, const float* q, int64_t q_stride,
                              int64_t d, float* s, int64_t prefetch_bytes) {
  int64_t j = 0;
  for (; j + kKeysAtOnce <= n; j += kKeysAtOnce) {
    for (int64_t i = j; prefetch_bytes > 0 && i < j + kKeysAtOnce; ++i)
      prefetch_row(keys.key[i + kKeyChunk] + offset, prefetch_bytes);
    score_keys<T, kKeysAtOnce, kRows>(keys.key + j, offset, q, q_stride, d, s + j * kRowGroup);
  }
  for (; j < n; ++j) score_keys<T, 1, kRows>(keys.key + j, offset, q, q_stride, d, s + j * kRowGroup);
}

// All heads of the item chunk by chunk, so that memory is read nearly in its order where the heads of a token are
// neighbours.
template <typename T>
HWY_NOINLINE void score_split(const DecodeArgs& args, DecodeScratch& x, int64_t first, int64_t last) {
  const int64_t d = args.rows.d_qk, row_bytes = d * static_cast<int64_t>(sizeof(T));
  ChunkAddresses keys;
  for (int64_t chunk = first; chunk < last; chunk += kKeyChunk) {
    const int64_t n = chunk + kKeyChunk < last ? kKeyChunk : last - chunk;
    keys.fill(args.k, chunk, last);
    for (int64_t h = 0; h < args.heads; ++h) {
      for (int64_t g = 0; g < x.groups; ++g) {
        const int64_t unit = h * x.groups + g, rows = args.row_count - g * kRowGroup;
        const float* q = x.q + unit * kRowGroup * x.q_stride;
        float* s = x.s + (unit * kSplitKeys + chunk - x.base) * kRowGroup;
        const int64_t offset = h * args.k_head_stride, prefetch_bytes = g == 0 ? row_bytes : 0;
        if (rows == 1) {
          score_chunk<T, 1>(keys, offset, n, q, x.q_stride, d, s, prefetch_bytes);
        } else if (rows == 2) {
          score_chunk<T, 2>(keys, offset, n, q, x.q_stride, d, s, prefetch_bytes);
        } else {
          score_chunk<T, 4>(keys, offset, n, q, x.q_stride, d, s, prefetch_bytes);
        }
      }
    }
  }
}

// Four values, one per row, repeated over the vector.
HWY_INLINE F32 per_row(const float* four) { return hn::LoadDup128(kF32, four); }

HWY_INLINE int64_t clamp(int64_t n, int64_t low, int64_t high) { return n < low ? low : n > high ? high : n; }

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
HWY_NOINLINE void weigh_group(const DecodeArgs& args, const RowOperands& rows, const ScoreRule& rule,
                              float* HWY_RESTRICT s, int64_t group, int64_t first, int64_t last, GroupState* state) {
  HWY_ALIGN int32_t begin[4], end[4], position[4];
  HWY_ALIGN float slope[4];
  for (int64_t i = 0; i < kRowGroup; ++i) {
    const bool real = group * kRowGroup + i < args.row_count;
    const int64_t r = args.row_begin + group * kRowGroup + i;
    begin[i] = real ? args.key_begin[group * kRowGroup + i] : 0;
    // The vectors run past the last key; a row may see what lies there, in the next split.
    end[i] = real ? static_cast<int32_t>(clamp(args.key_end[group * kRowGroup + i], 0, last)) : 0;
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

// o[kRows][kVectors vectors] += w^T V for n keys.
template <typename T, int kVectors, int kRows>
HWY_INLINE void add_values(const ChunkAddresses& values, int64_t offset, int64_t n, const float* HWY_RESTRICT w,
                           float* HWY_RESTRICT o, int64_t o_stride, int64_t prefetch_bytes) {
  F32 acc[kRows][kVectors];
  ADAATTN_UNROLL for (int r = 0; r < kRows; ++r) {
    ADAATTN_UNROLL for (int i = 0; i < kVectors; ++i) acc[r][i] = hn::Load(kF32, o + r * o_stride + i * kLanes);
  }
  for (int64_t j = 0; j < n; ++j) {
    const T* v = reinterpret_cast<const T*>(values.key[j] + offset);
    prefetch_row(values.key[j + kKeyChunk] + offset, prefetch_bytes);
    F32 x[kVectors];
    ADAATTN_UNROLL for (int i = 0; i < kVectors; ++i) x[i] = load(v + i * kLanes);
    ADAATTN_UNROLL for (int r = 0; r < kRows; ++r) {
      const F32 weight = hn::Set(kF32, w[j * kRowGroup + r]);
      ADAATTN_UNROLL for (int i = 0; i < kVectors; ++i) acc[r][i] = hn::MulAdd(weight, x[i], acc[r][i]);
    }
  }
  ADAATTN_UNROLL for (int r = 0; r < kRows; ++r) {
    ADAATTN_UNROLL for (int i = 0; i < kVectors; ++i) hn::Store(acc[r][i], kF32, o + r * o_stride + i * kLanes);
  }
}

template <typename T, int kRows>
HWY_NOINLINE void add_chunk(const ChunkAddresses& values, int64_t offset, int64_t n, int64_t d, const float* w,
                            float* o, int64_t o_stride, int64_t prefetch_bytes) {
  constexpr int64_t kStep = kValueVectors * kLanes;
  int64_t column = 0;
  const auto at = [offset](int64_t c) { return offset + c * static_cast<int64_t>(sizeof(T)); };
  for (; column + kStep <= d; column += kStep) {
    add_values<T, kValueVectors, kRows>(values, at(column), n, w, o + column, o_stride, prefetch_bytes);
    prefetch_bytes = 0;
  }
  for (; column + kLanes <= d; column += kLanes)
    add_values<T, 1, kRows>(values, at(column), n, w, o + column, o_stride, 0);
  for (int64_t j = 0; column < d && j < n; ++j) {
    const F32 x = load_head(reinterpret_cast<const T*>(values.key[j] + at(column)), d - column);
    for (int r = 0; r < kRows; ++r) {
      float* to = o + r * o_stride + column;
      hn::Store(hn::MulAdd(hn::Set(kF32, w[j * kRowGroup + r]), x, hn::Load(kF32, to)), kF32, to);
    }
  }
}

template <typename T>
HWY_NOINLINE void add_split(const DecodeArgs& args, DecodeScratch& x, int64_t first, int64_t last) {
  const int64_t d = args.rows.d_v, row_bytes = d * static_cast<int64_t>(sizeof(T));
  ChunkAddresses values;
  for (int64_t chunk = first; chunk < last; chunk += kKeyChunk) {
    const int64_t n = chunk + kKeyChunk < last ? kKeyChunk : last - chunk;
    values.fill(args.v, chunk, last);
    for (int64_t h = 0; h < args.heads; ++h) {
      for (int64_t g = 0; g < x.groups; ++g) {
        const int64_t unit = h * x.groups + g, rows = args.row_count - g * kRowGroup;
        const float* w = x.s + (unit * kSplitKeys + chunk - x.base) * kRowGroup;
        float* o = x.o + unit * kRowGroup * x.o_stride;
        const int64_t offset = h * args.v_head_stride, prefetch_bytes = g == 0 ? row_bytes : 0;
        if (rows == 1) {
          add_chunk<T, 1>(values, offset, n, d, w, o, x.o_stride, prefetch_bytes);
        } else if (rows == 2) {
          add_chunk<T, 2>(values, offset, n, d, w, o, x.o_stride, prefetch_bytes);
        } else {
          add_chunk<T, 4>(values, offset, n, d, w, o, x.o_stride, prefetch_bytes);
        }
      }
    }
  }
}

// The same for keys that some row must not see: V may hold anything there, so weights of 0 are skipped, not multiplied.
HWY_NOINLINE void add_guarded(const DecodeArgs& args, DecodeScratch& x, int64_t first, int64_t last) {
  const int64_t d = args.rows.d_v;
  for (int64_t j = first; j < last; ++j) {
    for (int64_t h = 0; h < args.heads; ++h) {
      widen_row(key_address(args.v, j) + h * args.v_head_stride, args.v.dtype, x.row, d, 1.0f);
      for (int64_t r = 0; r < args.row_count; ++r) {
        const int64_t unit = h * x.groups + r / kRowGroup;
        const float w = x.s[(unit * kSplitKeys + j - x.base) * kRowGroup + r % kRowGroup];
        if (w == 0) continue;
        float* o = x.o + (unit * kRowGroup + r % kRowGroup) * x.o_stride;
        for (int64_t i = 0; i < d; ++i) o[i] += w * x.row[i];
      }
    }
  }
}

// Keys [first, last) of the split that some row sees, and those that all rows see.
struct SplitRange {
  int64_t first, last, all_first, all_last;
};

HWY_INLINE SplitRange split_range(const DecodeArgs& args) {
  SplitRange range = {args.split_end, args.split_begin, args.split_begin, args.split_end};
  for (int64_t r = 0; r < args.row_count; ++r) {
    const int64_t begin = clamp(args.key_begin[r], args.split_begin, args.split_end);
    const int64_t end = clamp(args.key_end[r], args.split_begin, args.split_end);
    if (begin < end) {
      range.first = begin < range.first ? begin : range.first;
      range.last = end > range.last ? end : range.last;
    }
    range.all_first = begin > range.all_first ? begin : range.all_first;
    range.all_last = end < range.all_last ? end : range.all_last;
  }
  range.all_first = clamp(range.all_first, range.first, range.last);
  range.all_last = clamp(range.all_last, range.all_first, range.last);
  return range;
}

void decode(const DecodeArgs& args) {
  const ScoreRule rule = score_rule(args.rows);
  const int64_t d_qk = args.rows.d_qk, d_v = args.rows.d_v, stride = partial_floats(d_v);
  Arena arena{args.scratch};
  DecodeScratch x;
  lay_out(arena, x, d_qk, d_v);
  x.groups = (args.row_count + kRowGroup - 1) / kRowGroup;

  SplitRange range = split_range(args);
  if (range.first >= range.last) {
    for (int64_t h = 0; h < args.heads; ++h) {
      for (int64_t r = 0; r < args.row_count; ++r) {
        float* out = args.partial + h * args.partial_head_stride + r * stride;
        memset(out, 0, static_cast<size_t>(stride) * sizeof(float));
        out[0] = -infinity();
      }
    }
    return;
  }
  x.base = range.first;

  const int64_t padded_rows = args.heads * x.groups * kRowGroup;
  memset(x.q, 0, static_cast<size_t>(padded_rows * x.q_stride) * sizeof(float));
  memset(x.o, 0, static_cast<size_t>(padded_rows * x.o_stride) * sizeof(float));
  for (int64_t h = 0; h < args.heads; ++h) {
    const RowOperands rows = rows_of_head(args.rows, h);
    for (int64_t r = 0; r < args.row_count; ++r) {
      widen_row(row_address(rows.q, rows.group, args.row_begin + r), rows.q.dtype,
                x.q + (h * x.groups * kRowGroup + r) * x.q_stride, d_qk, rule.query_factor);
    }
  }

  if (args.k.dtype == Dtype::kF32) {
    score_split<float>(args, x, range.first, range.last);
  } else if (args.k.dtype == Dtype::kBF16) {
    score_split<Brain>(args, x, range.first, range.last);
  } else {
    score_split<Half>(args, x, range.first, range.last);
  }

  GroupState states[kMaxUnits];
  for (int64_t h = 0; h < args.heads; ++h) {
    const RowOperands rows = rows_of_head(args.rows, h);
    for (int64_t g = 0; g < x.groups; ++g) {
      const int64_t unit = h * x.groups + g;
      weigh_group(args, rows, rule, x.s + unit * kSplitKeys * kRowGroup, g, range.first, range.last, &states[unit]);
    }
  }

  // Keys that every row sees need no guard; with a bias any key may be shut out by -inf.
  if (args.rows.bias.data != nullptr) range.all_first = range.all_last = range.last;
  add_guarded(args, x, range.first, range.all_first);
  if (args.v.dtype == Dtype::kF32) {
    add_split<float>(args, x, range.all_first, range.all_last);
  } else if (args.v.dtype == Dtype::kBF16) {
    add_split<Brain>(args, x, range.all_first, range.all_last);
  } else {
    add_split<Half>(args, x, range.all_first, range.all_last);
  }
  add_guarded(args, x, range.all_last, range.last);

  for (int64_t h = 0; h < args.heads; ++h) {
    for (int64_t r = 0; r < args.row_count; ++r) {
      const GroupState& state = states[h * x.groups + r / kRowGroup];
      float* out = args.partial + h * args.partial_head_stride + r * stride;
      out[0] = state.max[r % kRowGroup];
      out[1] = state.sum[r % kRowGroup];
      out[2] = state.entropy_sum[r % kRowGroup];
      out[3] = 0;
      memcpy(out + kPartialHeader, x.o + (h * x.groups * kRowGroup + r) * x.o_stride,
             static_cast<size_t>(d_v) * sizeof(float));
    }
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
