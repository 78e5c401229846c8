#include "cpu_fallback/adaptive/schedule.h"

#include <algorithm>

namespace adaattn::cpu {
namespace {

bool is_dense(const HeadState& head) { return head.choice.dense; }

}  // namespace

AttendSchedule::AttendSchedule(const UnitShape& s, int64_t units, int64_t lanes)
    : queues_(static_cast<size_t>(units)), queue_of_lane_(static_cast<size_t>(lanes)) {
  // A chunk of one tile covers at least as many rows as a tile of one head, but for the last of each head. One more for
  // the check.
  items_.reserve(static_cast<size_t>(units * (s.group * (s.query_tiles + 1) + 1)));
  exact_.reserve(static_cast<size_t>(s.group));
}

int64_t AttendSchedule::build(const std::vector<Unit>& units, int64_t count, const UnitShape& s, int64_t lanes,
                              bool check) {
  items_.clear();
  int64_t exact_rows = 0;
  for (int64_t u = 0; u < count; ++u) {
    const Unit& unit = units[static_cast<size_t>(u)];
    exact_rows += unit.seq.len_q * std::count_if(unit.heads, unit.heads + s.group, is_dense);
  }
  // Smaller chunks where there are few of them; results do not depend on it.
  int64_t tiles = s.exact_tiles;
  while (tiles > 1 && lanes > 1 && exact_rows < 4 * lanes * tiles * kTileRows) tiles = (tiles + 1) / 2;

  // Heads that share keys go together unless that leaves lanes without work; results do not depend on it.
  const bool few = count * s.query_tiles * ((s.group + s.heads - 1) / s.heads) < 4 * lanes;
  const auto heads = static_cast<int32_t>(few ? 1 : s.heads);

  used_ = count;
  lanes_of_queue_ = std::max<int64_t>(1, lanes / count);
  for (int32_t u = 0; u < count; ++u) {
    Queue& queue = queues_[static_cast<size_t>(u)];
    queue.next.store(static_cast<int64_t>(items_.size()), std::memory_order_relaxed);
    add_unit(units[static_cast<size_t>(u)], u, s, tiles * kTileRows, heads, check);
    queue.end = static_cast<int64_t>(items_.size());
  }
  for (int64_t lane = 0; lane < lanes; ++lane)
    queue_of_lane_[static_cast<size_t>(lane)] = count >= lanes ? lane * count / lanes : lane % count;
  return static_cast<int64_t>(items_.size());
}

void AttendSchedule::add_unit(const Unit& unit, int32_t u, const UnitShape& s, int64_t chunk, int32_t heads,
                              bool check) {
  exact_.clear();
  if (std::all_of(unit.heads, unit.heads + s.group, is_dense)) {
    exact_.push_back({kAllHeads, s.group, unit.seq.len_q * s.group});
  } else {
    if (check) items_.push_back({.unit = u, .check = true});
    for (int32_t g = 0; g < s.group; ++g) {
      if (is_dense(unit.heads[g])) exact_.push_back({g, 1, unit.seq.len_q});
    }
  }
  for (int64_t tile = s.query_tiles - 1; tile >= 0; --tile) {
    const int64_t first = tile * decide::kTileQ;
    for (Rows& rows : exact_) {
      while (rows.left > 0 && (rows.left - 1) / rows.group >= first) {
        const int64_t begin = (rows.left - 1) / chunk * chunk;
        items_.push_back({u, rows.member, 1, true, false, begin, rows.left - begin});
        rows.left = begin;
      }
    }
    if (first >= unit.seq.len_q) continue;
    const int64_t count = std::min<int64_t>(decide::kTileQ, unit.seq.len_q - first);
    for (int32_t g = 0; g < s.group; g += heads) {
      const auto members = static_cast<int32_t>(std::min<int64_t>(heads, s.group - g));
      if (!std::all_of(unit.heads + g, unit.heads + g + members, is_dense))
        items_.push_back({u, g, members, false, false, first, count});
    }
  }
}

const AttendItem& AttendSchedule::take(int64_t lane, const AttendItem** next) {
  int64_t& mine = queue_of_lane_[static_cast<size_t>(lane)];
  while (true) {
    Queue& queue = queues_[static_cast<size_t>(mine)];
    const int64_t at = queue.next.fetch_add(1, std::memory_order_relaxed);
    if (at < queue.end) {
      const int64_t after = at + lanes_of_queue_;
      *next = after < queue.end ? &items_[static_cast<size_t>(after)] : nullptr;
      return items_[static_cast<size_t>(at)];
    }
    // Where most is left.
    int64_t most = 0;
    for (int64_t q = 0; q < used_; ++q) {
      const Queue& other = queues_[static_cast<size_t>(q)];
      const int64_t left = other.end - other.next.load(std::memory_order_relaxed);
      if (left <= most) continue;
      most = left;
      mine = q;
    }
  }
}

}  // namespace adaattn::cpu
