// What the caller allows, with every default filled in: the adaptive descriptor as the back-ends see it.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace adaattn::decide {

enum class Policy : int32_t { kExact = 0, kQuality = 1, kBalanced = 2, kSpeed = 3, kCustom = 4 };  // = ADAATTN_POLICY_*
enum class Probe : int32_t { kOff = 0, kRank = 1, kFull = 2 };                                     // = ADAATTN_PROBE_*
enum class RankMode : int32_t { kOff = 0, kFixed = 1, kEnergy = 2 };                               // = ADAATTN_RANK_*
// Precisions in increasing order, so that a range is a pair of them.
enum class Precision : int32_t { kI8 = 1, kBF16 = 2, kF16 = 3, kF32 = 4 };  // = ADAATTN_PRECISION_*

struct Options {
  Policy policy = Policy::kExact;
  float tolerance = 0;  // tau, relative to the spread of V
  int min_level = 0;    // lowest mass level (tile_mass.h) a head may use
  bool tiles = false;   // key tiles may be skipped
  // Share of a block's mass in a cell, in units of 2^-24, from which on its tile is kept at every level; 0: none.
  uint32_t keep_peak = 0;
  // Share of a row's mass in a needle (needles.h) from which on its tile is kept beside the cells'; 0: none. Only where
  // keep_peak is set.
  float needle_mass = 0;
  bool far_field = false;
  // Dropped tiles as one mean of V per block of rows, with so many times the weight that the cells estimate; 0: nothing
  // stands for them. Not beside the far field.
  float remainder = 0;
  Probe probe = Probe::kOff;
  int probe_rank = 32;
  float needle_share = 0.05f;
  RankMode rank_mode = RankMode::kOff;
  float rank_ratio = 1;          // cap on rank / head_dim_v
  float rank_threshold = 0.97f;  // share of V's energy that the basis keeps
  int min_rank = 32;
  Precision min_precision = Precision::kF32, max_precision = Precision::kF32;
  int verify_rows = 0;
  bool feedback = false;
  bool recompute = false;  // heads over the tolerance are recomputed dense
  bool freeze = false;     // decisions of the first call are kept
  uint64_t seed = 0;
  uint64_t max_workspace_bytes = 0;  // 0: no limit
  bool operator==(const Options&) const = default;
};

}  // namespace adaattn::decide
