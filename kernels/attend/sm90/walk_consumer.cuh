// A consumer warpgroup of the mask-walking kernels: the key tiles of a query tile that are not kept, as centroids, then
// the others from the last to the first, and for V in a basis the product with it at the end. With a probe the others
// first, then those that it finds, and then what is left as centroids: thresholds are of exact keys alone.
#pragma once

#include "attend/sm90/consumer_core.cuh"
#include "attend/sm90/walk.h"
#include "attend/sm90/walk_mean.cuh"
#include "attend/sm90/walk_tiles.cuh"

namespace adaattn::cuda::sm90 {

constexpr float kGroupBonus = 7.0f;  // log2(kFarKeys)
// The second-order term of a group's log weight, v/2, overshoots where scores spread over more than a few nats, because
// 128 keys have no Gaussian tail: it is taken as v/2 / (1 + v/8), here in units of log2.
constexpr float kSpreadLimit = 0.17328679513998632f;  // ln(2) / 4
static_assert(kFarKeys == 128);
constexpr float kMostLeftOut = 15.f;  // log2 of the weight of what is left out over that of the row's maximum

template <class Traits>
class WalkConsumer : WalkTiles<ConsumerCore<Traits>> {
  using Core = ConsumerCore<Traits>;
  using Tiles = WalkTiles<Core>;
  using Core::args_, Core::shared_, Core::group_, Core::warp_, Core::lane_, Core::tile_, Core::range_;
  using Core::kN, Core::q_count_, Core::v_count_;
  using Core::scores_, Core::out_, Core::row_max_, Core::row_sum_;
  using Core::uniform, Core::release;
  using Tiles::begin_, Tiles::end_, Tiles::full_begin_, Tiles::full_end_, Tiles::kept_;
  using typename Core::RowScale, typename Core::T;

 public:
  __device__ __forceinline__ WalkConsumer(const WalkArgs& args, typename Traits::Shared& shared, int group)
      : Tiles(args.forward, shared, group), walk_(args) {}

  __device__ __forceinline__ void run() {
    take_tile();
    while (Tiles::begin_taken()) {
      begin_tile();
      exact_blocks();
      if constexpr (Traits::kProbe) probe_others();
      // What does not need O runs under the last product.
      Core::issue_last();
      if constexpr (Traits::kFar) {
        if (walk_.far_share != nullptr) write_share(share_of_far());
      }
      if constexpr (Traits::kRemainder) add_remainder();
      const RowScale scale = Core::finish_rows();
      take_tile();
      Core::finish_last();
      store(scale);
    }
    Core::drain();
  }

 private:
  __device__ __forceinline__ void take_tile() {
    Tiles::take_tile([&](const WalkTile& walk) {
      if constexpr (Traits::kFar) {
        // Registers are short in the loops.
        if (lane_ == 0) shared_.item[group_][warp_] = walk.item;
      }
    });
  }

  // Up to the weights of the last visible tile, which is always kept.
  __device__ __forceinline__ void begin_tile() {
    const bool far = Traits::kFar && !Traits::kProbe && walk_.far_field && kept_ < end_ - begin_;
    const int valid = range_.len_k - (end_ - 1) * kN;
    mbarrier_wait(&shared_.q_full[group_], q_count_++ & 1);
    Core::first_scores(k_count_);
    float mean_scores[4];
    if constexpr (Traits::kRemainder) issue_mean_scores(mean_scores, shared_.q[group_], shared_.mean_k[group_]);
    Core::set_limits(range_.off, range_.len_k);
    if (far) {
      if constexpr (Traits::kFar && !Traits::kProbe) {
        first_centroids();
        keep_far_rows(true);
        step<MaskSides::kBoth>(end_ - 1, kept_ - 1);
        if (args_.zero_v_tail && valid < kN) Core::zero_v_tail(valid);
      }
    } else {
      wgmma_wait<0>();
      pin(scores_);
      if constexpr (Traits::kRemainder) {
        pin(mean_scores);
        keep_mean_scores(mean_scores);
      }
      Core::release_scores(k_count_++, is_last(kept_ - 1));
      Core::template begin_softmax<true, MaskSides::kBoth>(end_ - 1);
      Core::begin_out(valid);
      if constexpr (Traits::kFar && !Traits::kProbe) keep_far_rows(false);
    }
    // The compiler takes what differs between the branches for what differs between lanes.
    k_count_ = uniform(k_count_);
    v_count_ = uniform(v_count_);
  }

