// The back-end's half of a plan on CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>

#include "attend/select.h"
#include "backend.h"
#include "records.h"

namespace adaattn::cuda {

// Loads the kernel on the current device and raises its shared-memory limit, so that neither happens in a capture.
void prepare_kernel(const AttendKernel& kernel);

// Fills what a kernel is launched with; partial results lie in workspace.
AttendArgs make_args(const AttnParams& params, const Problem& problem, const Launch& launch, void* workspace);

// Feature bits that the tensors of one call add to those of its problem.
uint32_t call_features(const AttnParams& params);

// Whether a launch of these arguments uses the plan's record: for what it reports, or to hand out its tiles.
bool touches_record(const AttendArgs& args, const AttendKernel& kernel);

// Rows and pairs of a call in which every sequence is as long as the call says; its tiles, counted one query tile after
// another.
void add_lengths(PlanCounters& counters, const AttnParams& params);
uint64_t tiles_of_call(const AttnParams& params);
// What the device counted, added to what the host did.
void add_record(PlanCounters& counters, const PlanRecord& record);

std::unique_ptr<AttentionPlan> make_plan(const Problem& problem, const DeviceTraits& device, int32_t device_id,
                                         std::shared_ptr<RecordPool> records);

PlanInfo plan_info(const Problem& problem, const DeviceTraits& device);

// Every sequence is as long as the call says.
inline bool lengths_on_host(const AttnParams& p) {
  return p.cu_seqlens_q == nullptr && p.cu_seqlens_k == nullptr && p.seqused_k == nullptr;
}
// An exact call whose rows, pairs and tiles its kernels count, for they read a page table or lengths.
inline bool lengths_on_device(const AttnParams& p) { return !lengths_on_host(p) || p.block_table != nullptr; }

}  // namespace adaattn::cuda
