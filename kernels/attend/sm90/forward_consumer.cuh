// A consumer warpgroup: 64 query rows of each tile, S = Q K^T and O = P V by wgmma with the online softmax between
// them. The loop overlaps S of key block n with P V of block n + 1, so the exponentials of one warpgroup run under the
// matrix products of its own and of the other one.
#pragma once

#include <cfloat>

#include "attend/sm90/forward_schedule.cuh"
#include "common/sm90_ptx.cuh"
#include "common/sm90_wgmma.cuh"

namespace adaattn::sm90 {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

enum class MaskSides { kNone, kEnd, kBoth, kLeft };

__device__ __forceinline__ uint32_t pack_pair(float low, float high, const __nv_bfloat16*) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ uint32_t pack_pair(float low, float high, const __half*) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// Four lanes hold word t of four 16-byte groups each; afterwards lane t holds group t.
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4], int t) {
  const bool odd = t & 1, upper = t & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(~0u, odd ? w[i] : w[i + 1], 1);
    (odd ? w[i] : w[i + 1]) = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(~0u, upper ? w[i] : w[i + 2], 2);
    (upper ? w[i] : w[i + 2]) = got;
  }
}

template <class Traits>
class Consumer {
  using T = typename Traits::T;
  static constexpr ForwardConfig kC = Traits::kC;
  static constexpr int kN = Traits::kN;

 public:
  __device__ __forceinline__ Consumer(const ForwardArgs& args, typename Traits::Shared& shared, int group)
      : args_(args),
        shared_(shared),
        group_(group),
        warp_(static_cast<int>(threadIdx.x) / 32 % 4),
        lane_(static_cast<int>(threadIdx.x) % 32) {}

  __device__ __forceinline__ void run() {
    if constexpr (kC.ordered) {
      if (group_ == Traits::kGroups - 1) pass_turn();  // the first turn is group 0's
    }
    for (int i = 0;; ++i) {
      const int slot = i % 2;
      mbarrier_wait(&shared_.tile_full[slot], i / 2 & 1);
      const Tile tile = shared_.tile[slot];
      release(&shared_.tile_empty[slot]);
      if (tile.m_block < 0) break;
      const TileRange range = tile_range<Traits>(args_, tile);
      if (range.blocks() > 0) {
        attend(tile, range);
      } else {
        row_max_[0] = row_max_[1] = -INFINITY;
        row_sum_[0] = row_sum_[1] = 0;
#pragma unroll
        for (int j = 0; j < Traits::kDv / 2; ++j) out_[j] = 0;
      }
      store(tile, range);
    }
  }

 private:
  // One arrival per warp: its own reads are over, the others speak for themselves.
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

  __device__ __forceinline__ void attend(const Tile& tile, const TileRange& range) {
    const int q_stage = q_count_ % Traits::kQStages;
    q_address_ = shared_address(shared_.q[q_stage][group_]);
    q_empty_ = &shared_.q_empty[q_stage][group_];
    // Row limits: keys [low, high) of the thread's two rows, relative to the thread's first column.
    const int row = tile.m_block * Traits::kM + group_ * kGroupRows + warp_ * 16 + lane_ / 4;
    const int column = 2 * (lane_ % 4);
    int free_end = 0x7fffffff, free_begin = 0;  // blocks in [free_begin, free_end) need no mask
    if constexpr (kC.masked) {
      const int first_row = tile.m_block * Traits::kM + group_ * kGroupRows;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int diagonal = row + 8 * r + range.off;
        high_[r] = min(range.len_k, args_.window_right >= 0 ? diagonal + args_.window_right + 1 : range.len_k) - column;
        low_[r] = (args_.window_left >= 0 ? diagonal - args_.window_left : 0) - column;
      }
      if (args_.window_right >= 0) free_end = max(0, first_row + range.off + args_.window_right + 1) / kN;
      if (args_.window_left >= 0) {
        free_begin = (max(0, first_row + kGroupRows - 1 + range.off - args_.window_left) + kN - 1) / kN;
      }
    } else {
      high_[0] = high_[1] = range.len_k - column;
    }

    int n = range.n_max - 1;
    mbarrier_wait(&shared_.q_full[q_stage][group_], q_count_ / Traits::kQStages & 1);
    ++q_count_;
    wait_full(shared_.k_full, kv_count_);
    wgmma_fence();
    issue_scores(kv_count_);
    wgmma_wait<0>();
    pin(scores_);
    release(&shared_.k_empty[kv_count_ % kStages]);
    if (n == range.n_min) release(q_empty_);
    if constexpr (kC.masked) {
      softmax<true, MaskSides::kBoth>(n);
    } else if ((n + 1) * kN > range.len_k) {
      softmax<true, MaskSides::kEnd>(n);
    } else {
      softmax<true, MaskSides::kNone>(n);
    }
    pack_probabilities();
    if (args_.zero_v_tail && (n + 1) * kN > range.len_k) zero_v_tail(range.len_k - n * kN);

