// A consumer warpgroup of the e4m3 kernels: 64 query rows, S = Q K^T and O += P V in 8 bits with fp32 accumulators. The
// loop is that of the 16-bit kernels; O leaves the accumulators for fp32 sums in shared memory every few blocks.
#pragma once

#include "attend/sm90/e4m3_traits.cuh"
#include "attend/sm90/forward_consumer.cuh"
#include "common/sm90_int8.cuh"
#include "common/sm90_wgmma8.cuh"

namespace adaattn::cuda::sm90 {

template <class Traits>
class E4m3Consumer {
  static constexpr ForwardConfig kC = Traits::kC;
  static constexpr int kN = Traits::kN, kColumns = kN / 8, kEarly = kC.early_columns, kKeep = Traits::kKeep;
  static constexpr int kOut = Traits::kOut;
  // Weights are 2^(x - max + kBits): e4m3 ends at 448 and is coarse below 2^-6.
  static constexpr float kBits = 8;

 public:
  __device__ __forceinline__ E4m3Consumer(const ForwardArgs& args, typename Traits::Shared& shared, int group)
      : args_(args),
        shared_(shared),
        group_(group),
        warp_(uniform(static_cast<int>(threadIdx.x) / 32 % 4)),
        lane_(static_cast<int>(threadIdx.x) % 32) {}

  __device__ __forceinline__ void run() {
    if (group_ == Traits::kGroups - 1) pass_turn();  // the first turn is group 0's
    if (!next_tile()) return;
    do {
      first_block();
      middle_blocks();
      last_block();
      store();
    } while (next_tile());
  }

 private:
  static __device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

  __device__ __forceinline__ void release(uint64_t* barrier) {
    __syncwarp();
    if (lane_ == 0) mbarrier_arrive(barrier);
  }
  __device__ __forceinline__ void take_turn() {
    if constexpr (kC.ordered) named_barrier_sync(static_cast<int>(NamedBarrier::kOrder) + group_, 2 * kWarpgroup);
  }
  __device__ __forceinline__ void pass_turn() {
    if constexpr (kC.ordered) {
      const int next = group_ + 1 == Traits::kGroups ? 0 : group_ + 1;
      named_barrier_arrive(static_cast<int>(NamedBarrier::kOrder) + next, 2 * kWarpgroup);
    }
  }
  __device__ __forceinline__ void wait_full(uint64_t* barriers, uint32_t count) {
    mbarrier_wait(&barriers[count % kStages], count / kStages & 1);
  }

  // The next tile that has keys; those without are answered on the way. False: no more tiles.
  __device__ __forceinline__ bool next_tile() {
    for (;; ++tile_count_) {
      const int slot = tile_count_ % 2;
      mbarrier_wait(&shared_.tile_full[slot], tile_count_ / 2 & 1);
      tile_.m_block = uniform(shared_.tile[slot].m_block);
      tile_.head = uniform(shared_.tile[slot].head);
      tile_.batch = uniform(shared_.tile[slot].batch);
      release(&shared_.tile_empty[slot]);
      if (tile_.m_block < 0) return false;
      range_ = tile_range<Traits>(args_, tile_);
      range_.n_min = uniform(range_.n_min);
      range_.n_max = uniform(range_.n_max);
      if (range_.blocks() > 0) break;
      store_empty();
    }
    ++tile_count_;
    return true;
  }

  __device__ __forceinline__ float descale(const Descale& x) const {
    return __ldg(x.data + tile_.batch * x.stride_b + tile_.head / args_.group_size * x.stride_h);
  }

