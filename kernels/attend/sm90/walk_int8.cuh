// The mask-walking kernel in 8 bits: lists and masks as in walk_kernel.cuh, the arithmetic of int8_kernel.cuh.
#pragma once

#include "attend/sm90/int8_kernel.cuh"
#include "attend/sm90/walk_producer.cuh"
#include "attend/sm90/walk_tiles.cuh"

namespace adaattn::cuda::sm90 {

struct Int8WalkPolicy {
  static constexpr ForwardConfig kConfig = {
      .d_qk = kWalkDim, .d_v = kWalkDim, .masked = true, .dynamic = true, .ordered = false, .early_columns = 8};
};

template <typename T>
struct Int8WalkTraits : Int8Traits<T, Int8WalkPolicy> {
  using Base = Int8Traits<T, Int8WalkPolicy>;
  static constexpr bool kFar = false, kProbe = false, kScalesOfLane = true;
  struct Shared : Base::Shared {
    WalkTile walk[2];
    uint64_t mask[2][kListWords];
    alignas(8) uint64_t draw;
  };
  static_assert(Base::kN == decide::kTileK && Base::kM == decide::kTileQ);
  static_assert(sizeof(Shared) <= 232448, "shared memory of a Hopper SM");
};

template <class Traits>
class Int8WalkProducer : Int8Producer<Traits> {
  using Loads = Int8Producer<Traits>;

 public:
  __device__ __forceinline__ Int8WalkProducer(const Int8WalkArgs& args, typename Traits::Shared& shared)
      : Loads(args.walk.forward, args.tables, shared), lists_(args.walk.tables) {}

  __device__ __forceinline__ void run() {
    each_walk_tile(this->shared_, [&](const WalkTile& walk, const uint64_t* words) { load_tile(walk, words); });
  }

 private:
  __device__ __forceinline__ void load_tile(const WalkTile& walk, const uint64_t* first_words) {
    const ForwardArgs& args = this->args_;
    Tile tile;
    tile.m_block = walk.m_block;
    tile.head = walk.head;
    tile.batch = walk.batch;
    Loads::load_q(tile, read_sequence(args, walk.batch), args.p.cu_seqlens_q != nullptr ? 0 : walk.batch);
    Loads::go_to_unit(walk.batch, walk.head);
    int left = walk.kept, before = -1;
    each_kept_tile(walk, first_words, lists_.mask + int64_t{walk.item} * lists_.shape.mask_words, [&](int n) {
      if (--left == 0) mbarrier_arrive(&this->shared_.draw);
      Loads::load_k(n);
      if (before >= 0) Loads::load_v(before);
      before = n;
    });
    Loads::load_v(before);
  }

  const AdaptiveTables& lists_;
};

template <class Traits>
class Int8WalkConsumer : WalkTiles<Int8Consumer<Traits>> {
  using Tiles = WalkTiles<Int8Consumer<Traits>>;

 public:
  __device__ __forceinline__ Int8WalkConsumer(const Int8WalkArgs& args, typename Traits::Shared& shared, int group)
      : Tiles(args.walk.forward, args.tables, args.with_shift, shared, group) {}

  __device__ __forceinline__ void run() {
    const auto nothing = [](const WalkTile&) {};
    Tiles::take_tile(nothing);
    while (Tiles::begin_taken()) {
      this->range_.n_max = this->end_;
      this->set_limits(this->range_.off, this->range_.len_k);
      this->quantize_queries();
      this->first_block();
      Tiles::each_block([&](int tile, int) { this->template step<MaskSides::kBoth>(tile); },
                        [&](int) { this->template step<MaskSides::kNone>(0); });
      this->last_block();
      Tiles::take_tile(nothing);
      this->store();
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(Int8WalkTraits<T>::kThreads, 1)
    int8_walk_kernel(const __grid_constant__ Int8WalkArgs args) {
  using Traits = Int8WalkTraits<T>;
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(dynamic_shared);
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&args.walk.forward.q_map);
    init_barriers(shared, Traits::kGroups);
    ptx::mbarrier_init(&shared.draw, 1);
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
  }
  write_ones<Traits>(shared);
  ptx::fence_proxy_async(ptx::space_shared);
  __syncthreads();
  wait_for_previous_grid();  // masks, lists and tables
  launch_dependents();
  if (warpgroup == 0) {
    set_max_registers_down<Traits::kProducerRegisters>();
    // The list's warp spills at these, but it is a tile ahead; with more for it the loops of the consumers would.
    if (threadIdx.x == 0) Int8WalkProducer<Traits>(args, shared).run();
    if (threadIdx.x / 32 == 1) WalkList<Traits>(args.walk, shared).run();
  } else {
    set_max_registers_up<Traits::kConsumerRegisters>();
    Int8WalkConsumer<Traits>(args, shared, warpgroup - 1).run();
  }
}

}  // namespace adaattn::cuda::sm90
