// A consumer warpgroup of the 8-bit kernels: 64 query rows, quantised on arrival; S = Q K^T in int8, P in e4m3 and each
// key block's P V added to O in fp32 by the instruction that rescales O. The loop is that of the 16-bit kernels.
#pragma once

#include <climits>

#include "attend/sm90/forward_consumer.cuh"
#include "attend/sm90/int8_traits.cuh"
#include "common/sm90_int8.cuh"
#include "common/sm90_wgmma8.cuh"

namespace adaattn::cuda::sm90 {

// Weights are 2^(x - max + kWeightBits): e4m3 ends at 448 and is coarse below 2^-6.
constexpr float kWeightBits = 8;

constexpr float kInteger = 12582912.f;  // 1.5 * 2^23
constexpr uint32_t kIntegerBits = 0x4b400000;

template <class Traits>
class Int8Consumer : protected Consumer<Traits> {
 protected:
  using Base = Consumer<Traits>;
  using Core = ConsumerCore<Traits>;
  using Base::free_begin_, Base::free_end_;
  using Core::args_, Core::shared_, Core::group_, Core::warp_, Core::lane_, Core::tile_, Core::range_,
      Core::tile_count_;
  using Core::high_, Core::low_, Core::row_max_, Core::row_sum_, Core::rescale_, Core::out_, Core::q_count_;
  using Core::kC, Core::kColumns, Core::kEarly, Core::kN;
  using Core::release, Core::take_turn, Core::pass_turn, Core::uniform, Core::read_slot, Core::set_limits;
  using typename Core::T;
  static constexpr int kD = Traits::kD, kStages = Traits::kStages, kHalves = kN / kInt8ScaleBlock;

 public:
  __device__ __forceinline__ Int8Consumer(const ForwardArgs& args, const Int8Tables& tables, bool with_shift,
                                          typename Traits::Shared& shared, int group)
      : Base(args, shared, group), tables_(tables), with_shift_(with_shift) {}

  __device__ __forceinline__ void run() {
    if (group_ == Traits::kGroups - 1) pass_turn();  // the first turn is group 0's
    if (!Base::next_tile()) return;
    do {
      Base::row_limits();
      quantize_queries();
      Base::release_slot();
      first_block();
      middle_blocks();
      last_block();
      store();
    } while (Base::next_tile());
  }

 protected:
  __device__ __forceinline__ void group_barrier() {
    named_barrier_sync(static_cast<int>(NamedBarrier::kQuantized) + group_, kWarpgroup);
  }
  __device__ __forceinline__ void wait_full(uint64_t* barriers, uint32_t count) {
    mbarrier_wait(&barriers[count % kStages], count / kStages & 1);
  }
  __device__ __forceinline__ int row_in_group(int r) const { return warp_ * 16 + lane_ / 4 + 8 * r; }
  __device__ __forceinline__ int64_t unit() const {
    return tile_.batch * args_.p.heads_kv + tile_.head / args_.group_size;
  }

