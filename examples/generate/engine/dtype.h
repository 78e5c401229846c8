// The types that attention tensors may have.
#pragma once

#include <cstddef>
#include <cstdint>

#include "adaattn/adaattn.h"

namespace generate {

enum class DType : adaattn_dtype_t {
  kF32 = ADAATTN_DTYPE_F32,
  kF16 = ADAATTN_DTYPE_F16,
  kBf16 = ADAATTN_DTYPE_BF16,
};

inline size_t dtype_size(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

inline const char* dtype_name(DType dtype) {
  return dtype == DType::kF32 ? "f32" : dtype == DType::kF16 ? "f16" : "bf16";
}

// How keys and values lie in the cache.
enum class CacheFormat {
  kAsAttention,  // in the attention's type
  kE4m3,         // in 8 bits, with a factor for each kFactorTokens tokens of a head
};

inline const char* cache_name(CacheFormat format, DType dtype) {
  return format == CacheFormat::kE4m3 ? "e4m3" : dtype_name(dtype);
}

inline constexpr int64_t kFactorTokens = 64;
inline constexpr float kE4m3Max = 448;
// A block's factor follows from the tokens that come first. Where they do not fill it, later ones may be this many
// times larger; what is larger still is cut off.
inline constexpr float kE4m3Room = 4;

}  // namespace generate
