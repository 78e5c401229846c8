// What a tile plan makes of the caller's options, and the memory that its problem takes.
#pragma once

#include <cstddef>

#include "adaptive/verify.h"
#include "attend/select.h"
#include "decide/policy.h"

namespace adaattn::cuda {

// What block statistics cannot see, or too short to be worth looking at: computed by the exact plan.
bool always_exact(const Problem& problem);
Problem exact_problem(const Problem& problem);

// Refuses, naming the field, what a tile plan does not serve.
void check_tile_options(const decide::Options& options);
void check_tile_problem(const Problem& problem, const DeviceTraits& device);
// Whether every head is to be computed in 8 bits.
bool tiles_in_bytes(const decide::Options& options);

// What the device makes of the caller's options: for named policies the shares that their rules give, among others.
decide::Options device_options(const Problem& problem);

// Offsets into the workspace, which starts with the tables of analyze.
struct TilePlanSizes {
  TableShape shape;
  VerifyShape verify;
  size_t far_share = 0, found = 0, verify_parts = 0, bytes = 0, workspace_bytes = 0;
};
// Refuses where max_workspace_bytes is too small. problem: with device_options().
TilePlanSizes tile_plan_sizes(const Problem& problem, const DeviceTraits& device);

// Of the maps of all heads; 0: more than a plan keeps.
size_t tile_map_bytes(const TableShape& shape);
inline constexpr size_t kMaxTileMapBytes = size_t{16} << 20;

}  // namespace adaattn::cuda
