// Streams, device memory and graphs for the tests of the CUDA back-end.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <stdexcept>
#include <string>

#include "support/context.h"

namespace adaattn::test {

inline const Target kCuda = {"cuda", ADAATTN_DEVICE_CUDA, ADAATTN_ISA_AUTO};

inline void require(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Skips where there is no device, saying why.
class OnTheDevice : public testing::Test {
 protected:
  void SetUp() override {
    if (const std::string reason = missing(kCuda); !reason.empty()) GTEST_SKIP() << reason;
  }
};

class Stream {
 public:
  Stream() { require(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  adaattn_stream_t get() const { return stream_; }
  void wait() const { require(cudaStreamSynchronize(stream_)); }

 private:
  cudaStream_t stream_ = nullptr;
};

class DeviceMemory {
 public:
  explicit DeviceMemory(size_t bytes) : bytes_(bytes) {
    require(cudaMalloc(&data_, bytes == 0 ? 1 : bytes));
    require(cudaMemset(data_, 0xff, bytes));  // NaN
    require(cudaDeviceSynchronize());
  }
  ~DeviceMemory() { cudaFree(data_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

}  // namespace adaattn::test
