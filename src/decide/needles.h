// Finer cells than those of cells.h, which keep tiles beside them: means of 16 rows of Q and of 8 keys in 8 bits. The
// dot products are integers and the rest is fixed arithmetic, so the same tables give the same bits on the host.
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "decide/cells.h"
#include "decide/fixed_math.h"

namespace adaattn::decide {

constexpr int kNeedleKeys = 8;   // keys behind one mean
constexpr int kNeedleRows = 16;  // rows of Q behind one mean
constexpr int kNeedlesOfCell = kCell / kNeedleKeys;
constexpr int kNeedleRowsOfTile = kTileQ / kNeedleRows;

// log2 of a needle's weight, up to a constant of the row.
ADAATTN_HD inline float needle_score(int32_t dot, float query_scale, float key_scale) {
  return float_of_integer(dot) * (query_scale * key_scale);
}

// The score from which on a needle holds 2^log2_share of its row's mass, which is taken for that of the row's block of
// cells: a cell of a score s has the integer mass 2^(s - top + 22) there, cells.inverse is 1 / the sum of those, and a
// needle of that score has a quarter of the cell's keys.
ADAATTN_HD inline float needle_limit(const CellRow& cells, float log2_share) {
  static_assert(kNeedlesOfCell == 4);
  return cells.top - 20.0f - fixed_log2(cells.inverse) + log2_share;
}

}  // namespace adaattn::decide
