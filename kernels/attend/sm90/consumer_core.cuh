// What the consumer warpgroups of every Hopper kernel in 16 bits share: 64 query rows of each tile, S = Q K^T and
// O = P V by wgmma with the online softmax between them, and rows written from registers. A step overlaps S of one key
// block with P V of the block before, so the exponentials of one warpgroup run under the matrix products of its own and
// of the other one.
#pragma once

#include <cfloat>

#include "attend/sm90/forward_schedule.cuh"
#include "common/ptx.cuh"
#include "common/sm90_ptx.cuh"
#include "common/sm90_wgmma.cuh"

namespace adaattn::cuda::sm90 {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

enum class MaskSides { kNone, kEnd, kBoth };

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
class ConsumerCore {
 public:
  __device__ __forceinline__ ConsumerCore(const ForwardArgs& args, typename Traits::Shared& shared, int group)
      : args_(args),
        shared_(shared),
        group_(group),
        warp_(uniform(static_cast<int>(threadIdx.x) / 32 % 4)),
        lane_(static_cast<int>(threadIdx.x) % 32) {}

 protected:
  using T = typename Traits::T;
  static constexpr ForwardConfig kC = Traits::kC;
  static constexpr int kN = Traits::kN, kColumns = kN / 8, kEarly = kC.early_columns;
  static_assert(kEarly >= 0 && kEarly <= kColumns);
  static_assert(!kC.quick || (kEarly == 0 && !kC.rescale_early && !kC.softcap));
  static constexpr float kQuickLimit = 32768.f;  // half of what an f16 weight can hold

  // The same in all lanes, which the compiler cannot see in loaded values: descriptors and loop counts that follow from
  // them then stay in uniform registers, a tenth of the inner loop.
  static __device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

  // Four words of a slot as lane 0 reads them, which arrives at the slot's barrier for its warp; `uniform` hands them
  // to the others, for whose own reads that arrival would not speak. Predicated, for a branch would split the block.
  __device__ __forceinline__ int4 read_slot(const void* words) const {
    int4 x{};
    asm volatile("{\n.reg .pred p;\nsetp.eq.s32 p, %4, 0;\n@p ld.shared.v4.b32 {%0, %1, %2, %3}, [%5];\n}"
                 : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w)
                 : "r"(lane_), "r"(shared_address(words))
                 : "memory");
    return x;
  }

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

