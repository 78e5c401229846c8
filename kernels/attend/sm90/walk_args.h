// What a mask-walking kernel is launched with.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "adaptive/int8_tables.h"
#include "adaptive/tables.h"
#include "attend/sm90/forward_args.h"

namespace adaattn::cuda::sm90 {

struct WalkArgs {
  ForwardArgs forward;  // v_map: V, or V in the basis
  CUtensorMap group_k_map, group_v_map;
  CUtensorMap basis_map;  // of a class of lower rank
  AdaptiveTables tables;
  const uint32_t* work;  // the class's items
  const uint32_t* work_count;
  bool far_field;
  float* far_share;  // [items][kWalkShares], null: not wanted
  // Of instances that probe; the maps and probe_base of those in a basis.
  CUtensorMap probe_q_map, probe_k_map;
  float log2_needle;
  uint64_t* mask;  // that of the tables
  int32_t* found;  // [items]
};

struct Int8WalkArgs {
  WalkArgs walk;
  Int8Tables tables;
  bool with_shift;  // as Int8Args
};

struct WalkInstance {
  ForwardConfig config;
  int shared_bytes;
  const void* kernel;
};
// walk_int8.cu
const WalkInstance& int8_walk();

}  // namespace adaattn::cuda::sm90
