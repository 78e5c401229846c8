// The producer warp of the 8-bit kernels: Q through TMA in 16 bits, tiles of K and V through bulk copies.
#pragma once

#include "attend/sm90/forward_schedule.cuh"
#include "attend/sm90/int8_traits.cuh"
#include "common/sm90_ptx.cuh"

namespace adaattn::cuda::sm90 {

template <class Traits>
class Int8Producer {
  static constexpr int kStages = Traits::kStages;

 public:
  __device__ __forceinline__ Int8Producer(const Int8Args& args, typename Traits::Shared& shared)
      : args_(args), shared_(shared), keep_(l2_evict_last()), stream_(l2_evict_first()) {}

  __device__ __forceinline__ void run() {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    TileScheduler<Traits> scheduler(args_.forward, lane);
    Tile tile = scheduler.first();
    for (int i = 0;; ++i) {
      if (lane == 0) {
        const int slot = i % 2;
        mbarrier_wait(&shared_.tile_empty[slot], (i / 2 & 1) ^ 1);
        shared_.tile[slot] = tile;
        mbarrier_arrive(&shared_.tile_full[slot]);
      }
      __syncwarp();
      if (tile.m_block < 0) break;
      scheduler.prefetch();
      const TileRange range = tile_range<Traits>(args_.forward, tile);
      if (lane == 0 && range.blocks() > 0) load_tile(tile, range);
      __syncwarp();
      tile = scheduler.next();
    }
    scheduler.finish();
  }

 private:
  // Q first: it has to be quantised before it can be used.
  __device__ __forceinline__ void load_tile(const Tile& tile, const TileRange& range) {
    const AttnParams& p = args_.forward.p;
    load_q(tile, range, p.cu_seqlens_q != nullptr ? 0 : tile.batch);
    const int unit = tile.batch * static_cast<int>(p.heads_kv) + tile.head / args_.forward.group_size;
    first_tile_ = static_cast<int64_t>(unit) * args_.tables.key_tiles;
    load_k(range.n_max - 1);
    for (int n = range.n_max - 2; n >= range.n_min; --n) {
      load_k(n);
      load_v(n + 1);
    }
    load_v(range.n_min);
  }

  __device__ __forceinline__ void load_q(const Tile& tile, const TileRange& range, int batch) {
    const int parity = q_count_++ & 1;
#pragma unroll
    for (int group = 0; group < Traits::kGroups; ++group) {
      mbarrier_wait(&shared_.q_empty[group], parity ^ 1);
      mbarrier_arrive_expect_tx(&shared_.q_full[group], Traits::kRawBytes);
      const int row = range.q_start + tile.m_block * Traits::kM + group * kGroupRows;
#pragma unroll
      for (int c = 0; c < Traits::kChunks; ++c) {
        tma_load_4d(shared_.q_raw[group] + c * kGroupRows * Traits::kWidth, &args_.forward.q_map,
                    &shared_.q_full[group], stream_, c * Traits::kChunk, row, tile.head, batch);
      }
    }
  }

  __device__ __forceinline__ void load_k(int n) {
    const int stage = k_count_ % kStages, parity = k_count_ / kStages & 1;
    mbarrier_wait(&shared_.k_empty[stage], parity ^ 1);
    uint64_t* full = &shared_.k_full[stage];
    mbarrier_arrive_expect_tx(full, Traits::kKBytes + sizeof(Int8Scales));
    bulk_load(&shared_.scales[stage], args_.tables.scales + first_tile_ + n, sizeof(Int8Scales), full, keep_);
    bulk_load(shared_.k[stage], args_.tables.k + (first_tile_ + n) * Traits::kKBytes, Traits::kKBytes, full, keep_);
    ++k_count_;
  }

  __device__ __forceinline__ void load_v(int n) {
    const int stage = v_count_ % kStages, parity = v_count_ / kStages & 1;
    mbarrier_wait(&shared_.v_empty[stage], parity ^ 1);
    uint64_t* full = &shared_.v_full[stage];
    mbarrier_arrive_expect_tx(full, Traits::kVBytes);
    bulk_load(shared_.v[stage], args_.tables.v + (first_tile_ + n) * Traits::kVBytes, Traits::kVBytes, full, keep_);
    ++v_count_;
  }

  const Int8Args& args_;
  typename Traits::Shared& shared_;
  uint64_t keep_, stream_;
  int64_t first_tile_ = 0;
  uint32_t q_count_ = 0, k_count_ = 0, v_count_ = 0;
};

}  // namespace adaattn::cuda::sm90
