#include <algorithm>
#include <numeric>
#include <sstream>

#include "support/cases.h"

namespace adaattn::test {
namespace {

// Lengths around the sizes of tiles and vectors, and anything between.
int64_t random_length(Random& random, int64_t limit) {
  const int64_t edges[] = {0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 191, 192, 193};
  const int64_t n = random.chance(0.3) ? random.pick(edges) : random.between(std::min<int64_t>(1, limit), limit);
  return std::min(n, limit);
}

int64_t random_head_dim(Random& random) {
  return random.chance(0.6) ? random.pick({32, 64, 80, 96, 128, 192, 256}) : random.between(1, 150);
}

}  // namespace

AttentionCase random_case(Random& random) {
  AttentionCase c;
  c.name = "Random";
  c.batch = random.between(1, 3);
  c.heads_kv = random.between(1, 3);
  c.heads_q = c.heads_kv * random.pick({1, 1, 2, 3, 4, 8});
  c.d_qk = random_head_dim(random);
  if (random.chance(0.25)) c.d_v = random_head_dim(random);
  const int64_t limit_q = random.chance(0.4) ? 8 : 200, limit_k = 300;
  c.seqlen_q = random_length(random, limit_q);
  c.seqlen_k = random_length(random, limit_k);

  const auto lengths = [&](int64_t count, int64_t limit) {
    std::vector<int32_t> list;
    for (int64_t i = 0; i < count; ++i) list.push_back(static_cast<int32_t>(random_length(random, limit)));
    return list;
  };
  switch (random.between(0, 5)) {
    case 0:
      c.layout_q = c.layout_kv = ADAATTN_LAYOUT_BHSD;
      break;
    case 1:
      c.layout_q = c.layout_kv = ADAATTN_LAYOUT_THD;
      c.lens_q = lengths(c.batch, limit_q);
      c.lens_k = lengths(c.batch, limit_k);
      if (random.chance(0.3)) c.slack_tokens = random.between(1, 5);
      break;
    case 2:
    case 3:
      c.layout_kv = ADAATTN_LAYOUT_PAGED;
      c.page_size = random.pick({1, 3, 16, 17, 32, 64, 128, 256});
      if (random.chance(0.3)) {
        c.layout_q = ADAATTN_LAYOUT_THD;
        c.lens_q = lengths(c.batch, limit_q);
      }
      c.used_k = lengths(c.batch, c.seqlen_k);
      break;
    default:
      break;
  }
  if (c.used_k.empty() && random.chance(0.2)) {
    for (int64_t b = 0; b < c.batch; ++b)
      c.used_k.push_back(static_cast<int32_t>(random.between(0, c.lens_k.empty() ? c.seqlen_k : c.lens_k[b])));
  }

  c.mask = random.pick({ADAATTN_MASK_NONE, ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT, ADAATTN_MASK_CAUSAL_TOP_LEFT});
  if (random.chance(0.25)) c.window_left = random_length(random, 200);
  if (random.chance(0.15)) c.window_right = random_length(random, 200);
  if (random.chance(0.2)) c.scale = 0.05 + 0.3 * random.uniform();
  if (random.chance(0.2)) c.softcap = 1 + 20 * random.uniform();
  if (random.chance(0.2)) {
    c.flags |= ADAATTN_FLAG_ALIBI;
    c.alibi_per_batch = random.chance(0.5);
  }
  if (random.chance(0.2)) c.flags |= ADAATTN_FLAG_SINK;
  if (random.chance(0.3))
    c.bias =
        random.pick({Bias::kFull, Bias::kPerHead, Bias::kPerKey, Bias::kPerQuery, Bias::kKeyMajor, Bias::kPadding});
  if (random.chance(0.3)) c.storage = random.pick({Storage::kPadded, Storage::kHeadsFirst});
  return c;
}

std::string describe(const AttentionCase& c) {
  std::ostringstream out;
  const auto list = [&](const char* name, const std::vector<int32_t>& values) {
    if (values.empty()) return;
    out << ' ' << name << '[';
    for (size_t i = 0; i < values.size(); ++i) out << (i ? "," : "") << values[i];
    out << ']';
  };
  const char* layouts[] = {"?", "BSHD", "BHSD", "THD", "PAGED"};
  const char* masks[] = {"full", "causal-bottom-right", "causal-top-left"};
  out << c.name << ": b" << c.batch << " h" << c.heads_q << '/' << c.heads_kv << " q" << c.seqlen_q << " k"
      << c.seqlen_k << " d" << c.d_qk << '/' << (c.d_v ? c.d_v : c.d_qk) << ' ' << layouts[c.layout_q] << '/'
      << layouts[c.layout_kv] << ' ' << masks[c.mask] << " window " << c.window_left << ',' << c.window_right;
  list("lens_q", c.lens_q);
  list("lens_k", c.lens_k);
  list("used_k", c.used_k);
  if (c.page_size) out << " page_size " << c.page_size;
  if (c.slack_tokens) out << " slack " << c.slack_tokens;
  if (c.scale != 0) out << " scale " << c.scale;
  if (c.softcap != 0) out << " softcap " << c.softcap;
  if (c.flags & ADAATTN_FLAG_ALIBI) out << (c.alibi_per_batch ? " alibi-per-batch" : " alibi");
  if (c.flags & ADAATTN_FLAG_SINK) out << " sinks";
  if (c.bias != Bias::kNone) out << " bias" << static_cast<int>(c.bias);
  if (c.storage != Storage::kContiguous) out << " storage" << static_cast<int>(c.storage);
  return out.str();
}

}  // namespace adaattn::test
