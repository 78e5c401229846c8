// What a call with E4M3 tensors may need beyond the features of attend/kernel.h.
#pragma once

#include "attend/kernel.h"

namespace adaattn::cuda {

inline constexpr uint32_t kMixed = 1u << 15;          // queries of 16 bits with keys and values in E4M3
inline constexpr uint32_t kDescaleBlocks = 1u << 16;  // factors for blocks of keys

// Of a kernel: the tiles that the last round leaves over may come in two parts of their keys.
inline constexpr uint32_t kTail = 1u << 17;
// A tile's warps, each with rows of its own, and the words of 16 bytes that a lane of them hands over: 64 sums of O,
// and of two rows the shift and the sum of the weights.
inline constexpr int kTailWarps = 12, kTailWords = 17;
inline constexpr int64_t kMostTailTiles = 80;
// Of what one tile's two parts hand over.
inline constexpr int64_t kTailBytes = int64_t{2} * kTailWarps * kTailWords * 32 * 16;

}  // namespace adaattn::cuda