  // The warp's 16 rows, four at a time and eight lanes each, from 16 bits to int8 with a scale per row. The first
  // barrier: all warps are through with the Q before; the second: all of Q is there.
  __device__ __forceinline__ void quantize_queries() {
    constexpr int kPart = kD / 8, kWords = kPart / 8;  // elements and 16-byte words of a lane
    mbarrier_wait(&shared_.q_full[group_], q_count_++ & 1);
    group_barrier();
    const uint8_t* raw = shared_.q[group_];
    uint8_t* out = shared_.q8[group_];
    const int part = lane_ % 8;
    const float* mean = tables_.k_mean + unit() * kD + part * kPart;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = warp_ * 16 + i * 4 + lane_ / 8;
      float x[kPart];
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const int word = part * kWords + w, chunk = word / 8;
        const uint4 v = *reinterpret_cast<const uint4*>(raw + chunk * kGroupRows * Traits::kWidth +
                                                        swizzled<Traits::kWidth>(row * Traits::kWidth + word % 8 * 16));
        const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float2 two = unpack_pair(pairs[k], static_cast<const T*>(nullptr));
          x[8 * w + 2 * k] = two.x;
          x[8 * w + 2 * k + 1] = two.y;
        }
      }
      float top = 0, shift = 0;
#pragma unroll
      for (int k = 0; k < kPart; ++k) top = max_or_nan(top, fabsf(x[k]));
      if (with_shift_) {
#pragma unroll
        for (int k = 0; k < kPart; ++k) shift = fmaf(x[k], __ldg(mean + k), shift);
      }
#pragma unroll
      for (int step = 1; step <= 4; step *= 2) {
        top = max_or_nan(top, __shfl_xor_sync(~0u, top, step));
        shift += __shfl_xor_sync(~0u, shift, step);
      }
      // Below the smallest normal number the reciprocal overflows; such rows count as 0.
      const float step_size = top * (1.f / 127), inverse = top < FLT_MIN * 127 ? 0.f : reciprocal_approx(step_size);
      uint32_t words[kPart / 4];
#pragma unroll
      for (int k = 0; k < kPart / 4; ++k)
        words[k] = pack_int8(x[4 * k], x[4 * k + 1], x[4 * k + 2], x[4 * k + 3], inverse);
      uint8_t* to = out + swizzled<kD>(row * kD + part * kPart);
      if constexpr (kPart == 16) {
        *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
      } else {
        *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
      }
      if (part == 0) {
        shared_.row_scale[group_][row] = step_size * args_.scale_log2;
        shared_.row_shift[group_][row] = shift * args_.scale_log2;
      }
    }
    release(&shared_.q_empty[group_]);
    ptx::fence_proxy_async(ptx::space_shared);
    group_barrier();
  }

  __device__ __forceinline__ void first_block() {
    wait_full(shared_.k_full, kv_count_);
    const int4 scales = read_scales<true>(kv_count_);
    wgmma_fence();
    issue_scores(kv_count_);
    share_scales<true>(scales);
    wgmma_wait<0>();
    pin(scores_);
    release(&shared_.k_empty[kv_count_ % kStages]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_max_[r] = -INFINITY;
      row_sum_[r] = 0;
    }
    const int n = range_.n_max - 1;
    if constexpr (kC.masked) {
      softmax_of_first<MaskSides::kBoth>(n);
    } else if ((n + 1) * kN > range_.len_k) {
      softmax_of_first<MaskSides::kEnd>(n);
    } else {
      softmax_of_first<MaskSides::kNone>(n);
    }
    wait_full(shared_.v_full, kv_count_);
#pragma unroll
    for (int i = 0; i < Traits::kOut; ++i) out_[i] = 0;
  }

  template <MaskSides kMask>
  __device__ __forceinline__ void softmax_of_first(int n) {
    begin_softmax<kMask>(n);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (j >= kEarly) exponentiate<kMask>(j);
      if (j % 2 == 1) pack_columns(j / 2);
    }
    end_softmax();
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

  __device__ __forceinline__ void last_block() {
    wgmma_fence();
    issue_out(kv_count_);
    wgmma_wait<0>();
    pin(part_);
    release(&shared_.v_empty[kv_count_ % kStages]);
    ++kv_count_;
#pragma unroll
    for (int i = 0; i < Traits::kOut; ++i) promote(i);
    promote_sums();
  }

  template <MaskSides kMask>
  __device__ __forceinline__ void step(int n) {
    wait_full(shared_.k_full, kv_count_ + 1);
    const int4 scales = read_scales<false>(kv_count_ + 1);
    take_turn();
    wgmma_fence();
    issue_scores(kv_count_ + 1);
    issue_out(kv_count_);
    pass_turn();
    share_scales<false>(scales);
    wgmma_wait<1>();
    pin(scores_);
    release(&shared_.k_empty[(kv_count_ + 1) % kStages]);
    begin_softmax<kMask>(n);
    pin(scores_);
    // Stands here because it ends the basic block, to whose start ptxas moves the wait for PV.
    wait_full(shared_.v_full, kv_count_ + 1);
    wgmma_wait<0>();
    pin(part_);
    release(&shared_.v_empty[kv_count_ % kStages]);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (j >= kEarly) exponentiate<kMask>(j);
      if (j % 2 == 1) pack_columns(j / 2);
#pragma unroll
      for (int i = j * Traits::kOut / kColumns; i < (j + 1) * Traits::kOut / kColumns; ++i) promote(i);
    }
    promote_sums();
    end_softmax();
    ++kv_count_;
  }

  __device__ __forceinline__ void issue_scores(uint32_t count) {
    const uint64_t q = Descriptor<kD>::k_major(shared_address(shared_.q8[group_]));
    const uint64_t k = Descriptor<kD>::k_major(shared_address(shared_.k[count % kStages]));
#pragma unroll
    for (int i = 0; i < kD / 32; ++i) wgmma_s8_n128(scores_, q + 2 * i, k + 2 * i, i > 0);
    wgmma_commit();
  }

  __device__ __forceinline__ void issue_out(uint32_t count) {
    const uint64_t v = Descriptor<kN>::k_major(shared_address(shared_.v[count % kStages]));
#pragma unroll
    for (int i = 0; i < kN / 32; ++i) {
      WgmmaE4m3<Traits::kDv + 8>::rs(part_, probabilities_[4 * i], probabilities_[4 * i + 1], probabilities_[4 * i + 2],
                                     probabilities_[4 * i + 3], v + 2 * i, i > 0);
    }
    wgmma_commit();
  }

  // Where they are read by all lanes they are set at once, otherwise under the products.
  template <bool kFirst>
  __device__ __forceinline__ int4 read_scales(uint32_t count) {
    const Int8Scales& scales = shared_.scales[count % kStages];
    if constexpr (Traits::kScalesOfLane) return Core::read_slot(&scales);
    set_scales<kFirst>(scales);
    return {};
  }
  template <bool kFirst>
  __device__ __forceinline__ void share_scales(const int4& read) {
    if constexpr (Traits::kScalesOfLane) {
      const auto of_lane = [](int word) { return __int_as_float(uniform(word)); };
      set_scales<kFirst>({{of_lane(read.x), of_lane(read.y)}, of_lane(read.z), of_lane(read.w)});
    }
  }

  // Scales of K's block in the log2 units of the softmax. O is kept in units of the last V tile added.
  template <bool kFirst>
  __device__ __forceinline__ void set_scales(const Int8Scales scales) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float row_scale = shared_.row_scale[group_][row_in_group(r)];
