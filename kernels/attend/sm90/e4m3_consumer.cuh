// A consumer warpgroup of the e4m3 kernels: 64 query rows, S = Q K^T and O += P V in 8 bits with fp32 accumulators. O
// leaves the accumulators for fp32 sums in shared memory every few blocks. A warpgroup waits for both of its products
// and then computes weights: it is the other two whose products run meanwhile.
#pragma once

#include "attend/sm90/e4m3_traits.cuh"
#include "attend/sm90/forward_consumer.cuh"
#include "attend/sm90/ring.cuh"
#include "common/ptx.cuh"
#include "common/sm90_int8.cuh"
#include "common/sm90_wgmma8.cuh"

namespace adaattn::cuda::sm90 {

template <class Traits>
class E4m3Consumer {
  static constexpr ForwardConfig kC = Traits::kC;
  static constexpr int kN = Traits::kN, kColumns = kN / 8, kWords = kN / 8, kKeep = Traits::kKeep;
  static constexpr int kD = Traits::kD, kOut = Traits::kOut;
  // Weights start at 2^kBits: e4m3 ends at 448, which leaves room for larger scores, and is coarse below 2^-6.
  static constexpr float kBits = Traits::kBits;
  // Shift of a row without a key so far: its first key saturates.
  static constexpr float kUnseen = -FLT_MAX / 4;

 public:
  __device__ __forceinline__ E4m3Consumer(const ForwardArgs& args, typename Traits::Shared& shared, int group)
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
      store();
    } while (next_tile());
  }

 private:
  static __device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

  __device__ __forceinline__ void release(uint64_t* barrier) {
    __syncwarp();
    if (lane_ == 0) mbarrier_arrive(barrier);
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
    read_queries();
    wait_for(shared_.k_full, k_at_);
    wgmma_fence();
    issue_scores();
    row_limits();
    // A factor of 0 must not turn a masked score into NaN.
    scale_ = fmaxf(args_.scale_log2 * descale(args_.p.q_descale) * descale(args_.p.k_descale), FLT_MIN);
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
      mask<MaskSides::kBoth>(n);
    } else if ((n + 1) * kN > range_.len_k) {
      mask<MaskSides::kEnd>(n);
    }
    raise_shift();
    write_weights();
    come_ = false;
    clear_out();
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
    release(&shared_.q_empty[group_]);
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

  // S of block n beside O += P V of block n + 1, then the weights of block n. Blocks without a mask take the maxima of
  // earlier ones for granted until a weight reaches the end of e4m3's range.
  template <MaskSides kMask>
  __device__ __forceinline__ void step(int n) {
    if (!come_) {
      wait_for(shared_.k_full, k_at_);
      wait_for(shared_.v_full, v_at_);
    }
    wgmma_fence();
    issue_scores();
    issue_out();
    wgmma_wait<0>();
    pin(scores_);
    pin(out_);
    add_sums();
    clear_sums();
    __syncwarp();
    leave(shared_.k_empty, k_at_);
    leave(shared_.v_empty, v_at_);
    come_ = has_come(shared_.k_full, k_at_) & has_come(shared_.v_full, v_at_);
    if constexpr (kMask == MaskSides::kNone) {
      // Scores are still there: the warp takes them to their own maximum.
      if (__any_sync(~0u, write_weights() != 0)) {
        raise_shift();
        rescale_out();
        write_weights();
      }
    } else {
      mask<kMask>(n);
      raise_shift();
      write_weights();
      rescale_out();
    }
    if (--left_ == 0) {
      if (range_.n_max - 1 - n == kKeep) {
        keep_out<true>();
      } else {
        keep_out<false>();
      }
      left_ = kKeep;
    }
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

  // The sums of positive weights leave the accumulators at once: what the tensor cores cut off of each addition is
  // biased, 15 % over 8k keys, where that of values around 0 is not.
  __device__ __forceinline__ void add_sums() {
#pragma unroll
    for (int r = 0; r < 2; ++r) row_sum_[r] += out_[kOut + 2 * r];
  }
  __device__ __forceinline__ void clear_sums() {
#pragma unroll
    for (int i = kOut; i < Traits::kPart; ++i) {
      out_[i] = 0;
      asm volatile("" : "+f"(out_[i])::"memory");  // here, or ptxas serialises the products
    }
  }

  __device__ __forceinline__ void clear_out() {
#pragma unroll
    for (int i = 0; i < Traits::kPart; ++i) out_[i] = 0;
  }

  // Takes the shift to the block's maxima where they are above those so far.
  __device__ __forceinline__ void raise_shift() {
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
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float shift = fmaxf(shift_[r], fmaf(top[r], scale_, -kBits));
      rescale_[r] = exp2_approx(shift_[r] - shift);
      shift_[r] = shift;
    }
  }

  __device__ __forceinline__ void rescale_out() {
#pragma unroll
    for (int i = 0; i < kOut; ++i) out_[i] *= rescale_[i / 2 % 2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_sum_[r] *= rescale_[r];
      kept_factor_[r] *= rescale_[r];
    }
  }

  // Two column groups are one of V's 16 keys, in the order of the transposer. Not 0 where a weight is at the end of
  // e4m3's range or not a number.
  __device__ __forceinline__ uint32_t write_weights() {
    uint32_t full = 0;
#pragma unroll
    for (int pair = 0; pair < kColumns / 2; ++pair) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          x[i] = exp2_approx(fmaf(scores_[8 * pair + 2 * r + i % 2 + i / 2 * 4], scale_, -shift_[r]));
        }
        const uint32_t word = pack_e4m3(x[0], x[1], x[2], x[3]);
        probabilities_[2 * pair + r] = word;
        full |= word + 0x02020202;  // 448 is 0x7e
      }
    }
    return full & 0x80808080;
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

  // O, at the shift of the moment, joins that in shared memory; kept_factor_ has followed the shift since the last
  // time.
  template <bool kFirst>
  __device__ __forceinline__ void keep_out() {
    float4* const kept = &shared_.kept[group_][0][warp_ * 32 + lane_];
#pragma unroll
    for (int i = 0; i < kOut / 4; ++i) {
      float4 x = make_float4(out_[4 * i], out_[4 * i + 1], out_[4 * i + 2], out_[4 * i + 3]);
      if constexpr (!kFirst) add_kept(x, kept[i * kWarpgroup]);
      kept[i * kWarpgroup] = x;
    }
    kept_factor_[0] = kept_factor_[1] = 1;
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

  const ForwardArgs& args_;
  typename Traits::Shared& shared_;
  const int group_, warp_, lane_;
  Tile tile_;
  TileRange range_;
  uint32_t tile_count_ = 0, q_count_ = 0;
  Ring<Traits::kKStages> k_at_;        // of the next scores
  Ring<Traits::kVStages> v_at_;        // of the values of the last scores
  bool come_ = false;                  // the next K and the V of the last scores
  int left_ = 0;                       // blocks until O is kept
  int free_begin_ = 0, free_end_ = 0;  // blocks [free_begin_, free_end_) need no mask
  int high_[2], low_[2];
  float scale_;  // from S to base-2 logits
  float shift_[2], rescale_[2];
  float row_sum_[2], kept_factor_[2];
  float scores_[kN / 2];
  uint32_t probabilities_[kWords], queries_[kD / 8];
  float out_[Traits::kPart];  // O and the row sums of one block's P
};

}  // namespace adaattn::cuda::sm90