  // Row limits: keys [low, high) of the thread's two rows, relative to the thread's first column.
  __device__ __forceinline__ void row_limits() {
    const int column = 2 * (lane_ % 4);
    if constexpr (kC.masked) {
      const int first_row = tile_.m_block * Traits::kM + group_ * kGroupRows;
      const int right = args_.window_right, left = args_.window_left;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int diagonal = first_row + warp_ * 16 + lane_ / 4 + 8 * r + range_.off;
        high_[r] = (right >= 0 ? min(range_.len_k, diagonal + right + 1) : range_.len_k) - column;
        low_[r] = (left >= 0 ? diagonal - left : 0) - column;
      }
      free_end_ = uniform(right >= 0 ? max(0, first_row + range_.off + right + 1) / kN : range_.n_max);
      free_begin_ = uniform(left >= 0 ? (max(0, first_row + kGroupRows - 1 + range_.off - left) + kN - 1) / kN : 0);
    } else {
      high_[0] = high_[1] = range_.len_k - column;
    }
  }

  __device__ __forceinline__ void first_block() {
    mbarrier_wait(&shared_.q_full[group_], q_count_++ & 1);
    wait_full(shared_.k_full, kv_count_);
    wgmma_fence();
    issue_scores(kv_count_);
    row_limits();
    // A factor of 0 must not turn a masked score into NaN.
    scale_ = fmaxf(args_.scale_log2 * descale(args_.p.q_descale) * descale(args_.p.k_descale), FLT_MIN);
    wgmma_wait<0>();
    pin(scores_);
    release_scores(kv_count_, range_.blocks() == 1);
    const int n = range_.n_max - 1;
    if constexpr (kC.masked) {
      begin_softmax<true, MaskSides::kBoth>(n);
    } else if ((n + 1) * kN > range_.len_k) {
      begin_softmax<true, MaskSides::kEnd>(n);
    } else {
      begin_softmax<true, MaskSides::kNone>(n);
    }
    finish_softmax<true>();
    wait_full(shared_.v_full, kv_count_);
    clear_out();
  }

  __device__ __forceinline__ void middle_blocks() {
    int n = range_.n_max - 2;
    if constexpr (kC.masked) {
      // One body for both masked ends, as in the 16-bit kernels.
      for (int stop = max(range_.n_min, free_end_);; stop = range_.n_min) {
        for (; n >= stop; --n) step<MaskSides::kBoth>(n);
        if (stop == range_.n_min) break;
        for (; n >= max(range_.n_min, free_begin_); --n) step<MaskSides::kNone>(n);
      }
    } else {
      for (; n >= range_.n_min; --n) step<MaskSides::kNone>(n);
    }
  }

  // S of block n beside O += P V of block n + 1, then the softmax of block n.
  template <MaskSides kMask>
  __device__ __forceinline__ void step(int n) {
    issue_both();
    release_scores(kv_count_ + 1, n == range_.n_min);
    begin_softmax<false, kMask>(n);
    pin(scores_);
    // Stands here because it ends the basic block, to whose start ptxas moves the wait for PV.
    wait_full(shared_.v_full, kv_count_ + 1);
    wgmma_wait<0>();
    pin(out_);
    release(&shared_.v_empty[kv_count_ % kStages]);
    keep_now_and_then(n);
    finish_softmax<false>();
    ++kv_count_;
  }

  // S with the next K, then O += P V with the present V; returns when S is there.
  __device__ __forceinline__ void issue_both() {
    wait_full(shared_.k_full, kv_count_ + 1);
    take_turn();
    wgmma_fence();
    issue_scores(kv_count_ + 1);
    issue_out(kv_count_);
    pass_turn();
    wgmma_wait<1>();
    pin(scores_);
  }

  // Before the softmax of block n.
  __device__ __forceinline__ void keep_now_and_then(int n) {
    const int done = range_.n_max - 1 - n;  // blocks in O and kept
    if (done % kKeep != 0) return;
    if (done == kKeep) {
      keep_out<true>();
    } else {
      keep_out<false>();
    }
  }

  __device__ __forceinline__ void release_scores(uint32_t k, bool last) {
    release(&shared_.k_empty[k % kStages]);
    if (last) release(&shared_.q_empty[group_]);
  }

  __device__ __forceinline__ void last_block() {
    wgmma_fence();
    issue_out(kv_count_);
    wgmma_wait<0>();
    pin(out_);
    release(&shared_.v_empty[kv_count_ % kStages]);
    ++kv_count_;
  }

