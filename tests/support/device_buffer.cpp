#include "support/device_buffer.h"

#include <stdexcept>

#ifdef ADAATTN_WITH_CUDA
#include "support/cuda_device_buffer.h"
#endif

namespace adaattn::test {
namespace {

class HostBuffer final : public DeviceBuffer {
 public:
  explicit HostBuffer(void* host) : host_(host) {}
  void* data() override { return host_; }
  void upload() override {}
  void download() override {}

 private:
  void* host_;
};

}  // namespace

std::unique_ptr<DeviceBuffer> make_device_buffer(adaattn_device_t device, int32_t device_id, void* host, size_t bytes) {
  if (device == ADAATTN_DEVICE_CPU) return std::make_unique<HostBuffer>(host);
#ifdef ADAATTN_WITH_CUDA
  if (device == ADAATTN_DEVICE_CUDA) return make_cuda_device_buffer(device_id, host, bytes);
#endif
  throw std::logic_error("no memory for this device in this build");
}

}  // namespace adaattn::test
