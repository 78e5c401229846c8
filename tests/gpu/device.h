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

// For kernels of compute capability 9.0.
class OnHopper : public OnTheDevice {
 protected:
  void SetUp() override {
    OnTheDevice::SetUp();
    if (IsSkipped()) return;
    cudaDeviceProp properties{};
    require(cudaGetDeviceProperties(&properties, 0));
    if (properties.major != 9) GTEST_SKIP() << "compute capability 9.0 only";
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

// One execution of a plan, captured.
class Graph {
 public:
  Graph(adaattn_plan_t* plan, const adaattn_io_t& io, const DeviceMemory& workspace, const Stream& stream,
        cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal) {
    require(cudaStreamBeginCapture(stream.get(), mode));
    const adaattn_status_t status = adaattn_plan_execute(plan, &io, workspace.data(), workspace.bytes(), stream.get());
    require(cudaStreamEndCapture(stream.get(), &graph_));
    if (status != ADAATTN_SUCCESS) throw std::runtime_error("capturing a plan: " + last_error());
    require(cudaGraphInstantiate(&replay_, graph_, 0));
  }
  ~Graph() {
    cudaGraphExecDestroy(replay_);
    cudaGraphDestroy(graph_);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void launch(const Stream& stream) const { require(cudaGraphLaunch(replay_, stream.get())); }

 private:
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t replay_ = nullptr;
};

}  // namespace adaattn::test