  __device__ __forceinline__ void issue_scores(uint32_t count) {
    const uint64_t q = Descriptor<Traits::kD>::k_major(shared_address(shared_.q[group_]));
    const uint64_t k = Descriptor<Traits::kD>::k_major(shared_address(shared_.k[count % kStages]));
#pragma unroll
    for (int i = 0; i < Traits::kD / 32; ++i) WgmmaE4m3<kN>::ss(scores_, q + 2 * i, k + 2 * i, i > 0);
    wgmma_commit();
  }

  __device__ __forceinline__ void issue_out(uint32_t count) {
    const uint64_t v = Descriptor<kSlabKeys>::k_major(shared_address(shared_.v[count % kStages]));
#pragma unroll
    for (int i = 0; i < Traits::kSlabs; ++i) {
      WgmmaE4m3<Traits::kLines>::rs(out_, probabilities_[4 * i], probabilities_[4 * i + 1], probabilities_[4 * i + 2],
                                    probabilities_[4 * i + 3], v + i * (Traits::kSlabBytes / 16), 1);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void clear_out() {
#pragma unroll
    for (int i = 0; i < Traits::kPart; ++i) out_[i] = 0;
  }

  // Row maxima, the shift and the rescaling factor that follow from them, and the first exponentials.
  template <bool kFirst, MaskSides kMask>
  __device__ __forceinline__ void begin_softmax(int n) {
    if constexpr (kMask != MaskSides::kNone) mask<kMask>(n);
    float top[4] = {scores_[0], scores_[2], scores_[1], scores_[3]};
#pragma unroll
    for (int j = 1; j < kColumns; ++j) {
      top[0] = fmaxf(top[0], scores_[4 * j]);
      top[1] = fmaxf(top[1], scores_[4 * j + 2]);
      top[2] = fmaxf(top[2], scores_[4 * j + 1]);
      top[3] = fmaxf(top[3], scores_[4 * j + 3]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = fmaxf(top[r], top[r + 2]);
      if constexpr (!kFirst) top[r] = fmaxf(top[r], row_max_[r]);
    }
#pragma unroll
    for (int step = 1; step <= 2; ++step) {
#pragma unroll
      for (int r = 0; r < 2; ++r) top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], step));
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // A row with no visible key so far: its exponentials must be 0, not exp2(-inf + inf).
      shift_[r] = kMask != MaskSides::kNone && top[r] == -INFINITY ? 0.f : fmaf(top[r], scale_, -kBits);
      rescale_[r] = kFirst ? 0.f : exp2_approx(fmaf(row_max_[r], scale_, -kBits) - shift_[r]);
      row_max_[r] = top[r];
    }
#pragma unroll
    for (int j = 0; j < kEarly; ++j) exponentiate(j);
  }

