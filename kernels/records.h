// Device-side records of plans, taken from slabs so that making a plan allocates nothing.
#pragma once

#include <cuda_runtime_api.h>

#include <mutex>
#include <vector>

#include "attend/kernel.h"

namespace adaattn::cuda {

struct RecordSlot {
  PlanRecord* device = nullptr;
  PlanRecord* host = nullptr;  // pinned
};

// All calls need the pool's device current.
class RecordPool {
 public:
  ~RecordPool();
  RecordSlot acquire();  // zeroed
  void release(const RecordSlot& slot);
  // What the device has counted up to now, whatever else is running; reset clears it afterwards.
  PlanRecord read(const RecordSlot& slot, bool reset);

 private:
  static constexpr int kSlots = 128;
  std::mutex mutex_;
  cudaStream_t stream_ = nullptr;  // does not wait for the caller's streams
  std::vector<RecordSlot> slabs_, free_;
};

}  // namespace adaattn::cuda