  // Row limits: keys [low, high) of the thread's two rows, relative to the thread's first column.
  __device__ __forceinline__ void set_limits(int off, int len_k) {
    const int first = first_row<Traits>(tile_) + group_ * kGroupRows;
    const int column = 2 * (lane_ % 4);
    if constexpr (kC.masked) {
      const int right = args_.window_right, left = args_.window_left;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int diagonal = position_of<Traits>(args_, first + warp_ * 16 + lane_ / 4 + 8 * r) + off;
        high_[r] = (right >= 0 ? min(len_k, diagonal + right + 1) : len_k) - column;
        low_[r] = (left >= 0 ? diagonal - left : 0) - column;
      }
    } else {
      high_[0] = high_[1] = len_k - column;
    }
  }

  // Enqueues S of a tile's first block alone. k counts the blocks of K that were loaded before, as v_count_ those of V.
  __device__ __forceinline__ void first_scores(uint32_t k) {
    wait_k(k);
    wgmma_fence();
    issue_scores(k);
  }

  // P of the first block is in registers; O starts from zero. Zeroes and accumulation, not wgmma's discard flag: a
  // run-time flag leaves O undefined on one path, and ptxas then finds no fixed registers for it and serialises every
  // product. valid: keys of the block that exist.
  __device__ __forceinline__ void begin_out(int valid) {
    finish_softmax<true>();
    wait_full(shared_.v_full, v_count_);
    if (args_.zero_v_tail && valid < kN) zero_v_tail(valid);
#pragma unroll
    for (int j = 0; j < Traits::kDv / 2; ++j) out_[j] = 0;
  }

  // S of block n beside O += P V of block n + 1, then the softmax of block n. Its first part runs under the PV: up to
  // the exponentials of kEarly column groups. The rest waits for P and O to be free, so that packing P and rescaling O
  // fill the issue slots that the exponentials leave.
  // last: no later block of the tile reads Q.
  template <MaskSides kMask>
  __device__ __forceinline__ void step(int n, uint32_t k, bool last) {
    issue_both(k);
    release_scores(k, last);
    begin_softmax<false, kMask>(n);
    pin(scores_);
    // V of the next product. The wait stands here because it ends the basic block: ptxas moves the wait for PV up to
    // the start of its block, and the work above would follow PV instead of running under it.
    wait_full(shared_.v_full, v_count_ + 1);
    wgmma_wait<0>();
    pin(out_);
    release(&shared_.v_empty[v_count_ % Traits::kVStages]);
    finish_softmax<false>();
    ++v_count_;
  }

  // A step without a mask that takes the maxima of earlier blocks for granted: exponentials need no maximum of their
  // own block as long as they stay far from overflow, O keeps its scale, and the chain from S to P is a third shorter.
  // Where a thread's sum leaves kQuickLimit, the warpgroup computes S again and takes the way of `step`.
  __device__ __forceinline__ void quick_step(int n, uint32_t k, bool last) {
    issue_both(k);
    clear_sums();
#pragma unroll
    for (int j = 0; j < kColumns; ++j) exponentiate(j);
    const float most = fmaxf(fmaxf(sum_[0], sum_[1]), fmaxf(sum_[2], sum_[3]));
    pin(scores_);
    const bool beyond = any_of_group(!(most <= kQuickLimit));  // not a number counts as too much
    wait_full(shared_.v_full, v_count_ + 1);                   // here for the reason that `step` gives
    wgmma_wait<0>();
    pin(out_);
    if (beyond) {
      wgmma_fence();
      issue_scores(k);
      wgmma_wait<0>();
      pin(scores_);
      begin_softmax<false, MaskSides::kNone>(n);
      clear_sums();
#pragma unroll
      for (int j = 0; j < kColumns; ++j) exponentiate(j);
      rescale_out();
#pragma unroll
      for (int r = 0; r < 2; ++r) row_sum_[r] *= rescale_[r];
    }
    release_scores(k, last);
    release(&shared_.v_empty[v_count_ % Traits::kVStages]);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) pack_column(j);
