// The table of attention problems that tests and benches share. A case says what is computed; dtypes, devices and
// instruction sets are crossed with it by the caller.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "adaattn/adaattn.h"
#include "support/random.h"

namespace adaattn::test {

enum class Storage {
  kContiguous,
  kPadded,           // every row followed by padding, the first element 1 element past an aligned address
  kFused,            // q, k and v are slices of one [.., heads_q + 2 * heads_kv, head_dim] tensor
  kHeadsFirst,       // memory ordered [head, batch, token, dim] whatever the layout says
  kBroadcastBatch,   // stride 0 over the batch of k and v
  kBroadcastHeads,   // stride 0 over the heads of k and v
  kBroadcastTokens,  // stride 0 over the tokens of k and v: every key is the same
};

enum class Bias {
  kNone,
  kFull,      // [batch, heads, q, k]
  kPerHead,   // [1, heads, q, k]
  kPerKey,    // [batch, 1, 1, k]
  kPerQuery,  // [1, 1, q, 1]
  kKeyMajor,  // [batch, heads, q, k], queries fastest in memory
  kPadding,   // [batch, 1, 1, k] of 0 and -inf: a mask in additive form
};

struct AttentionCase {
  std::string name;
  int64_t batch = 1, heads_q = 1, heads_kv = 1;
  int64_t seqlen_q = 1, seqlen_k = 1;  // THD: ignored, see lens_*; PAGED: seqlen_k bounds used_k
  int64_t d_qk = 64, d_v = 0;          // d_v 0: as d_qk
  adaattn_layout_t layout_q = ADAATTN_LAYOUT_BSHD, layout_kv = ADAATTN_LAYOUT_BSHD;
  int64_t page_size = 0;
  adaattn_mask_t mask = ADAATTN_MASK_NONE;
  int64_t window_left = -1, window_right = -1;
  double scale = 0, softcap = 0;
  uint32_t flags = 0;  // ADAATTN_FLAG_ALIBI | ADAATTN_FLAG_SINK; BIAS follows from bias
  Bias bias = Bias::kNone;
  bool alibi_per_batch = false;
  std::vector<int32_t> lens_q = {}, lens_k = {};  // THD: lengths of the packed sequences; batch is their number
  std::vector<int32_t> used_k = {};               // seqused_k, absent if empty
  int64_t slack_tokens = 0;                       // THD: tokens after the last sequence
  Storage storage = Storage::kContiguous;
  double input_scale = 1;  // of q and k
  bool reduced = false;    // also in the small set for sanitizers and emulators, and crossed with mixed dtypes
};

const std::vector<AttentionCase>& attention_cases();

// A case drawn from everything the API offers, small enough for the oracle.
AttentionCase random_case(Random& random);

// "b2 h4/2 q128 k128 d64 BSHD causal ..." for failure messages.
std::string describe(const AttentionCase& c);

struct Dtypes {
  const char* name;
  adaattn_dtype_t q, kv, o;
  int64_t descale_block = 0;  // E4M3
};

// One dtype throughout: f32, f16, bf16.
const std::vector<Dtypes>& uniform_dtypes();
// Narrower or wider keys and outputs.
const std::vector<Dtypes>& mixed_dtypes();
// E4M3 keys and values, queries in E4M3 or wider, one descale factor per head or per block of keys.
const std::vector<Dtypes>& e4m3_dtypes();
// Of these, what no kernel of E4M3 products takes: a CUDA device widens the keys and values.
const std::vector<Dtypes>& e4m3_cache_dtypes();

// Descriptor whose maxima are exactly the case's own sizes.
adaattn_attn_desc_t make_desc(const AttentionCase& c, const Dtypes& dtypes, uint32_t outputs = ADAATTN_OUTPUT_ALL);

}  // namespace adaattn::test
