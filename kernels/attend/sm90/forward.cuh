// Registry rows of the Hopper forward kernels: how each instance is built. NOTES.md has the measurements behind it.
#pragma once

#include "attend/launch.h"
#include "attend/sm90/forward_kernel.cuh"
#include "attend/sm90/forward_launch.h"

namespace adaattn::cuda::sm90 {

template <int kDqk, int kDv, uint32_t kFeatures>
constexpr ForwardConfig forward_config() {
  ForwardConfig c{.d_qk = kDqk, .d_v = kDv};
  c.masked = kFeatures != kPlain;
  c.softcap = (kFeatures & kSoftcap) != 0;
  c.dynamic = c.masked;
  c.split = kFeatures == kSplit;
  if (kDqk <= 64) {
    c.groups = c.split ? 2 : 3;
    c.ordered = !c.masked;
    c.quick = !c.softcap;
    c.k_stages = 3;
    c.pass_unseen = c.masked && !c.split;
  } else if (kDqk <= 96) {
    c.ordered = false;
    c.quick = !c.softcap;
    c.k_stages = 3;
    c.load_ahead = c.quick && c.masked;
    c.q_in_registers = c.quick;
  } else if (kDqk <= 128 && kDv <= 64) {
    // Short products: a third warpgroup keeps the tensor cores busy during the exponentials of two.
    c.groups = 3;
    c.ordered = false;
    c.pass_unseen = c.masked && !c.split;
  } else if (kDqk <= 128) {
    c.ordered = c.softcap;
    c.early_columns = c.softcap ? 6 : 0;
    c.quick = !c.softcap;
    c.k_stages = c.quick ? 3 : 2;
    c.load_ahead = c.quick && !c.split;
    c.q_in_registers = c.load_ahead;
  } else if (kDqk <= 192) {
    c.tile_n = kDv <= 128 ? 128 : 112;
    c.early_columns = kDv <= 128 ? 8 : 3;
  } else {
    c.tile_n = 80;
    c.ordered = false;
    c.early_columns = 5;
    c.rescale_early = true;
  }
  return c;
}

template <typename T, int kDqk, int kDv, uint32_t kFeatures>
struct Forward {
  static constexpr ForwardConfig kConfig = forward_config<kDqk, kDv, kFeatures>();
  using Traits = ForwardTraits<T, Forward>;

  static AttendKernel row(const char* name) {
    static const ForwardInstance instance{name, dtype_of<T>(), kConfig,
                                          static_cast<int>(sizeof(typename Traits::Shared)),
                                          reinterpret_cast<const void*>(&forward_kernel<T, Forward>)};
    AttendKernel k{};
    k.name = name;
    k.arch = 90;
    k.phase = Phase::kForward;
    k.dtype = dtype_of<T>();
    k.d_qk = kDqk;
    k.d_v = kDv;
    k.features = kVarlen | kSink | kRagged | (kConfig.masked ? kMasked : 0) | (kConfig.softcap ? kSoftcap : 0) |
                 (kConfig.split ? kSplit | kPacked : 0);
    k.tile_q = Traits::kM;
    k.tile_k = Traits::kN;
    k.ctas_per_sm = 1;
    k.reports = false;
    k.shared_bytes = sizeof(typename Traits::Shared);
    k.function = instance.kernel;
    k.launch = [](const AttendArgs& args, cudaStream_t stream) { return launch_forward(instance, args, stream); };
    return k;
  }
};

}  // namespace adaattn::cuda::sm90
