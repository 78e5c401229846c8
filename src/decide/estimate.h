// The pooled second-order estimate of a tile's mass as the device computes it: the same bits for the same statistics on
// the host.
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "decide/fixed_math.h"
#include "decide/tile_mass.h"

namespace adaattn::decide {

// log2 of the mean weight of a key tile for a query tile, up to a constant of the query tile. Of queries in log2 units
// (mean m, variance s) and keys around their head's mean (mean k, variance v): query (m, m^2 + s, s), key
// (k, v ln(2)/2, k^2 ln(2)/2), each 3 head_dim wide.
ADAATTN_HD inline float tile_estimate(const float* query, const float* key, int width) {
  float sum = 0;
  for (int i = 0; i < width; ++i) sum = fixed_fma(query[i], key[i], sum);
  return sum;
}

// Added to the estimate of a tile of `rows` keys.
ADAATTN_HD inline float ragged_term(int64_t rows) {
  return rows == kTileK ? 0.0f : fixed_log2(static_cast<float>(rows) * (1.0f / kTileK));
}

}  // namespace adaattn::decide
