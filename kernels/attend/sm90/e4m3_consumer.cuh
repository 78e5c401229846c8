// A consumer warpgroup of the e4m3 kernels: Q, K and V in e4m3 with one factor each.
#pragma once

#include "attend/sm90/e4m3_traits.cuh"
#include "attend/sm90/eight_bit_consumer.cuh"

namespace adaattn::cuda::sm90 {

template <class Traits>
class E4m3Consumer : public EightBitConsumer<Traits, E4m3Consumer<Traits>> {
  using Base = EightBitConsumer<Traits, E4m3Consumer>;
  friend Base;
  using Base::args_, Base::shared_, Base::group_, Base::warp_, Base::lane_, Base::tile_, Base::range_;
  using Base::kD, Base::kN, Base::kUnseen;
  using Base::shift_, Base::row_sum_, Base::queries_, Base::scores_, Base::out_;

 public:
  using Base::Base;

 private:
  static __device__ __forceinline__ void product(float (&s)[kN / 2], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                 uint64_t k, int accumulate) {
    WgmmaE4m3<kN>::rs(s, a0, a1, a2, a3, k, accumulate);
  }

  __device__ __forceinline__ float descale(const Descale& x) const {
    return __ldg(x.data + tile_.batch * x.stride_b + tile_.head / args_.group_size * x.stride_h);
  }

  // 16 bytes of 8 rows are a matrix.
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
    Base::release(&shared_.q_empty[group_]);
  }

  template <bool kFirst>
  __device__ __forceinline__ void read_scales() {
    if constexpr (kFirst) scale_ = args_.scale_log2 * descale(args_.p.q_descale) * descale(args_.p.k_descale);
  }
  __device__ __forceinline__ void exponents(float (&x)[kN / 2], const float (&base)[2]) const {
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) x[i] = fmaf(scores_[i], scale_, -base[i / 2 % 2]);
  }

  // O is kept without V's factor.
  static __device__ __forceinline__ bool changes_units() { return false; }
  static __device__ __forceinline__ float change_of_units() { return 1; }
  static __device__ __forceinline__ float units() { return 1; }
  static __device__ __forceinline__ void reset_units() {}

  // Normalises and writes O and LSE.
  __device__ __forceinline__ void store() {
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
      const int row = Base::row_of(r);
      if (row >= range_.len_q) continue;
      const int64_t position = range_.q_start + row;
      if (p.lse.data != nullptr && lane_ % 4 == 0)
        *Base::lse_of(position) = empty ? -INFINITY : (shared_top + __log2f(total)) * kLn2;
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

  float scale_;  // from S to base-2 logits
};

}  // namespace adaattn::cuda::sm90
