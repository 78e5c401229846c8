// A consumer warpgroup of the kernels in 8 bits: 64 query rows, S = Q K^T, weights in e4m3 and O += P V, whose
// accumulators pass O on to fp32 sums in shared memory every few blocks. A warpgroup waits for both of its products and
// then computes weights: it is the other two whose products run meanwhile. Class derives from it and says what S is
// made of and what becomes of O.
#pragma once

#include "attend/sm90/consumer_core.cuh"
#include "attend/sm90/ring.cuh"
#include "common/ptx.cuh"
#include "common/sm90_int8.cuh"
#include "common/sm90_wgmma8.cuh"

namespace adaattn::cuda::sm90 {

template <class Traits, class Class>
class EightBitConsumer {
 public:
  __device__ __forceinline__ EightBitConsumer(const ForwardArgs& args, typename Traits::Shared& shared, int group)
      : args_(args),
        shared_(shared),
        group_(group),
        warp_(uniform(static_cast<int>(threadIdx.x) / 32 % 4)),
        lane_(static_cast<int>(threadIdx.x) % 32) {}

  __device__ __forceinline__ void run() {
    if (!next_tile()) return;
    do {
      first_block();
      middle_blocks();
      last_block();
      if (range_.blocks() > kKeep) collect_out();
      of_class().store();
    } while (next_tile());
  }

 protected:
  static constexpr ForwardConfig kC = Traits::kC;
  static constexpr int kN = Traits::kN, kColumns = kN / 8, kWords = kN / 8, kKeep = Traits::kKeep;
  static constexpr int kD = Traits::kD, kOut = Traits::kOut;
  // Shift of a row without a key so far.
  static constexpr float kUnseen = -FLT_MAX / 4;

  static __device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

  __device__ __forceinline__ void release(uint64_t* barrier) {
    __syncwarp();
    if (lane_ == 0) mbarrier_arrive(barrier);
  }

  __device__ __forceinline__ int row_in_group(int r) const { return warp_ * 16 + lane_ / 4 + 8 * r; }
  __device__ __forceinline__ int row_of(int r) const {
    return tile_.m_block * Traits::kM + group_ * kGroupRows + row_in_group(r);
  }

  __device__ __forceinline__ float* lse_of(int64_t position) const {
    const AttnParams& p = args_.p;
    return static_cast<float*>(p.lse.data) + tile_.batch * p.lse.stride_b + position * p.lse.stride_s +
           tile_.head * p.lse.stride_h;
  }

  const ForwardArgs& args_;
  typename Traits::Shared& shared_;
  const int group_, warp_, lane_;
  Tile tile_;
  TileRange range_;
  Ring<Traits::kKStages> k_at_;  // of the next scores
  float shift_[2];
  float row_sum_[2];
  uint32_t queries_[kD / 8];  // the A operand of S
  typename Traits::Score scores_[kN / 2];
  float out_[Traits::kPart];  // O and the row sums of P as it was rounded

 private:
  // Weights start at 2^kBits: e4m3 ends at 448, which leaves room for larger scores, and is coarse below 2^-6.
  static constexpr float kBits = 5;
  // The bits of 8.75, for 2^8.8 is 448.
  static constexpr int kRoom = 0x410c0000;
  // Pairs of column groups, and how many of them are weights before what is rare is asked for.
  static constexpr int kPairs = kN / 16, kHead = kPairs / 2;

  __device__ __forceinline__ Class& of_class() { return static_cast<Class&>(*this); }

  // The next tile that has keys; those without are answered on the way. False: no more tiles.
  __device__ __forceinline__ bool next_tile() {
    for (;; ++tile_count_) {
      const int slot = tile_count_ % 2;
      mbarrier_wait(&shared_.tile_full[slot], tile_count_ / 2 & 1);
      const Tile& given = shared_.tile[slot];
      tile_.m_block = uniform(given.m_block);
      tile_.head = uniform(given.head);
      tile_.batch = uniform(given.batch);
      range_ = given.range;
      release(&shared_.tile_empty[slot]);
      if (tile_.m_block < 0) return false;
      range_.len_k = uniform(range_.len_k);
      range_.n_min = uniform(range_.n_min);
      range_.n_max = uniform(range_.n_max);
      if (range_.blocks() > 0) break;
      store_empty();
    }
    ++tile_count_;
    return true;
  }

