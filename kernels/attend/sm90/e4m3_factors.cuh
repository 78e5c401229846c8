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

#include "attend/sm90/forward_args.h"

namespace adaattn::cuda::sm90 {

// Of one block of keys, for its consumers.
struct alignas(16) BlockFactors {
  float scale;   // from Q K^T to base-2 logits
  float lead;    // log2(factor / unit) of V
  float change;  // what O is multiplied by before this block's values join it: old unit / new unit
};

// Of the same block's values, for the transposer.
struct ValueFactors {
  float unit;      // of O from this block on; 0: no factor so far was above 0
  uint32_t lines;  // as of lines_of()
  bool nothing;    // the values count as zeros
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

// A tile's factors, from its last block of kN keys to its first. Run by one thread.
template <int kN>
class FactorWalk {
 public:
  __device__ __forceinline__ FactorWalk(const ForwardArgs& args, int batch, int head_kv, int n)
      : args_(args), batch_(batch), head_kv_(head_kv) {
    const int64_t block = args.p.descale_block;
    blocks_ = block == 0 ? INT32_MAX : static_cast<int>(min(block / kN, int64_t{INT32_MAX}));
    scale_ = args.scale_log2 * factor(args.p.q_descale, 0);
    fetch(n);
  }

  // Of block n; starts reading those of the block before it.
  __device__ __forceinline__ BlockFactors next(int n, ValueFactors& values) {
    BlockFactors keys{scale_ * key_, 0, 1};
    const float log2 = __log2f(value_);
    largest_ = fmaxf(largest_, log2);
    values.nothing = !(log2 >= largest_ + kLeastFactor) || value_ == 0;
    if (!values.nothing) {
      keys.lead = log2 - unit_log2_;
      if (!(keys.lead >= kLeastLead && keys.lead <= kMostLead)) {
        if (unit_ != 0) keys.change = exp2f(-keys.lead);
        keys.lead = 0;
        unit_ = value_;
        unit_log2_ = log2;
      }
    }
    values.unit = unit_;
    values.lines = lines_of(exp2f(-keys.lead));
    fetch(max(n - 1, 0));
    return keys;
  }

 private:
  __device__ __forceinline__ float factor(const Descale& x, int block) const {
    return __ldg(x.data + batch_ * x.stride_b + head_kv_ * x.stride_h + block * x.stride_block);
  }
  __device__ __forceinline__ void fetch(int n) {
    const int block = n / blocks_;
    key_ = factor(args_.p.k_descale, block);
    value_ = factor(args_.p.v_descale, block);
  }

  const ForwardArgs& args_;
  int batch_, head_kv_, blocks_;
  float scale_, key_, value_;
  float unit_ = 0, unit_log2_ = -INFINITY, largest_ = -FLT_MAX;
};

// What stands in its place where a factor is for all keys.
struct NoFactors {
  __device__ __forceinline__ NoFactors(const ForwardArgs&, int, int, int) {}
  __device__ __forceinline__ BlockFactors next(int, ValueFactors&) { return {}; }
};

}  // namespace adaattn::cuda::sm90
