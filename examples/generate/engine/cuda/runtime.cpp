#include "engine/cuda/runtime.h"

#include <algorithm>

namespace generate::cuda {

Buffer allocate_on(const std::shared_ptr<Stream>& stream, size_t bytes) {
  void* memory = nullptr;
  bytes = std::max<size_t>(bytes, 1);
  check(cudaMallocAsync(&memory, bytes, stream->get()), "allocating memory");
  Buffer buffer = {std::shared_ptr<void>(memory, [stream](void* p) { cudaFreeAsync(p, stream->get()); })};
  check(cudaMemsetAsync(memory, 0, bytes, stream->get()), "clearing memory");
  return buffer;
}

Clock::~Clock() {
  for (const auto* spans : {&open_, &ended_, &spare_})
    for (const Span& span : *spans) {
      cudaEventDestroy(span.first);
      cudaEventDestroy(span.second);
    }
}

void Clock::start(cudaStream_t stream) {
  if (spare_.empty()) {
    Span& span = spare_.emplace_back();
    check(cudaEventCreate(&span.first), "making an event");
    check(cudaEventCreate(&span.second), "making an event");
  }
  check(cudaEventRecord(spare_.back().first, stream), "recording an event");
  open_ = {spare_.back()};
  spare_.pop_back();
}

void Clock::stop(cudaStream_t stream) {
  check(cudaEventRecord(open_.back().second, stream), "recording an event");
  ended_.push_back(open_.back());
  open_.clear();
}

void Clock::collect() {
  for (const Span& span : ended_) {
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, span.first, span.second), "reading an event");
    seconds_ += milliseconds * 1e-3;
    spare_.push_back(span);
  }
  ended_.clear();
}

}  // namespace generate::cuda
