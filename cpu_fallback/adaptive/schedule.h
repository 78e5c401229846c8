// The items of attend: tiles of approximated heads, and larger chunks of exact rows, whose keys are packed as they come
// and so should serve many rows.
#pragma once

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
  int64_t row_begin = 0, row_count = 0;
};

class AttendSchedule {
 public:
  AttendSchedule() = default;
  // Takes all memory: for `units` units of this shape.
  AttendSchedule(const UnitShape& shape, int64_t units);

  // For the first `count` units as decide left them, the last queries first: under a causal mask they take longest.
  const std::vector<AttendItem>& build(const std::vector<Unit>& units, int64_t count, const UnitShape& shape,
                                       int64_t lanes);

 private:
  // Exact rows [0, left) of one head or of a whole unit.
  struct Rows {
    int32_t unit, member;
    int64_t group, left;
  };
  std::vector<AttendItem> items_;
  std::vector<Rows> exact_;
};

}  // namespace adaattn::cpu
