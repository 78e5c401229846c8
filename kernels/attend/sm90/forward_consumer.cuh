// A consumer warpgroup of the forward kernels: the key blocks of a tile from the last to the first.
#pragma once

#include <type_traits>

#include "attend/sm90/consumer_core.cuh"
#include "attend/sm90/split_rows.cuh"

namespace adaattn::cuda::sm90 {

template <class Traits>
using ForwardCore = std::conditional_t<Traits::kC.split, SplitRows<Traits>, ConsumerCore<Traits>>;

template <class Traits>
class Consumer : protected ForwardCore<Traits> {
  using Core = ForwardCore<Traits>;
  using Core::args_, Core::shared_, Core::group_, Core::tile_, Core::range_, Core::tile_count_, Core::q_count_,
      Core::v_count_;
  using Core::kC, Core::kN, Core::scores_;
  using Core::uniform, Core::release, Core::pass_turn, Core::first_scores, Core::release_scores, Core::begin_out;

  static_assert(!kC.pass_unseen || !kC.ordered, "a warpgroup that passes blocks by takes no turns");

 public:
  using Core::Core;

  __device__ __forceinline__ void run() {
    if (group_ == Traits::kGroups - 1) pass_turn();  // the first turn is group 0's
    for (bool more = next_tile(); more;) {
      if constexpr (kC.pass_unseen) {
        if (pass_unseen()) {
          more = next_tile();
          continue;
        }
      }
      start_tile();
      first_block();
      middle_blocks();
      if constexpr (kC.split) {
        Core::last_block();
        Core::store();
        more = next_tile();
      } else {
        // Row sums and the next tile's number and range need no O: they are there when the last product is.
        Core::issue_last();
        const auto scale = Core::finish_rows();
        more = next_tile();
        Core::finish_last();
        Core::store(scale);
      }
    }
    Core::drain();
  }

 protected:
  // The next tile that has keys; those without are answered on the way. False: no more tiles.
  __device__ __forceinline__ bool next_tile() {
    for (;; ++tile_count_) {
      const int slot = tile_count_ % 2;
      mbarrier_wait(&shared_.tile_full[slot], tile_count_ / 2 & 1);
      const Tile& given = shared_.tile[slot];
      const int4 tile = Core::read_slot(&given.m_block), rows = Core::read_slot(&given.range.len_q),
                 blocks = Core::read_slot(&given.range.k_start);
      tile_.m_block = uniform(tile.x);
      if (tile_.m_block < 0) return false;
      tile_.head = uniform(tile.y);
      tile_.batch = uniform(tile.z);
      if constexpr (kC.split) tile_.split = uniform(tile.w);
      range_.len_q = uniform(rows.x);
      range_.len_k = uniform(rows.y);
      range_.off = uniform(rows.z);
      range_.q_start = uniform(rows.w);
      range_.n_min = uniform(blocks.y);
      range_.n_max = uniform(blocks.z);
      if (range_.blocks() > 0) break;
      Core::store_empty();
      release(&shared_.tile_empty[slot]);
    }
    ++tile_count_;
    return true;
  }
  // The slot of the present tile, once something has waited for what was read of it: an arrival overtakes reads on
  // their way.
  __device__ __forceinline__ void release_slot() { release(&shared_.tile_empty[(tile_count_ + 1) % 2]); }

  __device__ __forceinline__ void row_limits() {
    Core::set_limits(range_.off, range_.len_k);
    if constexpr (kC.masked) {
      const int row = first_row<Traits>(tile_) + group_ * kGroupRows;
      const int first = position_of<Traits>(args_, row), last = position_of<Traits>(args_, row + kGroupRows - 1);
      const int right = args_.window_right, left = args_.window_left;
      free_end_ = uniform(right >= 0 ? max(0, first + range_.off + right + 1) / kN : range_.n_max);
      free_begin_ = uniform(left >= 0 ? (max(0, last + range_.off - left) + kN - 1) / kN : 0);
    }
  }

