// A consumer warpgroup of the e4m3 kernels: 64 query rows, S = Q K^T and O += P V in 8 bits with fp32 accumulators. O
// leaves the accumulators for fp32 sums in shared memory every few blocks. A warpgroup waits for both of its products
// and then computes weights: it is the other two whose products run meanwhile.
#pragma once

#include "attend/sm90/consumer_core.cuh"
#include "attend/sm90/e4m3_tail.cuh"
#include "attend/sm90/e4m3_traits.cuh"
#include "attend/sm90/ring.cuh"
#include "common/ptx.cuh"
#include "common/sm90_int8.cuh"
#include "common/sm90_wgmma8.cuh"

namespace adaattn::cuda::sm90 {

template <class Traits>
class E4m3Consumer {
  static constexpr ForwardConfig kC = Traits::kC;
  static constexpr int kN = Traits::kN, kColumns = kN / 8, kWords = kN / 8;
  static constexpr int kSums = Traits::kSums, kKeep = Traits::kKeep;
  static_assert(kKeep % kSums == 0);
  static constexpr int kD = Traits::kD, kOut = Traits::kOut;
  static constexpr bool kBlockFactors = Traits::kBlockFactors;
  // Shift of a row without a key so far.
  static constexpr float kUnseen = -FLT_MAX / 4;

  // Weights start at 2^kBits: e4m3 ends at 448, which leaves room for larger scores, and is coarse below 2^-6.
  static constexpr float kBits = 5;
  // The bits of 8.75, for 2^8.8 is 448.
  static constexpr int kRoom = 0x410c0000;
  // Pairs of column groups, and how many of them are weights before what is rare is asked for.
  static constexpr int kPairs = kN / 16, kHead = kPairs / 2;