  // Row limits: keys [low, high) of the thread's two rows, relative to the thread's first column.
  __device__ __forceinline__ void row_limits() {
    const int column = 2 * (lane_ % 4);
    if constexpr (kC.masked) {
      const int first_row = tile_.m_block * Traits::kM + group_ * kGroupRows;
      const int right = args_.window_right, left = args_.window_left;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int diagonal = first_row + row_in_group(r) + range_.off;
        high_[r] = (right >= 0 ? min(range_.len_k, diagonal + right + 1) : range_.len_k) - column;
        low_[r] = (left >= 0 ? diagonal - left : 0) - column;
      }
      // One block less where the first row's first key would be in a block without a mask, whose steps need a shift.
      free_end_ = uniform(right >= 0 ? max(0, first_row + range_.off + right) / kN : range_.n_max);
      free_begin_ = uniform(left >= 0 ? (max(0, first_row + kGroupRows - 1 + range_.off - left) + kN - 1) / kN : 0);
    } else {
      high_[0] = high_[1] = range_.len_k - column;
    }
  }

  __device__ __forceinline__ void first_block() {
    mbarrier_wait(&shared_.q_full[group_], q_count_++ & 1);
    of_class().read_queries();
    wait_for(shared_.k_full, k_at_);
    wgmma_fence();
    issue_scores();
    row_limits();
    of_class().template read_scales<true>();
    shift_[0] = shift_[1] = kUnseen;
    row_sum_[0] = row_sum_[1] = 0;
    kept_factor_[0] = kept_factor_[1] = 1;
    left_ = kKeep;
    wgmma_wait<0>();
    pin(scores_);
    __syncwarp();
    leave(shared_.k_empty, k_at_);
    const int n = range_.n_max - 1;
    if constexpr (kC.masked) {
      masked_weights<MaskSides::kBoth>(n);
    } else if ((n + 1) * kN > range_.len_k) {
      masked_weights<MaskSides::kEnd>(n);
    } else {
      masked_weights<MaskSides::kNone>(n);
    }
    clear_out();
  }

