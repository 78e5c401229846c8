// How a call is cut into items, and what memory that takes.
#pragma once

#include "core/problem.h"
#include "cpu_fallback/attend/kernels.h"

namespace adaattn::cpu {

struct WorkLayout {
  int64_t tiles = 1;         // of kTileRows rows in a prefill item, at most
  int64_t decode_rows = 0;   // rows of a decode unit, at most
  int64_t splits = 1;        // of the longest sequence
  int64_t lane_bytes = 0;    // scratch of one lane
  int64_t ranges_bytes = 0;  // its head: the visible keys of the rows
  int64_t unit_bytes = 0;    // partial results of a decode unit over all splits
  int64_t units = 0;         // decode units in flight
  int64_t workspace_bytes = 0;
};

// Rows of a sequence that the decode kernel takes: few rows, or one query of a large group.
inline bool is_decode(int64_t seqlen_q, int64_t group) { return seqlen_q == 1 || seqlen_q * group <= kDecodeRows; }

inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

WorkLayout lay_out_work(const Problem& problem, const KernelTable& kernels, int64_t lanes);

}  // namespace adaattn::cpu
