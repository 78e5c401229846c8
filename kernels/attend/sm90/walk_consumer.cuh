// A consumer warpgroup of the mask-walking kernels: the kept key tiles of a query tile from the last to the first, then
// the others as centroids, and for V in a basis the product with it at the end.
#pragma once

#include "attend/sm90/consumer_core.cuh"
#include "attend/sm90/walk.h"
#include "attend/sm90/walk_traits.cuh"

namespace adaattn::cuda::sm90 {

constexpr float kGroupBonus = 5.0f;  // log2(kGroupK)
// The second-order term of a group's log weight, v/2, overshoots where scores spread over more than a few nats, because
// 32 keys have no Gaussian tail: it is taken as v/2 / (1 + v/8), here in units of log2.
constexpr float kSpreadLimit = 0.17328679513998632f;  // ln(2) / 4
static_assert(decide::kGroupK == 32);

template <class Traits>
class WalkConsumer : ConsumerCore<Traits> {
  using Core = ConsumerCore<Traits>;
  using Core::args_, Core::shared_, Core::group_, Core::warp_, Core::lane_, Core::tile_, Core::range_;
  using Core::kN, Core::tile_count_, Core::q_count_, Core::v_count_;
  using Core::scores_, Core::out_, Core::row_max_, Core::row_sum_;
  using Core::uniform, Core::release;
  using typename Core::RowScale, typename Core::T;

 public:
  __device__ __forceinline__ WalkConsumer(const WalkArgs& args, typename Traits::Shared& shared, int group)
      : Core(args.forward, shared, group), walk_(args) {}

  __device__ __forceinline__ void run() {
    if (!next_tile()) return;
    do {
      first_block();
      exact_blocks();
      far_blocks();
      Core::last_block();
      store();
    } while (next_tile());
    Core::drain();
  }

 private:
  // The next query tile that sees keys; the rows of others are answered on the way. False: no more tiles.
  __device__ __forceinline__ bool next_tile() {
    for (;; ++tile_count_) {
      const int slot = tile_count_ % 2;
      mbarrier_wait(&shared_.tile_full[slot], tile_count_ / 2 & 1);
      const WalkTile walk = shared_.walk[slot];
      release(&shared_.tile_empty[slot]);
      tile_.m_block = uniform(walk.tile.m_block);
      tile_.head = uniform(walk.tile.head);
      tile_.batch = uniform(walk.tile.batch);
      item_ = uniform(walk.item);
      if (tile_.m_block < 0) return false;
      range_ = read_sequence(args_, tile_.batch);
      // After the reading of the sequence, or the compiler loses track of what is uniform.
      begin_ = uniform(walk.begin);
      end_ = uniform(walk.end);
      full_begin_ = uniform(walk.full_begin);
      full_end_ = uniform(walk.full_end);
      kept_ = uniform(walk.kept);
      if (begin_ < end_) break;
      Core::store_empty();
      write_share(0);
    }
    ++tile_count_;
    return true;
  }

  // S of the last visible tile, which is always kept.
  __device__ __forceinline__ void first_block() {
    far_ = walk_.far_field && kept_ < end_ - begin_;
    mbarrier_wait(&shared_.q_full[group_], q_count_++ & 1);
    Core::first_scores(k_count_);
    Core::set_limits(range_.off, range_.len_k);
    if (far_) square_queries();
    wgmma_wait<0>();
    pin(scores_);
    Core::release_scores(k_count_++, kept_ == 1 && !far_);
    Core::template begin_softmax<true, MaskSides::kBoth>(end_ - 1);
    Core::begin_out(range_.len_k - (end_ - 1) * kN);
  }

