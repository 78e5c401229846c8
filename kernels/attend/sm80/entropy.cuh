// The entropy tool: the forward kernels without values, over all query rows or a sample of them.
#pragma once

#include <type_traits>

#include "attend/sm80/exactf32.cuh"
#include "attend/sm80/forward.cuh"

namespace adaattn::cuda::sm80 {

template <typename T, int kDqk, int kDv, uint32_t kFeatures>
struct Entropy {
  static_assert(kDv == 0);
  static constexpr bool kExact = std::is_same_v<T, float>;
  using Shape = std::conditional_t<kExact, ExactF32Shape<kDqk>, ForwardShape<T, kExact ? 64 : kDqk, 0>>;
  static constexpr auto kernel() {
    if constexpr (kExact)
      return &exact_f32_kernel<kDqk, true>;
    else
      return &forward_kernel<T, kDqk, 0, kFeatures>;
  }
  static AttendKernel row(const char* name) {
    return portable_row<Entropy>(name, Phase::kEntropy, dtype_of<T>(), kDqk, kDv,
                                 (kCommon | kFeatures | kRowSample) & ~(kSplit | kPacked), 2);
  }
};

}  // namespace adaattn::cuda::sm80
