// Finer cells than those of cells.h, which keep tiles beside them: means of 16 rows of Q and of 8 keys in 8 bits. The
// dot products are integers and the rest is fixed arithmetic, so the same tables give the same bits on the host.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/host_device.h"
#include "decide/cells.h"
#include "decide/fixed_math.h"

namespace adaattn::decide {

constexpr int kNeedleKeys = 8;   // keys behind one mean
constexpr int kNeedleRows = 16;  // rows of Q behind one mean
constexpr int kNeedlesOfCell = kCell / kNeedleKeys;
constexpr int kNeedleRowsOfTile = kTileQ / kNeedleRows;

// A needle's score, log2 of its weight up to a constant of the row, is dot * query_scale * key_scale. In units of the
// row's scale, the one from which on it holds 2^log2_share of the row's mass, which is taken for that of the row's
// block of cells: a cell of a score s has the integer mass 2^(s - top + 22) there, cells.inverse is 1 / the sum of
// those, and a needle of that score has a quarter of the cell's keys.
ADAATTN_HD inline float needle_limit(const CellRow& cells, float query_scale, float log2_share) {
  static_assert(kNeedlesOfCell == 4);
  return query_scale > 0 ? (cells.top - 20.0f - fixed_log2(cells.inverse) + log2_share) / query_scale : INFINITY;
}

// What a needle's score has above the limit; it is one unless this has a sign. dot: of 128 products of bytes.
ADAATTN_HD inline float needle_margin(float dot, float key_scale, float limit) {
  return fixed_fma(dot, key_scale, -limit);
}
ADAATTN_HD inline bool is_needle(int32_t dot, float key_scale, float limit) {
  return bits_of(needle_margin(float_of_integer(dot), key_scale, limit)) >> 31 == 0;
}

}  // namespace adaattn::decide
