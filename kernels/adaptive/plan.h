// The back-end's half of an adaptive plan on CUDA, compute capability 9.0: every tile in 8 bits where max_precision is
// I8 and tile_mass 1 (V not projected, nothing verified), else plans that skip tiles (tile_plan.h). What neither serves
// is refused by name.
#pragma once

#include <memory>

#include "attend/select.h"
#include "backend.h"
#include "records.h"

namespace adaattn::cuda {

PlanInfo adaptive_plan_info(const Problem& problem, const DeviceTraits& device);

std::unique_ptr<AttentionPlan> make_adaptive_plan(const Problem& problem, const DeviceTraits& device, int32_t device_id,
                                                  std::shared_ptr<RecordPool> records);

}  // namespace adaattn::cuda
