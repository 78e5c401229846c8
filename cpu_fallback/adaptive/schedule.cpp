#include "cpu_fallback/adaptive/schedule.h"

#include <algorithm>

namespace adaattn::cpu {

AttendSchedule::AttendSchedule(const UnitShape& s, int64_t units) {
  // A chunk of one tile covers at least as many rows as a tile of one head, but for the last of each head.
  items_.reserve(static_cast<size_t>(units * s.group * (s.query_tiles + 1)));
  exact_.reserve(static_cast<size_t>(units * s.group));
}

const std::vector<AttendItem>& AttendSchedule::build(const std::vector<Unit>& units, int64_t count, const UnitShape& s,
                                                     int64_t lanes) {
  items_.clear();
  exact_.clear();
  int64_t exact_rows = 0;
  for (int32_t u = 0; u < count; ++u) {
    const Unit& unit = units[static_cast<size_t>(u)];
    const auto dense = [](const HeadState& head) { return head.choice.dense; };
    if (std::all_of(unit.heads, unit.heads + s.group, dense)) {
      exact_.push_back({u, kAllHeads, s.group, unit.seq.len_q * s.group});
    } else {
      for (int32_t g = 0; g < s.group; ++g) {
        if (dense(unit.heads[g])) exact_.push_back({u, g, 1, unit.seq.len_q});
      }
    }
  }
  for (const Rows& rows : exact_) exact_rows += rows.left;
  // Smaller chunks where there are few of them; results do not depend on it.
  int64_t tiles = s.exact_tiles;
  while (tiles > 1 && lanes > 1 && exact_rows < 4 * lanes * tiles * kTileRows) tiles = (tiles + 1) / 2;
  const int64_t chunk = tiles * kTileRows;

  // Heads that share keys go together unless that leaves lanes without work; results do not depend on it.
  const bool few = count * s.query_tiles * ((s.group + s.heads - 1) / s.heads) < 4 * lanes;
  const auto heads = static_cast<int32_t>(few ? 1 : s.heads);

  for (int64_t tile = s.query_tiles - 1; tile >= 0; --tile) {
    const int64_t first = tile * decide::kTileQ;
    for (Rows& rows : exact_) {
      while (rows.left > 0 && (rows.left - 1) / rows.group >= first) {
        const int64_t begin = (rows.left - 1) / chunk * chunk;
        items_.push_back({rows.unit, rows.member, 1, true, begin, rows.left - begin});
        rows.left = begin;
      }
    }
    for (int32_t g = 0; g < s.group; g += heads) {
      for (int32_t u = 0; u < count; ++u) {
        const Unit& unit = units[static_cast<size_t>(u)];
        const auto members = static_cast<int32_t>(std::min<int64_t>(heads, s.group - g));
        const auto dense = [](const HeadState& head) { return head.choice.dense; };
        if (first >= unit.seq.len_q || std::all_of(unit.heads + g, unit.heads + g + members, dense)) continue;
        items_.push_back({u, g, members, false, first, std::min<int64_t>(decide::kTileQ, unit.seq.len_q - first)});
      }
    }
  }
  return items_;
}

}  // namespace adaattn::cpu
