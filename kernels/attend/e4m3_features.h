// What a call with E4M3 tensors may need beyond the features of attend/kernel.h.
#pragma once

#include "attend/kernel.h"

namespace adaattn::cuda {

inline constexpr uint32_t kMixed = 1u << 15;          // queries of 16 bits with keys and values in E4M3
inline constexpr uint32_t kDescaleBlocks = 1u << 16;  // factors for blocks of keys

// Of a kernel: the tiles that the last round leaves over may come in two parts of their keys.
inline constexpr uint32_t kTail = 1u << 17;
// A warp of rows has a bit of a launch's arrivals.
inline constexpr int64_t kMostTailTiles = 80;
// Of what one tile's parts hand over: two times 192 rows of 128 sums, a shift and a sum of weights, the last two for
// each of the four lanes that share a row.
inline constexpr int64_t kTailBytes = int64_t{2} * 12 * 17 * 32 * 16;

}  // namespace adaattn::cuda
