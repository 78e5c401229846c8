#include "number.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace adaattn::reference {
namespace {

struct Format {
  int exponent_bits, mantissa_bits;
};
constexpr Format kHalf{5, 10}, kBfloat{8, 7};

double decode(uint16_t bits, Format f) {
  const int bias = (1 << (f.exponent_bits - 1)) - 1;
  const int exponent = (bits >> f.mantissa_bits) & ((1 << f.exponent_bits) - 1);
  const int mantissa = bits & ((1 << f.mantissa_bits) - 1);
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (exponent == (1 << f.exponent_bits) - 1)
    return mantissa ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - f.mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << f.mantissa_bits), exponent - bias - f.mantissa_bits);
}

uint16_t encode(double value, Format f) {
  const int bias = (1 << (f.exponent_bits - 1)) - 1;
  const uint16_t infinity = static_cast<uint16_t>(((1 << f.exponent_bits) - 1) << f.mantissa_bits);
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return sign | infinity | 1 << (f.mantissa_bits - 1);
  if (std::isinf(value)) return sign | infinity;
  if (value == 0) return sign;
  int exponent;
  std::frexp(value, &exponent);  // |value| in [2^(exponent-1), 2^exponent)
  const int lowest = 1 - bias;   // exponent of the smallest normal number
  const int ulp = std::max(exponent - 1, lowest) - f.mantissa_bits;
  const double steps = std::nearbyint(std::ldexp(std::fabs(value), -ulp));  // to nearest even
  // Adding the steps to the exponent field carries over correctly when they round up to the next power of two.
  const int64_t hidden = int64_t{1} << f.mantissa_bits;
  const int64_t field = std::max(exponent - 1, lowest) - lowest;
  const int64_t bits = field * hidden + static_cast<int64_t>(steps);
  return sign | static_cast<uint16_t>(std::min<int64_t>(bits, infinity));
}

// E4M3 has no infinity and one NaN: the exponent field 15 counts on, up to 448.
double decode_e4m3(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  const double sign = bits & 0x80 ? -1.0 : 1.0;
  if (exponent == 15 && mantissa == 7) return std::copysign(std::numeric_limits<double>::quiet_NaN(), sign);
  if (exponent == 0) return sign * std::ldexp(mantissa, -9);
  return sign * std::ldexp(8 + mantissa, exponent - 10);
}

uint8_t encode_e4m3(double value) {
  const uint8_t sign = std::signbit(value) ? 0x80 : 0;
  if (std::isnan(value)) return sign | 0x7f;
  const double magnitude = std::fmin(std::fabs(value), 448);
  if (magnitude == 0) return sign;
  int exponent;
  std::frexp(magnitude, &exponent);
  const int field = std::max(exponent - 1, -6) + 6;
  const double steps = std::nearbyint(std::ldexp(magnitude, 9 - field));  // to nearest even
  return sign | static_cast<uint8_t>(8 * field + static_cast<int>(steps));
}

}  // namespace

int64_t size_of(adaattn_dtype_t dtype) {
  switch (dtype) {
    case ADAATTN_DTYPE_F32:
    case ADAATTN_DTYPE_I32:
      return 4;
    case ADAATTN_DTYPE_F16:
    case ADAATTN_DTYPE_BF16:
      return 2;
    case ADAATTN_DTYPE_I64:
      return 8;
    case ADAATTN_DTYPE_E4M3:
      return 1;
    default:
      std::abort();
  }
}

double load(const void* data, adaattn_dtype_t dtype, int64_t index) {
  const char* p = static_cast<const char*>(data) + index * size_of(dtype);
  const auto as = [p](auto x) {
    std::memcpy(&x, p, sizeof x);
    return x;
  };
  switch (dtype) {
    case ADAATTN_DTYPE_F32:
      return as(float{});
    case ADAATTN_DTYPE_I32:
      return as(int32_t{});
    case ADAATTN_DTYPE_I64:
      return static_cast<double>(as(int64_t{}));
    case ADAATTN_DTYPE_F16:
      return decode(as(uint16_t{}), kHalf);
    case ADAATTN_DTYPE_E4M3:
      return decode_e4m3(as(uint8_t{}));
    default:
      return decode(as(uint16_t{}), kBfloat);
  }
}

void store(void* data, adaattn_dtype_t dtype, int64_t index, double value) {
  char* p = static_cast<char*>(data) + index * size_of(dtype);
  const auto put = [p](auto x) { std::memcpy(p, &x, sizeof x); };
  switch (dtype) {
    case ADAATTN_DTYPE_F32:
      return put(static_cast<float>(value));
    case ADAATTN_DTYPE_I32:
      return put(static_cast<int32_t>(value));
    case ADAATTN_DTYPE_I64:
      return put(static_cast<int64_t>(value));
    case ADAATTN_DTYPE_F16:
      return put(encode(value, kHalf));
    case ADAATTN_DTYPE_E4M3:
      return put(encode_e4m3(value));
    default:
      return put(encode(value, kBfloat));
  }
}

double rounded(double value, adaattn_dtype_t dtype) {
  int64_t storage;
  store(&storage, dtype, 0, value);
  return load(&storage, dtype, 0);
}

double at(const adaattn_tensor_t& t, int64_t i0, int64_t i1, int64_t i2, int64_t i3) {
  return load(t.data, t.dtype, i0 * t.stride[0] + i1 * t.stride[1] + i2 * t.stride[2] + i3 * t.stride[3]);
}

}  // namespace adaattn::reference