  // Masked at the diagonal and the ragged end, whose tiles are all kept, not in the middle, masked again at a window's
  // left side: one body for both ends, because with three loops the compiler loses track of what is uniform.
  __device__ __forceinline__ void exact_blocks() {
    const int left = full_begin_ - begin_, after_right = kept_ - 1 - max(end_ - full_end_ - 1, 0);
    int rest = kept_ - 2, tile = end_ - 2;  // blocks after this one, and its tile where that matters
    for (int stop = after_right;; stop = 0) {
      for (; rest >= stop; --rest, --tile) step<MaskSides::kBoth>(tile, rest);
      if (stop == 0) break;
      for (; rest >= left; --rest) step<MaskSides::kNone>(0, rest);
      tile = full_begin_ - 1;
    }
  }

  template <MaskSides kMask>
  __device__ __forceinline__ void step(int n, int rest) {
    Core::template step<kMask>(n, k_count_++, rest == 0 && !far_);
  }

  // q^2 in the layout of q, element by element, for the product with the groups' variances.
  __device__ __forceinline__ void square_queries() {
    const uint4* q = reinterpret_cast<const uint4*>(shared_.q[group_]);
    uint4* squared = reinterpret_cast<uint4*>(shared_.q_squared[group_]);
    const int thread = warp_ * 32 + lane_;
#pragma unroll
    for (int i = 0; i < Traits::kQBytes / 16 / kWarpgroup; ++i) {
      uint4 words = q[i * kWarpgroup + thread];
      words.x = square(words.x);
      words.y = square(words.y);
      words.z = square(words.z);
      words.w = square(words.w);
      squared[i * kWarpgroup + thread] = words;
    }
    ptx::fence_proxy_async(ptx::space_shared);
    named_barrier_sync(static_cast<int>(NamedBarrier::kSquared) + group_, kWarpgroup);
  }
  static __device__ __forceinline__ uint32_t square(uint32_t word) {
    const __nv_bfloat162 pair = reinterpret_cast<const __nv_bfloat162&>(word);
    const __nv_bfloat162 squared = __hmul2(pair, pair);
    return reinterpret_cast<const uint32_t&>(squared);
  }

  __device__ __forceinline__ void far_blocks() {
    if (!far_) {
      write_share(0);
      return;
    }
    const float max_before[2] = {row_max_[0], row_max_[1]}, sum_before[2] = {row_sum_[0], row_sum_[1]};
    while (far_step()) {
    }
    if (walk_.far_share == nullptr) return;
    float share = 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float before = sum_before[r] * exp2_approx((max_before[r] - row_max_[r]) * args_.scale_log2), all = row_sum_[r];
#pragma unroll
      for (int step = 1; step <= 2; step *= 2) {
        before += __shfl_xor_sync(~0u, before, step);
        all += __shfl_xor_sync(~0u, all, step);
      }
      if (Core::row_of(r) < range_.len_q) share += 1.f - before / all;
    }
#pragma unroll
    for (int step = 4; step <= 16; step *= 2) share += __shfl_xor_sync(~0u, share, step);
    write_share(share);
  }
  __device__ __forceinline__ void write_share(float share) {
    if (walk_.far_share != nullptr && lane_ == 0)
      walk_.far_share[int64_t{item_} * kWalkShares + group_ * (kWarpgroup / 32) + warp_] = share;
  }

  // O += P V of the block before, then one block of centroids: their scores with the second-order term, of which the
  // skipped tiles' count. False: it was the last.
  __device__ __forceinline__ bool far_step() {
    Core::wait_full(shared_.k_full, k_count_);
    const FarBlock far = shared_.far[k_count_ % kStages];
    const bool last = uniform(far.last) != 0;
    wgmma_fence();
    Core::issue_out(v_count_);
    Core::issue_scores(k_count_);
    wgmma_wait<1>();
    pin(out_);
    release(&shared_.v_empty[v_count_ % kStages]);
    Core::wait_full(shared_.k_full, k_count_ + 1);
    float spread[kN / 2];
    wgmma_fence();
    Core::issue_products(spread, shared_.q_squared[group_], shared_.k[(k_count_ + 1) % kStages]);
    wgmma_wait<0>();
    pin(scores_);
    pin(spread);
    Core::release_scores(k_count_, last);
    release(&shared_.k_empty[(k_count_ + 1) % kStages]);
    k_count_ += 2;
    add_spread(spread, far.skipped);
    Core::template begin_softmax<false, MaskSides::kNone>(0);
    Core::wait_full(shared_.v_full, v_count_ + 1);
    Core::template finish_softmax<false>();
    ++v_count_;
    return !last;
  }