  int free_begin_ = 0, free_end_ = 0;  // blocks [free_begin_, free_end_) need no mask

 private:
  // Lets the blocks at the tile's end pass by that no row of this warpgroup sees; what remains ends at range_.n_max.
  // True: nothing remains, the rows are answered.
  __device__ __forceinline__ bool pass_unseen() {
    const int first = first_row<Traits>(tile_) + group_ * kGroupRows, right = args_.window_right;
    int end = range_.n_max;
    if (right >= 0) {
      const int last = min(position_of<Traits>(args_, first + kGroupRows - 1), range_.len_q - 1);
      end = min(end, (max(0, last + range_.off + right + 1) + kN - 1) / kN);
    }
    if ((kC.from_end && first < 0) || position_of<Traits>(args_, first) >= range_.len_q) end = 0;
    end = uniform(max(end, range_.n_min));
    for (int n = range_.n_max; n > end; --n) {
      // The barriers count arrivals of one phase at a time: none before the block is there.
      Core::wait_k(v_count_);
      release(&shared_.k_empty[v_count_ % Traits::kKStages]);
      Core::wait_full(shared_.v_full, v_count_);
      release(&shared_.v_empty[v_count_ % Traits::kVStages]);
      ++v_count_;
    }
    v_count_ = uniform(v_count_);
    range_.n_max = end;
    if (range_.blocks() > 0) return false;
    mbarrier_wait(&shared_.q_full[group_], q_count_++ & 1);
    release(&shared_.q_empty[group_]);
    Core::store_empty();
    release_slot();
    return true;
  }

  // Enqueues S of a tile's first block, the last in the sequence.
  __device__ __forceinline__ void start_tile() {
    mbarrier_wait(&shared_.q_full[group_], q_count_++ & 1);
    if constexpr (kC.q_in_registers) Core::load_q();
    first_scores(v_count_);
    // The products have waited for what was read of Q: an arrival overtakes reads on their way.
    if constexpr (kC.q_in_registers) release(&shared_.q_empty[group_]);
  }

  // Up to P of that block. The row limits are computed under the product.
  __device__ __forceinline__ void first_block() {
    row_limits();
    wgmma_wait<0>();
    pin(scores_);
    release_slot();
    release_scores(v_count_, range_.blocks() == 1);
    first_softmax();
    begin_out(range_.len_k - (range_.n_max - 1) * kN);
  }

  __device__ __forceinline__ void middle_blocks() {
    int n = range_.n_max - 2;
    if constexpr (kC.masked) {
      // Masked at the diagonal, not in the middle, masked again at a window's left side: one body for both ends,
      // because with three loops the compiler loses track of what is uniform.
      for (int stop = max(range_.n_min, free_end_);; stop = range_.n_min) {
        for (; n >= stop; --n) Core::template step<MaskSides::kBoth>(n, v_count_ + 1, n == range_.n_min);
        if (stop == range_.n_min) break;
        free_blocks(n, max(range_.n_min, free_begin_));
      }
    } else {
      free_blocks(n, range_.n_min);
    }
  }

  // Blocks down to `end` that every row sees whole.
  __device__ __forceinline__ void free_blocks(int& n, int end) {
    if constexpr (kC.quick) {
      for (; n >= end; --n) Core::quick_step(n, v_count_ + 1, n == range_.n_min);
    } else {
      for (; n >= end; --n) Core::template step<MaskSides::kNone>(n, v_count_ + 1, n == range_.n_min);
    }
  }

  __device__ __forceinline__ void first_softmax() {
    const int n = range_.n_max - 1;
    if constexpr (kC.masked) {
      Core::template begin_softmax<true, MaskSides::kBoth>(n);
    } else if ((n + 1) * kN > range_.len_k) {
      Core::template begin_softmax<true, MaskSides::kEnd>(n);
    } else {
      Core::template begin_softmax<true, MaskSides::kNone>(n);
    }
  }
};

}  // namespace adaattn::cuda::sm90
