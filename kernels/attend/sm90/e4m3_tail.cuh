// Full attention's last round. The tiles that whole rounds of the grid leave over, where they are at most half as many
// as CTAs, come in two parts of their keys, so that the round takes half as long. Whoever ends last joins the parts,
// warp by warp.
#pragma once

#include "attend/sm90/e4m3_args.h"
#include "attend/sm90/forward_schedule.cuh"

namespace adaattn::cuda::sm90 {

// The numbers of a schedule without parts, for its Traits.
template <class Traits>
struct WithoutTail : Traits {
  static constexpr bool kTail = false;
};

// From args.whole_tiles on two numbers are the parts, Tile::split 1 and 2, of one tile.
template <class Traits>
requires(Traits::kTail) class TileScheduler<Traits> {
 public:
  __device__ __forceinline__ TileScheduler(const ForwardArgs& args, int lane)
      : args_(static_cast<const E4m3Args&>(args)), whole_(args, lane) {}

  __device__ __forceinline__ Tile first() { return part_of(whole_.first()); }
  __device__ __forceinline__ void prefetch() { whole_.prefetch(); }
  __device__ __forceinline__ Tile next() {
    number_ += static_cast<int>(gridDim.x);
    return part_of(whole_.next());
  }
  __device__ __forceinline__ void finish() { whole_.finish(); }

 private:
  __device__ __forceinline__ Tile part_of(Tile tile) const {
    const int part = number_ - args_.whole_tiles;
    if (part < 0) return tile;
    const int number = args_.whole_tiles + part / 2, row = number / args_.m_blocks;
    tile = {};
    if (number >= args_.num_tiles) return tile;
    tile.m_block = number - row * args_.m_blocks;
    tile.batch = row / args_.heads_q;
    tile.head = row - tile.batch * args_.heads_q;
    tile.split = 1 + part % 2;
    return tile;
  }

  const E4m3Args& args_;
  TileScheduler<WithoutTail<Traits>> whole_;
  int number_ = static_cast<int>(blockIdx.x);
};

template <class Traits>
requires(Traits::kTail) __device__ __forceinline__ TileRange tile_range(const ForwardArgs& args, const Tile& tile) {
  TileRange r = tile_range<WithoutTail<Traits>>(args, tile);
  const int middle = r.n_min + r.blocks() / 2;
  if (tile.split == 1) r.n_max = middle;
  if (tile.split == 2) r.n_min = middle;
  return r;
}

// Where the parts of a warp's rows meet.
class TailPlace {
 public:
  __device__ __forceinline__ TailPlace(const E4m3Args& args, const Tile& tile, int warp, int lane)
      : part_(tile.split - 1), lane_(lane) {
    const int number = (tile.batch * args.heads_q + tile.head) * args.m_blocks + tile.m_block;
    const int place = (number - args.whole_tiles) * kTailWarps + warp;
    arrival_ = args.arrivals + place / 32;
    bit_ = 1u << place % 32;
    parts_ = args.tail + static_cast<int64_t>(place) * 2 * kTailWords * 32;
  }

  // Word i of this lane, of the own part or of the other.
  __device__ __forceinline__ float4* own(int i) const { return parts_ + (part_ * kTailWords + i) * 32 + lane_; }
  __device__ __forceinline__ float4 other(int i) const {
    return __ldcg(parts_ + ((1 - part_) * kTailWords + i) * 32 + lane_);
  }

  // Whether the other part is there. If so the arrival is taken back: arrivals are zero between launches.
  __device__ __forceinline__ bool found() const {
    uint32_t seen = 0;
    if (lane_ == 0) {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrival_) : "memory");
      seen &= bit_;
      if (seen != 0) atomicXor(arrival_, bit_);
    }
    __syncwarp();
    return __shfl_sync(~0u, seen, 0) != 0;
  }
  // After the own part was written. Whether the other part came meanwhile.
  __device__ __forceinline__ bool arrive() const {
    __threadfence();
    __syncwarp();
    uint32_t seen = 0;
    if (lane_ == 0) {
      seen = atomicXor(arrival_, bit_) & bit_;
      __threadfence();
    }
    __syncwarp();
    return __shfl_sync(~0u, seen, 0) != 0;
  }

 private:
  int part_, lane_;
  uint32_t* arrival_;
  uint32_t bit_;
  float4* parts_;
};

}  // namespace adaattn::cuda::sm90