  __device__ __forceinline__ void exact_blocks() {
    Tiles::each_block([&](int tile, int rest) { step<MaskSides::kBoth>(tile, rest); },
                      [&](int rest) { Core::quick_step(0, k_count_++, is_last(rest)); });
  }

  template <MaskSides kMask>
  __device__ __forceinline__ void step(int n, int rest) {
    Core::template step<kMask>(n, k_count_++, is_last(rest));
  }
  // Whether nothing reads Q after a kept tile that has so many behind it.
  __device__ __forceinline__ bool is_last(int rest) const {
    return rest == 0 && !(Traits::kProbe && kept_ < end_ - begin_);
  }

  // The tiles that are not kept, which every row sees whole. P of the last kept one waits in registers.
  __device__ __forceinline__ void probe_others() {
    int rest = end_ - begin_ - kept_;
    const bool any = rest > 0;
    bool left = false;
    float base[2] = {0, 0};
    if (Traits::kLowProbe && any) read_base(base);
    for (; rest > 0; rest -= kSweepTiles) {
      const int swept = min(rest, kSweepTiles);
      int found = sweep(swept, base);
      left = left || found < swept;
      for (; found > 0; --found) Core::quick_step(0, k_count_++, false);
    }
    keep_far_rows(true);
    if (walk_.far_field && left) {
      square_queries();
      while (next_centroids().last == 0) {
      }
    }
    if (any) release(&shared_.q_empty[group_]);
  }

  // What a probe in a basis leaves out of the scores of the thread's rows.
  __device__ __forceinline__ void read_base(float (&base)[2]) const {
    const TableShape& shape = walk_.tables.shape;
    const float* const rows =
        walk_.tables.probe_base + (int64_t{tile_.batch} * shape.heads_q + tile_.head) * shape.query_rows();
#pragma unroll
    for (int r = 0; r < 2; ++r) base[r] = rows[Core::row_of(r)];
  }

  // S of a tile that is swept, on its way; place: of those in its buffer.
  __device__ __forceinline__ void issue_swept(int place) {
    if constexpr (Traits::kLowProbe) {
      constexpr int kWidth = Traits::kProbeWidth;
      if (place == 0) Core::wait_k(k_count_);
      wgmma_fence();
      const uint64_t a = Descriptor<kWidth>::k_major(shared_address(shared_.q_squared[group_]));
      const uint64_t b = Descriptor<kWidth>::k_major(
          shared_address(shared_.k[k_count_ % Traits::kKStages] + place * Traits::kSweptBytes));
#pragma unroll
      for (int i = 0; i < Traits::kProbeColumns / 16; ++i)
        Wgmma<T, kN>::template ss<0>(scores_, a + i * 32 / 16, b + i * 32 / 16, i > 0);
      wgmma_commit();
    } else {
      Core::first_scores(k_count_);
    }
  }

