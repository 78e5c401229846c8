// What each mass level would keep of one query block's key tiles.
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "decide/fixed_math.h"
#include "decide/tile_mass.h"

namespace adaattn::decide {

struct TileLevels {
  TileRow row;         // empty: no query of the block sees a key
  bool usable = true;  // false: an estimate was not finite, there is nothing to go by
  float log2_max = 0;
  float entropy = 0;  // of the masses, keys of a tile counted as equal; 1 = uniform over the visible keys
  uint32_t threshold[kLevels] = {};  // integer mass from which on a tile is kept
  uint32_t kept[kLevels] = {};       // tiles
  uint32_t dropped[kLevels] = {};    // mass of the others, in units of 2^-16
};

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

}  // namespace adaattn::decide
