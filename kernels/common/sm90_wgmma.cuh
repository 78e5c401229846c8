// Warpgroup matrix instructions, 16-bit operands with fp32 accumulation, and the shared-memory descriptors they read.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace adaattn::cuda::sm90 {

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Registers that wgmma writes asynchronously: no use of them may move across this point.
template <int kCount>
__device__ __forceinline__ void pin(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void pin(uint32_t (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// Tiles lie in shared memory as TMA writes them: column chunks of one swizzle width, each chunk `rows` lines of that
// width. kWidth is the swizzle width in bytes; eight lines form a swizzle atom.
template <int kWidth>
struct Descriptor {
  static_assert(kWidth == 128 || kWidth == 64 || kWidth == 32);
  static constexpr uint64_t kSwizzle = uint64_t{kWidth == 128 ? 1 : kWidth == 64 ? 2 : 3} << 62;
  static constexpr uint64_t kAtomStride = uint64_t{8 * kWidth / 16} << 32;

  // Operand whose contraction dimension is contiguous. One 16-element step adds 32 bytes within a chunk.
  static __device__ __forceinline__ uint64_t k_major(uint32_t address) {
    return kSwizzle | kAtomStride | (uint64_t{1} << 16) | ((address & 0x3FFFF) >> 4);
  }
  // Operand whose other dimension is contiguous; chunk_bytes leads to its next chunk. A 16-element step of the
  // contraction dimension adds 16 lines.
  static __device__ __forceinline__ uint64_t mn_major(uint32_t address, uint32_t chunk_bytes) {
    return kSwizzle | kAtomStride | (uint64_t{chunk_bytes >> 4} << 16) | ((address & 0x3FFFF) >> 4);
  }
};

// Operand lists of the accumulators: names in the instruction text, and the registers bound to them.
// clang-format off
#define ADAATTN_REGS8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define ADAATTN_REGS16 ADAATTN_REGS8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define ADAATTN_REGS24 ADAATTN_REGS16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define ADAATTN_REGS32 ADAATTN_REGS24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define ADAATTN_REGS40 ADAATTN_REGS32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define ADAATTN_REGS48 ADAATTN_REGS40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define ADAATTN_REGS56 ADAATTN_REGS48 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define ADAATTN_REGS64 ADAATTN_REGS56 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define ADAATTN_REGS72 ADAATTN_REGS64 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define ADAATTN_REGS80 ADAATTN_REGS72 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define ADAATTN_REGS88 ADAATTN_REGS80 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define ADAATTN_REGS96 ADAATTN_REGS88 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define ADAATTN_REGS104 ADAATTN_REGS96 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define ADAATTN_REGS112 ADAATTN_REGS104 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define ADAATTN_REGS120 ADAATTN_REGS112 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define ADAATTN_REGS128 ADAATTN_REGS120 ",%120,%121,%122,%123,%124,%125,%126,%127"
#define ADAATTN_EIGHT(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define ADAATTN_ACC8(d) ADAATTN_EIGHT(d, 0)
#define ADAATTN_ACC16(d) ADAATTN_ACC8(d), ADAATTN_EIGHT(d, 8)
#define ADAATTN_ACC24(d) ADAATTN_ACC16(d), ADAATTN_EIGHT(d, 16)
#define ADAATTN_ACC32(d) ADAATTN_ACC24(d), ADAATTN_EIGHT(d, 24)
#define ADAATTN_ACC40(d) ADAATTN_ACC32(d), ADAATTN_EIGHT(d, 32)
#define ADAATTN_ACC48(d) ADAATTN_ACC40(d), ADAATTN_EIGHT(d, 40)
#define ADAATTN_ACC56(d) ADAATTN_ACC48(d), ADAATTN_EIGHT(d, 48)
#define ADAATTN_ACC64(d) ADAATTN_ACC56(d), ADAATTN_EIGHT(d, 56)
#define ADAATTN_ACC72(d) ADAATTN_ACC64(d), ADAATTN_EIGHT(d, 64)
#define ADAATTN_ACC80(d) ADAATTN_ACC72(d), ADAATTN_EIGHT(d, 72)
#define ADAATTN_ACC88(d) ADAATTN_ACC80(d), ADAATTN_EIGHT(d, 80)
#define ADAATTN_ACC96(d) ADAATTN_ACC88(d), ADAATTN_EIGHT(d, 88)
#define ADAATTN_ACC104(d) ADAATTN_ACC96(d), ADAATTN_EIGHT(d, 96)
#define ADAATTN_ACC112(d) ADAATTN_ACC104(d), ADAATTN_EIGHT(d, 104)
#define ADAATTN_ACC120(d) ADAATTN_ACC112(d), ADAATTN_EIGHT(d, 112)
#define ADAATTN_ACC128(d) ADAATTN_ACC120(d), ADAATTN_EIGHT(d, 120)
// clang-format on

// D (64 x N, fp32) = [D +] A (64 x 16) * B (16 x N). B is always in shared memory; A there too (ss) or in registers
// (rs). accumulate 0 discards what D held. kTransB: B is MN-major.
template <typename T, int N>
struct Wgmma;

// The numbers are those of the operands that follow the N/2 accumulators.
#define ADAATTN_WGMMA_TYPE(N, HALF, T, NAME, A0, A1, A2, A3, A4, A5, A6)                                            \
  template <>                                                                                                       \
  struct Wgmma<T, N> {                                                                                              \
    template <int kTransB>                                                                                          \
    static __device__ __forceinline__ void ss(float (&d)[HALF], uint64_t a, uint64_t b, int accumulate) {           \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #A2                                                         \
                   ", 0;\n"                                                                                         \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" ADAATTN_REGS##HALF          \
                   "}, %" #A0 ", %" #A1 ", p, 1, 1, 0, %" #A3 ";\n}\n"                                              \
                   : ADAATTN_ACC##HALF(d)                                                                           \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(kTransB));                                                \
    }                                                                                                               \
    template <int kTransB>                                                                                          \
    static __device__ __forceinline__ void rs(float (&d)[HALF], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, \
                                              uint64_t b, int accumulate) {                                         \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #A5                                                         \
                   ", 0;\n"                                                                                         \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" ADAATTN_REGS##HALF          \
                   "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #A4 ", p, 1, 1, %" #A6 ";\n}\n"                 \
                   : ADAATTN_ACC##HALF(d)                                                                           \
                   : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate), "n"(kTransB));                    \
    }                                                                                                               \
  };
#define ADAATTN_WGMMA(N, HALF, A0, A1, A2, A3, A4, A5, A6)                       \
  ADAATTN_WGMMA_TYPE(N, HALF, __nv_bfloat16, "bf16", A0, A1, A2, A3, A4, A5, A6) \
  ADAATTN_WGMMA_TYPE(N, HALF, __half, "f16", A0, A1, A2, A3, A4, A5, A6)

ADAATTN_WGMMA(32, 16, 16, 17, 18, 19, 20, 21, 22)
ADAATTN_WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38)
ADAATTN_WGMMA(80, 40, 40, 41, 42, 43, 44, 45, 46)
ADAATTN_WGMMA(96, 48, 48, 49, 50, 51, 52, 53, 54)
ADAATTN_WGMMA(112, 56, 56, 57, 58, 59, 60, 61, 62)
ADAATTN_WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70)
ADAATTN_WGMMA(144, 72, 72, 73, 74, 75, 76, 77, 78)
ADAATTN_WGMMA(160, 80, 80, 81, 82, 83, 84, 85, 86)
ADAATTN_WGMMA(176, 88, 88, 89, 90, 91, 92, 93, 94)
ADAATTN_WGMMA(192, 96, 96, 97, 98, 99, 100, 101, 102)
ADAATTN_WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134)

#undef ADAATTN_WGMMA
#undef ADAATTN_WGMMA_TYPE

}  // namespace adaattn::cuda::sm90
