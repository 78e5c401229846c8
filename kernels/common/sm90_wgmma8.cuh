// Warpgroup matrix instructions with 8-bit operands. Both operands lie with the contraction dimension contiguous; one
// step covers 32 of it, 32 bytes within a line.
#pragma once

#include "common/sm90_wgmma.cuh"

namespace adaattn::cuda::sm90 {

template <int kCount>
__device__ __forceinline__ void pin(int32_t (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// clang-format off
#define ADAATTN_REGS36 ADAATTN_REGS32 ",%32,%33,%34,%35"
#define ADAATTN_REGS68 ADAATTN_REGS64 ",%64,%65,%66,%67"
#define ADAATTN_FOUR(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ADAATTN_ACC36(d) ADAATTN_ACC32(d), ADAATTN_FOUR(d, 32)
#define ADAATTN_ACC68(d) ADAATTN_ACC64(d), ADAATTN_FOUR(d, 64)
#define ADAATTN_EIGHT_INTS(d, i) \
  "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), "+r"(d[i + 6]), "+r"(d[i + 7])
// clang-format on

// D (64 x 128, s32) = [D +] A (64 x 32) * B (32 x 128), int8, both in shared memory.
__device__ __forceinline__ void wgmma_s8_n128(int32_t (&d)[64], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" ADAATTN_REGS64 "}, %64, %65, p;\n}\n"
      : ADAATTN_EIGHT_INTS(d, 0), ADAATTN_EIGHT_INTS(d, 8), ADAATTN_EIGHT_INTS(d, 16), ADAATTN_EIGHT_INTS(d, 24),
        ADAATTN_EIGHT_INTS(d, 32), ADAATTN_EIGHT_INTS(d, 40), ADAATTN_EIGHT_INTS(d, 48), ADAATTN_EIGHT_INTS(d, 56)
      : "l"(a), "l"(b), "r"(accumulate));
}

// D (64 x N, fp32) = [D +] A (64 x 32) * B (32 x N), e4m3, B in shared memory, A there too (ss) or in registers (rs).
// The tensor cores add with about 14 bits.
template <int N>
struct WgmmaE4m3;

// The numbers are those of the operands that follow the N/2 accumulators.
#define ADAATTN_WGMMA_E4M3(N, HALF, A0, A1, A2, A3, A4, A5)                                                         \
  template <>                                                                                                       \
  struct WgmmaE4m3<N> {                                                                                             \
    static __device__ __forceinline__ void ss(float (&d)[HALF], uint64_t a, uint64_t b, int accumulate) {           \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #A2                                                         \
                   ", 0;\n"                                                                                         \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" ADAATTN_REGS##HALF                  \
                   "}, %" #A0 ", %" #A1 ", p, 1, 1;\n}\n"                                                           \
                   : ADAATTN_ACC##HALF(d)                                                                           \
                   : "l"(a), "l"(b), "r"(accumulate));                                                              \
    }                                                                                                               \
    static __device__ __forceinline__ void rs(float (&d)[HALF], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, \
                                              uint64_t b, int accumulate) {                                         \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #A5                                                         \
                   ", 0;\n"                                                                                         \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" ADAATTN_REGS##HALF                  \
                   "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #A4 ", p, 1, 1;\n}\n"                           \
                   : ADAATTN_ACC##HALF(d)                                                                           \
                   : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate));                                  \
    }                                                                                                               \
  };
ADAATTN_WGMMA_E4M3(64, 32, 32, 33, 34, 35, 36, 37)
ADAATTN_WGMMA_E4M3(72, 36, 36, 37, 38, 39, 40, 41)
ADAATTN_WGMMA_E4M3(136, 68, 68, 69, 70, 71, 72, 73)
#undef ADAATTN_WGMMA_E4M3

}  // namespace adaattn::cuda::sm90
