// Compile-time shape of the kernels whose Q, K and V are e4m3: both products in 8 bits.
#pragma once

#include <type_traits>

#include "attend/sm90/e4m3_args.h"
#include "attend/sm90/e4m3_factors.cuh"
#include "attend/sm90/forward_traits.cuh"

namespace adaattn::cuda::sm90 {

// V arrives by rows and has to lie transposed; a slab is the 32 keys of one step of P V.
constexpr int kSlabKeys = 32;

template <class Policy>
struct E4m3Traits {
  static constexpr ForwardConfig kC = Policy::kConfig;
  static constexpr int kD = kC.d_qk, kDv = kC.d_v, kN = kC.tile_n, kGroups = kC.groups;
  static constexpr int kM = kGroupRows * kGroups;
  static constexpr int kThreads = kWarpgroup * (kGroups + 1);
  static constexpr int kWidth = kD, kChunk = kD, kChunks = 1;  // a line of Q or K is one swizzle width
  static constexpr int kQBytes = kGroupRows * kD, kKBytes = kN * kD, kVBytes = kN * kDv;
  // Eight lines of ones behind V's: P times them is the row sum of P as it was rounded. With factors for blocks of
  // keys the lines hold the digits of what takes V's factor out of P.
  static constexpr int kLines = kDv + 8, kSlabs = kN / kSlabKeys, kSlabBytes = kSlabKeys * kLines;
  static constexpr int kKStages = kC.k_stages, kRawStages = Policy::kRawStages, kVStages = Policy::kVStages;
  static constexpr int kOut = kDv / 2, kPart = kLines / 2;  // accumulators of a thread
  // Blocks after which row sums leave the accumulators, and O.
  static constexpr int kSums = Policy::kSums, kKeep = Policy::kKeep;
  static constexpr bool kBlockFactors = Policy::kBlockFactors;
  static constexpr bool kTail = !kC.dynamic;  // the last round's tiles may come in parts: e4m3_tail.cuh
  // The kernel is launched with 128 a thread: no more than 512 for the four warpgroups together, or setmaxnreg waits
  // for ever.
  static constexpr int kProducerRegisters = 32, kConsumerRegisters = 160;

  static constexpr int kNoMore = -1 << 30;

  static_assert(kGroups * 4 == kTailWarps && kOut / 4 + 1 <= kTailWords);
  static_assert(kGroups == 3 && kN % kSlabKeys == 0 && kN <= 256);
  static_assert(kD == 128 && (kDv == 64 || kDv == 128));

  struct Buffers {
    alignas(1024) uint8_t q[kGroups][kQBytes];
    alignas(1024) uint8_t k[kKStages][kKBytes];
    alignas(1024) uint8_t raw[kRawStages][kVBytes];
    alignas(1024) uint8_t v[kVStages][kSlabs * kSlabBytes];
    alignas(16) float4 kept[kGroups][kOut / 4][kWarpgroup];
    alignas(8) uint64_t q_full[kGroups], q_empty[kGroups];
    uint64_t k_full[kKStages], k_empty[kKStages], v_full[kVStages], v_empty[kVStages];
    uint64_t raw_full[kRawStages], raw_empty[kRawStages];
    uint64_t tile_full[2], tile_empty[2];
    Tile tile[2];
    int raw_valid[kRawStages];  // keys of the block that exist; kNoMore: there is none
  };
  struct BuffersAndFactors : Buffers {
    BlockFactors k_factors[kKStages];
    float raw_lead[kRawStages];  // BlockFactors::lead
    float largest_factor;        // FactorWalk's
  };
  using Shared = std::conditional_t<kBlockFactors, BuffersAndFactors, Buffers>;
  static_assert(sizeof(Shared) <= 232448, "shared memory of a Hopper SM");
};

}  // namespace adaattn::cuda::sm90
