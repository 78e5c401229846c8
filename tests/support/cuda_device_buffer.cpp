#include "support/cuda_device_buffer.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace adaattn::test {
namespace {

void require(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

class CudaBuffer final : public DeviceBuffer {
 public:
  CudaBuffer(int32_t device_id, void* host, size_t bytes) : device_id_(device_id), host_(host), bytes_(bytes) {
    require(cudaSetDevice(device_id_));
    // Never empty, so that an empty tensor has an address of the device.
    require(cudaMalloc(&device_, std::max<size_t>(bytes_, 1)));
  }
  ~CudaBuffer() override { cudaFree(device_); }
  void* data() override { return device_; }
  void upload() override {
    require(cudaSetDevice(device_id_));
    require(cudaMemcpy(device_, host_, bytes_, cudaMemcpyHostToDevice));
    // The copy may return while the last bytes are on their way, and streams of the tests do not wait for its stream.
    require(cudaStreamSynchronize(nullptr));
  }
  void download() override {
    require(cudaSetDevice(device_id_));
    require(cudaDeviceSynchronize());
    require(cudaMemcpy(host_, device_, bytes_, cudaMemcpyDeviceToHost));
  }

 private:
  int32_t device_id_;
  void* host_;
  size_t bytes_;
  void* device_ = nullptr;
};

}  // namespace

std::unique_ptr<DeviceBuffer> make_cuda_device_buffer(int32_t device_id, void* host, size_t bytes) {
  return std::make_unique<CudaBuffer>(device_id, host, bytes);
}

}  // namespace adaattn::test
