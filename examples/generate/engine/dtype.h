// The types that attention tensors may have.
#pragma once

#include <cstddef>

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

}  // namespace generate
