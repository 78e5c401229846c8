#include "cpu_fallback/isa/registry.h"

#include "core/error.h"
#include "cpu_fallback/cpu_features.h"

namespace adaattn::cpu {
namespace {

struct IsaRow {
  adaattn_isa_t isa;
  const char* name;
  bool (*available)();
  const KernelTable* (*kernels)();
  const AdaptiveKernels* (*adaptive)();
  const AdaptiveKernels* (*adaptive_bf16)() = nullptr;  // where it differs
};

#if defined(__x86_64__)
// vdpbf16ps has twice the rate of f32 multiply-adds where there are no tiles (measured 1.7 x on Zen 4), and half of it
// where there are (Sapphire and Emerald Rapids).
const KernelTable* avx512_kernels() {
  const CpuFeatures& cpu = cpu_features();
  return cpu.avx512_bf16 && cpu.avx512_vnni && !cpu.amx ? &kAvx512Bf16Kernels : &kAvx512Kernels;
}

const AdaptiveKernels* avx512_adaptive() {
  return cpu_features().avx512_vnni ? &kAvx512VnniAdaptive : &kAvx512Adaptive;
}

AdaptiveKernels with_bf16(const Bf16Tiles& tiles) {
  AdaptiveKernels kernels = kAvx512VnniAdaptive;
  kernels.tile_scratch = tiles.tile_scratch;
  kernels.tiles = tiles.tiles;
  kernels.heads_together = tiles.heads_together;
  kernels.byte_cost = tiles.byte_cost;
  kernels.bf16_cost = tiles.bf16_cost;
  kernels.pack_keys = tiles.pack_keys;
  kernels.pack_values = tiles.pack_values;
  kernels.pack_tile = tiles.pack_tile;
  kernels.pack_groups = tiles.pack_groups;
  kernels.probe_tile_bytes = tiles.probe_tile_bytes;
  kernels.pack_probe = tiles.pack_probe;
  kernels.gram_scratch = tiles.gram_scratch;
  kernels.gram = tiles.gram;
  kernels.project_scratch = tiles.project_scratch;
  kernels.project_tile = tiles.project_tile;
  if (tiles.find_needles != nullptr) kernels.find_needles = tiles.find_needles;
  return kernels;
}

const AdaptiveKernels* amx_adaptive_bf16() {
  static const AdaptiveKernels kernels = with_bf16(kAmxTiles);
  return &kernels;
}

const AdaptiveKernels* avx512_adaptive_bf16() {
  static const AdaptiveKernels kernels = with_bf16(kAvx512Bf16Tiles);
  return avx512_kernels()->prefill_bf16_name != nullptr ? &kernels : avx512_adaptive();
}
#endif

// Best first.
constexpr IsaRow kIsas[] = {
#if defined(__x86_64__)
    {ADAATTN_ISA_AMX, "amx", [] { return request_amx(); }, [] { return &kAmxKernels; }, avx512_adaptive,
     amx_adaptive_bf16},
    {ADAATTN_ISA_AVX512, "avx512", [] { return cpu_features().avx512; }, avx512_kernels, avx512_adaptive,
     avx512_adaptive_bf16},
    {ADAATTN_ISA_AVX2, "avx2", [] { return cpu_features().avx2; }, [] { return &kAvx2Kernels; },
     [] { return &kAvx2Adaptive; }},
    {ADAATTN_ISA_BASELINE, "baseline", [] { return cpu_features().baseline; }, [] { return &kBaselineKernels; },
     [] { return &kBaselineAdaptive; }},
#elif defined(__aarch64__)
    {ADAATTN_ISA_NEON, "neon", [] { return cpu_features().neon; }, [] { return &kNeonKernels; },
     [] { return &kNeonAdaptive; }},
#endif
};

std::string join(bool only_available) {
  std::string text;
  for (const IsaRow& row : kIsas) {
    if (only_available && !row.available()) continue;
    if (!text.empty()) text += ' ';
    text += row.name;
  }
  return text;
}

}  // namespace

const char* isa_name(adaattn_isa_t isa) {
  switch (isa) {
    case ADAATTN_ISA_AUTO:
      return "auto";
    case ADAATTN_ISA_BASELINE:
      return "baseline";
    case ADAATTN_ISA_AVX2:
      return "avx2";
    case ADAATTN_ISA_AVX512:
      return "avx512";
    case ADAATTN_ISA_AMX:
      return "amx";
    case ADAATTN_ISA_NEON:
      return "neon";
    default:
      return nullptr;
  }
}

bool isa_available(adaattn_isa_t isa) {
  for (const IsaRow& row : kIsas)
    if (row.isa == isa) return row.available();
  return false;
}

adaattn_isa_t resolve_isa(int64_t requested) {
  const char* name =
      requested == static_cast<adaattn_isa_t>(requested) ? isa_name(static_cast<adaattn_isa_t>(requested)) : nullptr;
  if (name == nullptr)
    fail(ADAATTN_ERROR_INVALID_ARGUMENT, "isa is %lld; accepted: the ADAATTN_ISA_* constants, 0 to 5",
         static_cast<long long>(requested));
  for (const IsaRow& row : kIsas) {
    if (requested != ADAATTN_ISA_AUTO && requested != row.isa) continue;
    if (row.available()) return row.isa;
  }
  fail(ADAATTN_ERROR_NOT_SUPPORTED, "isa is %lld (%s); accepted on this processor: auto %s",
       static_cast<long long>(requested), name, available_isas().c_str());
}

const KernelTable* kernels_of(adaattn_isa_t isa) {
  for (const IsaRow& row : kIsas)
    if (row.isa == isa) return row.kernels();
  fail(ADAATTN_ERROR_INTERNAL, "no kernels for isa %d", static_cast<int>(isa));
}

const AdaptiveKernels* adaptive_kernels_of(adaattn_isa_t isa, bool bf16) {
  for (const IsaRow& row : kIsas)
    if (row.isa == isa) return bf16 && row.adaptive_bf16 != nullptr ? row.adaptive_bf16() : row.adaptive();
  fail(ADAATTN_ERROR_INTERNAL, "no kernels for isa %d", static_cast<int>(isa));
}

std::string available_isas() { return join(true); }
std::string compiled_isas() { return join(false); }

std::vector<adaattn_isa_t> compiled_isa_list() {
  std::vector<adaattn_isa_t> list;
  for (const IsaRow& row : kIsas) list.push_back(row.isa);
  return list;
}

}  // namespace adaattn::cpu
