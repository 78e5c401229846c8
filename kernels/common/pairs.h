// How many (query, visible key) pairs a sequence has, in closed form, and how many tiles they lie in.
#pragma once

#include "core/attn_params.h"

namespace adaattn::cuda {

// Sum over i in [0, n) of clamp(i + c, 0, limit).
ADAATTN_HD inline int64_t clamped_ramp_sum(int64_t n, int64_t c, int64_t limit) {
  const int64_t first = clamp_to(-c, 0, n);            // below: 0
  const int64_t full = clamp_to(limit - c, first, n);  // from here on: limit
  const int64_t count = full - first;
  return count * c + (first + full - 1) * count / 2 + (n - full) * limit;
}

// Of one head.
ADAATTN_HD inline int64_t visible_pairs(const AttnParams& p, const Sequence& s) {
  const int64_t ends =
      p.window_right < 0 ? s.len_q * s.len_k : clamped_ramp_sum(s.len_q, s.off + p.window_right + 1, s.len_k);
  const int64_t begins = p.window_left < 0 ? 0 : clamped_ramp_sum(s.len_q, s.off - p.window_left, s.len_k);
  return ends - begins;
}

// Key tiles of tile_k in which some query of [first, first + count) sees a key.
ADAATTN_HD inline int64_t visible_tiles(const AttnParams& p, const Sequence& s, int64_t first, int64_t count,
                                        int64_t tile_k) {
  const int64_t last = (first + count < s.len_q ? first + count : s.len_q) - 1;
  const int64_t begin = visible_keys(p, s, first).begin, end = visible_keys(p, s, last).end;
  return end > begin ? (end - 1) / tile_k - begin / tile_k + 1 : 0;
}

}  // namespace adaattn::cuda