  // The other exponentials, P, and O at the new maximum.
  template <bool kFirst>
  __device__ __forceinline__ void finish_softmax() {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (j >= kEarly) exponentiate(j);
      if (j % 2 == 1) pack_columns(j / 2);
      if constexpr (!kFirst) {
#pragma unroll
        for (int i = j * kOut / kColumns; i < (j + 1) * kOut / kColumns; ++i) out_[i] *= rescale_[i / 2 % 2];
      }
    }
    if constexpr (!kFirst) {
#pragma unroll
      for (int i = kOut; i < Traits::kPart; ++i) out_[i] *= rescale_[i / 2 % 2];
#pragma unroll
      for (int r = 0; r < 2; ++r) kept_factor_[r] *= rescale_[r];
    }
  }

  __device__ __forceinline__ void exponentiate(int j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& s = scores_[4 * j + i];
      s = exp2_approx(fmaf(s, scale_, -shift_[i / 2]));
    }
  }

  // Two column groups are one of V's 16 keys, in the order of the transposer.
  __device__ __forceinline__ void pack_columns(int pair) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at = 8 * pair + 2 * r;
      probabilities_[2 * pair + r] = pack_e4m3(scores_[at], scores_[at + 1], scores_[at + 4], scores_[at + 5]);
    }
  }

  template <MaskSides kMask>
  __device__ __forceinline__ void mask(int n) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int high = high_[r] - n * kN;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          if (8 * j + c >= high) scores_[4 * j + 2 * r + c] = -INFINITY;
        }
      }
      if constexpr (kMask == MaskSides::kBoth) {
        if (args_.window_left >= 0) {
          const int low = low_[r] - n * kN;
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              if (8 * j + c < low) scores_[4 * j + 2 * r + c] = -INFINITY;
            }
          }
        }
      }
    }
  }

  // O and the row sums, at the maximum of the block they end with, join those in shared memory; kept_factor_ has
  // followed the maxima since the last time.
  template <bool kFirst>
  __device__ __forceinline__ void keep_out() {
    float4* const kept = &shared_.kept[group_][0][warp_ * 32 + lane_];
#pragma unroll
    for (int i = 0; i < kOut / 4; ++i) {
      float4 x = make_float4(out_[4 * i], out_[4 * i + 1], out_[4 * i + 2], out_[4 * i + 3]);
      if constexpr (!kFirst) add_kept(x, kept[i * kWarpgroup]);
      kept[i * kWarpgroup] = x;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = out_[kOut + 2 * r];
      kept_sum_[r] = kFirst ? sum : fmaf(kept_sum_[r], kept_factor_[r], sum);
      kept_factor_[r] = 1;
    }
    clear_out();
  }
  __device__ __forceinline__ void add_kept(float4& x, const float4& kept) const {
    x.x = fmaf(kept.x, kept_factor_[0], x.x);
    x.y = fmaf(kept.y, kept_factor_[0], x.y);
    x.z = fmaf(kept.z, kept_factor_[1], x.z);
    x.w = fmaf(kept.w, kept_factor_[1], x.w);
  }

  // Of what is left in the accumulators and what was kept.
  __device__ __forceinline__ void collect_out() {
    float4* const kept = &shared_.kept[group_][0][warp_ * 32 + lane_];
#pragma unroll
    for (int i = 0; i < kOut / 4; ++i) {
      float4 x = make_float4(out_[4 * i], out_[4 * i + 1], out_[4 * i + 2], out_[4 * i + 3]);
      add_kept(x, kept[i * kWarpgroup]);
      out_[4 * i] = x.x;
      out_[4 * i + 1] = x.y;
      out_[4 * i + 2] = x.z;
      out_[4 * i + 3] = x.w;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) out_[kOut + 2 * r] = fmaf(kept_sum_[r], kept_factor_[r], out_[kOut + 2 * r]);
  }

  __device__ __forceinline__ int row_of(int r) const {
    return tile_.m_block * Traits::kM + group_ * kGroupRows + warp_ * 16 + lane_ / 4 + 8 * r;
  }

  __device__ __forceinline__ float* lse_of(int64_t position) const {
    const AttnParams& p = args_.p;
    return static_cast<float*>(p.lse.data) + tile_.batch * p.lse.stride_b + position * p.lse.stride_s +
           tile_.head * p.lse.stride_h;
  }

  // Normalises and writes O and LSE.
  __device__ __forceinline__ void store() {
    if (range_.blocks() > kKeep) collect_out();
    const AttnParams& p = args_.p;
    const float sink = p.sinks != nullptr ? p.sinks[tile_.head * p.sinks_stride] * kLog2e : -INFINITY;
    const float v_scale = descale(p.v_descale);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = out_[kOut + 2 * r], top = row_max_[r] == -INFINITY ? -INFINITY : row_max_[r] * scale_;
      const float shared_top = fmaxf(top, sink);
      const bool empty = shared_top == -INFINITY;
      const float weight = empty ? 0.f : exp2_approx(top - shared_top - kBits);
      const float total = empty ? 1.f : fmaf(sum, weight, exp2_approx(sink - shared_top));
      const float factor = __fdividef(weight, total) * v_scale;
      const int row = row_of(r);
      if (row >= range_.len_q) continue;
      const int64_t position = range_.q_start + row;
      if (p.lse.data != nullptr && lane_ % 4 == 0)
        *lse_of(position) = empty ? -INFINITY : (shared_top + __log2f(total)) * kLn2;
      store_row(tile_.batch * p.o.stride_b + position * p.o.stride_s + tile_.head * p.o.stride_h, r, factor);
    }
  }

  // The transposer's order of columns gives a lane four neighbours of every 16.
  __device__ __forceinline__ void store_row(int64_t offset, int r, float factor) const {
    const int first = 4 * (lane_ % 4), d_v = static_cast<int>(args_.p.d_v);
    uint8_t* const o = static_cast<uint8_t*>(args_.p.o.data);
    const Dtype dtype = args_.p.o.dtype;
#pragma unroll
    for (int c = 0; c < Traits::kDv / 16; ++c) {
      const int even = 8 * c + 2 * r, odd = even + 4, column = 16 * c + first;
      const float x[4] = {out_[even] * factor, out_[odd] * factor, out_[even + 1] * factor, out_[odd + 1] * factor};
      const int64_t at = offset + column;
      if (dtype == Dtype::kF32) {
        store_four<4>(o + 4 * at,
                      {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])},
                      d_v - column);
      } else if (dtype == Dtype::kBF16) {
        constexpr const __nv_bfloat16* kType = nullptr;
        store_four<2>(o + 2 * at, {pack_pair(x[0], x[1], kType), pack_pair(x[2], x[3], kType), 0, 0}, d_v - column);
      } else {
        constexpr const __half* kType = nullptr;
        store_four<2>(o + 2 * at, {pack_pair(x[0], x[1], kType), pack_pair(x[2], x[3], kType), 0, 0}, d_v - column);
      }
    }
  }

  // The first `count` of four elements of kSize bytes.
  template <int kSize>
  static __device__ __forceinline__ void store_four(uint8_t* to, uint4 words, int count) {
    if (count >= 4) {
      if constexpr (kSize == 4) {
        *reinterpret_cast<uint4*>(to) = words;
      } else {
        *reinterpret_cast<uint2*>(to) = make_uint2(words.x, words.y);
      }
      return;
    }
    const uint8_t* const bytes = reinterpret_cast<const uint8_t*>(&words);
#pragma unroll
    for (int i = 0; i < 3 * kSize; ++i) {
      if (i < count * kSize) to[i] = bytes[i];
    }
  }

  // A tile without keys: O = 0, LSE that of the sink alone.
  __device__ __forceinline__ void store_empty() {
    const AttnParams& p = args_.p;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = row_of(r);
      if (row >= range_.len_q) continue;
      const int64_t position = range_.q_start + row;
      if (p.lse.data != nullptr && lane_ % 4 == 0)
        *lse_of(position) = p.sinks != nullptr ? p.sinks[tile_.head * p.sinks_stride] : -INFINITY;
      const int size = p.o.dtype == Dtype::kF32 ? 4 : 2, bytes = static_cast<int>(p.d_v) * size;
      uint8_t* const o = static_cast<uint8_t*>(p.o.data) +
                         (tile_.batch * p.o.stride_b + position * p.o.stride_s + tile_.head * p.o.stride_h) * size;
      for (int at = 2 * (lane_ % 4); at < bytes; at += 8) *reinterpret_cast<uint16_t*>(o + at) = 0;
    }
  }

  const ForwardArgs& args_;
  typename Traits::Shared& shared_;
  const int group_, warp_, lane_;
  Tile tile_;
  TileRange range_;
  uint32_t tile_count_ = 0, q_count_ = 0, kv_count_ = 0;
  int free_begin_ = 0, free_end_ = 0;  // blocks [free_begin_, free_end_) need no mask
  int high_[2], low_[2];
  float scale_;  // from S to base-2 logits
  float row_max_[2], rescale_[2], shift_[2];
  float kept_sum_[2], kept_factor_[2];
  float scores_[kN / 2];  // then weights
  uint32_t probabilities_[kN / 8];
  float out_[Traits::kPart];  // O and the row sums of P
};

}  // namespace adaattn::cuda::sm90