#pragma unroll
    for (int r = 0; r < 2; ++r) row_sum_[r] += sum_[2 * r] + sum_[2 * r + 1];
    ++v_count_;
  }

  // The same in all lanes of the warpgroup.
  __device__ __forceinline__ bool any_of_group(bool mine) {
    return uniform(named_barrier_any(static_cast<int>(NamedBarrier::kVote) + group_, kWarpgroup, mine));
  }
  __device__ __forceinline__ void clear_sums() {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum_[i] = 0;
  }

  // S with the next K, then O += P V with the present V; returns when S is there.
  __device__ __forceinline__ void issue_both(uint32_t k) {
    wait_k(k);
    take_turn();
    wgmma_fence();
    issue_scores(k);
    if constexpr (kC.rescale_early) {
      rescale_out();
      wgmma_fence();
    }
    issue_out(v_count_);
    pass_turn();
    wgmma_wait<1>();
    pin(scores_);
  }

  __device__ __forceinline__ void release_scores(uint32_t k, bool last) {
    release(&shared_.k_empty[k % Traits::kKStages]);
    if constexpr (!kC.q_in_registers) {
      if (last) release(&shared_.q_empty[group_]);
    }
  }

  // O += P V of the tile's last block, whole or in two parts with work between them that does not need O.
  __device__ __forceinline__ void last_block() {
    issue_last();
    finish_last();
  }
  __device__ __forceinline__ void issue_last() {
    if constexpr (kC.rescale_early) rescale_out();
    wgmma_fence();
    issue_out(v_count_);
  }
  __device__ __forceinline__ void finish_last() {
    // V is there: the poll ends the basic block, to whose start ptxas moves the wait for the product.
    wait_full(shared_.v_full, v_count_);
    wgmma_wait<0>();
    pin(out_);
    release(&shared_.v_empty[v_count_ % Traits::kVStages]);
    ++v_count_;
  }

  __device__ __forceinline__ void wait_full(uint64_t* barriers, uint32_t count) {
    mbarrier_wait(&barriers[count % Traits::kVStages], count / Traits::kVStages & 1);
  }

  __device__ __forceinline__ void wait_k(uint32_t count) {
    mbarrier_wait(&shared_.k_full[count % Traits::kKStages], count / Traits::kKStages & 1);
  }

  __device__ __forceinline__ void issue_scores(uint32_t count) {
    const uint8_t* const k = shared_.k[count % Traits::kKStages];
    if constexpr (kC.q_in_registers) {
      const uint64_t b = Descriptor<Traits::kWidth>::k_major(shared_address(k));
#pragma unroll
      for (int i = 0; i < Traits::kD / 16; ++i) {
        Wgmma<T, kN>::template rs<0>(scores_, query_[i][0], query_[i][1], query_[i][2], query_[i][3],
                                     b + step_bytes(i, kN) / 16, i > 0);
      }
      wgmma_commit();
    } else {
      issue_products(scores_, shared_.q[group_], k);
    }
  }
  // Where step i of 16 columns begins in a tile of so many rows.
  static constexpr int step_bytes(int i, int rows) {
    constexpr int kPerChunk = Traits::kChunk / 16;
    return i / kPerChunk * rows * Traits::kWidth + i % kPerChunk * 32;
  }

  // The warp's 16 rows of Q as A operands. A product that reads them from shared memory takes 96 of the 128 bytes a
  // clock that there are, with Q in registers 64; and the next tile's Q can come at once.
  __device__ __forceinline__ void load_q() {
    constexpr int kWidth = Traits::kWidth;
    const int row = warp_ * 16 + lane_ % 16;
    const uint32_t base = shared_address(shared_.q[group_]) + row * kWidth;
    const int swizzle = kWidth == 128 ? row % 8 : row / 2 % 4;
#pragma unroll
    for (int i = 0; i < Traits::kD / 16; ++i) {
      const int unit = i % (Traits::kChunk / 16) * 2 + lane_ / 16;
      ldmatrix_x4(query_[i], base + i / (Traits::kChunk / 16) * kGroupRows * kWidth + (unit ^ swizzle) * 16);
    }
  }

  // out = a b^T over head_dim; a: the warpgroup's 64 rows, b: rows of a block of kN from `first` on.
  template <int kHalf>
  __device__ __forceinline__ void issue_products(float (&out)[kHalf], const uint8_t* a_rows, const uint8_t* b_rows,
                                                 int first = 0) {
    constexpr int kWidth = Traits::kWidth;
    const uint64_t a = Descriptor<kWidth>::k_major(shared_address(a_rows));
    const uint64_t b = Descriptor<kWidth>::k_major(shared_address(b_rows) + first * kWidth);
#pragma unroll
    for (int i = 0; i < Traits::kD / 16; ++i) {
      Wgmma<T, 2 * kHalf>::template ss<0>(out, a + step_bytes(i, kGroupRows) / 16, b + step_bytes(i, kN) / 16, i > 0);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void issue_out(uint32_t count) {
    constexpr int kWidth = Traits::kWidthV;
    const uint64_t v = Descriptor<kWidth>::mn_major(shared_address(shared_.v[count % Traits::kVStages]), kN * kWidth);
#pragma unroll
    for (int i = 0; i < kN / 16; ++i) {
      Wgmma<T, Traits::kDv>::template rs<1>(out_, probabilities_[4 * i], probabilities_[4 * i + 1],
                                            probabilities_[4 * i + 2], probabilities_[4 * i + 3], v + i * kWidth, 1);
    }
    wgmma_commit();
  }

  // Row maxima, the shift and the rescaling factor that follow from them, and the first exponentials.
  template <bool kFirst, MaskSides kMask>
  __device__ __forceinline__ void begin_softmax(int n) {
    if constexpr (kC.softcap) {
      // tanh(x) = 1 - 2 / (1 + exp(2x)): exact to the last bits where tanh.approx has an error of 2^-11.
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) {
        scores_[i] = fmaf(-2.f, reciprocal_approx(1.f + exp2_approx(scores_[i] * args_.softcap_log2)), 1.f);
      }
    }
    if constexpr (kMask != MaskSides::kNone) mask<kMask>(n);
    // Both rows in step and two partial results each: a single chain of maxima or sums would be the longest latency
    // between S and P.
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
      // A row with no visible key so far: its exponentials must be 0, not exp2(-inf + inf), and its first key in a
      // quick step must leave the limit.
      shift_[r] = kMask != MaskSides::kNone && top[r] == -INFINITY ? -FLT_MAX / 4 : top[r] * args_.scale_log2;
      rescale_[r] = kFirst ? 0.f : exp2_approx(fmaf(row_max_[r], args_.scale_log2, -shift_[r]));
      row_max_[r] = top[r];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sum_[i] = 0;
#pragma unroll
    for (int j = 0; j < kEarly; ++j) exponentiate(j);
  }

  // The other exponentials, P, the row sums (the thread's own part of them) and O at the new maximum.
  template <bool kFirst>
  __device__ __forceinline__ void finish_softmax() {
    // In shares of eight the compiler keeps O in memory.
    constexpr bool kRescaleBetween = !kC.rescale_early && Traits::kDv / 2 < 8 * kColumns;
    if constexpr (!kFirst && !kC.rescale_early && !kRescaleBetween) rescale_out();
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (j >= kEarly) exponentiate(j);
      pack_column(j);
      if constexpr (!kFirst && kRescaleBetween) {
        constexpr int kOut = Traits::kDv / 2;
#pragma unroll
        for (int i = j * kOut / kColumns; i < (j + 1) * kOut / kColumns; ++i) out_[i] *= rescale_[i / 2 % 2];
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float total = sum_[2 * r] + sum_[2 * r + 1];
      row_sum_[r] = kFirst ? total : fmaf(row_sum_[r], rescale_[r], total);
    }
  }

  __device__ __forceinline__ void exponentiate(int j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& s = scores_[4 * j + i];
      s = exp2_approx(fmaf(s, args_.scale_log2, -shift_[i / 2]));
      sum_[i] += s;
    }
  }

  template <MaskSides kMask>
  __device__ __forceinline__ void mask(int n) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int high = high_[r] - n * kN;
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          if (8 * j + c >= high) scores_[4 * j + 2 * r + c] = -INFINITY;
        }
      }
      if constexpr (kMask == MaskSides::kBoth) {
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
  __device__ __forceinline__ void pack_column(int j) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      probabilities_[2 * j + r] =
          pack_pair(scores_[4 * j + 2 * r], scores_[4 * j + 2 * r + 1], static_cast<const T*>(nullptr));
    }
  }
  __device__ __forceinline__ void rescale_out() {
#pragma unroll
    for (int j = 0; j < Traits::kDv / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out_[4 * j + i] *= rescale_[i / 2];
    }
  }

  // 0 * NaN is NaN: keys beyond the sequence have weight 0, but their V must be finite.
  __device__ __forceinline__ void zero_v_tail(int valid) {
    constexpr int kWidth = Traits::kWidthV;
    const int lines = kN - valid, words = lines * (kWidth / 16);
    uint8_t* v = shared_.v[v_count_ % Traits::kVStages];
    for (int i = warp_ * 32 + lane_; i < words * Traits::kChunksV; i += kWarpgroup) {
      const int chunk = i / words, word = i - chunk * words;
      *reinterpret_cast<uint4*>(v + (chunk * kN + valid) * kWidth + word * 16) = make_uint4(0, 0, 0, 0);
    }
    ptx::fence_proxy_async(ptx::space_shared);
    named_barrier_sync(static_cast<int>(NamedBarrier::kTailZeroed) + group_, kWarpgroup);
  }

  // Of the warp's first row in its sequence.
  __device__ __forceinline__ int warp_row(const Tile& tile) const {
    return first_row<Traits>(tile) + group_ * kGroupRows + warp_ * 16;
  }
  __device__ __forceinline__ int warp_row() const { return warp_row(tile_); }
  __device__ __forceinline__ int row_of(int r) const { return warp_row() + lane_ / 4 + 8 * r; }

  // What finish_rows leaves of a thread's two rows.
  struct RowScale {
    float factor[2];  // of O, so that the weights with the sink's add up to 1
    float share[2];   // what the keys hold of that
  };

  // Both rows' sums over the quad.
  __device__ __forceinline__ void join_sums() {
#pragma unroll
    for (int step = 1; step <= 2; ++step) {
#pragma unroll
      for (int r = 0; r < 2; ++r) row_sum_[r] += __shfl_xor_sync(~0u, row_sum_[r], step);
    }
  }

  // Row r's sum, joined with the sink's logit in log2 units. Returns the row's LSE.
  __device__ __forceinline__ float finish_row(int r, float sink, RowScale& scale) {
    const float sum = row_sum_[r];
    const float top = row_max_[r] * args_.scale_log2;
    const float shared_top = fmaxf(top, sink);
    const bool empty = shared_top == -INFINITY;
    const float weight = empty ? 0.f : exp2_approx(top - shared_top);
    const float total = empty ? 1.f : fmaf(sum, weight, exp2_approx(sink - shared_top));
    scale.factor[r] = __fdividef(weight, total);
    scale.share[r] = sum * scale.factor[r];
    return empty ? -INFINITY : (shared_top + __log2f(total)) * kLn2;
  }

  // Row sums over the quad; writes LSE. O of the present tile can be stored when tile_ is already the next one.
  __device__ __forceinline__ RowScale finish_rows() {
    const AttnParams& p = args_.p;
    out_tile_ = tile_;
    out_range_ = range_;
    const float sink = p.sinks != nullptr ? p.sinks[tile_.head * p.sinks_stride] * kLog2e : -INFINITY;
    RowScale scale;
    float lse[2];
    join_sums();
#pragma unroll
    for (int r = 0; r < 2; ++r) lse[r] = finish_row(r, sink, scale);
    if (p.lse.data == nullptr) return scale;
    float* const out = static_cast<float*>(p.lse.data) + tile_.batch * p.lse.stride_b + tile_.head * p.lse.stride_h;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = row_of(r);
      if (row < range_.len_q && lane_ % 4 == 0) out[(range_.q_start + row) * p.lse.stride_s] = lse[r];
    }
    return scale;
  }

  // Normalises and writes O and LSE.
  __device__ __forceinline__ void store() { store(finish_rows()); }
  __device__ __forceinline__ void store(const RowScale& scale) {
    if constexpr (Traits::kStagedOut) {
      // A box that reached into the next packed sequence would overwrite its rows.
      if (uniform(args_.p.cu_seqlens_q == nullptr || warp_row(out_tile_) + 16 <= out_range_.len_q)) {
        store_box(scale.factor);
      } else {
        store_rows(out_, scale.factor);
      }
    } else {
      store_rows(out_, scale.factor);
    }
  }
  // Shared memory is read until then.
  __device__ __forceinline__ void drain() {
    if constexpr (Traits::kStagedOut) {
      if (lane_ == 0) ptx::cp_async_bulk_wait_group(ptx::n32_t<0>{});
    }
  }

  // The warp's 16 rows through shared memory in one box per column chunk. Reading it back is left to the copy engine;
  // the next tile's rows wait for that.
  __device__ __forceinline__ void store_box(const float (&factor)[2]) {
    constexpr int kWidth = Traits::kWidthV, kUnits = kWidth / 16;
    if (lane_ == 0) ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>{});
    __syncwarp();
    uint8_t* const box = shared_.out[group_][warp_];
    // Lane l addresses row l % 8 of matrix l / 8: two row halves of a column group, then those of the next.
    const int row = lane_ % 16, column = lane_ / 16;
    const uint32_t base = shared_address(box) + row * kWidth;
    const int swizzle = kWidth == 128 ? row % 8 : row / 2 % 4;
