// E4M3 operands of the portable kernels: bytes are widened to f16, which is exact, between shared memory and the tensor
// cores; queries of any narrow type become f16 too, scaled to its range by a power of two for each row.
#pragma once

#include <cuda_fp8.h>

#include "attend/e4m3_features.h"
#include "attend/launch.h"
#include "common/tile.cuh"

namespace adaattn::cuda {

template <>
constexpr Dtype dtype_of<__nv_fp8_e4m3>() {
  return Dtype::kE4M3;
}

// What tensor cores multiply where K and V hold elements of type T.
template <typename T>
struct Products {
  using Type = T;
  using Output = T;
  static constexpr bool kEightBits = false;
  static constexpr uint32_t kFeatures = 0;
};
template <>
struct Products<__nv_fp8_e4m3> {
  using Type = __half;
  using Output = unsigned short;  // bits of either 16-bit type
  static constexpr bool kEightBits = true;
  static constexpr uint32_t kFeatures = kMixed | kDescaleBlocks;
};

// Two pairs of f16, the first of a pair in the low half.
struct F16Pairs {
  uint32_t first, second;
};

#if __CUDA_ARCH__ >= 890
__device__ __forceinline__ uint32_t widen_pair(uint32_t bytes) {
  uint32_t r;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(static_cast<unsigned short>(bytes)));
  return r;
}
// Four numbers x0..x3 of a word as (x0, x1) and (x2, x3).
__device__ __forceinline__ F16Pairs widen_adjacent(uint32_t word) { return {widen_pair(word), widen_pair(word >> 16)}; }
// And as (x0, x2) and (x1, x3).
__device__ __forceinline__ F16Pairs widen_alternate(uint32_t word) {
  return widen_adjacent(__byte_perm(word, 0, 0x3120));
}
#else
// Bytes 1 and 3: exponent and mantissa shifted into place are the number times 2^-8, subnormals included; the only
// pattern that carries into the sign is NaN, which gets an exponent of ones.
__device__ __forceinline__ uint32_t widen_odd_bytes(uint32_t word) {
  const uint32_t nan = ((word & 0x7f007f00u) + 0x01000100u) & 0x80008000u;
  const uint32_t bits = (word & 0x80008000u) | ((word >> 1) & 0x3f803f80u) | (nan >> 1);
  uint32_t r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(bits), "r"(0x5c005c00u));  // 256
  return r;
}
__device__ __forceinline__ F16Pairs widen_adjacent(uint32_t word) {
  return {widen_odd_bytes(__byte_perm(word, 0, 0x1404)), widen_odd_bytes(__byte_perm(word, 0, 0x3424))};
}
__device__ __forceinline__ F16Pairs widen_alternate(uint32_t word) {
  return {widen_odd_bytes(word << 8), widen_odd_bytes(word)};
}
#endif

// The power of two that brings the largest magnitude of a row into [2^14, 2^15), and its reciprocal: in f16 the row is
// then what it was, short of elements below 2^-29 of the largest. 1 for zero, infinity and NaN.
struct RowScale {
  float scale, unscale;
  __device__ __forceinline__ explicit RowScale(float largest) {
    const int exponent = static_cast<int>(__float_as_uint(largest) >> 23);
    const int field = exponent == 0 || exponent >= 255 ? 127 : min(268 - exponent, 253);
    scale = __uint_as_float(static_cast<uint32_t>(field) << 23);
    unscale = __uint_as_float(static_cast<uint32_t>(254 - field) << 23);
  }
};

// The descale factor of one of the kernel's blocks of keys or values.
__device__ __forceinline__ const float* block_factor(const Descale& descale, int64_t descale_block, int keys_per_block,
                                                     int batch, int head_kv, int block) {
  const float* first = descale.data + batch * descale.stride_b + head_kv * descale.stride_h;
  if (descale_block == 0) return first;
  const uint32_t blocks = static_cast<uint32_t>(descale_block / keys_per_block);
  return first + static_cast<int64_t>(static_cast<uint32_t>(block) / blocks) * descale.stride_block;
}

__device__ __forceinline__ void cp_async4(uint32_t shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(global) : "memory");
}

__device__ __forceinline__ void store_shared8(uint32_t shared, uint32_t first, uint32_t second) {
  asm volatile("st.shared.v2.b32 [%0], {%1,%2};" ::"r"(shared), "r"(first), "r"(second) : "memory");
}

