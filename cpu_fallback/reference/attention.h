// The oracle behind the public structs: reads host tensors of any layout, stride and dtype, walks sequences and heads,
// and leaves the arithmetic to attend().
#pragma once

#include <cstdint>
#include <vector>

#include "adaattn/adaattn.h"
#include "head.h"

namespace adaattn::reference {

// Contiguous, in the order of the tensor's own dimensions. NaN where a call must leave the output alone (packed
// tokens that belong to no sequence).
struct AttentionResult {
  std::vector<double> o;                           // as io.o
  std::vector<double> lse, entropy;                // [batch, heads_q, seqlen_q] or [heads_q, total_q]
  std::vector<double> o_scale, score_scale, keys;  // per row, shaped as lse: see HeadResult
  uint64_t query_rows = 0, score_pairs = 0;        // what adaattn_plan_stats_t counts
};

AttentionResult attention(const adaattn_attn_desc_t& desc, const adaattn_io_t& io);

// [batch, heads_q]: mean over the rows of H, or of H / ln n with n the keys a row sees (0 where n < 2).
std::vector<double> head_entropy(const adaattn_attn_desc_t& desc, const adaattn_io_t& io, bool normalized);

// One row of merge: (o, lse) over the union of two disjoint sets of keys.
struct MergedRow {
  std::vector<double> o;
  double lse;
};
MergedRow merge_rows(const std::vector<double>& o_a, double lse_a, const std::vector<double>& o_b, double lse_b);

}  // namespace adaattn::reference
