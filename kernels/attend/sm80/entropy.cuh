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
    AttendKernel k{};
    k.name = name;
    k.arch = 80;
    k.phase = Phase::kEntropy;
    k.dtype = dtype_of<T>();
    k.d_qk = kDqk;
    k.d_v = 0;
    k.features = (kCommon | kFeatures | kRowSample) & ~(kSplit | kPacked);
    k.tile_q = Shape::kM;
    k.tile_k = Shape::kN;
    k.ctas_per_sm = 2;
    k.reports = true;
    k.shared_bytes = Shape::kSharedBytes;
    k.function = reinterpret_cast<const void*>(kernel());
    k.launch = [](const AttendArgs& args, cudaStream_t stream) {
      const dim3 grid(static_cast<unsigned>(args.m_tiles * args.heads * args.p.batch));
      return launch_grid(kernel(), grid, Shape::kThreads, Shape::kSharedBytes, stream, args);
    };
    return k;
  }
};

}  // namespace adaattn::cuda::sm80
