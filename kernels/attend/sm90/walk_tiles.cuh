// Query tiles as a list names them, for the consumer warpgroups of the mask-walking kernels: which is next, and the
// order of its key tiles.
#pragma once

#include "attend/sm90/forward_schedule.cuh"
#include "attend/sm90/walk_traits.cuh"
#include "common/sm90_ptx.cuh"

namespace adaattn::cuda::sm90 {

// Core: ConsumerCore, or what is built on it.
template <class Core>
class WalkTiles : protected Core {
 protected:
  using Core::args_, Core::shared_, Core::lane_, Core::tile_, Core::range_, Core::tile_count_;
  using Core::Core, Core::uniform;

  // The next query tile, while the one before may still be at work. look(walk): at the slot, before it is let go of.
  template <class Look>
  __device__ __forceinline__ void take_tile(const Look& look) {
    const int slot = tile_count_ % 2;
    mbarrier_wait(&shared_.tile_full[slot], tile_count_ / 2 & 1);
    const WalkTile& walk = shared_.walk[slot];
    taken_ = Core::read_slot(&walk.m_block);
    taken_range_ = Core::read_slot(&walk.begin);
    look(walk);
    ++tile_count_;
  }
  // Lets go of the slot of a tile that has keys. An arrival overtakes reads on their way: this one is made to depend on
  // the range, begin_taken() has branched on the other words.
  __device__ __forceinline__ void release_slot() {
    if (lane_ == 0 && taken_range_.y > 0) mbarrier_arrive(&shared_.tile_empty[(tile_count_ + 1) % 2]);
  }
  // Goes on to it. False: no more.
  __device__ __forceinline__ bool begin_taken() {
    tile_.m_block = uniform(taken_.x);
    tile_.head = uniform(taken_.y);
    tile_.batch = uniform(taken_.z);
    if (tile_.m_block < 0) return false;
    range_ = read_sequence(args_, tile_.batch);
    // After the reading of the sequence, or the compiler loses track of what is uniform.
    begin_ = uniform(taken_range_.x);
    end_ = uniform(taken_range_.y);
    full_begin_ = uniform(taken_range_.z);
    full_end_ = uniform(taken_range_.w);
    kept_ = uniform(taken_.w);
    release_slot();
    return true;
  }

  // The key tiles after the first, which is the last visible one. Masked at the diagonal and the ragged end, whose
  // tiles are all kept, not in the middle, masked again at a window's left side: one body for both ends, because with
  // three loops the compiler loses track of what is uniform. masked(tile, rest), free(rest): rest more come after it.
  template <class Masked, class Free>
  __device__ __forceinline__ void each_block(const Masked& masked, const Free& free) {
    const int left = full_begin_ - begin_, after_right = kept_ - 1 - max(end_ - full_end_ - 1, 0);
    int rest = kept_ - 2, tile = end_ - 2;  // blocks after this one, and its tile where that matters
    for (int stop = after_right;; stop = 0) {
      for (; rest >= stop; --rest, --tile) masked(tile, rest);
      if (stop == 0) break;
      for (; rest >= left; --rest) free(rest);
      tile = full_begin_ - 1;
    }
  }

  int4 taken_, taken_range_;  // a WalkTile's first words, in lane 0
  int begin_ = 0, end_ = 0, full_begin_ = 0, full_end_ = 0, kept_ = 0;
};

}  // namespace adaattn::cuda::sm90