// Scores are multiplied by a factor that is never 0, so that those of masked keys stay -inf: with the least factor the
// largest product is 0 to the exponential function.
__device__ __forceinline__ float positive_factor(float factor) { return fmaxf(factor, 0x1p-120f); }

// The unit of the accumulators of O. Factors within 2^6 of it are folded into the probabilities, which f16 has room for
// up to 2^16 and which lose nothing that counts; others change the unit. Never below 2^-60 of the largest factor so
// far, so that accumulators do not overflow.
class ValueUnit {
 public:
  __device__ __forceinline__ float value() const { return unit_; }
  // What to multiply a block's probabilities by; before that, accumulators by shrink (1: not at all).
  __device__ __forceinline__ float weight(float factor, float& shrink) {
    shrink = 1;
    if (factor == unit_) return 1;
    if (factor == 0) return 0;
    if (factor >= unit_ * 0x1p-6f && factor <= unit_ * 0x1p6f) return __fdividef(factor, unit_);
    largest_ = fmaxf(largest_, factor);
    const float unit = fmaxf(factor, largest_ * 0x1p-60f);
    shrink = __fdividef(unit_, unit);
    unit_ = unit;
    return __fdividef(factor, unit);
  }

 private:
  float unit_ = 0, largest_ = 0;
};

// Eight elements from column c of a query row, as they are: 16 bytes of a 16-bit type, 8 of E4M3. Columns from d on are
// zero; aligned rows start on 16 bytes and d is a multiple of 4.
template <bool kMayBeUnaligned>
__device__ __forceinline__ uint4 load_query_chunk(const Operand& q, int64_t row, int c, int d, bool aligned) {
  const bool eight_bits = q.dtype == Dtype::kE4M3;
  const char* from = static_cast<const char*>(q.data) + (row + c) * (eight_bits ? 1 : 2);
  uint4 raw{0, 0, 0, 0};
  if (kMayBeUnaligned && !aligned) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (c + e >= d) break;
      if (eight_bits)
        (e < 4 ? raw.x : raw.y) |= static_cast<uint32_t>(static_cast<unsigned char>(from[e])) << 8 * (e % 4);
      else
        (e < 2   ? raw.x
         : e < 4 ? raw.y
         : e < 6 ? raw.z
                 : raw.w) |= static_cast<uint32_t>(reinterpret_cast<const unsigned short*>(from)[e]) << 16 * (e % 2);
    }
  } else if (eight_bits) {
    if (c + 4 < d) {
      const uint2 all = *reinterpret_cast<const uint2*>(from);
      raw.x = all.x, raw.y = all.y;
    } else if (c < d) {
      raw.x = *reinterpret_cast<const uint32_t*>(from);
    }
  } else if (c + 4 < d) {
    raw = *reinterpret_cast<const uint4*>(from);
  } else if (c < d) {
    const uint2 low = *reinterpret_cast<const uint2*>(from);
    raw.x = low.x, raw.y = low.y;
  }
  return raw;
}

__device__ __forceinline__ float bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float bf16_high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ float largest_of_bf16(float top, uint32_t pair) {
  return fmaxf(top, fmaxf(fabsf(bf16_low(pair)), fabsf(bf16_high(pair))));
}
__device__ __forceinline__ uint32_t bf16_to_f16(uint32_t pair, float scale) {
  return pack2<__half>(bf16_low(pair) * scale, bf16_high(pair) * scale);
}

__device__ __forceinline__ float query_factor(const AttnParams& p, int batch, int head_kv) {
  const Descale& x = p.q_descale;
  return x.data == nullptr ? 1.0f : x.data[batch * x.stride_b + head_kv * x.stride_h];
}

__device__ __forceinline__ uint32_t pack_narrow(Dtype dtype, float low, float high) {
  return dtype == Dtype::kBF16 ? pack2<__nv_bfloat16>(low, high) : pack2<__half>(low, high);
}
__device__ __forceinline__ void store_narrow(const Operand& o, int64_t i, float x) {
  static_cast<unsigned short*>(o.data)[i] = static_cast<unsigned short>(pack_narrow(o.dtype, x, 0));
}

