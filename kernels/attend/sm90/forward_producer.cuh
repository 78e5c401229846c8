// The producer warp: draws tiles, and keeps Q, K and V flowing into shared memory through TMA.
#pragma once

#include "attend/sm90/forward_schedule.cuh"
#include "common/sm90_ptx.cuh"

namespace adaattn::cuda::sm90 {

template <class Traits>
class Producer {
  static constexpr ForwardConfig kC = Traits::kC;

 public:
  __device__ __forceinline__ Producer(const ForwardArgs& args, typename Traits::Shared& shared)
      : args_(args), shared_(shared), keep_(l2_evict_last()), stream_(l2_evict_first()) {}

  __device__ __forceinline__ void run() {
    const auto first = [&](const Tile& tile) { load_first(tile, tile.range); };
    const auto last = [&](const Tile& tile) { load_last(tile, tile.range); };
    if constexpr (kC.load_ahead) {
      draw_tiles(
          first, [&](const Tile& tile, const TileRange& range, const auto& draw) { load_middle(tile, range, draw); },
          last);
    } else {
      draw_tiles([&](const Tile& tile, const TileRange& range, const auto& draw) {
        first(tile);
        load_middle(tile, range, draw);
        last(tile);
      });
    }
  }

 protected:
  // Hands every tile to the consumers and calls load(tile, range, draw) in lane 0 for those that have keys; it calls
  // draw() once, as late as hides the latency of drawing the next tile.
  template <class Load>
  __device__ __forceinline__ void draw_tiles(const Load& load) {
    const auto nothing = [](const Tile&) {};
    draw_tiles(nothing, load, nothing);
  }

  // The same in three parts: last(tile) runs after the next tile was handed over and first called for it. To draw, to
  // decode and to announce a tile takes this one warp 2,000 clocks, which then pass where it would wait for the buffer
  // of a tile's last V.
  template <class First, class Middle, class Last>
  __device__ __forceinline__ void draw_tiles(const First& first, const Middle& middle, const Last& last) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    TileScheduler<Traits> scheduler(args_, lane);
    const auto hand_over = [&](int i, Tile& tile) {
      tile.range = tile_range<Traits>(args_, tile);
      if (lane == 0) {
        const int slot = i % 2;
        mbarrier_wait(&shared_.tile_empty[slot], (i / 2 & 1) ^ 1);
        shared_.tile[slot] = tile;
        mbarrier_arrive(&shared_.tile_full[slot]);
        if (tile.m_block >= 0 && tile.range.blocks() > 0) first(tile);
      }
    };
    Tile tile = scheduler.first();
    hand_over(0, tile);
    for (int i = 1; tile.m_block >= 0; ++i) {
      if constexpr (!kC.dynamic) scheduler.prefetch();
      // Drawn as late as hides the draw's latency: who drew at the start of a long tile would find the next one taken
      // from others that end sooner.
      const auto draw = [&] {
        if constexpr (kC.dynamic) scheduler.prefetch();
      };
      if (lane == 0) {
        if (tile.range.blocks() > 0) {
          middle(tile, tile.range, draw);
        } else {
          draw();
        }
      }
      __syncwarp();
      Tile next = scheduler.next();
      hand_over(i, next);
      if (lane == 0 && tile.range.blocks() > 0) last(tile);
      __syncwarp();
      tile = next;
    }
    scheduler.finish();
  }

  __device__ __forceinline__ void load_q(const Tile& tile, const TileRange& range, int batch) {
    const int parity = q_count_++ & 1;
#pragma unroll
    for (int group = 0; group < Traits::kGroups; ++group) {
      mbarrier_wait(&shared_.q_empty[group], parity ^ 1);
      mbarrier_arrive_expect_tx(&shared_.q_full[group], Traits::kQBytes);
      const int first = first_row<Traits>(tile) + group * kGroupRows;
      const int row = range.q_start + position_of<Traits>(args_, first);
      // Split instances read the heads of a group beside each other: the map's second dimension is the head.
      const int head = kC.split ? tile.head << args_.pack_shift : tile.head;
#pragma unroll
      for (int c = 0; c < Traits::kChunks; ++c) {
        tma_load_4d(shared_.q[group] + c * kGroupRows * Traits::kWidth, &args_.q_map, &shared_.q_full[group], stream_,
                    c * Traits::kChunk, kC.split ? head : row, kC.split ? row : head, batch);
      }
    }
  }

