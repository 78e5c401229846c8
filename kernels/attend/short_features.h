// Features of Hopper kernels for causal calls, beyond those of attend/kernel.h.
#pragma once

#include "attend/kernel.h"

namespace adaattn::cuda {

// Small blocks, for calls of few keys: asked for by the selector alone.
inline constexpr uint32_t kShort = 1u << 18;
// No call asks for it: tiles are counted from the end, and the shortest ones of the last heads drawn after all others.
inline constexpr uint32_t kFromEnd = 1u << 19;

}  // namespace adaattn::cuda
