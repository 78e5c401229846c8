// The producer warp of the 8-bit kernels: Q through TMA in 16 bits, tiles of K and V through bulk copies.
#pragma once

#include "attend/sm90/forward_producer.cuh"
#include "attend/sm90/int8_traits.cuh"

namespace adaattn::cuda::sm90 {

template <class Traits>
class Int8Producer : protected Producer<Traits> {
 protected:
  using Loads = Producer<Traits>;
  using Loads::args_, Loads::shared_, Loads::keep_, Loads::k_count_, Loads::v_count_;
  static constexpr int kStages = Traits::kStages;

 public:
  __device__ __forceinline__ Int8Producer(const ForwardArgs& args, const Int8Tables& tables,
                                          typename Traits::Shared& shared)
      : Loads(args, shared), tables_(tables) {}

  __device__ __forceinline__ void run() {
    Loads::draw_tiles(
        [&](const Tile& tile, const TileRange& range, const auto& draw) { load_tile(tile, range, draw); });
  }

 protected:
  // Whose tiles are loaded from here on.
  __device__ __forceinline__ void go_to_unit(int batch, int head) {
    const int unit = batch * static_cast<int>(args_.p.heads_kv) + head / args_.group_size;
    first_tile_ = static_cast<int64_t>(unit) * tables_.key_tiles;
  }

  __device__ __forceinline__ void load_k(int n) {
    const int stage = k_count_ % kStages, parity = k_count_ / kStages & 1;
    mbarrier_wait(&shared_.k_empty[stage], parity ^ 1);
    uint64_t* full = &shared_.k_full[stage];
    mbarrier_arrive_expect_tx(full, Traits::kKBytes + sizeof(Int8Scales));
    bulk_load(&shared_.scales[stage], tables_.scales + first_tile_ + n, sizeof(Int8Scales), full, keep_);
    bulk_load(shared_.k[stage], tables_.k + (first_tile_ + n) * Traits::kKBytes, Traits::kKBytes, full, keep_);
    ++k_count_;
  }

  __device__ __forceinline__ void load_v(int n) {
    const int stage = v_count_ % kStages, parity = v_count_ / kStages & 1;
    mbarrier_wait(&shared_.v_empty[stage], parity ^ 1);
    uint64_t* full = &shared_.v_full[stage];
    mbarrier_arrive_expect_tx(full, Traits::kVBytes);
    bulk_load(shared_.v[stage], tables_.v + (first_tile_ + n) * Traits::kVBytes, Traits::kVBytes, full, keep_);
    ++v_count_;
  }

  const Int8Tables& tables_;
  int64_t first_tile_ = 0;

 private:
  // Q first: it has to be quantised before it can be used.
  template <class Draw>
  __device__ __forceinline__ void load_tile(const Tile& tile, const TileRange& range, const Draw& draw) {
    const AttnParams& p = args_.p;
    Loads::load_q(tile, range, p.cu_seqlens_q != nullptr ? 0 : tile.batch);
    go_to_unit(tile.batch, tile.head);
    load_k(range.n_max - 1);
    if (range.blocks() == 1) draw();
    for (int n = range.n_max - 2; n >= range.n_min; --n) {
      if (n == range.n_min) draw();
      load_k(n);
      load_v(n + 1);
    }
    load_v(range.n_min);
  }
};

}  // namespace adaattn::cuda::sm90
