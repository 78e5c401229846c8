// What the e4m3 kernels are launched with.
#pragma once

#include "attend/sm90/forward_args.h"

namespace adaattn::cuda::sm90 {

struct E4m3Args : ForwardArgs {
  int32_t factor_blocks;  // blocks of keys that share a factor of K, and one of V
};

}  // namespace adaattn::cuda::sm90
