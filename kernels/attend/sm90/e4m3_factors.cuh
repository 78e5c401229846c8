// Descale factors for blocks of keys, in the e4m3 kernels that take them. The producer walks a tile's blocks in the
// consumers' order and tells them, with each block of K, what its factors come to.
//
// O is kept in the unit of one of V's factors. A block whose factor is within reach of the unit has its weights
// multiplied by factor / unit before they are rounded, which costs a weight nothing: its exponent starts from another
// number. Any other factor becomes the unit, and O is multiplied by old / new. Row sums must not feel V's factors: the
// lines behind V hold unit / factor instead of ones, so that the tensor cores take it out again of the very weights
// that were rounded.
#pragma once

#include <cfloat>

#include "attend/sm90/e4m3_args.h"
#include "common/ptx.cuh"

namespace adaattn::cuda::sm90 {

// Of one block of keys, for its consumers.
struct alignas(16) BlockFactors {
  float scale;   // from Q K^T to base-2 logits
  float lead;    // log2(factor / unit) of V
  float unit;    // that of O from this block on; 0: as before
  bool nothing;  // the values count as zeros
};

// E4M3 has normal numbers down to 2^-11 of where weights start. Of factors 2^6 apart the smaller one's weights are
// still good enough for the row sum, and what they give O is a 64th. An octave above the unit is taken as it comes, for
// the largest of many factors is found in small steps.
inline constexpr float kLeastLead = -6, kMostLead = 1;
// Factors below 2^-60 of the largest in a tile count as 0, so that O does not overflow.
inline constexpr float kLeastFactor = -60;

// A number from 2^-6 on as eight binary digits, one for each line behind V: its power of two in E4M3, the digits above
// it. A line holds the power of two where its digit is 1. Digits apart, for the tensor cores cut off what lies 14 bits
// below a sum at every step, and products of a weight and a power of two have no bits there that the weight has not:
// with two terms of four digits, row sums over 768 keys came out 0.9 % too small, with powers of two 0.3 %.
__device__ __forceinline__ uint32_t lines_of(float x) {
  const uint32_t rounded = __float_as_uint(x) + (1u << 15);
  const uint32_t power = (rounded >> 23) - 120, digits = 0x80 | (rounded >> 16 & 0x7f);
  return digits << 8 | power << 3;
}
__device__ __forceinline__ uint32_t line_byte(uint32_t lines, int line) {
  return (lines >> (15 - line) & 1) != 0 ? lines & 0xff : 0;
}
// What the sums of a lane's even column, 2 (lane % 4), count in a row's.
__device__ __forceinline__ float line_weight(int lane) {
  return __uint_as_float(static_cast<uint32_t>(127 - 2 * (lane % 4)) << 23);
}

// A tile's factors, from its last block of keys to its first. Run by the thread that loads, which has 1,000 clocks for
// a block and 32 registers: no division, no address computed anew, and what is rare is in shared memory.
class FactorWalk {
 public:
  __device__ __forceinline__ FactorWalk(const E4m3Args& args, float& largest, int batch, int head_kv, int n)
      : args_(args), largest_(largest) {
    const AttnParams& p = args.p;
    const int factor = n / args.factor_blocks;
    left_ = n - factor * args.factor_blocks;
    scale_ = args.scale_log2 * __ldg(place(p.q_descale, batch, head_kv, 0));
    keys_ = place(p.k_descale, batch, head_kv, factor);
    values_ = place(p.v_descale, batch, head_kv, factor);
    key_ = __ldg(keys_);
    value_ = __ldg(values_);
    largest_ = -FLT_MAX;
  }

  // Of block n, the next one down; starts reading those of the block before it.
  __device__ __forceinline__ BlockFactors next(int n) {
    const float log2 = log2_approx(value_);
    BlockFactors block{scale_ * key_, log2 - unit_log2_, 0, false};
    if (!(block.lead >= kLeastLead && block.lead <= kMostLead)) {
      block.lead = 0;
      const float largest = fmaxf(largest_, log2);
      largest_ = largest;
      block.nothing = !(log2 >= largest + kLeastFactor);
      if (!block.nothing) {
        block.unit = value_;
        unit_log2_ = log2;
      }
    }
    if (left_-- == 0 && n > 0) {
      left_ = args_.factor_blocks - 1;
      keys_ -= args_.p.k_descale.stride_block;
      values_ -= args_.p.v_descale.stride_block;
      key_ = __ldg(keys_);
      value_ = __ldg(values_);
    }
    return block;
  }

 private:
  static __device__ __forceinline__ const float* place(const Descale& x, int batch, int head_kv, int factor) {
    return x.data + batch * x.stride_b + head_kv * x.stride_h + factor * x.stride_block;
  }
  // Of 0 and of subnormal numbers -inf.
  static __device__ __forceinline__ float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }

  const E4m3Args& args_;
  float& largest_;  // logarithm of the largest factor of V so far, short of those within reach of a unit
  const float *keys_, *values_;
  int left_;  // blocks before this one with the same factors
  float scale_, key_, value_;
  float unit_log2_ = -INFINITY;
};

}  // namespace adaattn::cuda::sm90
