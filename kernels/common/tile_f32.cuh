// Shared-memory tiles of f32 rows, padded by one 16-byte chunk against bank conflicts.
#pragma once

#include "common/tile.cuh"

namespace adaattn::cuda {

// Rows of kD floats; rows outside `valid` and columns from d on become zero. row_of(r) gives the address of row r.
template <int kD, int kRows, int kThreads, typename RowOf>
__device__ __forceinline__ void load_rows_f32(float* shared, int thread, int d, RowSpan valid, bool aligned,
                                              const RowOf& row_of) {
  constexpr int kPitch = kD + 4, kChunks = kD / 4;
  for (int i = thread; i < kRows * kChunks; i += kThreads) {
    const int r = i / kChunks, c = i % kChunks * 4;
    const int elements = r >= valid.begin && r < valid.end ? min(max(d - c, 0), 4) : 0;
    float* to = shared + r * kPitch + c;
    const float* from = row_of(elements > 0 ? r : max(valid.begin, 0)) + (elements > 0 ? c : 0);
    if (aligned) {
      cp_async16(shared_address(to), from, elements * 4);
    } else {
      float x[4] = {0, 0, 0, 0};
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (e < elements) x[e] = from[e];
      *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
    }
  }
}

}  // namespace adaattn::cuda
