// The producer of paged kernels: K and V come in boxes of keys that lie in one page each, a lane for each box.
#pragma once

#include "attend/sm90/forward_producer.cuh"
#include "attend/sm90/paged_boxes.h"

namespace adaattn::cuda::sm90 {

template <class Traits>
class PagedProducer : protected Producer<Traits> {
  using Base = Producer<Traits>;
  using Base::args_, Base::shared_, Base::keep_, Base::k_count_, Base::v_count_;
  static constexpr int kN = Traits::kN, kChunks = Traits::kChunks;
  static_assert(kChunks == Traits::kChunksV && kN / kPageMultiple * kChunks <= 32);

 public:
  static constexpr int kWarps = 2;

  __device__ __forceinline__ PagedProducer(const ForwardArgs& args, typename Traits::Shared& shared)
      : Base(args, shared),
        lane_(static_cast<int>(threadIdx.x) % 32),
        box_rows_(box_rows(page_size(), kN)),
        box_key_(lane_ / kChunks * box_rows_) {}

  // Warp 0 draws tiles and brings Q and K; warp 1 reads the tiles as the consumers do and brings V. To find its
  // coordinates and to issue its copies takes a warp as long as the products of a block take.
  __device__ __forceinline__ void run() {
    TileScheduler<Traits> scheduler(args_, lane_);
    const bool leads = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0) == 0;
    for (int i = 0;; ++i) {
      const int slot = i % 2;
      Tile tile;
      if (leads) {
        tile = i == 0 ? scheduler.first() : scheduler.next();
        tile.range = tile_range<Traits>(args_, tile);
        if (lane_ == 0) {
          mbarrier_wait(&shared_.tile_empty[slot], (i / 2 & 1) ^ 1);
          shared_.tile[slot] = tile;
          mbarrier_arrive(&shared_.tile_full[slot]);
        }
        __syncwarp();
      } else {
        mbarrier_wait(&shared_.tile_full[slot], i / 2 & 1);
        tile = shared_.tile[slot];
      }
      if (tile.m_block < 0) break;
      table_ = args_.p.block_table + tile.batch * args_.p.block_table_stride;
      const int head = tile.head / args_.group_size;
      const TileRange& range = tile.range;
      if (leads) {
        load_keys(tile, head, [&] {
          if (lane_ == 0) scheduler.prefetch();
        });
      } else if (range.blocks() > 0) {
        Place next = look_up(range.n_max - 1);
        for (int n = range.n_max - 1; n >= range.n_min; --n) {
          const Place v = next;
          if (n > range.n_min) next = look_up(n - 1);
          load_v(v, head);
        }
      }
      __syncwarp();
      // Behind the last use of what was read: an arrival does not wait for loads before it.
      if (!leads && lane_ == 0) mbarrier_arrive(&shared_.tile_empty[slot]);
    }
    if (leads) scheduler.finish();
  }

 private:
  // Where a lane's box of a block starts.
  struct Place {
    int32_t entry;
    int row;
  };

  // Draws the next tile as late as hides the latency of that.
  template <class Draw>
  __device__ __forceinline__ void load_keys(const Tile& tile, int head, const Draw& draw) {
    const TileRange& range = tile.range;
    if (range.blocks() <= 1) draw();
    if (range.blocks() == 0) return;
    Place next = look_up(range.n_max - 1);
    for (int n = range.n_max - 1; n >= range.n_min; --n) {
      const Place k = next;
      if (n > range.n_min) {
        next = look_up(n - 1);
      } else if (range.blocks() > 1) {
        draw();
      }
      load_k(k, head);
      if (n < range.n_max - 1) continue;
      if (lane_ == 0) Base::load_q(tile, range, args_.p.cu_seqlens_q != nullptr ? 0 : tile.batch);
      __syncwarp();
    }
  }

  // Straight from the kernel's parameters: the producer has few registers.
  __device__ __forceinline__ int page_size() const { return static_cast<int>(args_.p.page_size); }

  // Slots behind a sequence's last key may hold anything: the last block brings some page in their place, which no row
  // sees.
  __device__ __forceinline__ Place look_up(int n) const {
    const int key = n * kN + box_key_, slot = key / page_size();
    return {table_[min(slot, static_cast<int>(args_.p.pages_per_seq) - 1)], key - slot * page_size()};
  }

  __device__ __forceinline__ void load_k(const Place& place, int head) {
    const int stage = k_count_ % Traits::kKStages, parity = k_count_ / Traits::kKStages & 1;
    load_box<Traits::kChunk, Traits::kWidth>(shared_.k[stage], args_.k_map, &shared_.k_full[stage],
                                             &shared_.k_empty[stage], parity, place, head * args_.k_head_step,
                                             args_.k_batch_step);
    ++k_count_;
  }
  __device__ __forceinline__ void load_v(const Place& place, int head) {
    const int stage = v_count_ % Traits::kVStages, parity = v_count_ / Traits::kVStages & 1;
    load_box<Traits::kChunkV, Traits::kWidthV>(shared_.v[stage], args_.v_map, &shared_.v_full[stage],
                                               &shared_.v_empty[stage], parity, place, head * args_.v_head_step,
                                               args_.v_batch_step);
    ++v_count_;
  }

  template <int kChunk, int kWidth>
  __device__ __forceinline__ void load_box(uint8_t* stage, const CUtensorMap& map, uint64_t* full, uint64_t* empty,
                                           int parity, const Place& place, int head, int page_step) {
    mbarrier_wait(empty, parity ^ 1);
    if (lane_ == 0) mbarrier_arrive_expect_tx(full, kChunks * kN * kWidth);
    __syncwarp();
    if (box_key_ < kN) {
      const int chunk = lane_ % kChunks;
      const int page = min(max(place.entry, 0), static_cast<int>(args_.p.num_pages) - 1);
      tma_load_4d(stage + (chunk * kN + box_key_) * kWidth, &map, full, keep_, chunk * kChunk, place.row, head,
                  page * page_step);
    }
    __syncwarp();
  }

  const int lane_, box_rows_, box_key_;  // box_key_: of the lane's box in a block, from kN on where it has none
  const int32_t* table_ = nullptr;
};

}  // namespace adaattn::cuda::sm90
