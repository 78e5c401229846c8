// A unit of its own, beside the other walks'.
#include "attend/sm90/walk_int8.cuh"

namespace adaattn::cuda::sm90 {

const WalkInstance& int8_walk() {
  using Traits = Int8WalkTraits<__nv_bfloat16>;
  static const WalkInstance instance{Traits::kC, static_cast<int>(sizeof(typename Traits::Shared)),
                                     reinterpret_cast<const void*>(&int8_walk_kernel<__nv_bfloat16>)};
  return instance;
}

}  // namespace adaattn::cuda::sm90
