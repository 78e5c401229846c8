// What each mass level would keep of one query block's key tiles, and the mask of the tiles at the chosen one.
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "decide/fixed_math.h"
#include "decide/tile_mass.h"

namespace adaattn::decide {

struct TileLevels {
  TileRow row;         // empty: no query of the block sees a key
  bool usable = true;  // false: an estimate was not finite, there is nothing to go by
  float log2_max = 0;  // of the estimates
  float entropy = 0;   // of the masses, keys of a tile counted as equal; 1 = uniform over the visible keys
  uint32_t threshold[kLevels] = {};  // integer mass from which on a tile is kept
  uint32_t kept[kLevels] = {};       // tiles
  uint32_t dropped[kLevels] = {};    // mass of the others, in units of 2^-16
};

// A tile that holds this share of its query tile's mass, in units of 2^-24, may be kept at every level: the least
// integer mass that does, more than any tile's for share 0.
ADAATTN_HD inline uint32_t share_threshold(uint64_t total, uint32_t share) {
  if (share == 0) return 1u << 23;
  const uint64_t x = (total * share + ((1u << 24) - 1)) >> 24;
  return x < (1u << 23) ? static_cast<uint32_t>(x) : 1u << 23;
}

// Entropy of the masses of `tiles` tiles that add up to `total`, the keys of a tile counted as equal, over that of
// `visible` equal keys.
ADAATTN_HD inline float entropy_of_masses(const uint32_t* mass, int64_t tiles, uint64_t total, float visible) {
  const float inverse = 1.0f / static_cast<float>(total);
  float entropy = 7.0f;  // log2 of the keys of a tile
  for (int64_t b = 0; b < tiles; ++b) {
    if (mass[b] == 0) continue;
    const float share = static_cast<float>(mass[b]) * inverse;
    entropy = fixed_fma(-share, fixed_log2(share), entropy);
  }
  const float uniform = visible > 1.0f ? fixed_log2(visible) : 0.0f;
  return uniform > 0.0f ? (entropy < uniform ? entropy / uniform : 1.0f) : 0.0f;
}

// estimate: log2 of the mass of each tile of levels->row, first to last, any common offset. visible: mean number of
// keys that a row of the block sees. mass: scratch for one integer per tile. keep_share: of share_threshold(). Levels
// under first_level stay 0.
ADAATTN_HD inline void measure_levels(const float* estimate, float visible, uint32_t keep_share, uint32_t* mass,
                                      TileLevels* levels, int first_level = 0) {
  const TileRow row = levels->row;
  const int64_t tiles = row.end - row.begin;
  if (tiles <= 0) return;
  float top = estimate[0];
  bool finite = true;
  for (int64_t b = 0; b < tiles; ++b) {
    const uint32_t exponent = bits_of(estimate[b]) & 0x7f800000u;
    finite = finite && exponent != 0x7f800000u;
    top = estimate[b] > top ? estimate[b] : top;
  }
  levels->usable = finite;
  levels->log2_max = top;
  if (!finite) return;
  uint64_t total = 0;
  for (int64_t b = 0; b < tiles; ++b) {
    mass[b] = integer_mass(estimate[b], top);
    total += mass[b];
  }
  levels->entropy = entropy_of_masses(mass, tiles, total, visible);
  const uint32_t highest = share_threshold(total, keep_share);
  uint32_t covering = (1u << 23) - 1;
  for (int level = first_level; level < kLevels; ++level) {
    covering = mass_threshold(mass, tiles, total, level, covering);
    const uint32_t x = covering < highest ? covering : highest;
    uint32_t kept = 0;
    uint64_t dropped = 0;
    for (int64_t b = 0; b < tiles; ++b) {
      const bool keep = mass[b] >= x || is_forced(row, static_cast<int32_t>(row.begin + b));
      kept += keep ? 1 : 0;
      dropped += keep ? 0 : mass[b];
    }
    levels->threshold[level] = x;
    levels->kept[level] = kept;
    levels->dropped[level] = static_cast<uint32_t>((dropped << 16) / total);
  }
}

ADAATTN_HD inline bool keeps(const TileLevels& levels, int level, int32_t tile, float estimate) {
  return is_forced(levels.row, tile) || integer_mass(estimate, levels.log2_max) >= levels.threshold[level];
}

}  // namespace adaattn::decide
