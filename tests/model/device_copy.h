// Host arrays copied to the CUDA device, and back.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <vector>

namespace model_test {

inline void require(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

class DeviceCopy {
 public:
  template <typename T>
  explicit DeviceCopy(const std::vector<T>& from) {
    require(cudaMalloc(&data_, from.size() * sizeof(T)));
    require(cudaMemcpy(data_, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~DeviceCopy() { cudaFree(data_); }
  DeviceCopy(const DeviceCopy&) = delete;
  DeviceCopy& operator=(const DeviceCopy&) = delete;
  void* data() const { return data_; }
  template <typename T>
  std::vector<T> read(size_t count) const {
    std::vector<T> host(count);
    require(cudaMemcpy(host.data(), data_, count * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }

 private:
  void* data_ = nullptr;
};

}  // namespace model_test
