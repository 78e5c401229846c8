// How a call is cut into items, and what memory that takes.
#pragma once

#include "core/problem.h"
#include "cpu_fallback/attend/kernels.h"

namespace adaattn::cpu {

inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Sequences that the decode kernel takes: few rows per KV head, or one query of a large group.
inline bool is_decode(int64_t seqlen_q, int64_t group) { return seqlen_q == 1 || seqlen_q * group <= kDecodeRows; }

// Rows of the longest decode chunk among sequences of at most seqlen_q queries.
inline int64_t decode_rows(int64_t seqlen_q, int64_t group) {
  const int64_t fitting = group > kDecodeRows ? group : kDecodeRows / group * group;
  const int64_t rows = seqlen_q * group < fitting ? seqlen_q * group : fitting;
  return rows < kDecodeRows ? rows : kDecodeRows;
}

struct WorkLayout {
  int64_t tiles = 1;           // of kTileRows rows in a prefill item, at most
  int64_t splits = 1;          // of the longest sequence
  int64_t lane_bytes = 0;      // scratch of one lane
  int64_t ranges_bytes = 0;    // its head: the visible keys of the rows
  int64_t unit_bytes = 0;      // a KV head's partial results over all splits, behind kUnitHeader bytes
  int64_t wave_sequences = 1;  // decoded at a time
  int64_t workspace_bytes = 0;
};

inline constexpr int64_t kUnitHeader = 64;

WorkLayout lay_out_work(const Problem& problem, const KernelTable& kernels, int64_t lanes);

}  // namespace adaattn::cpu