 public:
  __device__ __forceinline__ E4m3Consumer(const E4m3Args& args, typename Traits::Shared& shared, int group)
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
      if constexpr (Traits::kTail) {
        if (tile_.split != 0 && !join_parts()) continue;
      }
      store();
    } while (next_tile());
  }

 private:
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

  // The next tile that has keys; those without are answered on the way. False: no more tiles.
  __device__ __forceinline__ bool next_tile() {
    for (;; ++tile_count_) {
      const int slot = tile_count_ % 2;
      mbarrier_wait(&shared_.tile_full[slot], tile_count_ / 2 & 1);
      const Tile& given = shared_.tile[slot];
      tile_.m_block = uniform(given.m_block);
      tile_.head = uniform(given.head);
      tile_.batch = uniform(given.batch);
      if constexpr (Traits::kTail) tile_.split = uniform(given.split);
      range_ = given.range;
      if (tile_.m_block < 0) return false;
      range_.len_k = uniform(range_.len_k);
      range_.n_min = uniform(range_.n_min);
      range_.n_max = uniform(range_.n_max);
      if (range_.blocks() > 0) break;
      store_empty();
      release(&shared_.tile_empty[slot]);
    }
    ++tile_count_;
    return true;
  }

  __device__ __forceinline__ float descale(const Descale& x) const {
    return __ldg(x.data + tile_.batch * x.stride_b + tile_.head / args_.group_size * x.stride_h);
  }

  // Q as the A operand of S: 16 bytes of 8 rows are a matrix.
  __device__ __forceinline__ void read_queries() {
    const int row = warp_ * 16 + lane_ % 16, atom = row % 8;
    const uint32_t line = shared_address(shared_.q[group_]) + row * kD;
#pragma unroll
    for (int i = 0; i < kD / 32; ++i) {
      uint32_t words[4];
      ldmatrix_x4(words, line + (((2 * i + lane_ / 16) ^ atom) * 16));
#pragma unroll
      for (int j = 0; j < 4; ++j) queries_[4 * i + j] = words[j];
    }
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
    read_queries();
    wait_for(shared_.k_full, k_at_);
    wgmma_fence();
    issue_scores();
    row_limits();
    if constexpr (kBlockFactors) {
      read_factors();
      unit_ = factors_.unit;
    } else {
      scale_ = args_.scale_log2 * descale(args_.p.q_descale) * descale(args_.p.k_descale);
    }
    shift_[0] = shift_[1] = kUnseen;
    row_sum_[0] = row_sum_[1] = 0;
    kept_factor_[0] = kept_factor_[1] = 1;
    left_ = kSums;
    wgmma_wait<0>();
    pin(scores_);
    // Behind the product, for an arrival overtakes reads on their way.
    release(&shared_.q_empty[group_]);
    if (lane_ == 0) mbarrier_arrive(&shared_.tile_empty[(tile_count_ - 1) % 2]);
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
    if constexpr (kBlockFactors) read_factors();
    wgmma_wait<0>();
    pin(scores_);
    pin(out_);
    __syncwarp();
    leave(shared_.k_empty, k_at_);
    leave(shared_.v_empty, v_at_);
    --left_;
    if constexpr (kMask == MaskSides::kNone) {
      const bool come = has_come(shared_.k_full, k_at_) & has_come(shared_.v_full, v_at_);
      to_exponents(shift_);
      const bool rescales = largest_exponent() > kRoom;
      write_weights<0, kHead>();
      if (__any_sync(~0u, rescales | !come | left_ == 0 | changes_unit())) {
        if (__any_sync(~0u, rescales)) {
          raise_shift(shift_);
          rescale_out();
          write_weights<0, kHead>();
        }
        change_unit();
        wait_for_next(n);
        keep_when_due(n);
      }
      write_weights<kHead, kPairs>();
    } else {
      masked_weights<kMask>(n);
      rescale_out();
      change_unit();
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
    if constexpr (kBlockFactors) {
#pragma unroll
      for (int r = 0; r < 2; ++r)
        for (int step = 1; step <= 2; ++step) row_sum_[r] += __shfl_xor_sync(~0u, row_sum_[r], step);
    }
    __syncwarp();
    leave(shared_.v_empty, v_at_);
  }

  __device__ __forceinline__ void issue_scores() {
    const uint64_t k = Descriptor<kD>::k_major(shared_address(shared_.k[k_at_.stage]));
#pragma unroll
    for (int i = 0; i < kD / 32; ++i) {
      WgmmaE4m3<kN>::rs(scores_, queries_[4 * i], queries_[4 * i + 1], queries_[4 * i + 2], queries_[4 * i + 3],
                        k + 2 * i, i > 0);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void issue_out() {
    const uint64_t v = Descriptor<kSlabKeys>::k_major(shared_address(shared_.v[v_at_.stage]));
#pragma unroll
    for (int i = 0; i < Traits::kSlabs; ++i) {
      WgmmaE4m3<Traits::kLines>::rs(out_, probabilities_[4 * i], probabilities_[4 * i + 1], probabilities_[4 * i + 2],
                                    probabilities_[4 * i + 3], v + i * (Traits::kSlabBytes / 16), 1);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void add_sums() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if constexpr (kBlockFactors) {
        const float weight = line_weight(lane_);
        row_sum_[r] = fmaf(out_[kOut + 2 * r], weight, fmaf(out_[kOut + 2 * r + 1], weight / 2, row_sum_[r]));
      } else {
        row_sum_[r] += out_[kOut + 2 * r];
      }
    }
  }
  __device__ __forceinline__ void clear_out() {
#pragma unroll
    for (int i = 0; i < Traits::kPart; ++i) out_[i] = 0;
  }

  // Scores become what weights are powers of 2 of, relative to `base`; in registers of its own it would be moved about.
  __device__ __forceinline__ void to_exponents(const float (&base)[2]) {
    const float lead = kBlockFactors ? factors_.lead : 0, from[2] = {base[0] - lead, base[1] - lead};
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) scores_[i] = fmaf(scores_[i], scale_, -from[i / 2 % 2]);
  }

  // Of exponents above 0, as integers that order them: an instruction takes two of them.
  __device__ __forceinline__ int largest_exponent() const {
    int top = 0;
#pragma unroll
    for (int i = 0; i < kN / 2; i += 2)
      top = __vimax3_s32(top, __float_as_int(scores_[i]), __float_as_int(scores_[i + 1]));
    return top;
  }

  // Takes the shift to the block's maxima where they are above those so far. Exponents are relative to `base`.
  __device__ __forceinline__ void raise_shift(const float (&base)[2]) {
    float top[4] = {scores_[0], scores_[2], scores_[1], scores_[3]};
#pragma unroll
    for (int j = 1; j < kColumns; ++j) {
      top[0] = fmaxf(top[0], scores_[4 * j]);
      top[1] = fmaxf(top[1], scores_[4 * j + 2]);
      top[2] = fmaxf(top[2], scores_[4 * j + 1]);
      top[3] = fmaxf(top[3], scores_[4 * j + 3]);
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
    for (int i = 0; i < kN / 2; ++i) scores_[i] -= change[i / 2 % 2];
  }

  __device__ __forceinline__ void rescale_out() {
#pragma unroll
    for (int i = 0; i < Traits::kPart; ++i) out_[i] *= rescale_[i / 2 % 2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_sum_[r] *= rescale_[r];
      kept_factor_[r] *= rescale_[r];
    }
  }

  // Of the block whose scores come next. Read by the lane that gives the buffer back.
  __device__ __forceinline__ void read_factors() {
    BlockFactors read{};
    if (lane_ == 0) read = shared_.k_factors[k_at_.stage];
    scale_ = __shfl_sync(~0u, read.scale, 0);
    factors_.lead = __shfl_sync(~0u, read.lead, 0);
    factors_.unit = __shfl_sync(~0u, read.unit, 0);
  }

  __device__ __forceinline__ bool changes_unit() const { return kBlockFactors && factors_.unit != 0; }
  // To that of the block of the present weights; row sums know no unit.
  __device__ __forceinline__ void change_unit() {
    if constexpr (kBlockFactors) {
      if (!__any_sync(~0u, changes_unit())) return;
      const float change = unit_ == 0 ? 1 : __fdividef(unit_, factors_.unit);
      unit_ = factors_.unit;
#pragma unroll
      for (int i = 0; i < kOut; ++i) out_[i] *= change;
#pragma unroll
      for (int r = 0; r < 2; ++r) kept_factor_[r] *= change;
    }
  }

  template <MaskSides kMask>
  __device__ __forceinline__ void masked_weights(int n) {
    const float base[2] = {shift_[0] == kUnseen ? 0 : shift_[0], shift_[1] == kUnseen ? 0 : shift_[1]};
    to_exponents(base);
    if constexpr (kMask != MaskSides::kNone) mask<kMask>(n);
    raise_shift(base);
    write_weights<0, kPairs>();
  }

  // Pairs [kFrom, kTo) of column groups; a pair is one of V's 16 keys, in the order of the transposer.
  template <int kFrom, int kTo>
  __device__ __forceinline__ void write_weights() {
#pragma unroll
    for (int pair = kFrom; pair < kTo; ++pair) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int at = 8 * pair + 2 * r;
        probabilities_[2 * pair + r] = pack_e4m3(exp2_approx(scores_[at]), exp2_approx(scores_[at + 1]),
                                                 exp2_approx(scores_[at + 4]), exp2_approx(scores_[at + 5]));
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

  // The tensor cores add with 14 bits and cut off the rest, which sums of positive numbers feel most. Row sums join
  // fp32 sums every kSums blocks. O, at the shift of the moment, joins those in shared memory every kKeep blocks;
  // kept_factor_ has followed the shift since the last time.
  __device__ __forceinline__ void keep_when_due(int n) {
    if (left_ > 0) return;
    left_ = kSums;
    add_sums();
#pragma unroll
    for (int i = kOut; i < Traits::kPart; ++i) out_[i] = 0;
    const int done = range_.n_max - 1 - n;
    if (done % kKeep != 0) return;
    if (done == kKeep) {
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
    kept_factor_[0] = kept_factor_[1] = 1;
#pragma unroll
    for (int i = 0; i < kOut; ++i) out_[i] = 0;
  }
  __device__ __forceinline__ float4 with_kept(int i, const float4& kept) {
    return {fmaf(kept.x, kept_factor_[0], out_[4 * i]), fmaf(kept.y, kept_factor_[0], out_[4 * i + 1]),
            fmaf(kept.z, kept_factor_[1], out_[4 * i + 2]), fmaf(kept.w, kept_factor_[1], out_[4 * i + 3])};
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
  }

  // Of a tile in two parts: false where the other part's warp is still to come, which then joins them. Sums of two
  // products do not depend on who that is.
  __device__ __forceinline__ bool join_parts() {
    const TailPlace place(args_, tile_, 4 * group_ + warp_, lane_);
    const float unit = kBlockFactors ? unit_ : 1;
    if (!place.found()) {
#pragma unroll
      for (int i = 0; i < kOut / 4; ++i)
        *place.own(i) =
            make_float4(out_[4 * i] * unit, out_[4 * i + 1] * unit, out_[4 * i + 2] * unit, out_[4 * i + 3] * unit);
      *place.own(kOut / 4) = make_float4(shift_[0], row_sum_[0], shift_[1], row_sum_[1]);
      if (!place.arrive()) return false;
    }
    const float4 rows = place.other(kOut / 4);
    const float shift[2] = {rows.x, rows.z}, sum[2] = {rows.y, rows.w};
    float own[2], other[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float top = fmaxf(shift_[r], shift[r]);
      own[r] = exp2_approx(shift_[r] - top);
      other[r] = exp2_approx(shift[r] - top);
      row_sum_[r] = __fadd_rn(__fmul_rn(row_sum_[r], own[r]), __fmul_rn(sum[r], other[r]));
      shift_[r] = top;
    }
    const auto join = [&](float& x, float y, int r) {
      x = __fadd_rn(__fmul_rn(__fmul_rn(x, unit), own[r]), __fmul_rn(y, other[r]));
    };
#pragma unroll
    for (int i = 0; i < kOut / 4; ++i) {
      const float4 y = place.other(i);
      join(out_[4 * i], y.x, 0);
      join(out_[4 * i + 1], y.y, 0);
      join(out_[4 * i + 2], y.z, 1);
      join(out_[4 * i + 3], y.w, 1);
    }
    unit_ = 1;
    return true;
  }

  // Normalises and writes O and LSE.
  __device__ __forceinline__ void store() {
    const AttnParams& p = args_.p;
    const float sink = p.sinks != nullptr ? p.sinks[tile_.head * p.sinks_stride] * kLog2e : -INFINITY;
    const float v_scale = kBlockFactors ? unit_ : descale(p.v_descale);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = row_sum_[r], top = shift_[r] == kUnseen ? -INFINITY : shift_[r];
      const float shared_top = fmaxf(top, sink);
      const bool empty = shared_top == -INFINITY;
      const float weight = empty ? 0.f : exp2_approx(top - shared_top);
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

  const E4m3Args& args_;
  typename Traits::Shared& shared_;
  const int group_, warp_, lane_;
  Tile tile_;
  TileRange range_;
  uint32_t tile_count_ = 0, q_count_ = 0;
  Ring<Traits::kKStages> k_at_;        // of the next scores
  Ring<Traits::kVStages> v_at_;        // of the values of the last scores
  int left_ = 0;                       // blocks until the row sums leave the accumulators
  int free_begin_ = 0, free_end_ = 0;  // blocks [free_begin_, free_end_) need no mask
  int high_[2], low_[2];
  float scale_;  // from S to base-2 logits
  BlockFactors factors_;
  float unit_;  // of O; 0: no factor so far was above 0
  float shift_[2], rescale_[2];
  float row_sum_[2];  // with factors for blocks of keys a lane's part of it until the last block
  float kept_factor_[2];
  float scores_[kN / 2];
  uint32_t probabilities_[kWords], queries_[kD / 8];
  float out_[Traits::kPart];  // O and the row sums of P as it was rounded
};

}  // namespace adaattn::cuda::sm90
