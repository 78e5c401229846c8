// The instruction sets compiled in, and which of them a context uses.
#pragma once

#include <string>
#include <vector>

#include "adaattn/adaattn.h"
#include "cpu_fallback/adaptive/kernels.h"
#include "cpu_fallback/attend/kernels.h"

namespace adaattn::cpu {

const char* isa_name(adaattn_isa_t isa);

// Usable here: compiled in, executed by this processor and granted by the operating system.
bool isa_available(adaattn_isa_t isa);

// AUTO becomes the best available set; one that is not available is refused with the reason.
adaattn_isa_t resolve_isa(int64_t requested);

// The kernels of an available set; AMX has its own where its tiles apply and shares AVX-512's otherwise.
const KernelTable* kernels_of(adaattn_isa_t isa);
// bf16: with bf16 products where the set has them.
const AdaptiveKernels* adaptive_kernels_of(adaattn_isa_t isa, bool bf16);

// "avx512 avx2 baseline": those available (or compiled in), best first.
std::string available_isas();
std::string compiled_isas();
std::vector<adaattn_isa_t> compiled_isa_list();

}  // namespace adaattn::cpu