#pragma unroll
      for (int h = 0; h < kHalves; ++h) scale_[r][h] = row_scale * scales.k[h];
    }
    v_ratio_ = kFirst ? 1.f : v_scale_ * scales.v_inverse;
    v_scale_ = scales.v;
  }

  // Row maxima, the shift that follows from them, and the first exponentials.
  template <MaskSides kMask>
  __device__ __forceinline__ void begin_softmax(int n) {
    if constexpr (kMask != MaskSides::kNone) mask<kMask>(n);
    int top[2][kHalves];
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      constexpr int kPerHalf = kColumns / kHalves;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int first = 4 * kPerHalf * h + 2 * r;
        top[r][h] = max(scores_[first], scores_[first + 1]);
#pragma unroll
        for (int j = 1; j < kPerHalf; ++j) {
          top[r][h] = max(top[r][h], scores_[first + 4 * j]);
          top[r][h] = max(top[r][h], scores_[first + 4 * j + 1]);
        }
      }
    }
    float row_top[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_top[r] = row_max_[r];
#pragma unroll
      for (int h = 0; h < kHalves; ++h) row_top[r] = fmaxf(row_top[r], scaled_top<kMask>(top[r][h], scale_[r][h]));
    }
#pragma unroll
    for (int step = 1; step <= 2; ++step) {
#pragma unroll
      for (int r = 0; r < 2; ++r) row_top[r] = fmaxf(row_top[r], __shfl_xor_sync(~0u, row_top[r], step));
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // A row with no visible key so far: its weights must be 0, not exp2(-inf + inf).
      const float base = kMask != MaskSides::kNone && row_top[r] == -INFINITY ? 0.f : row_top[r];
#pragma unroll
      for (int h = 0; h < kHalves; ++h) offset_[r][h] = fmaf(-kInteger, scale_[r][h], kWeightBits - base);
      next_rescale_[r] = exp2_approx(row_max_[r] - base);
      row_max_[r] = row_top[r];
    }
