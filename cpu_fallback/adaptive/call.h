// What the stages of one adaptive call share.
#pragma once

#include <cstdint>
#include <vector>

#include "core/problem.h"
#include "core/spread_rows.h"
#include "cpu_fallback/adaptive/kernels.h"
#include "cpu_fallback/adaptive/schedule.h"
#include "cpu_fallback/adaptive/unit.h"
#include "cpu_fallback/attend/operands.h"
#include "cpu_fallback/tools/linalg.h"
#include "decide/cells.h"

namespace adaattn::cpu {

// A basis of the previous call, from which the next one's iteration starts.
struct WarmBasis {
  std::vector<double> vectors;  // [columns][d]; empty: there are too many units to keep them
  bool warm = false;            // false: nothing there yet
};
WarmBasis room_for_basis(int64_t dim, int64_t rank);

struct AdaptiveCall {
  const Problem& problem;
  const AttnParams& params;
  const UnitShape& shape;
  const KernelTable& exact;
  const AdaptiveKernels& kernels;
  const ToolKernels& tools;
  uint64_t call_index = 0;
};

// What queries are multiplied by, for scores in units of log2.
inline float query_factor(const AdaptiveCall& call) { return call.params.scale * 1.4426950408889634f; }

// ---- analyze
size_t analyze_scratch(const UnitShape& shape, const AdaptiveKernels& kernels);
size_t basis_scratch(const UnitShape& shape, const AdaptiveKernels& kernels);
size_t query_scratch(const UnitShape& shape);
// K and V of one key tile: widened copies and statistics of their groups.
void load_key_tile(const AdaptiveCall& call, Unit& unit, int64_t tile, char* scratch);
// Means, tile statistics and spreads, from all tiles.
void measure_keys(const AdaptiveCall& call, Unit& unit, char* scratch);
// Principal directions of V - mean, and the least rank class that keeps enough of its energy, if any does.
void make_value_basis(const AdaptiveCall& call, Unit& unit, WarmBasis& start, char* scratch);
// Directions for the rank probe, whitened by the queries; none if Q or K - mean is 0.
void make_probe_basis(const AdaptiveCall& call, Unit& unit, WarmBasis& start, char* scratch);
// V and K of one key tile in the bases.
void project_key_tile(const AdaptiveCall& call, Unit& unit, int64_t tile, char* scratch);
// Heads of a query tile that are analyzed together.
inline constexpr int64_t kQueryHeads = 8;
// Statistics of one query tile and what each mass level would keep of its key tiles; where shape.masked, what the
// lowest level keeps too. For query heads [first, first + count) of the units, count <= kQueryHeads.
void analyze_query_tile(const AdaptiveCall& call, Unit* units, int64_t first, int64_t count, int64_t tile,
                        char* scratch);
// Estimates of the key tiles that a query tile sees, from the first of them on.
struct TileMasses {
  float* scores = nullptr;  // scratch of the kernel
  uint32_t *mass = nullptr, *peak = nullptr;
  decide::CellRow* rows = nullptr;  // of the blocks
};
TileMasses take_masses(Arena& arena, const UnitShape& shape);
// False where they are not finite.
bool weigh_tiles(const AdaptiveCall& call, const Unit& unit, int64_t member, int64_t tile, const TileMasses& x);
CellArgs cell_args(const AdaptiveCall& call, const Unit& unit, int64_t member, int64_t tile, const TileMasses& x);

// ---- decide
// feedback: multipliers of the unit's heads; frozen: their earlier choices, null to choose anew.
void decide_unit(const AdaptiveCall& call, Unit& unit, const decide::HeadFeedback* feedback,
                 const decide::HeadChoice* frozen);
// Bits of the tiles that a level keeps, from their masses.
void mask_of_level(const decide::TileLevels& levels, int level, const TileMasses& x, uint32_t keep_peak, int64_t words,
                   uint64_t* mask);
// Bits of the key tiles that a query tile computes exactly at its head's level. x: scratch.
void tile_mask(const AdaptiveCall& call, const Unit& unit, int64_t member, int64_t tile, const TileMasses& x,
               uint64_t* mask);

// ---- attend
size_t attend_scratch(const UnitShape& shape, const decide::Options& options, const KernelTable& exact,
                      const AdaptiveKernels& kernels);
// The heads of an item that are not dense. next: the item of the unit that the same thread will probably take then, or
// null.
void attend_query_tile(const AdaptiveCall& call, Unit& unit, const AttendItem& item, const AttendItem* next,
                       char* scratch);
void attend_exact_rows(const AdaptiveCall& call, const Unit& unit, const AttendItem& item, char* scratch);

// ---- verify
// Queries of a unit that are checked.
SpreadRows sampled_rows(const AdaptiveCall& call, const Unit& unit);
void compute_exact_rows(const AdaptiveCall& call, Unit& unit, char* scratch);
void measure_error(const AdaptiveCall& call, Unit& unit, char* scratch);

}  // namespace adaattn::cpu
