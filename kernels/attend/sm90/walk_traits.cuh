// Compile-time shape of a mask-walking kernel, and what its producer tells its consumers.
#pragma once

#include <type_traits>

#include "attend/sm90/forward_traits.cuh"
#include "attend/sm90/walk_args.h"

namespace adaattn::cuda::sm90 {

constexpr int kWalkDim = 128;                                 // of queries, keys and output
constexpr int kFarTiles = 128 / (decide::kTileK / kFarKeys);  // key tiles behind one block of 128 centroids
static_assert(kFarTiles == 128, "a block of centroids is two mask words");
constexpr int kListWords = 16;  // of a query tile's mask, in shared memory; those of longer ones stay where they are

// What the key tiles that are not kept add to a row: nothing, AdaptiveTables::remainder, or their centroids where
// WalkArgs::far_field says so.
enum class LeftOut { kNothing, kRemainder, kCentroids };

// Key tiles that are swept before those found among them are computed.
constexpr int kSweepTiles = 64;

// kRank: columns of V, kWalkDim or fewer of V in its basis. The square of Q for the centroids takes the room of a third
// buffer of K. kProbeColumns: tiles that are not kept are searched for single heavy keys, by so many
// columns of Q and K in a basis, or kWalkDim by Q and K themselves; 0: they are not.
template <int kRank, LeftOut kTheLeftOut, int kTheProbeColumns = 0>
struct WalkPolicy {
  static constexpr LeftOut kLeftOut = kTheLeftOut;
  static constexpr int kProbeColumns = kTheProbeColumns;
  static constexpr ForwardConfig kConfig = {.d_qk = kWalkDim,
                                            .d_v = kRank,
                                            .tile_n = 128,
                                            .masked = true,
                                            .dynamic = true,
                                            .ordered = false,
                                            .k_stages = kTheLeftOut == LeftOut::kCentroids ? 2 : 3,
                                            .quick = true};
};

// Consumers read the first words four at a time.
struct alignas(16) WalkTile {
  int m_block = -1;  // -1: no more work
  int head = 0, batch = 0;
  int kept = 0;  // key tiles computed exactly
  // Key tiles [begin, end) are visible, those of [full_begin, full_end) to every row.
  int begin = 0, end = 0, full_begin = 0, full_end = 0;
  int item = 0;  // of the work list
};

// A block of centroids that is on its way.
struct alignas(16) FarBlock {
  uint64_t skipped[2] = {0, 0};  // bit i: the centroid of the block's i-th key tile counts
  int last = 0;
};

template <typename T, class Policy>
struct WalkTraits : ForwardTraits<T, Policy> {
  using Base = ForwardTraits<T, Policy>;
  static constexpr bool kLowRank = Base::kDv < kWalkDim;
  static constexpr bool kRemainder = Policy::kLeftOut == LeftOut::kRemainder;
  static constexpr bool kFar = Policy::kLeftOut == LeftOut::kCentroids;
  static constexpr int kProbeColumns = Policy::kProbeColumns;
  static constexpr bool kProbe = kProbeColumns > 0, kLowProbe = kProbe && kProbeColumns < kWalkDim;
  static constexpr int kProbeWidth = kLowProbe ? 2 * kProbeColumns : 128;  // bytes, a swizzle's
  // Swept tiles of a basis share a buffer of K: as many bytes are on their way as with K itself.
  static constexpr int kSweptBytes = kLowProbe ? Base::kN * kProbeWidth : Base::kKBytes;
  static constexpr int kSweptTogether = Base::kKBytes / kSweptBytes;
  static constexpr bool kStagedOut = Base::kStagedOut && !kLowRank;
  static constexpr int kMeanBytes = 2 * kWalkDim * 2;
  static constexpr int kBasisBytes = kWalkDim * Base::kDv * 2;

  struct Basis {
    alignas(1024) uint8_t basis[kBasisBytes];
  };
  struct SquaredQ {
    alignas(1024) uint8_t q_squared[Base::kGroups][Base::kQBytes];
  };
  struct Far {
    float2 far_rows[Base::kGroups][kGroupRows];  // maximum and sum of the weights of the far field
    FarBlock far[kStages];
  };
  struct Remainder {
    // The product with it reads 96 bytes beyond, into columns that nobody looks at.
    alignas(16) uint8_t mean_k[Base::kGroups][kMeanBytes];
    float remainder[kRemainderWidth];
    float mean_scores[Base::kGroups][kGroupRows];  // of the rows with K's mean
    alignas(8) uint64_t remainder_full, remainder_empty;
  };
  struct Probe {
    // Bits of the tiles found in the sweep in work, and zeros for the next; found_full: every warp has swept.
    unsigned long long found[2];
    alignas(8) uint64_t found_full;
    int swept[kSweepTiles];  // key tiles of the sweep, the producer's own
  };
  // Bases of one type each: an empty one may stand once only.
  struct NoBasis {};
  struct NoSquaredQ {};
  struct NoFar {};
  struct NoRemainder {};
  struct NoProbe {};

  struct Shared : Base::Shared,
                  std::conditional_t<kLowRank, Basis, NoBasis>,
                  std::conditional_t<kFar, SquaredQ, NoSquaredQ>,
                  std::conditional_t<kFar, Far, NoFar>,
                  std::conditional_t<kRemainder, Remainder, NoRemainder>,
                  std::conditional_t<kProbe, Probe, NoProbe> {
    int item[Base::kGroups][kWarpgroup / 32];  // of the work list, which each warp has in work
    WalkTile walk[2];
    uint64_t mask[2][kListWords];  // first words of the tiles in walk
    alignas(8) uint64_t basis_full, basis_empty;
    uint64_t draw;  // the producer is about to load the last key tile of the one in work
  };
  static_assert(Base::kN == decide::kTileK && Base::kM == decide::kTileQ && Base::kVStages == kStages);
  static_assert(!kFar || Base::kKStages == kStages, "a block of centroids takes two buffers of K");
  static_assert(!kProbe || kFar, "what is left after a probe may enter as centroids");
  static_assert(!kLowProbe || kProbeColumns == 32 || kProbeColumns == 64, "one swizzle wide");
  static_assert(sizeof(Shared) <= 232448, "shared memory of a Hopper SM");
};

}  // namespace adaattn::cuda::sm90
