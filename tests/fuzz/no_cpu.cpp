// Stands in for the CPU back-end, so that the fuzzer's program is the host code alone, instrumented throughout.
#include <cstring>

#include "backend.h"
#include "capi/fake_backend.h"

namespace adaattn {

std::unique_ptr<Backend> make_cpu_backend(const BackendConfig& config) {
  return test::make_fake_backend(std::make_shared<test::FakeState>(), config.allocator);
}

void cpu_device_info(adaattn_device_info_t* info) {
  info->device = ADAATTN_DEVICE_CPU;
  std::strcpy(info->name, "none");
}

std::string cpu_build_info() { return "none"; }

}  // namespace adaattn