  __device__ __forceinline__ void middle_blocks() {
    int n = range_.n_max - 2;
    if (n >= range_.n_min) wait_for_next(n + 1);
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

  // S of block n beside O += P V of block n + 1, both of which have come, then the weights of block n. Blocks without a
  // mask take the maxima of earlier ones for granted until a weight would reach the end of e4m3's range. Whatever is
  // rare is asked for at once, amid the exponentials: the answer is there before they are through.
  template <MaskSides kMask>
  __device__ __forceinline__ void step(int n) {
    wgmma_fence();
    issue_scores();
    issue_out();
    of_class().template read_scales<false>();
    wgmma_wait<0>();
    pin(scores_);
    pin(out_);
    __syncwarp();
    leave(shared_.k_empty, k_at_);
    leave(shared_.v_empty, v_at_);
    --left_;
    if constexpr (kMask == MaskSides::kNone) {
      const bool come = has_come(shared_.k_full, k_at_) & has_come(shared_.v_full, v_at_);
      of_class().exponents(exponents_, shift_);
      const bool rescales = (largest_exponent() > kRoom) | of_class().changes_units();
      write_weights<0, kHead>();
      if (__any_sync(~0u, rescales | !come | left_ == 0)) {
        if (__any_sync(~0u, rescales)) {
          raise_shift(shift_);
          rescale_out();
          write_weights<0, kHead>();
        }
        wait_for_next(n);
        keep_when_due(n);
      }
      write_weights<kHead, kPairs>();
    } else {
      masked_weights<kMask>(n);
      rescale_out();
      wait_for_next(n);
      keep_when_due(n);
    }
  }

  // What the step after that of block n needs.
  __device__ __forceinline__ void wait_for_next(int n) {
    if (n > range_.n_min) wait_for(shared_.k_full, k_at_);
    wait_for(shared_.v_full, v_at_);
  }
  // After the products with a block, for all lanes.
  template <int kCount>
  __device__ __forceinline__ void leave(uint64_t (&empty)[kCount], Ring<kCount>& at) {
    if (lane_ == 0) mbarrier_arrive(&empty[at.stage]);
    at = at.next();
  }

  __device__ __forceinline__ void last_block() {
    wait_for(shared_.v_full, v_at_);
    wgmma_fence();
    issue_out();
    wgmma_wait<0>();
    pin(out_);
    add_sums();
    __syncwarp();
    leave(shared_.v_empty, v_at_);
  }

  __device__ __forceinline__ void issue_scores() {
    const uint64_t k = Descriptor<kD>::k_major(shared_address(shared_.k[k_at_.stage]));
#pragma unroll
    for (int i = 0; i < kD / 32; ++i) {
      Class::product(scores_, queries_[4 * i], queries_[4 * i + 1], queries_[4 * i + 2], queries_[4 * i + 3], k + 2 * i,
                     i > 0);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void issue_out() {
    const uint64_t v = Descriptor<Traits::kVLine>::k_major(shared_address(shared_.v[v_at_.stage]));
#pragma unroll
    for (int i = 0; i < kN / 32; ++i) {
      WgmmaE4m3<Traits::kLines>::rs(out_, probabilities_[4 * i], probabilities_[4 * i + 1], probabilities_[4 * i + 2],
                                    probabilities_[4 * i + 3], v + i * (Traits::kVStep / 16), 1);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void add_sums() {
#pragma unroll
    for (int r = 0; r < 2; ++r) row_sum_[r] += out_[kOut + 2 * r];
  }
  __device__ __forceinline__ void clear_out() {
#pragma unroll
    for (int i = 0; i < Traits::kPart; ++i) out_[i] = 0;
  }

  // Of exponents above 0, as integers that order them: an instruction takes two of them.
  __device__ __forceinline__ int largest_exponent() const {
    int top = 0;
#pragma unroll
    for (int i = 0; i < kN / 2; i += 2)
      top = __vimax3_s32(top, __float_as_int(exponents_[i]), __float_as_int(exponents_[i + 1]));
    return top;
  }

  // Takes the shift to the block's maxima where they are above those so far. Exponents are relative to `base`.
  __device__ __forceinline__ void raise_shift(const float (&base)[2]) {
    float top[4] = {exponents_[0], exponents_[2], exponents_[1], exponents_[3]};
#pragma unroll
    for (int j = 1; j < kColumns; ++j) {
      top[0] = fmaxf(top[0], exponents_[4 * j]);
      top[1] = fmaxf(top[1], exponents_[4 * j + 2]);
      top[2] = fmaxf(top[2], exponents_[4 * j + 1]);
      top[3] = fmaxf(top[3], exponents_[4 * j + 3]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) top[r] = fmaxf(top[r], top[r + 2]);
#pragma unroll
    for (int step = 1; step <= 2; ++step) {
#pragma unroll
      for (int r = 0; r < 2; ++r) top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], step));
    }
    float change[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float shift = fmaxf(shift_[r], base[r] + top[r] - kBits);
      rescale_[r] = exp2_approx(shift_[r] - shift);
      change[r] = shift - base[r];
      shift_[r] = shift;
    }
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) exponents_[i] -= change[i / 2 % 2];
  }

  __device__ __forceinline__ void rescale_out() {
    const float units = of_class().change_of_units();
    const float factor[2] = {rescale_[0] * units, rescale_[1] * units};
#pragma unroll
    for (int i = 0; i < kOut; ++i) out_[i] *= factor[i / 2 % 2];
#pragma unroll
    for (int i = kOut; i < Traits::kPart; ++i) out_[i] *= rescale_[i / 2 % 2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_sum_[r] *= rescale_[r];
      kept_factor_[r] *= rescale_[r];
    }
  }

  template <MaskSides kMask>
  __device__ __forceinline__ void masked_weights(int n) {
    const float base[2] = {shift_[0] == kUnseen ? 0 : shift_[0], shift_[1] == kUnseen ? 0 : shift_[1]};
    of_class().exponents(exponents_, base);
    if constexpr (kMask != MaskSides::kNone) mask<kMask>(n);
    raise_shift(base);
    write_weights<0, kPairs>();
  }

  // Pairs [kFrom, kTo) of column groups; a pair is 16 keys of V, in the order of v_key().
  template <int kFrom, int kTo>
  __device__ __forceinline__ void write_weights() {
#pragma unroll
    for (int pair = kFrom; pair < kTo; ++pair) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int at = 8 * pair + 2 * r;
        probabilities_[2 * pair + r] = pack_e4m3(exp2_approx(exponents_[at]), exp2_approx(exponents_[at + 1]),
                                                 exp2_approx(exponents_[at + 4]), exp2_approx(exponents_[at + 5]));
      }
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
          if (8 * j + c >= high) exponents_[4 * j + 2 * r + c] = -INFINITY;
        }
      }
      if constexpr (kMask == MaskSides::kBoth) {
        if (args_.window_left >= 0) {
          const int low = low_[r] - n * kN;
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              if (8 * j + c < low) exponents_[4 * j + 2 * r + c] = -INFINITY;
            }
          }
        }
      }
    }
  }

  // The tensor cores add with 14 bits and cut off the rest. O, at the shift of the moment, joins that in shared memory;
  // kept_factor_ has followed the shift since the last time.
  __device__ __forceinline__ void keep_when_due(int n) {
    if (left_ > 0) return;
    left_ = kKeep;
    if (range_.n_max - 1 - n == kKeep) {
      keep_out<true>();
    } else {
      keep_out<false>();
    }
  }
  template <bool kFirst>
  __device__ __forceinline__ void keep_out() {
    float4* const kept = &shared_.kept[group_][0][warp_ * 32 + lane_];
#pragma unroll
    for (int i = 0; i < kOut / 4; ++i) {
      kept[i * kWarpgroup] = with_kept(i, kFirst ? make_float4(0, 0, 0, 0) : kept[i * kWarpgroup]);
    }
    add_sums();
    kept_factor_[0] = kept_factor_[1] = 1;
    clear_out();
  }
  __device__ __forceinline__ float4 with_kept(int i, const float4& kept) {
    const float units = of_class().units();
    return {fmaf(kept.x, kept_factor_[0], out_[4 * i] * units), fmaf(kept.y, kept_factor_[0], out_[4 * i + 1] * units),
            fmaf(kept.z, kept_factor_[1], out_[4 * i + 2] * units),
            fmaf(kept.w, kept_factor_[1], out_[4 * i + 3] * units)};
  }

  // Of what is left in the accumulators and what was kept.
  __device__ __forceinline__ void collect_out() {
    const float4* const kept = &shared_.kept[group_][0][warp_ * 32 + lane_];
#pragma unroll
    for (int i = 0; i < kOut / 4; ++i) {
      const float4 x = with_kept(i, kept[i * kWarpgroup]);
      out_[4 * i] = x.x;
      out_[4 * i + 1] = x.y;
      out_[4 * i + 2] = x.z;
      out_[4 * i + 3] = x.w;
    }
    of_class().reset_units();
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

  uint32_t tile_count_ = 0, q_count_ = 0;
  Ring<Traits::kVStages> v_at_;        // of the values of the last scores
  int left_ = 0;                       // blocks until O is kept
  int free_begin_ = 0, free_end_ = 0;  // blocks [free_begin_, free_end_) need no mask
  int high_[2], low_[2];
  float rescale_[2], kept_factor_[2];
  float exponents_[kN / 2];
  uint32_t probabilities_[kWords];
};

}  // namespace adaattn::cuda::sm90
