// Which key tiles of one query block to keep for a given share of the attention's mass. Input: the estimated log2 of
// each tile's mass (any common offset). All sums and comparisons are on integers, so the
// result does not depend on the order of evaluation and is the same on every device.
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "decide/fixed_math.h"

namespace adaattn::decide {

constexpr int kTileQ = 128;  // query rows of a tile
constexpr int kTileK = 128;  // keys of a tile
constexpr int kGroupK = 32;  // keys behind one far-field centroid

// Mass levels a head may be computed at; the last one is dense.
constexpr int kLevels = 12;
constexpr int kDenseLevel = kLevels - 1;

// Level in units of 2^-16.
ADAATTN_HD inline uint32_t level_mass(int level) {
  constexpr uint32_t table[kLevels] = {45875, 52429, 55706, 58982, 60948, 62259,
                                       63570, 64225, 64553, 64881, 65208, 65536};
  return table[level];
}

// Lowest level whose mass is at least `mass` (0..1).
ADAATTN_HD inline int level_for_mass(double mass) {
  int level = 0;
  while (level < kDenseLevel && level_mass(level) + 0.5 < mass * 65536.0) ++level;
  return level;
}

// The mass of a tile as an integer: 2^22 for the heaviest of its row, 0 under 2^-22 of that.
ADAATTN_HD inline uint32_t integer_mass(float log2_mass, float log2_max) {
  return integer_of(fixed_exp2(log2_mass - log2_max + 22.0f) + 0.5f);
}

// Sum of the masses from x on. Compared as signed integers, which vector instructions offer everywhere.
template <typename Sum>
ADAATTN_HD inline Sum mass_from(const uint32_t* mass, int64_t tiles, uint32_t x) {
  Sum sum = 0;
  for (int64_t b = 0; b < tiles; ++b)
    sum += static_cast<int32_t>(mass[b]) >= static_cast<int32_t>(x) ? static_cast<Sum>(mass[b]) : Sum{0};
  return sum;
}

// The largest x such that the tiles of mass >= x together hold `level` of the total; 0 (keep all) at the dense level.
// Bitwise search: a pass for each bit, no sorting, the same for any order of the tiles. at_most: a bound on the result,
// as the threshold of any lower level is.
ADAATTN_HD inline uint32_t mass_threshold(const uint32_t* mass, int64_t tiles, uint64_t total, int level,
                                          uint32_t at_most = (1u << 23) - 1) {
  if (level >= kDenseLevel) return 0;
  const uint64_t wanted = (total * level_mass(level) + 65535u) >> 16;
  uint32_t x = 0;
  for (int bit = 22; bit >= 0; --bit) {
    const uint32_t candidate = x | (1u << bit);
    if (candidate > at_most) continue;
    const uint64_t sum =
        total <= UINT32_MAX ? mass_from<uint32_t>(mass, tiles, candidate) : mass_from<uint64_t>(mass, tiles, candidate);
    if (sum >= wanted) x = candidate;
  }
  return x;
}

// The key tiles that one query block sees, and those of them that are never skipped.
struct TileRow {
  int32_t begin = 0, end = 0;            // tiles holding any visible key
  int32_t full_begin = 0, full_end = 0;  // tiles every row sees whole: only these may be skipped
};

// Tiles that are computed exactly whatever their estimate: those not wholly visible to every row (the diagonal, window
// edges, the ragged last one), the neighbour before the diagonal, and the sequence's first (attention sinks).
ADAATTN_HD inline bool is_forced(const TileRow& row, int32_t tile) {
  return tile < row.full_begin || tile >= row.full_end || tile == row.full_end - 1 || tile == 0;
}

}  // namespace adaattn::decide
