#include "records.h"

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <utility>

#include "runtime.h"

namespace adaattn::cuda {
namespace {

// Allocations and queries would invalidate a capture that another thread has under way, though they have nothing to do
// with it.
class BesideCaptures {
 public:
  BesideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~BesideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  BesideCaptures(const BesideCaptures&) = delete;
  BesideCaptures& operator=(const BesideCaptures&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// The device's half of a slot.
struct SlotMemory {
  PlanRecord record;
  ArrivalSet arrivals[kArrivalSets];
};

bool done(cudaEvent_t event) {
  const cudaError_t error = cudaEventQuery(event);
  if (error == cudaErrorNotReady) cudaGetLastError();  // or the next launch would seem to have failed
  return error == cudaSuccess;
}

}  // namespace

void RecordSlot::mark(cudaStream_t stream) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &capture), "stream");
  if (capture != cudaStreamCaptureStatusNone) {
    forever_ = true;
    return;
  }
  unsigned long long id = 0;
  check(cudaStreamGetId(stream, &id), "stream");
  auto mark = std::find_if(marks_.begin(), marks_.end(), [&](const Mark& m) { return m.stream == id; });
  if (mark == marks_.end()) {
    const BesideCaptures scope;
    mark = std::find_if(marks_.begin(), marks_.end(), [](const Mark& m) { return done(m.event); });
    if (mark == marks_.end()) {
      cudaEvent_t event = nullptr;
      if (cudaEventCreateWithFlags(&event, cudaEventDisableTiming) != cudaSuccess) {
        forever_ = true;  // the launch cannot be taken back; its end will just never be known
        return;
      }
      mark = marks_.insert(marks_.end(), {id, event});
    }
    mark->stream = id;
  }
  check(cudaEventRecord(mark->event, stream), "marking the use of a plan record");
}

bool RecordSlot::idle() const {
  return std::all_of(marks_.begin(), marks_.end(), [](const Mark& m) { return done(m.event); });
}

RecordPool::~RecordPool() {
  for (auto* slots : {&free_, &retired_, &clearing_})
    for (const RecordSlot& slot : *slots)
      for (const RecordSlot::Mark& mark : slot.marks_) cudaEventDestroy(mark.event);
  for (const RecordSlot& slab : slabs_) {
    cudaFree(slab.device);  // waits for the device
    cudaFreeHost(slab.host);
  }
  if (cleared_ != nullptr) cudaEventDestroy(cleared_);
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
}

void RecordPool::add_slab() {
  if (stream_ == nullptr)
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "making the stream that reads records");
  if (cleared_ == nullptr)
    check(cudaEventCreateWithFlags(&cleared_, cudaEventDisableTiming), "making an event of plan records");
  RecordSlot slab;
  constexpr size_t kBytes = kSlots * sizeof(SlotMemory);
  SlotMemory* memory = nullptr;
  check(cudaMalloc(reinterpret_cast<void**>(&memory), kBytes), "allocating plan records");
  slab.device = &memory->record;
  const cudaError_t error = cudaMallocHost(reinterpret_cast<void**>(&slab.host), kSlots * sizeof(PlanRecord));
  if (error != cudaSuccess) cudaFree(slab.device);
  check(error, "allocating plan records");
  const RecordSlot& first = slabs_.emplace_back(std::move(slab));
  check(cudaMemsetAsync(first.device, 0, kBytes, stream_), "clearing plan records");
  check(cudaStreamSynchronize(stream_), "clearing plan records");
  for (int i = kSlots - 1; i >= 0; --i) {
    RecordSlot& slot = free_.emplace_back();
    slot.device = &memory[i].record;
    slot.arrivals = memory[i].arrivals;
    slot.host = first.host + i;
  }
}

// Retired slots come back in two steps, neither of which is waited for: when their work is done they are cleared, and
// when that is done they are free.
void RecordPool::reclaim() {
  const auto move_all = [](std::vector<RecordSlot>& from, auto first, std::vector<RecordSlot>& to) {
    to.insert(to.end(), std::move_iterator(first), std::move_iterator(from.end()));
    from.erase(first, from.end());
  };
  if (!clearing_.empty() && done(cleared_)) move_all(clearing_, clearing_.begin(), free_);
  const auto first_idle =
      std::partition(retired_.begin(), retired_.end(), [](const RecordSlot& slot) { return !slot.idle(); });
  if (first_idle == retired_.end()) return;
  for (auto slot = first_idle; slot != retired_.end(); ++slot)
    check(cudaMemsetAsync(slot->device, 0, sizeof(SlotMemory), stream_), "clearing a plan record");
  check(cudaEventRecord(cleared_, stream_), "clearing plan records");
  move_all(retired_, first_idle, clearing_);
}

RecordSlot RecordPool::acquire() {
  const std::lock_guard lock(mutex_);
  const BesideCaptures scope;
  reclaim();
  if (free_.empty()) add_slab();
  RecordSlot slot = std::move(free_.back());
  free_.pop_back();
  return slot;
}

void RecordPool::release(RecordSlot slot) {
  const std::lock_guard lock(mutex_);
  if (!slot.forever_) {
    retired_.push_back(std::move(slot));
    return;
  }
  for (const RecordSlot::Mark& mark : slot.marks_) cudaEventDestroy(mark.event);
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
