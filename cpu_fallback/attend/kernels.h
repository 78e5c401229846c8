// The border between the portable drivers and the units compiled once per instruction set. Those units may only see
// plain data: an inline function or a standard container used there could be emitted as a weak symbol full of wide
// instructions and then be linked into code that runs everywhere.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/attn_params.h"

namespace adaattn::cpu {

// Keys per block of the prefill kernel, anchored at key 0 so that results do not depend on how rows are grouped.
inline constexpr int64_t kKeyBlock = 192;
inline constexpr int64_t kTileRows = 128;
// Keys per split of the decode kernel: fixed, so that results do not depend on the number of threads.
inline constexpr int64_t kSplitKeys = 512;
// (query head, query) pairs of one KV head that the decode kernel takes.
inline constexpr int64_t kDecodeRows = 32;
// Rows, those of every head rounded up to four, that one decode item may hold over several heads.
inline constexpr int64_t kDecodeItemRows = 64;

// K or V of one sequence and one KV head. Paged: key j lies in page block_table[j / page_size].
struct KeyOperand {
  const char* data = nullptr;
  int64_t stride = 0;  // bytes between keys
  const int32_t* block_table = nullptr;
  int64_t page_size = 0, page_stride = 0, num_pages = 0;  // page_stride in bytes
  Dtype dtype = Dtype::kNone;
};

// Queries of one sequence and one KV head. Row r is query r / group of head first_head + r % group, so rows of
// neighbouring positions share a tile whatever the group size is. Strides in elements, as in AttnParams.
struct RowOperands {
  Operand q, o, lse, entropy;  // data points at (query 0, first head); lse, entropy: null if not wanted
  BiasOperand bias;
  const float* alibi = nullptr;  // slope of the first head
  int64_t alibi_stride = 0;
  const float* sinks = nullptr;
  int64_t sinks_stride = 0;
  int64_t group = 1;
  int64_t d_qk = 0, d_v = 0;
  int64_t off = 0;
  float scale = 1, softcap = 0;
  bool fast_f32 = false;
};

// Rows [row_begin, row_begin + rows) against all their keys.
struct PrefillArgs {
  RowOperands rows;
  KeyOperand k, v;
  int64_t row_begin = 0, row_count = 0;
  // Visible keys of each row, indexed from row_begin.
  const int32_t* key_begin = nullptr;
  const int32_t* key_end = nullptr;
  char* scratch = nullptr;  // prefill_scratch() bytes, 64-byte aligned
  // The rows themselves where they are not neighbours (row_begin is not used then); null: row_begin + i.
  const int64_t* row_map = nullptr;
  // Not null: only the entropies of the rows are computed, and stored here in order. v is not read, d_v is 0.
  float* row_entropy = nullptr;
};

// Rows of `heads` neighbouring KV heads of one sequence against keys [split_begin, split_end). The operands are those
// of the first head.
struct DecodeArgs {
  RowOperands rows;
  KeyOperand k, v;
  int64_t heads = 1;
  int64_t k_head_stride = 0, v_head_stride = 0;  // bytes
  int64_t row_begin = 0, row_count = 0;          // of each head, at most kDecodeRows
  const int32_t* key_begin = nullptr;
  const int32_t* key_end = nullptr;
  int64_t split_begin = 0, split_end = 0;
  float* partial = nullptr;  // partial_floats(d_v) per row: max, sum, entropy sum, unused, then O
  int64_t partial_head_stride = 0;
  char* scratch = nullptr;
};

struct CombineArgs {
  RowOperands rows;
  int64_t row_begin = 0, row_count = 0;
  const float* partials = nullptr;  // [splits][row_count][partial_floats(d_v)]
  int64_t splits = 0;
  char* scratch = nullptr;
};

inline constexpr int64_t kPartialHeader = 4;
ADAATTN_HD constexpr int64_t partial_floats(int64_t d_v) { return kPartialHeader + (d_v + 15) / 16 * 16; }

// Prefill computes with f32 products, except that a table with a prefill_bf16_name takes bf16 inputs as they are, and
// f32 ones rounded where fast_f32 allows it.
struct KernelTable {
  const char* prefill_name;
  const char* prefill_bf16_name;  // null: none
  void (*prefill)(const PrefillArgs& args);
  const char* decode_name;
  // Bytes that Q^T and O^T of an item's tiles may take, so that second-level cache has room for a block of K and V.
  int64_t tile_budget;
  // Bytes for items of up to tiles * kTileRows rows.
  size_t (*prefill_scratch)(int64_t d_qk, int64_t d_v, int64_t tiles);
  size_t (*decode_scratch)(int64_t d_qk, int64_t d_v);
  void (*decode)(const DecodeArgs& args);
  void (*combine)(const CombineArgs& args);
  // For the tests of the vector functions: 2^x for x <= 127 and tanh(x), over n values.
  void (*exp2)(const float* x, float* y, int64_t n);
  void (*tanh)(const float* x, float* y, int64_t n);
};

#if defined(__x86_64__)
extern const KernelTable kBaselineKernels, kAvx2Kernels, kAvx512Kernels, kAvx512Bf16Kernels, kAmxKernels;
#elif defined(__aarch64__)
extern const KernelTable kNeonKernels;
#endif

}  // namespace adaattn::cpu
