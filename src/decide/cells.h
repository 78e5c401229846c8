// The share of a query block's mass in cells of 32 queries x 32 keys as the device estimates it: from block means of Q
// and of K less its mean, in 8 bits with a scale for each block. The dot products are integers and the rest is fixed
// arithmetic, so the same tables give the same bits on the host.
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "decide/fixed_math.h"
#include "decide/tile_levels.h"
#include "decide/tile_mass.h"

namespace adaattn::decide {

constexpr int kCell = 32;  // queries or keys behind one mean
constexpr int kCellsOfTile = kTileK / kCell;
static_assert(kTileQ == kTileK);

// log2 of a cell's weight, up to a constant of the query block. dot: of up to 256 products of bytes. keys: of the cell
// that exist.
ADAATTN_HD inline float cell_score(int32_t dot, float query_scale, float key_scale, int keys) {
  const float score = float_of_integer(dot) * (query_scale * key_scale);
  return keys == kCell ? score : score + fixed_log2(static_cast<float>(keys) * (1.0f / kCell));
}

// A row of cells: its largest score, and 1 / the sum of integer_mass(score, top) over it.
struct CellRow {
  float top = 0, inverse = 0;
};

// Shares of a row in units of 2^-20 (of the cells of a tile together) and 2^-24 (of one cell).
ADAATTN_HD inline uint32_t tile_share(uint32_t mass, float inverse) {
  return static_cast<uint32_t>(static_cast<float>(mass) * inverse * 1048576.0f + 0.5f);
}
ADAATTN_HD inline uint32_t cell_share(uint32_t mass, float inverse) {
  return static_cast<uint32_t>(static_cast<float>(mass) * inverse * 16777216.0f + 0.5f);
}

// What each mass level keeps of a query tile. mass: of each tile of levels->row, the sum of tile_share() over the query
// tile's blocks; peak: the largest cell_share(). A tile with a peak of keep_peak is kept at every level; 0: none is.
// Levels under first_level stay 0, and those from end_level on keep everything.
ADAATTN_HD inline void measure_cells(const uint32_t* mass, const uint32_t* peak, uint32_t keep_peak, float visible,
                                     TileLevels* levels, int first_level = 0, int end_level = kDenseLevel) {
  const TileRow row = levels->row;
  const int64_t tiles = row.end - row.begin;
  if (tiles <= 0) return;
  uint64_t total = 0;
  for (int64_t b = 0; b < tiles; ++b) total += mass[b];
  levels->entropy = entropy_of_masses(mass, tiles, total, visible);
  uint32_t x = (1u << 23) - 1;
  for (int level = first_level; level < kLevels; ++level) {
    x = level < end_level ? mass_threshold(mass, tiles, total, level, x) : 0;
    uint32_t kept = 0;
    uint64_t dropped = 0;
    for (int64_t b = 0; b < tiles; ++b) {
      const bool keep = mass[b] >= x || is_forced(row, static_cast<int32_t>(row.begin + b)) ||
                        (keep_peak != 0 && peak[b] >= keep_peak);
      kept += keep ? 1 : 0;
      dropped += keep ? 0 : mass[b];
    }
    levels->threshold[level] = x;
    levels->kept[level] = kept;
    levels->dropped[level] = static_cast<uint32_t>((dropped << 16) / total);
  }
}

ADAATTN_HD inline bool keeps_tile(const TileLevels& levels, int level, int32_t tile, uint32_t mass, uint32_t peak,
                                  uint32_t keep_peak) {
  return is_forced(levels.row, tile) || mass >= levels.threshold[level] || (keep_peak != 0 && peak >= keep_peak);
}

}  // namespace adaattn::decide