#pragma unroll
    for (int j = 0; j < kEarly; ++j) exponentiate<kMask>(j);
  }

  template <MaskSides kMask>
  static __device__ __forceinline__ float scaled_top(int top, float scale) {
    return kMask != MaskSides::kNone && top == INT_MIN ? -INFINITY : __int2float_rn(top) * scale;
  }

  // An integer added to the bits of 1.5 * 2^23 is a float at once, for half the price of a conversion; what that adds
  // to the score is in offset_. Masked scores are INT_MIN, which no product of 8-bit numbers reaches.
  template <MaskSides kMask>
  __device__ __forceinline__ void exponentiate(int j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int32_t& s = scores_[4 * j + i];
      const int r = i / 2, h = j * 8 / kInt8ScaleBlock;
      const float x = fmaf(__uint_as_float(static_cast<uint32_t>(s) + kIntegerBits), scale_[r][h], offset_[r][h]);
      s = __float_as_int(exp2_approx(kMask != MaskSides::kNone && s == INT_MIN ? -INFINITY : x));
    }
  }

  // Two column groups are one of V's 16 keys, in the order of v_key().
  __device__ __forceinline__ void pack_columns(int pair) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at = 8 * pair + 2 * r;
      probabilities_[2 * pair + r] = pack_e4m3(__int_as_float(scores_[at]), __int_as_float(scores_[at + 1]),
                                               __int_as_float(scores_[at + 4]), __int_as_float(scores_[at + 5]));
    }
  }

  // O at the maximum and in the V units of the block whose P V has come.
  __device__ __forceinline__ void promote(int i) { out_[i] = fmaf(out_[i], factor_[i / 2 % 2], part_[i]); }
  __device__ __forceinline__ void promote_sums() {
#pragma unroll
    for (int r = 0; r < 2; ++r) row_sum_[r] = fmaf(row_sum_[r], rescale_[r], part_[Traits::kOut + 2 * r]);
  }
  // What the P V of this softmax's block will rescale O by.
  __device__ __forceinline__ void end_softmax() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      rescale_[r] = next_rescale_[r];
      factor_[r] = next_rescale_[r] * v_ratio_;
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
          if (8 * j + c >= high) scores_[4 * j + 2 * r + c] = INT_MIN;
        }
      }
      if constexpr (kMask == MaskSides::kBoth) {
        if (args_.window_left >= 0) {
          const int low = low_[r] - n * kN;
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              if (8 * j + c < low) scores_[4 * j + 2 * r + c] = INT_MIN;
            }
          }
        }
      }
    }
  }

  // O = (O' scale) / l + (sum of p) mu, where the sum of p is below 1 with a sink.
  __device__ __forceinline__ void store() {
    const AttnParams& p = args_.p;
    const float sink = p.sinks != nullptr ? p.sinks[tile_.head * p.sinks_stride] * kLog2e : -INFINITY;
    const int t = lane_ % 4;
    const float* mean = tables_.v_mean + unit() * Traits::kDv + 2 * t;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int local = row_in_group(r);
      const float top = row_max_[r] == -INFINITY ? -INFINITY : row_max_[r] + shared_.row_shift[group_][local];
      const float shared_top = fmaxf(top, sink);
      const bool empty = shared_top == -INFINITY;
      const float weight = empty ? 0.f : exp2_approx(top - shared_top - kWeightBits);
      const float total = empty ? 1.f : fmaf(row_sum_[r], weight, exp2_approx(sink - shared_top));
      const float factor = weight / total, share = row_sum_[r] * factor;
      const int row = Core::row_of(r);
      const bool mine = row < range_.len_q;
      const int64_t position = range_.q_start + row;
      if (p.lse.data != nullptr && mine && t == 0) {
        static_cast<float*>(
            p.lse.data)[tile_.batch * p.lse.stride_b + position * p.lse.stride_s + tile_.head * p.lse.stride_h] =
            empty ? -INFINITY : (shared_top + __log2f(total)) * kLn2;
      }
      T* o =
          static_cast<T*>(p.o.data) + tile_.batch * p.o.stride_b + position * p.o.stride_s + tile_.head * p.o.stride_h;
#pragma unroll
      for (int j = 0; j < Traits::kDv / 32; ++j) {
        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = 4 * (4 * j + i) + 2 * r;
          const float2 mu = *reinterpret_cast<const float2*>(mean + 8 * (4 * j + i));
          w[i] = pack_pair(fmaf(out_[at] * v_scale_, factor, mu.x * share),
                           fmaf(out_[at + 1] * v_scale_, factor, mu.y * share), static_cast<const T*>(nullptr));
        }
        transpose_quad(w, t);
        if (mine) *reinterpret_cast<uint4*>(o + 32 * j + 8 * t) = make_uint4(w[0], w[1], w[2], w[3]);
      }
    }
  }

  const Int8Tables& tables_;
  const bool with_shift_;
  uint32_t kv_count_ = 0;
  float factor_[2];          // of O, when the P V in flight is added, as rescale_ is of the sums
  float v_scale_, v_ratio_;  // of the newest tile; the one before it over that
  float scale_[2][kHalves], offset_[2][kHalves], next_rescale_[2];  // of the block in work
  int32_t scores_[kN / 2];                                          // then weights
  uint32_t probabilities_[kN / 8];
  float part_[Traits::kPart];  // P V of one block and the row sums of P
};

}  // namespace adaattn::cuda::sm90
