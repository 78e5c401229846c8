// Vector basics for the units compiled once per instruction set. Everything has internal linkage (see kernels.h).
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifndef HWY_COMPILE_ONLY_STATIC
#error "define HWY_COMPILE_ONLY_STATIC: the unit is compiled for exactly one target"
#endif
#include <hwy/highway.h>

#include "cpu_fallback/attend/kernels.h"

// AVX-512 with bf16 products beside it: on tiles, or on vdpbf16ps.
#if defined(ADAATTN_UNIT_AMX) || defined(ADAATTN_UNIT_AVX512BF16)
#define ADAATTN_UNIT_BF16
#endif
// AVX-512 with 8-bit products, which every processor with bf16 products has too.
#if defined(ADAATTN_UNIT_AVX512VNNI) || defined(ADAATTN_UNIT_BF16)
#define ADAATTN_UNIT_AVX512
#define ADAATTN_UNIT_INT8
#endif

// Highway falls back silently when a flag is missing.
#if defined(ADAATTN_UNIT_BASELINE)
static_assert(HWY_STATIC_TARGET == HWY_SSE4);
#elif defined(ADAATTN_UNIT_AVX2)
static_assert(HWY_STATIC_TARGET == HWY_AVX2);
#elif defined(ADAATTN_UNIT_AVX512)
static_assert(HWY_STATIC_TARGET == HWY_AVX3);
#elif defined(ADAATTN_UNIT_NEON)
static_assert(HWY_STATIC_TARGET == HWY_NEON);
#else
#error "define the ADAATTN_UNIT_* that the flags stand for"
#endif

