// The rows that an adaptive plan checks, the same on every device.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace adaattn {

// `count` rows from `first` on, `step` apart: what a plan checks in its turn-th call. Multiples of the golden ratio
// fill a circle evenly, so that calls together see every row.
struct SpreadRows {
  int64_t first = 0, step = 1, count = 0;
};
ADAATTN_HD inline SpreadRows spread_rows(uint64_t turn, int64_t sample_rows, int64_t rows) {
  SpreadRows s;
  s.count = sample_rows < rows ? sample_rows : rows;
  if (s.count == 0) return s;
  s.step = rows / s.count;
  s.first = static_cast<int64_t>((turn * 0x9e3779b97f4a7c15u >> 32) * static_cast<uint64_t>(s.step) >> 32);
  return s;
}

}  // namespace adaattn
