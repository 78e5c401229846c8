// Registry rows of the 8-bit kernels. NOTES.md has the measurements behind the configurations.
#pragma once

#include "attend/launch.h"
#include "attend/sm90/int8_kernel.cuh"
#include "attend/sm90/int8_launch.h"

namespace adaattn::cuda::sm90 {

template <typename T, int kDqk, int kDv, uint32_t kFeatures>
struct Int8 {
  static constexpr ForwardConfig kConfig = {.d_qk = kDqk,
                                            .d_v = kDv,
                                            .masked = kFeatures != kPlain,
                                            .dynamic = kFeatures != kPlain,
                                            .ordered = false,
                                            .early_columns = 8};
  using Traits = Int8Traits<T, Int8>;

  static AttendKernel row(const char* name) {
    static const ForwardInstance instance{name, dtype_of<T>(), kConfig,
                                          static_cast<int>(sizeof(typename Traits::Shared)),
                                          reinterpret_cast<const void*>(&int8_kernel<T, Int8>)};
    AttendKernel k{};
    k.name = name;
    k.arch = 90;
    k.phase = Phase::kInt8;
    k.dtype = dtype_of<T>();
    k.d_qk = kDqk;
    k.d_v = kDv;
    k.features = kVarlen | kSink | (kConfig.masked ? kMasked : 0);
    k.tile_q = Traits::kM;
    k.tile_k = Traits::kN;
    k.ctas_per_sm = 1;
    k.shared_bytes = sizeof(typename Traits::Shared);
    k.function = instance.kernel;
    k.launch = [](const AttendArgs& args, cudaStream_t stream) { return launch_int8(instance, args, stream); };
    return k;
  }
};

}  // namespace adaattn::cuda::sm90
