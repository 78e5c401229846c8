#include "cpu_fallback/tools/tool_kernels.h"

namespace adaattn::cpu {

#if defined(__x86_64__)
namespace baseline {
extern const ToolKernels kToolKernels;
}
namespace avx2 {
extern const ToolKernels kToolKernels;
}
namespace avx512 {
extern const ToolKernels kToolKernels;
}
#elif defined(__aarch64__)
namespace neon {
extern const ToolKernels kToolKernels;
}
#endif

const ToolKernels& tool_kernels(adaattn_isa_t isa) {
#if defined(__x86_64__)
  switch (isa) {
    case ADAATTN_ISA_AMX:
    case ADAATTN_ISA_AVX512:
      return avx512::kToolKernels;
    case ADAATTN_ISA_AVX2:
      return avx2::kToolKernels;
    default:
      return baseline::kToolKernels;
  }
#elif defined(__aarch64__)
  return neon::kToolKernels;
#endif
}

}  // namespace adaattn::cpu
