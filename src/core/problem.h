// A validated, normalised attention descriptor: defaults filled in, maxima known, no C struct versions left.
#pragma once

#include <cstdint>

#include "core/attn_params.h"
#include "decide/policy.h"

namespace adaattn {

enum class Layout : int32_t { kBSHD = 1, kBHSD = 2, kTHD = 3, kPaged = 4 };  // = ADAATTN_LAYOUT_*

struct Problem {
  int64_t max_batch = 0, max_seqlen_q = 0, max_seqlen_k = 0, max_total_q = 0;
  int64_t heads_q = 0, heads_kv = 0, d_qk = 0, d_v = 0;
  Dtype dtype_q = Dtype::kNone, dtype_kv = Dtype::kNone, dtype_o = Dtype::kNone;
  Layout layout_q = Layout::kBSHD, layout_kv = Layout::kBSHD;
  int64_t page_size = 0;
  int64_t window_left = -1, window_right = -1;  // causal folded in, as in AttnParams
  bool off_top_left = false;
  bool deterministic = false;
  bool fast_f32 = false;
  float scale = 1, softcap = 0;
  bool alibi = false, sink = false, bias = false;
  bool want_lse = false, want_entropy = false;
  int64_t descale_block = 0;  // of E4M3 k and v; 0: one factor per head
  decide::Options adaptive;   // policy kExact: nothing below it is used
  bool operator==(const Problem&) const = default;
};

}  // namespace adaattn
