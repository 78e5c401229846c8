// The CUDA runtime behind the library's errors, and the caller's current device left as it was.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "adaattn/adaattn.h"

namespace adaattn::cuda {

// Throws the status that fits `error`, naming what was tried.
void check(cudaError_t error, const char* what);

// Devices that the runtime can use; 0 with the reason where there is no driver or too old a one.
int32_t usable_devices(std::string* reason, adaattn_status_t* why);

// A driver entry point, looked up at first use (the library does not link libcuda); null where the driver lacks it.
void* driver_entry_point(const char* name, unsigned int version);

// Makes `device` current for a scope. Restores the thread's driver context too, which need not be a device's primary
// one.
class DeviceScope {
 public:
  explicit DeviceScope(int32_t device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int previous_device_ = -1;
  void* previous_context_ = nullptr;
  bool switched_ = false;
};

}  // namespace adaattn::cuda
