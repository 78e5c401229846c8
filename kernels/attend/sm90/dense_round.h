// Exact attention of a call of an adaptive plan that finds all of its units dense, as the device finds them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "attend/kernel.h"

namespace adaattn::cuda::sm90 {

// [units] counts of calls: the call is computed where all of them are above 0, or where there are none; otherwise the
// kernel leaves at once.
struct DenseUnits {
  const int32_t* calls = nullptr;
  int32_t count = 0;
};

// Whether a call of this kernel has such a form: then it gives the same bits.
bool has_dense_round(const AttendKernel& kernel);

// Once per device, before the first launch.
void prepare_dense_round();

// Capture-safe. The grid may start before the one before it has ended, whose memory it leaves alone; the grid after it
// may start as early, and waits for both.
cudaError_t launch_dense_round(const AttendArgs& call, const DenseUnits& units, cudaStream_t stream);

}  // namespace adaattn::cuda::sm90
