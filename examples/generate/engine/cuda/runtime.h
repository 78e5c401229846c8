// The CUDA runtime behind the engine's one exception, and owners of what it hands out.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <utility>
#include <vector>

#include "engine/compute.h"
#include "engine/error.h"

namespace generate::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) fail("CUDA: %s: %s", what, cudaGetErrorString(error));
}

class Stream {
 public:
  Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "making a stream"); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

// Allocated and freed in the stream's order, so that neither waits. The stream lives as long as its memory.
Buffer allocate_on(const std::shared_ptr<Stream>& stream, size_t bytes);

// Time between events on a stream, summed. Reading them waits; recording does not.
class Clock {
 public:
  ~Clock();
  void start(cudaStream_t stream);
  void stop(cudaStream_t stream);
  // Takes in the spans recorded so far. The stream must be idle.
  void collect();
  double seconds() const { return seconds_; }

 private:
  using Span = std::pair<cudaEvent_t, cudaEvent_t>;
  std::vector<Span> open_;   // at most one
  std::vector<Span> ended_;  // not yet collected
  std::vector<Span> spare_;
  double seconds_ = 0;
};

}  // namespace generate::cuda
