// What an adaptive plan keeps on its device, and what the device tells the host.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "runtime.h"

namespace adaattn::cuda {

// Device memory that lasts as long as a plan, zero at first, and a stream to look at it that waits for no other.
class PlanMemory {
 public:
  PlanMemory() = default;                             // takes count, and give nothing
  explicit PlanMemory(size_t bytes) : PlanMemory() {  // so that what throws below is cleared up
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "the adaptive plan's stream");
    check(cudaMalloc(&data_, bytes), "the adaptive plan's memory");
    clear(data_, bytes);
  }
  ~PlanMemory() {
    if (data_ != nullptr) cudaFree(data_);  // waits for the work that may still use it
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }
  PlanMemory(const PlanMemory&) = delete;
  PlanMemory& operator=(const PlanMemory&) = delete;
  template <typename T>
  T* take(size_t count) {
    T* const array = reinterpret_cast<T*>(static_cast<char*>(data_) + used_);
    used_ += (count * sizeof(T) + 255) / 256 * 256;
    return array;
  }
  size_t used() const { return used_; }
  void write(void* device, const void* host, size_t bytes) const {
    check(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream_), "the adaptive plan's memory");
    check(cudaStreamSynchronize(stream_), "the adaptive plan's memory");
  }
  void read(void* host, const void* device, size_t bytes) const {
    check(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream_), "reading the plan's statistics");
    check(cudaStreamSynchronize(stream_), "reading the plan's statistics");
  }
  void clear(void* device, size_t bytes) const {
    check(cudaMemsetAsync(device, 0, bytes, stream_), "clearing the plan's memory");
    check(cudaStreamSynchronize(stream_), "clearing the plan's memory");
  }

 private:
  cudaStream_t stream_ = nullptr;
  void* data_ = nullptr;
  size_t used_ = 0;
};

// What the device writes for the host to read whenever it likes.
class Outlook {
 public:
  Outlook() {
    check(cudaHostAlloc(reinterpret_cast<void**>(&word_), sizeof *word_, cudaHostAllocMapped | cudaHostAllocPortable),
          "the adaptive plan's memory");
    *word_ = 0;
  }
  ~Outlook() { cudaFreeHost(word_); }
  Outlook(const Outlook&) = delete;
  Outlook& operator=(const Outlook&) = delete;
  unsigned long long* device() const { return word_; }
  uint64_t read() const { return *static_cast<volatile unsigned long long*>(word_); }

 private:
  unsigned long long* word_ = nullptr;
};

}  // namespace adaattn::cuda
