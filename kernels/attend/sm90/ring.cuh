// Places in a ring of buffers.
#pragma once

#include <cstdint>

#include "common/sm90_ptx.cuh"

namespace adaattn::cuda::sm90 {

// The buffer of the next block, and the parity of its barrier's phase. Kept from block to block: places that follow
// from a block's number take a chain of uniform instructions at the very point where the products wait for them.
template <int kCount>
struct Ring {
  uint32_t stage = 0, parity = 0;

  __device__ __forceinline__ Ring next() const {
    const bool last = stage + 1 == kCount;
    return {last ? 0 : stage + 1, parity ^ static_cast<uint32_t>(last)};
  }
};

// Whether the block has come already; asked for early, the answer costs no wait.
template <int kCount>
__device__ __forceinline__ bool has_come(uint64_t (&full)[kCount], const Ring<kCount>& at) {
  return ptx::mbarrier_test_wait_parity(&full[at.stage], at.parity);
}
template <int kCount>
__device__ __forceinline__ void wait_for(uint64_t (&full)[kCount], const Ring<kCount>& at) {
  mbarrier_wait(&full[at.stage], at.parity);
}

}  // namespace adaattn::cuda::sm90