  // One block of K from `map`, first column `column`, into the next stage. announce: runs before the block's barrier is
  // armed, so that what it writes is seen with the block.
  template <class Announce>
  __device__ __forceinline__ void load_k(const CUtensorMap& map, int column, int row, int head, int batch,
                                         const Announce& announce) {
    const int stage = k_count_ % Traits::kKStages, parity = k_count_ / Traits::kKStages & 1;
    mbarrier_wait(&shared_.k_empty[stage], parity ^ 1);
    announce(stage);
    mbarrier_arrive_expect_tx(&shared_.k_full[stage], Traits::kKBytes);
#pragma unroll
    for (int c = 0; c < Traits::kChunks; ++c) {
      tma_load_4d(shared_.k[stage] + c * Traits::kN * Traits::kWidth, &map, &shared_.k_full[stage], keep_,
                  column + c * Traits::kChunk, row, head, batch);
    }
    ++k_count_;
  }
  __device__ __forceinline__ void load_v(const CUtensorMap& map, int row, int head, int batch) {
    const int stage = v_count_ % Traits::kVStages, parity = v_count_ / Traits::kVStages & 1;
    mbarrier_wait(&shared_.v_empty[stage], parity ^ 1);
    mbarrier_arrive_expect_tx(&shared_.v_full[stage], Traits::kVBytes);
#pragma unroll
    for (int c = 0; c < Traits::kChunksV; ++c) {
      tma_load_4d(shared_.v[stage] + c * Traits::kN * Traits::kWidthV, &map, &shared_.v_full[stage], keep_,
                  c * Traits::kChunkV, row, head, batch);
    }
    ++v_count_;
  }

  const ForwardArgs& args_;
  typename Traits::Shared& shared_;
  uint64_t keep_, stream_;
  uint32_t q_count_ = 0, k_count_ = 0, v_count_ = 0;

 private:
  // Order of arrival: the last K block, Q, then each K ahead of the V of the block after it, which is how the consumers
  // interleave S = Q K(n) with O += P V(n + 1). With load_ahead the next tile's first K comes before the last V, whose
  // buffer is free later.
  __device__ __forceinline__ void load_first(const Tile& tile, const TileRange& range) {
    load_k(range, range.n_max - 1, head_kv(tile), tile.batch);
  }
  template <class Draw>
  __device__ __forceinline__ void load_middle(const Tile& tile, const TileRange& range, const Draw& draw) {
    load_q(tile, range, args_.p.cu_seqlens_q != nullptr ? 0 : tile.batch);
    if (range.blocks() == 1) draw();
    const int head = head_kv(tile);
    for (int n = range.n_max - 2; n >= range.n_min; --n) {
      if (n == range.n_min) draw();
      load_k(range, n, head, tile.batch);
      load_v(range, n + 1, head, tile.batch);
    }
  }
  __device__ __forceinline__ void load_last(const Tile& tile, const TileRange& range) {
    load_v(range, range.n_min, head_kv(tile), tile.batch);
  }

  __device__ __forceinline__ int head_kv(const Tile& tile) const { return tile.head / args_.group_size; }
  __device__ __forceinline__ void load_k(const TileRange& range, int n, int head, int batch) {
    load_k(args_.k_map, 0, range.k_start + n * Traits::kN, head * args_.k_head_step, batch * args_.k_batch_step,
           [](int) {});
  }
  __device__ __forceinline__ void load_v(const TileRange& range, int n, int head, int batch) {
    load_v(args_.v_map, range.k_start + n * Traits::kN, head * args_.v_head_step, batch * args_.v_batch_step);
  }
};

}  // namespace adaattn::cuda::sm90