namespace adaattn::cpu {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

constexpr hn::ScalableTag<float> kF32;
using F32 = hn::Vec<decltype(kF32)>;
using F32Mask = hn::Mask<decltype(kF32)>;
constexpr hn::RebindToUnsigned<decltype(kF32)> kU32;
constexpr hn::RebindToSigned<decltype(kF32)> kI32;
constexpr hn::Rebind<uint16_t, decltype(kF32)> kU16;
constexpr int64_t kLanes = HWY_MAX_BYTES / sizeof(float);

// Vectors per panel: 24 accumulators where there are 32 registers, 12 where there are 16. With tiles it is the columns
// of two of them, so that most of what a panel works on stays in first-level cache.
#if defined(ADAATTN_UNIT_AMX)
constexpr int kPanelVectors = 2;
#elif defined(ADAATTN_UNIT_AVX512) || defined(ADAATTN_UNIT_NEON)
constexpr int kPanelVectors = 4;
#else
constexpr int kPanelVectors = 2;
#endif
constexpr int64_t kPanel = kPanelVectors * kLanes;  // queries
static_assert(kTileRows % kPanel == 0);

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

HWY_INLINE float infinity() { return __builtin_inff(); }

// Bounds that leave NaN as it is. Of two operands with a NaN among them x86 returns the second, Arm the number.
#if defined(ADAATTN_UNIT_NEON)
HWY_INLINE F32 at_least(F32 bound, F32 x) { return hn::IfThenElse(hn::Lt(x, bound), bound, x); }
HWY_INLINE F32 at_most(F32 bound, F32 x) { return hn::IfThenElse(hn::Gt(x, bound), bound, x); }
#else
HWY_INLINE F32 at_least(F32 bound, F32 x) { return hn::Max(bound, x); }
HWY_INLINE F32 at_most(F32 bound, F32 x) { return hn::Min(bound, x); }
#endif

// 2^x. Relative error below 2e-7 for -126 <= x <= 127, 0 below -126.5, NaN for NaN. The polynomial is, for the
// relative error on [-1/2, 1/2], the best of degree 5 with a constant term of 1: 2^0 must be exactly 1, or the running
// sums of a row would grow with every block of keys. Adding `magic` leaves round(x) + 127 in the low bits of the sum.
HWY_INLINE F32 exp2(F32 x) {
  const F32 magic = hn::Set(kF32, 12582912.0f + 127.0f);
  x = at_least(hn::Set(kF32, -127.0f), x);
  const F32 shifted = hn::Add(x, magic);
  const F32 f = hn::Sub(x, hn::Sub(shifted, magic));
  F32 p = hn::Set(kF32, 0.001326472731307149f);
  p = hn::MulAdd(p, f, hn::Set(kF32, 0.009671512991189957f));
  p = hn::MulAdd(p, f, hn::Set(kF32, 0.05550733581185341f));
  p = hn::MulAdd(p, f, hn::Set(kF32, 0.24022242426872253f));
  p = hn::MulAdd(p, f, hn::Set(kF32, 0.6931470036506653f));
  p = hn::MulAdd(p, f, hn::Set(kF32, 1.0f));
  const F32 power = hn::BitCast(kF32, hn::ShiftLeft<23>(hn::BitCast(kU32, shifted)));
  return hn::Mul(p, power);
}

// tanh with a relative error below 3e-7: an odd polynomial (minimax in x^2) below 0.65, 1 - 2 / (e^2|x| + 1) above.
HWY_INLINE F32 tanh(F32 x) {
  const F32 magnitude = at_most(hn::Set(kF32, 10.0f), hn::Abs(x));
  const F32 z = hn::Mul(x, x);
  F32 p = hn::Set(kF32, -0.005514986347407103f);
  p = hn::MulAdd(p, z, hn::Set(kF32, 0.020469259470701218f));
  p = hn::MulAdd(p, z, hn::Set(kF32, -0.05368797481060028f));
  p = hn::MulAdd(p, z, hn::Set(kF32, 0.1333082914352417f));
  p = hn::MulAdd(p, z, hn::Set(kF32, -0.3333325982093811f));
  const F32 small = hn::MulAdd(hn::Mul(x, z), p, x);
  const F32 one = hn::Set(kF32, 1.0f);
  const F32 e = exp2(hn::Mul(magnitude, hn::Set(kF32, 2 * kLog2E)));
  const F32 large = hn::CopySign(hn::Sub(one, hn::Div(hn::Set(kF32, 2.0f), hn::Add(e, one))), x);
  return hn::IfThenElse(hn::Lt(magnitude, hn::Set(kF32, 0.65f)), small, large);
}

// ---- Conversions ----

struct Half {
  uint16_t bits;
};
struct Brain {
  uint16_t bits;
};

HWY_INLINE float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

HWY_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

HWY_INLINE float to_float(float x) { return x; }
HWY_INLINE float to_float(Brain x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
// Multiplying by 2^112 moves the exponent bias and normalises subnormals in one exact step.
HWY_INLINE float to_float(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  if ((x.bits & 0x7c00) == 0x7c00)
    return bits_to_float(sign | 0x7f800000 | static_cast<uint32_t>(x.bits & 0x3ff) << 13);
  return bits_to_float(sign | float_to_bits(bits_to_float(static_cast<uint32_t>(x.bits & 0x7fff) << 13) * 0x1p112f));
}

template <typename T>
HWY_INLINE T load_scalar(const void* p) {
  T x;
  memcpy(&x, p, sizeof x);
  return x;
}

HWY_INLINE F32 load(const float* p) { return hn::LoadU(kF32, p); }

HWY_INLINE F32 load(const Brain* p) {
  const auto bits = hn::LoadU(kU16, reinterpret_cast<const uint16_t*>(p));
  return hn::BitCast(kF32, hn::ShiftLeft<16>(hn::PromoteTo(kU32, bits)));
}

HWY_INLINE F32 load(const Half* p) {
#if defined(ADAATTN_UNIT_AVX2)
  return F32{_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
#elif defined(ADAATTN_UNIT_AVX512)
  return F32{_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
#else
  const auto bits = hn::PromoteTo(kU32, hn::LoadU(kU16, reinterpret_cast<const uint16_t*>(p)));
  const auto magnitude = hn::ShiftLeft<13>(hn::And(bits, hn::Set(kU32, 0x7fff)));
  const auto special = hn::Eq(hn::And(bits, hn::Set(kU32, 0x7c00)), hn::Set(kU32, 0x7c00));
  const auto finite = hn::BitCast(kU32, hn::Mul(hn::BitCast(kF32, magnitude), hn::Set(kF32, 0x1p112f)));
  const auto value = hn::IfThenElse(special, hn::Or(magnitude, hn::Set(kU32, 0x7f800000)), finite);
  return hn::BitCast(kF32, hn::Or(value, hn::ShiftLeft<16>(hn::And(bits, hn::Set(kU32, 0x8000)))));
#endif
}

// The first n < kLanes elements, zeros behind them; never reads beyond.
template <typename T>
HWY_INLINE F32 load_head(const T* p, int64_t n) {
  HWY_ALIGN T padded[kLanes];
  memset(static_cast<void*>(padded), 0, sizeof padded);
  memcpy(static_cast<void*>(padded), p, static_cast<size_t>(n) * sizeof(T));
  return load(padded);
}

HWY_INLINE uint16_t round_to_brain(float x) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

HWY_INLINE uint16_t round_to_half(float x) {
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and above round to infinity
  if (magnitude < 0x38800000) {
    // Subnormal: the addition rounds to a multiple of 2^-24, the unit of the result.
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000));
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | (rounded - 0x38000000) >> 13);
}

HWY_INLINE void store_brain(F32 x, Brain* p) {
  const auto bits = hn::BitCast(kU32, x);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(kU32, 1));
  const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(kU32, 0x7fff)));
  const auto quiet = hn::Or(bits, hn::Set(kU32, 0x400000));
  const auto nan = hn::RebindMask(kU32, hn::IsNaN(x));
  const auto result = hn::ShiftRight<16>(hn::IfThenElse(nan, quiet, rounded));
  hn::StoreU(hn::TruncateTo(kU16, result), kU16, reinterpret_cast<uint16_t*>(p));
}

