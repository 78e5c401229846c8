// Memory on the device under test. On the CPU it is the host memory itself, so that what a kernel touches is exactly
// what the test holds; a CUDA build adds real device memory.
#pragma once

#include <cstddef>
#include <memory>

#include "adaattn/adaattn.h"

namespace adaattn::test {

// The device half of a host allocation of `bytes`.
class DeviceBuffer {
 public:
  virtual ~DeviceBuffer() = default;
  virtual void* data() = 0;
  virtual void upload() = 0;    // host to device
  virtual void download() = 0;  // device to host
};

std::unique_ptr<DeviceBuffer> make_device_buffer(adaattn_device_t device, int32_t device_id, void* host, size_t bytes);

}  // namespace adaattn::test
