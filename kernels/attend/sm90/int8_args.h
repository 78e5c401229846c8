// What an 8-bit kernel is launched with.
#pragma once

#include "adaptive/int8_tables.h"
#include "attend/sm90/forward_args.h"

namespace adaattn::cuda::sm90 {

struct Int8Args {
  ForwardArgs forward;  // k_map and v_map are not used
  Int8Tables tables;
  bool with_shift;  // LSE or sinks: what centring K took from every score of a row is added
};

}  // namespace adaattn::cuda::sm90