  // In units of q . k: the keys of a group add log2(32) and, in log2, c spread / (1 + limit c spread), c = scale_log2.
  // Column 8 j + 2 t + i of a thread belongs to key tile 2 j + t / 2 of the block.
  __device__ __forceinline__ void add_spread(const float (&spread)[kN / 2], uint32_t skipped) {
    const uint32_t bits = skipped >> (lane_ % 4 / 2);
    const float bonus = kGroupBonus / args_.scale_log2, limit = kSpreadLimit * args_.scale_log2;
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      const bool counts = bits >> (2 * j) & 1;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float v = spread[4 * j + i];
        const float score = scores_[4 * j + i] + fmaf(v, reciprocal_approx(fmaf(limit, v, 1.f)), bonus);
        scores_[4 * j + i] = counts ? score : -INFINITY;
      }
    }
  }

  __device__ __forceinline__ void store() {
    if constexpr (Traits::kLowRank) {
      store_projected(Core::finish_rows());
    } else {
      Core::store();
    }
  }

  // O = O' U^T + (sum of weights) mean of V; O' is normalised before it is rounded as an operand.
  __device__ __forceinline__ void store_projected(const RowScale& scale) {
    constexpr int kWidth = Traits::kWidthV, kPerChunk = Traits::kChunkV / 16;
    uint32_t low[Traits::kDv / 4];
#pragma unroll
    for (int j = 0; j < Traits::kDv / 8; ++j) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int at = 4 * j + 2 * r;
        low[2 * j + r] =
            pack_pair(out_[at] * scale.factor[r], out_[at + 1] * scale.factor[r], static_cast<const T*>(nullptr));
      }
    }
    float wide[kWalkDim / 2];
    mbarrier_wait(&shared_.basis_full, basis_count_++ & 1);
    const uint64_t basis = Descriptor<kWidth>::k_major(shared_address(shared_.basis));
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < Traits::kDv / 16; ++i) {
      Wgmma<T, kWalkDim>::template rs<0>(wide, low[4 * i], low[4 * i + 1], low[4 * i + 2], low[4 * i + 3],
                                         basis + (i / kPerChunk * kWalkDim * kWidth + i % kPerChunk * 32) / 16, i > 0);
    }
    wgmma_commit();
    const int unit = tile_.batch * walk_.tables.shape.heads_kv + tile_.head / args_.group_size;
    const float2* mean = reinterpret_cast<const float2*>(walk_.tables.v_mean + int64_t{unit} * kWalkDim) + lane_ % 4;
    float2 means[kWalkDim / 8];
#pragma unroll
    for (int j = 0; j < kWalkDim / 8; ++j) means[j] = __ldg(mean + 4 * j);
    wgmma_wait<0>();
    pin(wide);
    release(&shared_.basis_empty);
#pragma unroll
    for (int j = 0; j < kWalkDim / 8; ++j) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        wide[4 * j + 2 * r] = fmaf(means[j].x, scale.share[r], wide[4 * j + 2 * r]);
        wide[4 * j + 2 * r + 1] = fmaf(means[j].y, scale.share[r], wide[4 * j + 2 * r + 1]);
      }
    }
    const float one[2] = {1.f, 1.f};
    Core::store_rows(wide, one);
  }

  const WalkArgs& walk_;
  int item_ = 0, begin_ = 0, end_ = 0, full_begin_ = 0, full_end_ = 0, kept_ = 0;
  bool far_ = false;
  uint32_t k_count_ = 0, basis_count_ = 0;
};

}  // namespace adaattn::cuda::sm90