#pragma unroll
    for (int j = 0; j < Traits::kDv / 8; j += 2) {
      uint32_t w[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 4 * (j + i / 2) + 2 * (i % 2);
        w[i] = pack_pair(out_[at] * factor[i % 2], out_[at + 1] * factor[i % 2], static_cast<const T*>(nullptr));
      }
      const int unit = (j % kUnits + column) ^ swizzle;
      store_matrices(base + j / kUnits * 16 * kWidth + unit * 16, w);
    }
    ptx::fence_proxy_async(ptx::space_shared);
    __syncwarp();
    if (lane_ == 0) {
      const int batch = args_.p.cu_seqlens_q != nullptr ? 0 : out_tile_.batch;
      const int first_row = out_range_.q_start + warp_row(out_tile_);
#pragma unroll
      for (int c = 0; c < Traits::kChunksV; ++c) {
        tma_store_4d(&args_.o_map, box + c * 16 * kWidth, c * Traits::kChunkV, first_row, out_tile_.head, batch);
      }
      ptx::cp_async_bulk_commit_group();
    }
  }

  // From registers: after a quad transposition every lane stores 16 adjacent bytes. All transpositions of a row come
  // before the first branch, so that their shuffles overlap.
  template <int kCount>
  __device__ __forceinline__ void store_rows(const float (&out)[kCount], const float (&factor)[2]) {
    const AttnParams& p = args_.p;
    const int t = lane_ % 4, first_row = warp_row(out_tile_);
    T* const o = static_cast<T*>(p.o.data) + out_tile_.batch * p.o.stride_b + out_tile_.head * p.o.stride_h + 8 * t;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      constexpr int kWide = kCount / 16;
      uint32_t w[kWide][4];
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = 4 * (4 * j + i) + 2 * r;
          w[j][i] = pack_pair(out[at] * factor[r], out[at + 1] * factor[r], static_cast<const T*>(nullptr));
        }
        transpose_quad(w[j], t);
      }
      const int row = first_row + lane_ / 4 + 8 * r;
      if (row >= out_range_.len_q) continue;
      T* const o_row = o + (out_range_.q_start + row) * p.o.stride_s;
      const int room = static_cast<int>(p.d_v) - 8 * t;
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        if (32 * j + 8 <= room)
          *reinterpret_cast<uint4*>(o_row + 32 * j) = make_uint4(w[j][0], w[j][1], w[j][2], w[j][3]);
      }
      if (p.d_v % 8 == 0) continue;
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        if (32 * j >= room || 32 * j + 8 <= room) continue;
        const T* elements = reinterpret_cast<const T*>(w[j]);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (32 * j + i < room) o_row[32 * j + i] = elements[i];
        }
      }
    }
  }

  // A tile without keys: O = 0, LSE that of the sink alone.
  __device__ __forceinline__ void store_empty() {
    const AttnParams& p = args_.p;
    const int first = warp_row();
    if constexpr (kC.from_end) {
      if (first < 0) return;
    }
    const int rows = min(16, range_.len_q - first);
    T* o = static_cast<T*>(p.o.data) + tile_.batch * p.o.stride_b + tile_.head * p.o.stride_h;
    for (int i = 0; i < rows; ++i) {
      const int64_t position = range_.q_start + first + i;
      if (8 * lane_ < p.d_v)
        *reinterpret_cast<uint4*>(o + position * p.o.stride_s + 8 * lane_) = make_uint4(0, 0, 0, 0);
      if (p.lse.data != nullptr && lane_ == 0) {
        static_cast<float*>(
            p.lse.data)[tile_.batch * p.lse.stride_b + position * p.lse.stride_s + tile_.head * p.lse.stride_h] =
            p.sinks != nullptr ? p.sinks[tile_.head * p.sinks_stride] : -INFINITY;
      }
    }
  }

  const ForwardArgs& args_;
  typename Traits::Shared& shared_;
  const int group_, warp_, lane_;
  Tile tile_, out_tile_;         // in work, and whose O is to be stored
  TileRange range_, out_range_;  // of them
  uint32_t tile_count_ = 0, q_count_ = 0, v_count_ = 0;
  int high_[2], low_[2];
  float row_max_[2], row_sum_[2], rescale_[2];
  float shift_[2], sum_[4];  // of the block in work
  float scores_[kN / 2];
  uint32_t probabilities_[kN / 4];
  uint32_t query_[kC.q_in_registers ? Traits::kD / 16 : 1][4];
  float out_[Traits::kDv / 2];
};

}  // namespace adaattn::cuda::sm90