// n floats to the tensor's type.
HWY_INLINE void store_row(const float* HWY_RESTRICT x, void* HWY_RESTRICT out, Dtype dtype, int64_t n) {
  if (dtype == Dtype::kF32) {
    memcpy(out, x, static_cast<size_t>(n) * sizeof(float));
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(out);
  int64_t i = 0;
  if (dtype == Dtype::kBF16) {
    for (; i + kLanes <= n; i += kLanes) store_brain(load(x + i), reinterpret_cast<Brain*>(to + i));
    for (; i < n; ++i) to[i] = round_to_brain(x[i]);
    return;
  }
#if defined(ADAATTN_UNIT_AVX2)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), 0));
#elif defined(ADAATTN_UNIT_AVX512)
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm512_cvtps_ph(_mm512_loadu_ps(x + i), 0));
#endif
  for (; i < n; ++i) to[i] = round_to_half(x[i]);
}

// n elements widened and multiplied by `factor`. Returns false if some element is NaN or infinite.
template <typename T>
HWY_INLINE bool widen(const T* HWY_RESTRICT from, float* HWY_RESTRICT to, int64_t n, float factor) {
  const F32 f = hn::Set(kF32, factor);
  F32 check = hn::Zero(kF32);  // x - x is 0 for finite x, NaN otherwise
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const F32 x = load(from + i);
    check = hn::Add(check, hn::Sub(x, x));
    hn::StoreU(hn::Mul(x, f), kF32, to + i);
  }
  bool finite = !(hn::AllFalse(kF32, hn::IsNaN(check)) == false);
  for (; i < n; ++i) {
    const float x = to_float(load_scalar<T>(from + i));
    finite = finite && x - x == 0;
    to[i] = x * factor;
  }
  return finite;
}

HWY_INLINE bool widen_row(const void* from, Dtype dtype, float* to, int64_t n, float factor) {
  if (dtype == Dtype::kF32) return widen(static_cast<const float*>(from), to, n, factor);
  if (dtype == Dtype::kBF16) return widen(static_cast<const Brain*>(from), to, n, factor);
  return widen(static_cast<const Half*>(from), to, n, factor);
}

HWY_INLINE float load_any(const void* p, Dtype dtype) {
  if (dtype == Dtype::kF32) return load_scalar<float>(p);
  if (dtype == Dtype::kBF16) return to_float(load_scalar<Brain>(p));
  return to_float(load_scalar<Half>(p));
}

// ---- Addresses ----

HWY_INLINE int64_t element_bytes(Dtype dtype) { return dtype == Dtype::kF32 ? 4 : 2; }

HWY_INLINE const char* key_address(const KeyOperand& operand, int64_t key) {
  if (operand.block_table == nullptr) return operand.data + key * operand.stride;
  int64_t page = operand.block_table[key / operand.page_size];
  if (page < 0) page = 0;
  if (page >= operand.num_pages) page = operand.num_pages - 1;
  return operand.data + page * operand.page_stride + key % operand.page_size * operand.stride;
}

HWY_INLINE char* row_address(const Operand& operand, int64_t group, int64_t row) {
  const int64_t element = row / group * operand.stride_s + row % group * operand.stride_h;
  return static_cast<char*>(operand.data) + element * element_bytes(operand.dtype);
}

// ---- Scores: units of log2 ----

// What turns q . k, with q widened by query_factor(), into a score in units of log2.
struct ScoreRule {
  float query_factor;
  float cap;     // softcap * log2(e), 0: off
  bool special;  // anything beyond q . k
};

HWY_INLINE ScoreRule score_rule(const RowOperands& rows) {
  ScoreRule rule;
  rule.query_factor = rows.softcap > 0 ? rows.scale / rows.softcap : rows.scale * kLog2E;
  rule.cap = rows.softcap * kLog2E;
  rule.special = rows.softcap > 0 || rows.alibi != nullptr || rows.bias.data != nullptr;
  return rule;
}

// ---- The end of a row: from the running maximum, sum and entropy sum (units of log2) to what is stored ----

struct RowResult {
  float factor;  // of O
  float lse, entropy;
};

HWY_INLINE RowResult finish_row(float max, float sum, float entropy_sum, const float* sink) {
  RowResult result;
  float total = sum, top = max;
  if (sink != nullptr) {
    const float s = *sink * kLog2E;
    if (s > top || s != s) top = s;
    if (top == -infinity()) {
      total = 0;
    } else {
      // Up to rounding of 2^x on both sides; ::exp2f is exact enough and called once per row.
      total = (max == -infinity() ? 0.0f : sum * ::exp2f(max - top)) + ::exp2f(s - top);
    }
  }
  if (total == 0) {
    result.factor = 0;
    result.lse = -infinity();
  } else {
    result.factor = (max == -infinity() ? 0.0f : sink == nullptr ? 1.0f : ::exp2f(max - top)) / total;
    result.lse = kLn2 * top + ::logf(total);
  }
  result.entropy = sum == 0 ? 0 : ::logf(sum) - kLn2 * entropy_sum / sum;
  return result;
}

HWY_INLINE void store_statistics(const RowOperands& rows, int64_t row, const RowResult& result) {
  if (rows.lse.data != nullptr) memcpy(row_address(rows.lse, rows.group, row), &result.lse, sizeof(float));
  if (rows.entropy.data != nullptr) memcpy(row_address(rows.entropy, rows.group, row), &result.entropy, sizeof(float));
}

}  // namespace
}  // namespace adaattn::cpu
