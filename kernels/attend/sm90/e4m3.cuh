// Registry rows of the e4m3 class. NOTES.md has the measurements behind the configurations.
#pragma once

#include <cuda_fp8.h>

#include "attend/e4m3_features.h"
#include "attend/launch.h"
#include "attend/sm90/e4m3_kernel.cuh"
#include "attend/sm90/e4m3_launch.h"

namespace adaattn::cuda {

// As instances.def has them.
inline constexpr uint32_t kBlocks = kDescaleBlocks, kMaskedblocks = kMasked | kDescaleBlocks;

namespace sm90 {

// T names the dtype of the inputs.
template <typename T, int kDqk, int kDv, uint32_t kFeatures>
struct E4m3 {
  static constexpr ForwardConfig kConfig = {.d_qk = kDqk,
                                            .d_v = kDv,
                                            .tile_n = 64,
                                            .groups = 3,
                                            .masked = (kFeatures & kMasked) != 0,
                                            .dynamic = (kFeatures & kMasked) != 0,
                                            .ordered = false,
                                            .k_stages = 4,
                                            .quick = true};
  static constexpr int kSums = 12, kKeep = 24, kRawStages = 3, kVStages = 4;
  static constexpr bool kBlockFactors = (kFeatures & kDescaleBlocks) != 0;
  using Traits = E4m3Traits<E4m3>;

  static AttendKernel row(const char* name) {
    static const ForwardInstance instance{name, Dtype::kE4M3, kConfig,
                                          static_cast<int>(sizeof(typename Traits::Shared)),
                                          reinterpret_cast<const void*>(&e4m3_kernel<E4m3>)};
    AttendKernel k{};
    k.name = name;
    k.arch = 90;
    k.phase = Phase::kForward;
    k.dtype = Dtype::kE4M3;
    k.d_qk = kDqk;
    k.d_v = kDv;
    k.features = kVarlen | kSink | kWideOutput | kRagged | (kFeatures & (kMasked | kDescaleBlocks)) |
                 (Traits::kTail ? kTail : kPlain);
    k.tile_q = Traits::kM;
    k.tile_k = Traits::kN;
    k.ctas_per_sm = 1;
    k.shared_bytes = sizeof(typename Traits::Shared);
    k.function = instance.kernel;
    k.launch = [](const AttendArgs& args, cudaStream_t stream) { return launch_e4m3(instance, args, stream); };
    return k;
  }
};

}  // namespace sm90
}  // namespace adaattn::cuda
