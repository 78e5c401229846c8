// The device's own clock, for the time of the stages: it runs in captured calls too.
#pragma once

#include "adaptive/analyze.h"

namespace adaattn::cuda {

__device__ __forceinline__ unsigned long long device_nanoseconds() {
  unsigned long long t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}

// Call by every CTA of a stage's first kernel; the first one notes the time.
__device__ __forceinline__ void begin_stage(const AdaptiveState& state, Stage stage) {
  if (state.clock == nullptr || (threadIdx.x | blockIdx.x | blockIdx.y | blockIdx.z) != 0) return;
  state.clock->start[stage] = device_nanoseconds();
}

}  // namespace adaattn::cuda
