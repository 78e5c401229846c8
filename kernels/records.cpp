#include "records.h"

#include <cstddef>

#include "runtime.h"

namespace adaattn::cuda {

RecordPool::~RecordPool() {
  for (const RecordSlot& slab : slabs_) {
    cudaFree(slab.device);
    cudaFreeHost(slab.host);
  }
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
}

RecordSlot RecordPool::acquire() {
  const std::lock_guard lock(mutex_);
  if (free_.empty()) {
    if (stream_ == nullptr)
      check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "making the stream that reads records");
    RecordSlot slab;
    check(cudaMalloc(reinterpret_cast<void**>(&slab.device), kSlots * sizeof(PlanRecord)), "allocating plan records");
    const cudaError_t error = cudaMallocHost(reinterpret_cast<void**>(&slab.host), kSlots * sizeof(PlanRecord));
    if (error != cudaSuccess) cudaFree(slab.device);
    check(error, "allocating plan records");
    slabs_.push_back(slab);
    for (int i = kSlots - 1; i >= 0; --i) free_.push_back({slab.device + i, slab.host + i});
  }
  const RecordSlot slot = free_.back();
  check(cudaMemsetAsync(slot.device, 0, sizeof(PlanRecord), stream_), "clearing a plan record");
  check(cudaStreamSynchronize(stream_), "clearing a plan record");
  free_.pop_back();
  return slot;
}

void RecordPool::release(const RecordSlot& slot) {
  const std::lock_guard lock(mutex_);
  free_.push_back(slot);
}

PlanRecord RecordPool::read(const RecordSlot& slot, bool reset) {
  const std::lock_guard lock(mutex_);
  check(cudaMemcpyAsync(slot.host, slot.device, sizeof(PlanRecord), cudaMemcpyDeviceToHost, stream_),
        "reading a plan record");
  if (reset) check(cudaMemsetAsync(slot.device, 0, offsetof(PlanRecord, scheduler), stream_), "clearing a plan record");
  check(cudaStreamSynchronize(stream_), "reading a plan record");
  return *slot.host;
}

}  // namespace adaattn::cuda