      // Zeroes and accumulation, not wgmma's discard flag: a run-time flag leaves O undefined on one path, and ptxas
      // then finds no fixed registers for it and serialises every product.
#pragma unroll
    for (int j = 0; j < Traits::kDv / 2; ++j) out_[j] = 0;
    --n;
    if constexpr (kC.masked) {
      for (; n >= max(range.n_min, free_end); --n) step<MaskSides::kBoth>(n, range.n_min);
      for (; n >= max(range.n_min, free_begin); --n) step<MaskSides::kNone>(n, range.n_min);
      for (; n >= range.n_min; --n) step<MaskSides::kLeft>(n, range.n_min);
    } else {
      for (; n >= range.n_min; --n) step<MaskSides::kNone>(n, range.n_min);
    }

    if constexpr (kC.rescale_early) rescale_out();
    wait_full(shared_.v_full, kv_count_);
    wgmma_fence();
    issue_out(kv_count_);
    wgmma_wait<0>();
    pin(out_);
    release(&shared_.v_empty[kv_count_ % kStages]);
    ++kv_count_;
  }

  // S of block n beside O += P V of block n + 1, then the softmax of block n.
  template <MaskSides kMask>
  __device__ __forceinline__ void step(int n, int n_min) {
    wait_full(shared_.k_full, kv_count_ + 1);
    take_turn();
    wgmma_fence();
    issue_scores(kv_count_ + 1);
    if constexpr (kC.rescale_early) rescale_out();
    wait_full(shared_.v_full, kv_count_);
    wgmma_fence();
    issue_out(kv_count_);
    pass_turn();
    wgmma_wait<1>();
    pin(scores_);
    release(&shared_.k_empty[(kv_count_ + 1) % kStages]);
    if (n == n_min) release(q_empty_);
    softmax<false, kMask>(n);
    wgmma_wait<0>();
    pin(out_);
    pin(scores_);
    release(&shared_.v_empty[kv_count_ % kStages]);
    pack_probabilities();
    if constexpr (!kC.rescale_early) rescale_out();
    ++kv_count_;
  }

  __device__ __forceinline__ void wait_full(uint64_t* barriers, uint32_t count) {
    mbarrier_wait(&barriers[count % kStages], count / kStages & 1);
  }

  __device__ __forceinline__ void issue_scores(uint32_t count) {
    constexpr int kWidth = Traits::kWidth, kPerChunk = Traits::kChunk / 16;
    const uint64_t q = Descriptor<kWidth>::k_major(q_address_);
    const uint64_t k = Descriptor<kWidth>::k_major(shared_address(shared_.k[count % kStages]));
#pragma unroll
    for (int i = 0; i < Traits::kD / 16; ++i) {
      const int chunk = i / kPerChunk, inside = i % kPerChunk * 32;
      Wgmma<T, kN>::template ss<0>(scores_, q + (chunk * kGroupRows * kWidth + inside) / 16,
                                   k + (chunk * kN * kWidth + inside) / 16, i > 0);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void issue_out(uint32_t count) {
    constexpr int kWidth = Traits::kWidthV;
    const uint64_t v = Descriptor<kWidth>::mn_major(shared_address(shared_.v[count % kStages]), kN * kWidth);
#pragma unroll
    for (int i = 0; i < kN / 16; ++i) {
      Wgmma<T, Traits::kDv>::template rs<1>(out_, probabilities_[4 * i], probabilities_[4 * i + 1],
                                            probabilities_[4 * i + 2], probabilities_[4 * i + 3], v + i * kWidth, 1);
    }
    wgmma_commit();
  }

  // scores_ becomes exp2(scores - maximum); row_max_, row_sum_ and rescale_ follow. Row sums are the thread's own part.
  template <bool kFirst, MaskSides kMask>
  __device__ __forceinline__ void softmax(int n) {
    if constexpr (kC.masked) {
      if (args_.softcap_log2 != 0) {
        // tanh(x) = 1 - 2 / (1 + exp(2x)): exact to the last bits where tanh.approx has an error of 2^-11.
#pragma unroll
        for (int i = 0; i < kN / 2; ++i) {
          scores_[i] = fmaf(-2.f, reciprocal_approx(1.f + exp2_approx(scores_[i] * args_.softcap_log2)), 1.f);
        }
      }
    }
    if constexpr (kMask != MaskSides::kNone) mask<kMask>(n);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = kFirst ? scores_[2 * r] : fmaxf(row_max_[r], scores_[2 * r]);
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) top = fmaxf(fmaxf(top, scores_[4 * j + 2 * r]), scores_[4 * j + 2 * r + 1]);
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      // A row with no visible key so far: its exponentials must be 0, not exp2(-inf + inf).
      const float shift = kMask != MaskSides::kNone && top == -INFINITY ? 0.f : top * args_.scale_log2;
      rescale_[r] = kFirst ? 0.f : exp2_approx(fmaf(row_max_[r], args_.scale_log2, -shift));
      row_max_[r] = top;
      float sum = 0;
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& s = scores_[4 * j + 2 * r + c];
          s = exp2_approx(fmaf(s, args_.scale_log2, -shift));
          sum += s;
        }
      }
      row_sum_[r] = kFirst ? sum : fmaf(row_sum_[r], rescale_[r], sum);
    }
  }

  template <MaskSides kMask>
  __device__ __forceinline__ void mask(int n) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int high = high_[r] - n * kN;
      if constexpr (kMask == MaskSides::kEnd || kMask == MaskSides::kBoth) {
#pragma unroll
        for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            if (8 * j + c >= high) scores_[4 * j + 2 * r + c] = -INFINITY;
          }
        }
      }
      if constexpr (kMask == MaskSides::kLeft || kMask == MaskSides::kBoth) {
        if (args_.window_left >= 0) {
          const int low = low_[r] - n * kN;
#pragma unroll
          for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              if (8 * j + c < low) scores_[4 * j + 2 * r + c] = -INFINITY;
            }
          }
        }
      }
    }
  }

  // The accumulator layout of S is the layout of wgmma's A operand in registers, two adjacent column groups per step.
  __device__ __forceinline__ void pack_probabilities() {
#pragma unroll
    for (int i = 0; i < kN / 4; ++i) {
      probabilities_[i] = pack_pair(scores_[2 * i], scores_[2 * i + 1], static_cast<const T*>(nullptr));
    }
  }

  __device__ __forceinline__ void rescale_out() {
    if constexpr (kC.lazy_rescale) {
      if (!__any_sync(~0u, rescale_[0] != 1.f || rescale_[1] != 1.f)) return;
    }
#pragma unroll
    for (int j = 0; j < Traits::kDv / 8; ++j) {
      out_[4 * j] *= rescale_[0];
      out_[4 * j + 1] *= rescale_[0];
      out_[4 * j + 2] *= rescale_[1];
      out_[4 * j + 3] *= rescale_[1];
    }
  }

  // 0 * NaN is NaN: keys beyond the sequence have weight 0, but their V must be finite.
  __device__ __forceinline__ void zero_v_tail(int valid) {
    wait_full(shared_.v_full, kv_count_);
    constexpr int kWidth = Traits::kWidthV;
    const int lines = kN - valid, words = lines * (kWidth / 16);
    uint8_t* v = shared_.v[kv_count_ % kStages];
    for (int i = group_ * kWarpgroup + warp_ * 32 + lane_; i < words * Traits::kChunksV;
         i += Traits::kGroups * kWarpgroup) {
      const int chunk = i / words, word = i - chunk * words;
      *reinterpret_cast<uint4*>(v + (chunk * kN + valid) * kWidth + word * 16) = make_uint4(0, 0, 0, 0);
    }
    ptx::fence_proxy_async(ptx::space_shared);
    named_barrier_sync(static_cast<int>(NamedBarrier::kTailZeroed), Traits::kGroups * kWarpgroup);
  }

  // Normalises and writes O and LSE from registers: after a quad transposition every lane stores 16 adjacent bytes.
  __device__ __forceinline__ void store(const Tile& tile, const TileRange& range) {
    const AttnParams& p = args_.p;
    const float sink = p.sinks != nullptr ? p.sinks[tile.head * p.sinks_stride] * kLog2e : -INFINITY;
    const int t = lane_ % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = row_sum_[r];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const float top = row_max_[r] * args_.scale_log2;
      const float shared_top = fmaxf(top, sink);
      const bool empty = shared_top == -INFINITY;
      const float weight = empty ? 0.f : exp2_approx(top - shared_top);
      const float total = empty ? 1.f : fmaf(sum, weight, exp2_approx(sink - shared_top));
      const float factor = weight / total;
      const int row = tile.m_block * Traits::kM + group_ * kGroupRows + warp_ * 16 + lane_ / 4 + 8 * r;
      const bool mine = row < range.len_q;
      const int64_t position = range.q_start + row;
      if (p.lse.data != nullptr && mine && t == 0) {
        static_cast<float*>(
            p.lse.data)[tile.batch * p.lse.stride_b + position * p.lse.stride_s + tile.head * p.lse.stride_h] =
            empty ? -INFINITY : (shared_top + __log2f(total)) * kLn2;
      }
      T* o = static_cast<T*>(p.o.data) + tile.batch * p.o.stride_b + position * p.o.stride_s + tile.head * p.o.stride_h;
#pragma unroll
      for (int j = 0; j < Traits::kDv / 32; ++j) {
        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = 4 * (4 * j + i) + 2 * r;
          w[i] = pack_pair(out_[at] * factor, out_[at + 1] * factor, static_cast<const T*>(nullptr));
        }
        transpose_quad(w, t);
        const int column = 32 * j + 8 * t;
        if (mine && column < p.d_v) *reinterpret_cast<uint4*>(o + column) = make_uint4(w[0], w[1], w[2], w[3]);
      }
    }
  }

  const ForwardArgs& args_;
  typename Traits::Shared& shared_;
  const int group_, warp_, lane_;
  uint32_t q_address_ = 0, q_count_ = 0, kv_count_ = 0;
  uint64_t* q_empty_ = nullptr;
  int high_[2], low_[2];
  float row_max_[2], row_sum_[2], rescale_[2];
  float scores_[kN / 2];
  uint32_t probabilities_[kN / 4];
  float out_[Traits::kDv / 2];
};

}  // namespace adaattn::sm90
