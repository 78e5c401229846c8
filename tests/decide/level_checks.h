// What every rule for tiles owes its table of levels.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "decide/tile_levels.h"

namespace adaattn::decide {

// expected(level, tile): whether a tile is to be kept; found(level, tile): whether it is. Counts and dropped shares of
// `levels` must be theirs.
template <typename Expected, typename Found>
void expect_levels(const TileLevels& levels, const std::vector<uint32_t>& mass, const Expected& expected,
                   const Found& found) {
  const int tiles = static_cast<int>(mass.size());
  uint64_t total = 0;
  for (const uint32_t m : mass) total += m;
  for (int level = 0; level < kLevels; ++level) {
    uint32_t kept = 0;
    uint64_t dropped = 0;
    for (int t = 0; t < tiles; ++t) {
      const bool keep = expected(level, t);
      EXPECT_EQ(found(level, t), keep) << "tile " << t << " of " << tiles << ", level " << level;
      kept += keep;
      dropped += keep ? 0 : mass[static_cast<size_t>(t)];
    }
    EXPECT_EQ(levels.kept[level], kept);
    EXPECT_EQ(levels.dropped[level], (dropped << 16) / total);
  }
  EXPECT_EQ(levels.kept[kDenseLevel], static_cast<uint32_t>(tiles));
}

}  // namespace adaattn::decide
