// One instruction set's kernels: compiled once per set, with that set's flags and ADAATTN_UNIT_*.
#if !defined(ADAATTN_UNIT_AMX)
#include "cpu_fallback/isa/decode-inl.h"
#endif
#if defined(ADAATTN_UNIT_AMX) || defined(ADAATTN_UNIT_AVX512BF16)
#include "cpu_fallback/isa/prefill_bf16-inl.h"
#else
#include "cpu_fallback/isa/prefill-inl.h"
#endif

namespace adaattn::cpu {
namespace {

template <F32 (*kFunction)(F32)>
void map(const float* x, float* y, int64_t n) {
  HWY_ALIGN float lanes[kLanes];
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t count = n - i < kLanes ? n - i : kLanes;
    hn::Store(kFunction(count == kLanes ? load(x + i) : load_head(x + i, count)), kF32, lanes);
    memcpy(y + i, lanes, static_cast<size_t>(count) * sizeof(float));
  }
}

void map_exp2(const float* x, float* y, int64_t n) { map<exp2>(x, y, n); }
void map_tanh(const float* x, float* y, int64_t n) { map<tanh>(x, y, n); }

#if defined(ADAATTN_UNIT_BF16)
void prefill_any(const PrefillArgs& args) {
  if (args.row_entropy == nullptr && takes_bf16(args)) {
    prefill_bf16(args);
  } else {
#if defined(ADAATTN_UNIT_AMX)
    kAvx512Kernels.prefill(args);
#else
    prefill(args);
#endif
  }
}
#endif

#if defined(ADAATTN_UNIT_AMX)
// Whatever has no tile products is the work of the AVX-512 unit, whose panels are wider.
size_t scratch_of_both(int64_t d_qk, int64_t d_v, int64_t tiles) {
  const size_t own = prefill_scratch(d_qk, d_v, tiles), other = kAvx512Kernels.prefill_scratch(d_qk, d_v, tiles);
  return own > other ? own : other;
}

size_t decode_scratch(int64_t d_qk, int64_t d_v) { return kAvx512Kernels.decode_scratch(d_qk, d_v); }
void decode(const DecodeArgs& args) { kAvx512Kernels.decode(args); }
void combine(const CombineArgs& args) { kAvx512Kernels.combine(args); }
#define ADAATTN_PREFILL_SCRATCH scratch_of_both
#else
#define ADAATTN_PREFILL_SCRATCH prefill_scratch
#endif

}  // namespace

#if defined(ADAATTN_UNIT_BASELINE)
#define ADAATTN_TABLE kBaselineKernels
#define ADAATTN_ISA "baseline"
#elif defined(ADAATTN_UNIT_AVX2)
#define ADAATTN_TABLE kAvx2Kernels
#define ADAATTN_ISA "avx2"
#elif defined(ADAATTN_UNIT_AMX)
#define ADAATTN_TABLE kAmxKernels
#define ADAATTN_ISA "avx512"
#define ADAATTN_BF16_NAME "prefill_bf16_amx"
#elif defined(ADAATTN_UNIT_AVX512BF16)
#define ADAATTN_TABLE kAvx512Bf16Kernels
#define ADAATTN_ISA "avx512"
#define ADAATTN_BF16_NAME "prefill_bf16_avx512bf16"
#elif defined(ADAATTN_UNIT_AVX512)
#define ADAATTN_TABLE kAvx512Kernels
#define ADAATTN_ISA "avx512"
#else
#define ADAATTN_TABLE kNeonKernels
#define ADAATTN_ISA "neon"
#endif

const KernelTable ADAATTN_TABLE = {
    .prefill_name = "prefill_f32_" ADAATTN_ISA,
#if defined(ADAATTN_UNIT_BF16)
    .prefill_bf16_name = ADAATTN_BF16_NAME,
    .prefill = prefill_any,
#else
    .prefill_bf16_name = nullptr,
    .prefill = prefill,
#endif
    .decode_name = "decode_f32_" ADAATTN_ISA,
#if defined(ADAATTN_UNIT_AMX)
    .tile_budget = 1 << 20,  // these processors have 2 MB per core
#else
    .tile_budget = 512 << 10,
#endif
    .prefill_scratch = ADAATTN_PREFILL_SCRATCH,
    .decode_scratch = decode_scratch,
    .decode = decode,
    .combine = combine,
    .exp2 = map_exp2,
    .tanh = map_tanh,
};

}  // namespace adaattn::cpu
