// Device-side records of plans, taken from slabs so that making a plan allocates nothing.
#pragma once

#include <cuda_runtime_api.h>

#include <mutex>
#include <vector>

#include "attend/kernel.h"
#include "attend/select.h"

namespace adaattn::cuda {

// Arrival counters of decode launches, a set for each launch in turn: those of one plan may overlap on different
// streams. Zero between launches.
inline constexpr int kArrivalSets = 32;
using ArrivalSet = uint32_t[kMostJoinedTiles];

// A record and the work that may still touch it: a plan can be dropped while its launches are queued.
class RecordSlot {
 public:
  RecordSlot() = default;
  RecordSlot(RecordSlot&&) = default;
  RecordSlot& operator=(RecordSlot&&) = default;

  PlanRecord* device = nullptr;
  ArrivalSet* arrivals = nullptr;  // [kArrivalSets], in device memory
  PlanRecord* host = nullptr;      // pinned

  // Call behind each launch that touches_record() (attend/plan.h). Never waits.
  void mark(cudaStream_t stream);

 private:
  friend class RecordPool;
  struct Mark {
    unsigned long long stream;  // its id: a handle may be used again for another stream
    cudaEvent_t event;          // behind the newest launch on it
  };
  bool idle() const;

  std::vector<Mark> marks_;
  bool forever_ = false;  // a captured launch: a graph may replay it at any time
};

// All calls need the pool's device current. None waits for the caller's work.
class RecordPool {
 public:
  ~RecordPool();
  RecordSlot acquire();  // zeroed
  void release(RecordSlot slot);
  // What the device has counted up to now, whatever else is running; reset clears it afterwards.
  PlanRecord read(const RecordSlot& slot, bool reset);

 private:
  static constexpr int kSlots = 128;
  void add_slab();
  void reclaim();

  std::mutex mutex_;
  cudaStream_t stream_ = nullptr;     // does not wait for the caller's streams
  cudaEvent_t cleared_ = nullptr;     // behind the clearing of clearing_
  std::vector<RecordSlot> slabs_;     // the first record of each
  std::vector<RecordSlot> free_;      // zero
  std::vector<RecordSlot> retired_;   // released, with work that may still be queued
  std::vector<RecordSlot> clearing_;  // idle, being set to zero
};

}  // namespace adaattn::cuda
