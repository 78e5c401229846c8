// What a call with E4M3 tensors may need beyond the features of attend/kernel.h.
#pragma once

#include "attend/kernel.h"

namespace adaattn::cuda {

inline constexpr uint32_t kMixed = 1u << 15;          // queries of 16 bits with keys and values in E4M3
inline constexpr uint32_t kDescaleBlocks = 1u << 16;  // factors for blocks of keys

}  // namespace adaattn::cuda
