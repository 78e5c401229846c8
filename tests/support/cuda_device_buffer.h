// Device memory mirroring a host allocation.
#pragma once

#include <memory>

#include "support/device_buffer.h"

namespace adaattn::test {

std::unique_ptr<DeviceBuffer> make_cuda_device_buffer(int32_t device_id, void* host, size_t bytes);

}  // namespace adaattn::test
