// One attention call in plain numbers: what both back-ends' kernels read. Validated by src/core/validate.*, trivially
// copyable, passed to CUDA kernels by value. All strides count elements; the last dimension of q, k, v, o has stride 1.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace adaattn {

enum class Dtype : int32_t {
  kNone = 0,
  kF32 = 1,
  kF16 = 2,
  kBF16 = 3,
  kI32 = 4,
  kI64 = 5,
  kE4M3 = 6
};  // = ADAATTN_DTYPE_*

ADAATTN_HD constexpr int64_t dtype_size(Dtype dtype) {
  return dtype == Dtype::kI64                           ? 8
         : dtype == Dtype::kF32 || dtype == Dtype::kI32 ? 4
         : dtype == Dtype::kNone                        ? 0
         : dtype == Dtype::kE4M3                        ? 1
                                                        : 2;
}

// A [batch, token, head, dim] view. Packed (THD) operands have stride_b 0 and find a sequence's first token through
// cu_seqlens; paged ones use stride_b as the page stride. For lse and entropy there is no last dimension.
struct Operand {
  void* data = nullptr;
  int64_t stride_b = 0;
  int64_t stride_s = 0;
  int64_t stride_h = 0;
  Dtype dtype = Dtype::kNone;
};

struct BiasOperand {
  const void* data = nullptr;  // f32 or the dtype of q; null: absent
  int64_t stride_b = 0, stride_h = 0, stride_q = 0, stride_k = 0;
  Dtype dtype = Dtype::kNone;
};

// What elements of an E4M3 operand are multiplied by: a factor per sequence, KV head and block of keys.
struct Descale {
  const float* data = nullptr;  // null: the operand is not E4M3
  int64_t stride_b = 0, stride_h = 0, stride_block = 0;
};

enum class Field : int32_t { kNone = 0, kCuSeqlensQ = 1, kCuSeqlensK = 2, kSequsedK = 3, kBlockTable = 4 };

// First out-of-range value found in a length or index array; the numbers are those of ADAATTN_FIELD_*.
struct Violation {
  Field field = Field::kNone;
  int64_t index = 0;
  int64_t value = 0;
};

struct AttnParams {
  Operand q, k, v, o;
  Operand lse, entropy;  // f32, data null: not wanted
  BiasOperand bias;
  const float* alibi_slopes = nullptr;  // null: absent
  int64_t alibi_stride_b = 0, alibi_stride_h = 0;
  const float* sinks = nullptr;  // null: absent
  int64_t sinks_stride = 0;

  Descale q_descale, k_descale, v_descale;
  int64_t descale_block = 0;  // keys per factor of k and v; 0: all of the sequence

  const int32_t* cu_seqlens_q = nullptr;  // [batch + 1], null unless packed
  const int32_t* cu_seqlens_k = nullptr;  // [batch + 1], null unless packed
  const int32_t* seqused_k = nullptr;     // [batch], may be null
  const int32_t* block_table = nullptr;   // [batch, pages_per_seq], null unless paged
  int64_t block_table_stride = 0;         // of its rows; entries of a row are adjacent
  int64_t pages_per_seq = 0;
  int64_t num_pages = 0;
  int64_t page_size = 0;

  int64_t batch = 0;
  int64_t heads_q = 0, heads_kv = 0;
  int64_t d_qk = 0, d_v = 0;
  int64_t seqlen_q = 0;  // length, or the upper bound of all lengths when packed
  int64_t seqlen_k = 0;  // likewise; paged: pages_per_seq * page_size
  int64_t total_q = 0;   // packed tokens; batch * seqlen_q otherwise
  int64_t total_k = 0;

  // The mask as a window: key j is visible to query i when -window_left <= j - (i + off) <= window_right, -1 = open
  // side. A causal mask is window_right 0 (or the smaller of the two).
  int64_t window_left = -1, window_right = -1;
  bool off_top_left = false;  // off = 0 instead of len_k - len_q
  float scale = 1;
  float softcap = 0;      // 0: off
  bool fast_f32 = false;  // narrower products allowed for f32 inputs
};

