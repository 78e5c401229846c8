#include <unistd.h>

#include <cstdio>

#include "backend.h"
#include "cpu_fallback/cpu_backend.h"
#include "cpu_fallback/cpu_features.h"
#include "cpu_fallback/isa/registry.h"

namespace adaattn {

std::unique_ptr<Backend> make_cpu_backend(const BackendConfig& config) {
  return std::make_unique<cpu::CpuBackend>(config);
}

void cpu_device_info(adaattn_device_info_t* info) {
  info->device = ADAATTN_DEVICE_CPU;
  info->device_id = 0;
  info->compute_units = cpu::available_threads();
  info->compute_capability = 0;
  info->memory_bytes = static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
  std::snprintf(info->name, sizeof info->name, "%s", cpu::cpu_name().c_str());
  std::snprintf(info->isa, sizeof info->isa, "%s", cpu::available_isas().c_str());
}

std::string cpu_build_info() { return "cpu (" + cpu::compiled_isas() + ")"; }

}  // namespace adaattn