  // Scores of so many tiles less `base`, without weights. Returns in how many of them a key holds a needle's share of a
  // row: what the row has been given so far is less than what it will have, so no such key stays under the threshold.
  __device__ __forceinline__ int sweep(int count, const float (&base)[2]) {
    float least[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float weight = __log2f(quad_sum(row_sum_[r])) + walk_.log2_needle;
      least[r] = Core::row_of(r) < range_.len_q ? fmaf(weight, 1 / args_.scale_log2, row_max_[r]) - base[r] : INFINITY;
    }
    auto& found = shared_.found[sweep_count_ & 1];
    for (int i = 0; i < count; ++i) {
      const int place = i % Traits::kSweptTogether;
      issue_swept(place);
      wgmma_wait<0>();
      pin(scores_);
      if (place == Traits::kSweptTogether - 1 || i + 1 == count)
        release(&shared_.k_empty[k_count_++ % Traits::kKStages]);
      float top[4] = {scores_[0], scores_[2], scores_[1], scores_[3]};
#pragma unroll
      for (int j = 1; j < Core::kColumns; ++j) {
        top[0] = fmaxf(top[0], scores_[4 * j]);
        top[1] = fmaxf(top[1], scores_[4 * j + 2]);
        top[2] = fmaxf(top[2], scores_[4 * j + 1]);
        top[3] = fmaxf(top[3], scores_[4 * j + 3]);
      }
      const bool hit = fmaxf(top[0], top[2]) >= least[0] || fmaxf(top[1], top[3]) >= least[1];
      if (__any_sync(~0u, hit) && lane_ == 0) atomicOr(&found, 1ull << i);
    }
    // Of the lane that wrote.
    if (lane_ == 0) mbarrier_arrive(&shared_.found_full);
    mbarrier_wait(&shared_.found_full, sweep_count_++ & 1);
    return uniform(lane_ == 0 ? __popcll(found) : 0);
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

  // The blocks of centroids, of which the skipped tiles' count, up to the weights of the last. S of the first is on its
  // way, and nothing else: its second-order term comes as a product beside it.
  __device__ __forceinline__ void first_centroids() {
    FarBlock far = read_far();
    square_queries();
    add_spread<kN>(far, 0);
    release_centroids();
    Core::template begin_softmax<true, MaskSides::kNone>(0);
    Core::begin_out(kN);
    while (far.last == 0) far = next_centroids();
  }
  // O += P V of the block before, then one block of centroids.
  __device__ __forceinline__ FarBlock next_centroids() {
    Core::wait_full(shared_.k_full, k_count_);
    const FarBlock far = read_far();
    wgmma_fence();
    Core::issue_out(v_count_);
    Core::issue_scores(k_count_);
    wgmma_wait<1>();
    pin(out_);
    release(&shared_.v_empty[v_count_ % kStages]);
    // Registers for all columns at a time are not there beside O.
    add_spread<kN / 2>(far, 0);
    add_spread<kN / 2>(far, kN / 2);
    release_centroids();
    Core::template begin_softmax<false, MaskSides::kNone>(0);
    Core::wait_full(shared_.v_full, v_count_ + 1);
    Core::template finish_softmax<false>();
    ++v_count_;
    return far;
  }
  __device__ __forceinline__ FarBlock read_far() const {
    const FarBlock& from = shared_.far[k_count_ % kStages];
    const int4 skipped = Core::read_slot(from.skipped), last = Core::read_slot(&from.last);
    const auto word = [](int low, int high) {
      return static_cast<uint64_t>(static_cast<uint32_t>(uniform(low))) |
             static_cast<uint64_t>(static_cast<uint32_t>(uniform(high))) << 32;
    };
    return {{word(skipped.x, skipped.y), word(skipped.z, skipped.w)}, uniform(last.x)};
  }
  __device__ __forceinline__ void release_centroids() {
    release(&shared_.k_empty[k_count_ % kStages]);
    release(&shared_.k_empty[(k_count_ + 1) % kStages]);
    k_count_ += 2;
  }

  __device__ __forceinline__ float quad_sum(float x) const {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
  }
  __device__ __forceinline__ float2& far_row(int r) const {
    return shared_.far_rows[group_][16 * warp_ + lane_ / 4 + 8 * r];
  }
  // What the far field holds of the rows, for share_of_far(), or with a probe what the keys hold; of each quad lane 0
  // keeps it.
  __device__ __forceinline__ void keep_far_rows(bool any) const {
    if (walk_.far_share == nullptr) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = quad_sum(row_sum_[r]);
      if (lane_ % 4 == 0) far_row(r) = {row_max_[r], any ? sum : 0.f};
    }
  }
  __device__ __forceinline__ float share_of_far() const {
    float share = 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float2 far = lane_ % 4 == 0 ? far_row(r) : make_float2(0.f, 0.f);
      const float weight = far.y * exp2_approx((far.x - row_max_[r]) * args_.scale_log2), all = quad_sum(row_sum_[r]);
      if (far.y > 0 && Core::row_of(r) < range_.len_q) share += Traits::kProbe ? 1 - weight / all : weight / all;
    }
#pragma unroll
    for (int step = 4; step <= 16; step *= 2) share += __shfl_xor_sync(~0u, share, step);
    return share;
  }
  __device__ __forceinline__ void write_share(float share) {
    const int warp = group_ * (kWarpgroup / 32) + warp_;
    if (lane_ == 0) walk_.far_share[int64_t{shared_.item[group_][warp_]} * kWalkShares + warp] = share;
  }