// The tokens of one sequence, clamped to what exists.
struct Sequence {
  int64_t q_start = 0, len_q = 0;  // q_start counts packed tokens (0 when not packed)
  int64_t k_start = 0, len_k = 0;
  int64_t off = 0;
};

ADAATTN_HD inline int64_t clamp_to(int64_t x, int64_t lo, int64_t hi) { return x < lo ? lo : x > hi ? hi : x; }

// Lengths of sequence b. Violations are found by check_sequence below, so that kernels need not carry them along.
ADAATTN_HD inline Sequence sequence_of(const AttnParams& p, int64_t b) {
  Sequence s;
  s.len_q = p.seqlen_q;
  s.len_k = p.seqlen_k;
  if (p.cu_seqlens_q != nullptr) {
    s.q_start = clamp_to(p.cu_seqlens_q[b], 0, p.total_q);
    const int64_t end = clamp_to(p.cu_seqlens_q[b + 1], s.q_start, p.total_q);
    s.len_q = clamp_to(end - s.q_start, 0, p.seqlen_q);
  }
  if (p.cu_seqlens_k != nullptr) {
    s.k_start = clamp_to(p.cu_seqlens_k[b], 0, p.total_k);
    const int64_t end = clamp_to(p.cu_seqlens_k[b + 1], s.k_start, p.total_k);
    s.len_k = clamp_to(end - s.k_start, 0, p.seqlen_k);
  }
  if (p.seqused_k != nullptr) s.len_k = clamp_to(p.seqused_k[b], 0, s.len_k);
  s.off = p.off_top_left ? 0 : s.len_k - s.len_q;
  return s;
}

// The same walk, reporting the first value that had to be clamped (field kNone: nothing). Block-table entries in use
// are checked too.
ADAATTN_HD inline Violation check_sequence(const AttnParams& p, int64_t b) {
  Violation bad;
  const Sequence s = sequence_of(p, b);
  if (p.cu_seqlens_q != nullptr) {
    const int64_t first = p.cu_seqlens_q[b], end = p.cu_seqlens_q[b + 1];
    if (first != s.q_start || (b == 0 && first != 0)) return {Field::kCuSeqlensQ, b, first};
    if (end < first || end - first != s.len_q) return {Field::kCuSeqlensQ, b + 1, end};
  }
  int64_t limit_k = p.seqlen_k;
  if (p.cu_seqlens_k != nullptr) {
    const int64_t first = p.cu_seqlens_k[b], end = p.cu_seqlens_k[b + 1];
    if (first != s.k_start || (b == 0 && first != 0)) return {Field::kCuSeqlensK, b, first};
    limit_k = end - first;
    if (end < first || end > p.total_k || limit_k > p.seqlen_k) return {Field::kCuSeqlensK, b + 1, end};
  }
  if (p.seqused_k != nullptr && (p.seqused_k[b] < 0 || p.seqused_k[b] > limit_k))
    return {Field::kSequsedK, b, p.seqused_k[b]};
  if (p.block_table != nullptr) {
    const int64_t pages = (s.len_k + p.page_size - 1) / p.page_size;
    for (int64_t i = 0; i < pages; ++i) {
      const int64_t page = p.block_table[b * p.block_table_stride + i];
      if (page < 0 || page >= p.num_pages) return {Field::kBlockTable, b * p.pages_per_seq + i, page};
    }
  }
  return bad;
}

// Visible keys of query i: [begin, end), empty when begin >= end.
struct KeyRange {
  int64_t begin = 0, end = 0;
};

ADAATTN_HD inline KeyRange visible_keys(const AttnParams& p, const Sequence& s, int64_t i) {
  KeyRange r{0, s.len_k};
  if (p.window_left >= 0) r.begin = clamp_to(i + s.off - p.window_left, 0, s.len_k);
  if (p.window_right >= 0) r.end = clamp_to(i + s.off + p.window_right + 1, 0, s.len_k);
  return r;
}

}  // namespace adaattn
