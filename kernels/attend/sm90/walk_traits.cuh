// Compile-time shape of a mask-walking kernel, and what its producer tells its consumers.
#pragma once

#include "attend/sm90/forward_traits.cuh"
#include "attend/sm90/walk_args.h"

namespace adaattn::cuda::sm90 {

constexpr int kWalkDim = 128;                                 // of queries, keys and output
constexpr int kFarTiles = 128 / (decide::kTileK / kFarKeys);  // key tiles behind one block of 128 centroids
static_assert(kFarTiles == 128, "a block of centroids is two mask words");

// kRank: columns of V, kWalkDim or fewer of V in its basis. kWithRemainder: rows get AdaptiveTables::remainder.
template <int kRank, bool kWithRemainder = false>
struct WalkPolicy {
  static constexpr bool kRemainder = kWithRemainder;
  static constexpr ForwardConfig kConfig = {
      .d_qk = kWalkDim, .d_v = kRank, .tile_n = 128, .masked = true, .dynamic = true, .ordered = false, .quick = true};
};

struct WalkTile {
  Tile tile;
  int item = 0;  // of the work list
  int kept = 0;  // key tiles computed exactly
  // Key tiles [begin, end) are visible, those of [full_begin, full_end) to every row.
  int begin = 0, end = 0, full_begin = 0, full_end = 0;
};

// A block of centroids that is on its way.
struct FarBlock {
  uint64_t skipped[2] = {0, 0};  // bit i: the centroid of the block's i-th key tile counts
  int last = 0;
};

template <typename T, class Policy>
struct WalkTraits : ForwardTraits<T, Policy> {
  using Base = ForwardTraits<T, Policy>;
  static constexpr bool kLowRank = Base::kDv < kWalkDim;
  static constexpr bool kRemainder = Policy::kRemainder;
  static constexpr bool kStagedOut = Base::kStagedOut && !kLowRank;
  static constexpr int kBasisBytes = kLowRank ? kWalkDim * Base::kDv * 2 : 16;

  struct Shared : Base::Shared {
    alignas(1024) uint8_t q_squared[Base::kGroups][Base::kQBytes];
    alignas(1024) uint8_t basis[kBasisBytes];
    float2 far_rows[Base::kGroups][kGroupRows];  // maximum and sum of the weights of the far field
    int item[Base::kGroups][kWarpgroup / 32];    // of the work list, which each warp has in work
    alignas(8) uint64_t basis_full, basis_empty;
    WalkTile walk[2];
    FarBlock far[kStages];
  };
  static_assert(Base::kN == decide::kTileK && Base::kM == decide::kTileQ && kStages == 2);
  static_assert(sizeof(Shared) <= 232448, "shared memory of a Hopper SM");
};

}  // namespace adaattn::cuda::sm90
