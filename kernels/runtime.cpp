#include "runtime.h"

#include "core/error.h"

namespace adaattn::cuda {
namespace {

using GetContextFn = int (*)(void**);
using SetContextFn = int (*)(void*);

GetContextFn get_context() {
  static const auto fn = reinterpret_cast<GetContextFn>(driver_entry_point("cuCtxGetCurrent", 4000));
  return fn;
}

SetContextFn set_context() {
  static const auto fn = reinterpret_cast<SetContextFn>(driver_entry_point("cuCtxSetCurrent", 4000));
  return fn;
}

adaattn_status_t status_of(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return ADAATTN_ERROR_OUT_OF_MEMORY;
    case cudaErrorNoDevice:
      return ADAATTN_ERROR_NO_DEVICE;
    case cudaErrorInsufficientDriver:
      return ADAATTN_ERROR_DRIVER_TOO_OLD;
    case cudaErrorStreamCaptureUnsupported:
    case cudaErrorStreamCaptureInvalidated:
    case cudaErrorStreamCaptureImplicit:
      return ADAATTN_ERROR_CAPTURE;
    default:
      return ADAATTN_ERROR_DEVICE;
  }
}

}  // namespace

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  fail(status_of(error), "%s: %s (%s)", what, cudaGetErrorString(error), cudaGetErrorName(error));
}

int32_t usable_devices(std::string* reason, adaattn_status_t* why) {
  const auto none = [&](adaattn_status_t status, std::string text) {
    if (reason != nullptr) *reason = std::move(text);
    if (why != nullptr) *why = status;
    return 0;
  };
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
    return none(ADAATTN_ERROR_NO_DEVICE, "no NVIDIA driver is installed (libcuda.so.1 was not found)");
  const auto dotted = [](int version) {
    return std::to_string(version / 1000) + '.' + std::to_string(version % 1000 / 10);
  };
  if (driver / 1000 < CUDART_VERSION / 1000)
    return none(ADAATTN_ERROR_DRIVER_TOO_OLD, "the NVIDIA driver serves CUDA " + dotted(driver) +
                                                  "; this build needs " + dotted(CUDART_VERSION / 1000 * 1000) +
                                                  " or newer (driver 580)");
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0)
    return none(error == cudaErrorInsufficientDriver ? ADAATTN_ERROR_DRIVER_TOO_OLD : ADAATTN_ERROR_NO_DEVICE,
                std::string("the NVIDIA driver offers no device: ") +
                    cudaGetErrorString(error == cudaSuccess ? cudaErrorNoDevice : error));
  return count;
}

void* driver_entry_point(const char* name, unsigned int version) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  if (cudaGetDriverEntryPointByVersion(name, &entry, version, cudaEnableDefault, &found) != cudaSuccess) return nullptr;
  return found == cudaDriverEntryPointSuccess ? entry : nullptr;
}

DeviceScope::DeviceScope(int32_t device) {
  check(cudaGetDevice(&previous_device_), "cudaGetDevice");
  if (get_context() != nullptr) get_context()(&previous_context_);
  if (previous_device_ == device && previous_context_ != nullptr) {
    // Current already, unless the caller runs in a context of its own on this device.
    void* primary = nullptr;
    check(cudaSetDevice(device), "cudaSetDevice");
    if (get_context() != nullptr) get_context()(&primary);
    switched_ = primary != previous_context_;
    return;
  }
  check(cudaSetDevice(device), "cudaSetDevice");
  switched_ = true;
}

DeviceScope::~DeviceScope() {
  if (!switched_) return;
  int now = -1;
  if (cudaGetDevice(&now) == cudaSuccess && now != previous_device_) cudaSetDevice(previous_device_);
  if (set_context() != nullptr) set_context()(previous_context_);
}

}  // namespace adaattn::cuda
