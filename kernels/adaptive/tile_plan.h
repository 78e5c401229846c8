// Adaptive plans that skip key tiles: analyze, decide and the mask-walking kernels on one stream, without a wait.
#pragma once

#include <memory>

#include "attend/select.h"
#include "backend.h"
#include "records.h"

namespace adaattn::cuda {

// Throws where the problem is none that such a plan serves. What block statistics cannot see is computed exactly, and
// the info says so.
PlanInfo tile_plan_info(const Problem& problem, const DeviceTraits& device);

std::unique_ptr<AttentionPlan> make_tile_plan(const Problem& problem, const DeviceTraits& device, int32_t device_id,
                                              std::shared_ptr<RecordPool> records);

}  // namespace adaattn::cuda
