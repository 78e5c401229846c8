// Options under which tiles may be skipped and nothing else.
#pragma once

#include "decide/policy.h"

namespace adaattn::decide {

inline Options tile_options(float tolerance) {
  Options o;
  o.policy = Policy::kCustom;
  o.tiles = true;
  o.tolerance = tolerance;
  return o;
}

}  // namespace adaattn::decide
