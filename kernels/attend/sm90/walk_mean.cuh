// Products of a warpgroup's queries with the mean of their keys, which what is left out needs row by row.
#pragma once

#include "common/sm90_ptx.cuh"
#include "common/sm90_wgmma.cuh"

namespace adaattn::cuda::sm90 {

// scores = Q M^T for 64 queries of 128 columns, in the layout that TMA gives them, and eight rows M of which two count:
// the mean in bf16, and what that rounding leaves. Their sum is the score to 2^-17. mean: for each 8 columns 16 bytes
// of either row, without a swizzle. A row of the operand is 16 bytes, so the other six are what follows, and end 96
// bytes behind the mean; only the first two of scores' columns are of interest.
__device__ __forceinline__ void issue_mean_scores(float (&scores)[4], const uint8_t* queries, const uint8_t* mean) {
  constexpr uint64_t kColumnStride = uint64_t{32 / 16} << 16;  // from 8 columns to the next 8
  const uint64_t a = Descriptor<128>::k_major(shared_address(queries));
  const uint64_t b = kColumnStride | ((shared_address(mean) & 0x3FFFF) >> 4);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, p, 1, 1, 0, 0;\n}"
        : "+f"(scores[0]), "+f"(scores[1]), "+f"(scores[2]), "+f"(scores[3])
        : "l"(a + (i / 4 * 64 * 128 + i % 4 * 32) / 16), "l"(b + i * 64 / 16), "r"(static_cast<int>(i > 0)));
  }
  wgmma_commit();
}

}  // namespace adaattn::cuda::sm90
