// Compile-time shape of the 8-bit forward kernels: S = Q K^T in int8, O = P V in e4m3.
#pragma once

#include "attend/sm90/forward_traits.cuh"
#include "attend/sm90/int8_args.h"

namespace adaattn::cuda::sm90 {

template <typename T_, class Policy>
struct Int8Traits {
  using T = T_;
  static constexpr ForwardConfig kC = Policy::kConfig;
  static constexpr int kD = kC.d_qk, kDv = kC.d_v, kN = kInt8TileK, kGroups = kC.groups;
  static constexpr int kM = kGroupRows * kGroups;
  static constexpr int kThreads = kWarpgroup * (kGroups + 1);
  static constexpr int kStages = 4;
  // Q arrives in 16 bits, in column chunks of one swizzle width.
  static constexpr int kWidth = 128, kChunk = kWidth / 2, kChunks = kD / kChunk;
  static constexpr int kQBytes = kGroupRows * kD * 2;
  static constexpr int kQ8Bytes = kGroupRows * kD, kKBytes = kN * kD, kVBytes = kDv * kN;
  // Eight lines of ones behind V's: P times them is the row sum of P as it was rounded.
  static constexpr int kOnesBytes = 8 * kN;
  static constexpr int kOut = kDv / 2, kPart = (kDv + 8) / 2;  // accumulators of a thread
  // A stage's scales are read by the lane that lets go of it, which sanitizers ask for, and handed on by shuffles.
  static constexpr bool kScalesOfLane = false;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

  static_assert(kC.tile_n == kN && kGroups == 2);
  static_assert((kD == 64 || kD == 128) && (kDv == 64 || kDv == 128));

  struct Shared {
    alignas(1024) uint8_t q[kGroups][kQBytes];
    alignas(1024) uint8_t q8[kGroups][kQ8Bytes];
    alignas(1024) uint8_t k[kStages][kKBytes];
    alignas(1024) uint8_t v[kStages][kVBytes + kOnesBytes];
    Int8Scales scales[kStages];
    // Of Q, times the scores' scale c log2(e); c log2(e) q . k_mean.
    float row_scale[kGroups][kGroupRows], row_shift[kGroups][kGroupRows];
    alignas(8) uint64_t q_full[kGroups], q_empty[kGroups];
    uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
    uint64_t tile_full[2], tile_empty[2];
    TileSlot tile[2];
  };
  static_assert(sizeof(Shared) <= 232448, "shared memory of a Hopper SM");
};

}  // namespace adaattn::cuda::sm90
