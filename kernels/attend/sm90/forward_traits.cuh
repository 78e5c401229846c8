// Compile-time shape of a Hopper forward kernel: tiles, shared memory and register split.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attend/sm90/forward_args.h"

namespace adaattn::cuda::sm90 {

constexpr int kWarpgroup = 128;
constexpr int kGroupRows = 64;  // wgmma's M
constexpr int kStages = 2;      // of K and V unless a config says more

// Named barriers, one per consumer warpgroup from these numbers on; 0 is __syncthreads.
enum class NamedBarrier : int { kOrder = 1, kTailZeroed = 4, kQuantized = 7, kSquared = 10, kVote = 13 };

// Key blocks [n_min, n_max) of one query tile, and its sequence.
struct TileRange {
  int len_q, len_k, off, q_start, k_start;
  int n_min, n_max;
  __device__ __forceinline__ int blocks() const { return n_max - n_min; }
};

struct Tile {
  int m_block = -1;  // -1: no more work; counted from the end, the tile's last warpgroup of 64 rows
  int head = 0;
  int batch = 0;
  int split = 0;
  TileRange range;  // of those that the producer hands over
};
// Where it does: read by four words.
struct alignas(16) TileSlot : Tile {
  __device__ __forceinline__ void operator=(const Tile& tile) { Tile::operator=(tile); }
};

template <typename T_, class Policy>
struct ForwardTraits {
  using T = T_;
  static constexpr ForwardConfig kC = Policy::kConfig;
  static constexpr int kD = kC.d_qk, kDv = kC.d_v, kN = kC.tile_n, kGroups = kC.groups;
  static constexpr int kM = kGroupRows * kGroups;
  static constexpr int kKStages = kC.k_stages, kVStages = kC.v_stages;
  static constexpr int kThreads = kWarpgroup * (kGroups + 1);
  // Swizzle width in bytes, which is also the width of a column chunk.
  static constexpr int kWidth = kD % 64 == 0 ? 128 : 64, kWidthV = kDv % 64 == 0 ? 128 : 64;
  static constexpr int kChunk = kWidth / 2, kChunkV = kWidthV / 2;  // elements
  static constexpr int kChunks = kD / kChunk, kChunksV = kDv / kChunkV;
  static constexpr int kQBytes = kGroupRows * kD * 2;  // of one consumer warpgroup
  static constexpr int kKBytes = kN * kD * 2, kVBytes = kN * kDv * 2;
  // 65536 registers per SM: sum over warpgroups of 128 * registers.
  static constexpr int kProducerRegisters = kGroups == 1 ? 56 : kGroups == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kGroups == 1 ? 256 : kGroups == 2 ? 232 : 160;

  static_assert(kD % 32 == 0 && kD <= 256 && kDv % 32 == 0 && kDv <= 256, "head dimensions are multiples of 32");
  static_assert(kN % 16 == 0 && kN <= 256, "a key block is a whole number of 16-key steps");
  static_assert(kGroups >= 1 && kGroups <= 3, "the register file holds at most three consumer warpgroups");

  // O leaves through shared memory where there is room for it beside the stages.
  static constexpr int kOutBytes = 16 * kDv * 2;  // of one warp
  static constexpr int kRoom = 232448 - 1024 - kGroups * kQBytes - kKStages * kKBytes - kVStages * kVBytes;
  static constexpr bool kStagedOut = kGroups * 4 * kOutBytes <= kRoom;

  struct Shared {
    alignas(1024) uint8_t q[kGroups][kQBytes];
    alignas(1024) uint8_t k[kKStages][kKBytes];
    alignas(1024) uint8_t v[kVStages][kVBytes];
    alignas(1024) uint8_t out[kStagedOut ? kGroups : 1][kStagedOut ? 4 : 1][kStagedOut ? kOutBytes : 16];
    alignas(8) uint64_t q_full[kGroups], q_empty[kGroups];
    uint64_t k_full[kKStages], k_empty[kKStages], v_full[kVStages], v_empty[kVStages];
    uint64_t tile_full[2], tile_empty[2];
    TileSlot tile[2];
  };
  static_assert(kKBytes % (8 * kWidth) == 0 && kVBytes % (8 * kWidthV) == 0, "stages start on a swizzle atom");
  static_assert(sizeof(Shared) <= 232448, "shared memory of a Hopper SM");
};

}  // namespace adaattn::cuda::sm90
