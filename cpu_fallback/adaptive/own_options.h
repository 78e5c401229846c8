#pragma once

#include "core/problem.h"

namespace adaattn::cpu {

// What a named policy means where products of bf16 run on tiles; other problems' options as they are.
Problem with_tile_options(const Problem& problem);

}  // namespace adaattn::cpu
