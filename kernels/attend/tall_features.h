// Features of Hopper kernels beyond those of attend/kernel.h.
#pragma once

#include "attend/kernel.h"

namespace adaattn::cuda {

// Tiles of 192 rows, in small blocks: asked for by the selector alone.
inline constexpr uint32_t kTall = 1u << 18;
// No call asks for it: tiles are counted from the end, and the shortest ones of the last heads drawn after all others.
inline constexpr uint32_t kFromEnd = 1u << 19;

}  // namespace adaattn::cuda
