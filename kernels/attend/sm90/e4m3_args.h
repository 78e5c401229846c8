// What the e4m3 kernels are launched with.
#pragma once

#include "attend/e4m3_features.h"
#include "attend/sm90/forward_args.h"

namespace adaattn::cuda::sm90 {

struct E4m3Args : ForwardArgs {
  int32_t factor_blocks;  // blocks of keys that share a factor of K, and one of V
  // Tiles from this one on come in two parts. Without parts: more than there are.
  int32_t whole_tiles;
  float4* tail;        // [tiles in parts, kTailWarps, 2, kTailWords, 32]
  uint32_t* arrivals;  // a bit for each warp of these tiles; zero before and after a launch
};

}  // namespace adaattn::cuda::sm90