  // The second-order term of kColumns columns, from a product with the groups' variances, to the scores, which are
  // there when it is. In units of q . k: the keys of a group add log2(128) and, in log2, c spread / (1 + limit c
  // spread), c = scale_log2. Column 8 j + 2 t + i of a thread is the centroid of the block's key tile of that number.
  template <int kColumns>
  __device__ __forceinline__ void add_spread(const FarBlock& far, int first) {
    float spread[kColumns / 2];
    Core::wait_full(shared_.k_full, k_count_ + 1);
    wgmma_fence();
    Core::issue_products(spread, shared_.q_squared[group_], shared_.k[(k_count_ + 1) % kStages], first);
    wgmma_wait<0>();
    pin(scores_);
    pin(spread);
    const float bonus = kGroupBonus / args_.scale_log2, limit = kSpreadLimit * args_.scale_log2;
    const int shift = 2 * (lane_ % 4);
#pragma unroll
    for (int word = 0; word < kColumns / 32; ++word) {
      const int at_word = word + first / 32;
      const uint32_t bits = static_cast<uint32_t>(far.skipped[at_word / 2] >> 32 * (at_word % 2)) >> shift;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float v = spread[16 * word + i];
        float& score = scores_[16 * at_word + i];
        const float all = score + fmaf(v, reciprocal_approx(fmaf(limit, v, 1.f)), bonus);
        score = bits >> (8 * (i / 4) + i % 2) & 1 ? all : -INFINITY;
      }
    }
  }

  __device__ __forceinline__ void store(const RowScale& scale) {
    if constexpr (Traits::kLowRank) {
      store_projected(scale);
    } else {
      if constexpr (Traits::kRemainder) add_values();
      Core::store(scale);
      // Of every lane, for each has read; and only here, for an arrival overtakes reads that nobody has waited for: the
      // next record was there before them.
      if constexpr (Traits::kRemainder) mbarrier_arrive(&shared_.remainder_empty);
    }
  }

  // Of the thread's rows with K's mean, as the product leaves them: in the first lane of each quad, which keeps them.
  __device__ __forceinline__ void keep_mean_scores(const float (&scores)[4]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      asm volatile(
          "{\n.reg .pred p;\nsetp.eq.s32 p, %1, 0;\n@p st.shared.f32 [%0], %2;\n}" ::"r"(mean_score_address(r)),
          "r"(lane_ % 4), "f"(scores[2 * r] + scores[2 * r + 1])
          : "memory");
    }
  }
  __device__ __forceinline__ float mean_score(int r) const {
    float score = 0;
    asm volatile("{\n.reg .pred p;\nsetp.eq.s32 p, %2, 0;\n@p ld.shared.f32 %0, [%1];\n}"
                 : "+f"(score)
                 : "r"(mean_score_address(r)), "r"(lane_ % 4)
                 : "memory");
    return __shfl_sync(~0u, score, lane_ & ~3);
  }
  __device__ __forceinline__ uint32_t mean_score_address(int r) const {
    return shared_address(&shared_.mean_scores[group_][16 * warp_ + lane_ / 4 + 8 * r]);
  }

  // What is left out is one more key of each row: its share of the row sum, so that LSE has it too, and its values.
  __device__ __forceinline__ void add_remainder() {
    mbarrier_wait(&shared_.remainder_full, remainder_count_++ & 1);
    const float level = shared_.remainder[kWalkDim + 2 * group_ + warp_ / 2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // A row without keys has a maximum of -inf, and no use for the weight.
      const float weight = fmaf(mean_score(r) - row_max_[r], args_.scale_log2, level);
      left_out_[r] = level == -INFINITY ? 0.f : exp2_approx(fminf(weight, kMostLeftOut));
      row_sum_[r] += lane_ % 4 == 0 ? left_out_[r] : 0.f;
    }
  }
  __device__ __forceinline__ void add_values() {
#pragma unroll
    for (int j = 0; j < Traits::kDv / 8; ++j) {
      const float2 x = *reinterpret_cast<const float2*>(shared_.remainder + 8 * j + 2 * (lane_ % 4));
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        out_[4 * j + 2 * r] = fmaf(x.x, left_out_[r], out_[4 * j + 2 * r]);
        out_[4 * j + 2 * r + 1] = fmaf(x.y, left_out_[r], out_[4 * j + 2 * r + 1]);
      }
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
  float left_out_[2];  // weights, in units of the row's
  uint32_t k_count_ = 0, basis_count_ = 0, remainder_count_ = 0, sweep_count_ = 0;
};

}  // namespace adaattn::cuda::sm90
