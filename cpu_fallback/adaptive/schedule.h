// The items of attend: tiles of approximated heads, and larger chunks of exact rows, whose keys are packed as they come
// and so should serve many rows. Neighbouring tiles of a unit keep much the same keys: a lane stays with its unit as
// long as that has items, so that they come from second-level cache.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "cpu_fallback/adaptive/unit.h"

namespace adaattn::cpu {

constexpr int32_t kAllHeads = -1;

struct AttendItem {
  int32_t unit = 0;
  int32_t member = 0;   // kAllHeads: exact rows of all heads of the unit, row r is query r / group of head r % group
  int32_t members = 1;  // heads from `member` on, the dense ones among them left out
  bool exact = false;
  bool check = false;  // the rows to compare with instead
  int64_t row_begin = 0, row_count = 0;
};

class AttendSchedule {
 public:
  AttendSchedule() = default;
  // Takes all memory: for `units` units of this shape and up to `lanes` lanes.
  AttendSchedule(const UnitShape& shape, int64_t units, int64_t lanes);

  // For the first `count` units as decide left them, the last queries first: under a causal mask they take longest.
  // check: each unit begins with an item of its own. Returns the number of items.
  int64_t build(const std::vector<Unit>& units, int64_t count, const UnitShape& shape, int64_t lanes, bool check);

  // An item that no lane has had yet, for a call that has one for each. next: what the lane will probably want then, or
  // null.
  const AttendItem& take(int64_t lane, const AttendItem** next);

 private:
  // Items [next, end) of one unit.
  struct alignas(64) Queue {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  void add_unit(const Unit& unit, int32_t u, const UnitShape& shape, int64_t chunk, int32_t heads, bool check);

  // Exact rows [0, left) of one head or of a whole unit.
  struct Rows {
    int32_t member;
    int64_t group, left;
  };
  std::vector<AttendItem> items_;
  std::vector<Rows> exact_;
  std::vector<Queue> queues_;  // [units]
  int64_t used_ = 0, lanes_of_queue_ = 1;
  std::vector<int64_t> queue_of_lane_;
};

}  // namespace adaattn::cpu