// out += P V for 16 keys whose rows start at v_lane, the address of this lane's row and chunk. Widened values have even
// and odd columns in tiles of their own: of each 16 columns, out[.][2j] and out[.][2j + 1] hold for a lane 4t, 4t + 2
// and 4t + 1, 4t + 3.
template <typename T, int kRowTiles, int kDimTiles>
__device__ __forceinline__ void multiply_values(float (&out)[kRowTiles][kDimTiles][4],
                                                const uint32_t (&prob)[kRowTiles][4], uint32_t v_lane) {
  using Layout = RowLayout<T, 8 * kDimTiles>;
  if constexpr (Products<T>::kEightBits) {
#pragma unroll
    for (int j = 0; j < kDimTiles; j += 4) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, Layout::advance(v_lane, j / 4));
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const F16Pairs low = widen_alternate(b[2 * side]), high = widen_alternate(b[2 * side + 1]);
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) {
          mma_m16n8k16<__half>(out[t][j + 2 * side], prob[t], low.first, high.first);
          mma_m16n8k16<__half>(out[t][j + 2 * side + 1], prob[t], low.second, high.second);
        }
      }
    }
  } else {
#pragma unroll
    for (int j = 0; j < kDimTiles; j += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, Layout::advance(v_lane, j / 2));
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) {
        mma_m16n8k16<T>(out[t][j], prob[t], b[0], b[1]);
        mma_m16n8k16<T>(out[t][j + 1], prob[t], b[2], b[3]);
      }
    }
  }
}

// Makes f16 of chunk `chunk` of row r and puts it into a tile of such rows; unscale[r] is what products with the row
// are to be multiplied by. The kD / 8 lanes of a row call it together. Columns lie in the order in which fragments of
// widened keys have them: of each 16, a lane's four columns 4t .. 4t + 3 stand where the tensor cores look for 2t, 2t +
// 1, 2t + 8 and 2t + 9.
template <int kD>
__device__ __forceinline__ void store_query_chunk(uint32_t shared, float* unscale, int r, int chunk, uint4 raw,
                                                  Dtype dtype) {
  using Layout = TileLayout<kD>;
  const int upper = chunk % 2;
  float back = 1;
  if (dtype == Dtype::kE4M3) {
    const F16Pairs low = widen_adjacent(raw.x), high = widen_adjacent(raw.y);
    raw = {low.first, low.second, high.first, high.second};
  } else if (dtype == Dtype::kBF16) {
    float top = largest_of_bf16(largest_of_bf16(0, raw.x), raw.y);
    top = largest_of_bf16(largest_of_bf16(top, raw.z), raw.w);
#pragma unroll
    for (int step = kD / 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
    const RowScale row(top);
    raw = {bf16_to_f16(raw.x, row.scale), bf16_to_f16(raw.y, row.scale), bf16_to_f16(raw.z, row.scale),
           bf16_to_f16(raw.w, row.scale)};
    back = row.unscale;
  }
  store_shared8(shared + Layout::offset(r, chunk - upper) + 8 * upper, raw.x, raw.z);
  store_shared8(shared + Layout::offset(r, chunk - upper + 1) + 8 * upper, raw.y, raw.w);
  if (chunk == 0) unscale[r] = back;
}

// Fills kRows rows at `shared` by kThreads threads. row_of(r) is the element at which row r starts, for r below `rows`;
// others become zero.
template <int kD, int kRows, int kThreads, bool kMayBeUnaligned, typename RowOf>
__device__ __forceinline__ void load_queries(uint32_t shared, float* unscale, int thread, const Operand& q, int d,
                                             int rows, bool aligned, const RowOf& row_of) {
  constexpr int kLanes = kD / 8, kRowStep = kThreads / kLanes;
  static_assert(kLanes <= 32 && kRows % kRowStep == 0);
  const int chunk = thread % kLanes;
#pragma unroll 4
  for (int i = 0; i < kRows; i += kRowStep) {
    const int r = i + thread / kLanes;
    uint4 raw{0, 0, 0, 0};
    if (r < rows) raw = load_query_chunk<kMayBeUnaligned>(q, row_of(r), 8 * chunk, d, aligned);
    store_query_chunk<kD>(shared, unscale, r, chunk, raw, q.dtype);
  }
}

}  // namespace adaattn::cuda
