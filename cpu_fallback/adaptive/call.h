// What the stages of one adaptive call share.
#pragma once

#include <cstdint>
#include <vector>

#include "core/problem.h"
#include "cpu_fallback/adaptive/kernels.h"
#include "cpu_fallback/adaptive/unit.h"
#include "cpu_fallback/attend/operands.h"
#include "cpu_fallback/tools/linalg.h"

namespace adaattn::cpu {

// Bases of the previous call, from which the next one's iteration starts; one per (sequence, KV head), empty when there
// are too many of them to be worth the memory.
struct WarmBasis {
  std::vector<double> v, probe;  // [columns][d]
  bool warm = false;
};

struct AdaptiveCall {
  const Problem& problem;
  const AttnParams& params;
  const UnitShape& shape;
  const KernelTable& exact;
  const AdaptiveKernels& kernels;
  const ToolKernels& tools;
  uint64_t call_index = 0;
};

// ---- analyze
size_t analyze_scratch(const UnitShape& shape, const decide::Options& options, const AdaptiveKernels& kernels);
// K and V of one key tile: widened copies and statistics of their groups.
void load_key_tile(const AdaptiveCall& call, Unit& unit, int64_t tile, char* scratch);
// Means, tile statistics, spreads and the bases, from all tiles.
void analyze_unit(const AdaptiveCall& call, Unit& unit, WarmBasis* warm, char* scratch);
// V and K of one key tile in the bases.
void project_key_tile(const AdaptiveCall& call, Unit& unit, int64_t tile, char* scratch);
// Statistics of one query tile and what each mass level would keep of its key tiles.
void analyze_query_tile(const AdaptiveCall& call, Unit& unit, int64_t member, int64_t tile, char* scratch);
// log2 of the mass of each key tile that a query tile sees, up to a constant.
void estimate_tiles(const AdaptiveCall& call, const Unit& unit, int64_t member, int64_t tile, float* estimate);

// ---- decide
// feedback: multipliers of the unit's heads; frozen: their earlier choices, null to choose anew.
void decide_unit(const AdaptiveCall& call, Unit& unit, const decide::HeadFeedback* feedback,
                 const decide::HeadChoice* frozen);
// Bits of the key tiles that a query tile computes exactly at its head's level. estimate: scratch, one float per tile.
void tile_mask(const AdaptiveCall& call, const Unit& unit, int64_t member, int64_t tile, float* estimate,
               uint64_t* mask);
int64_t mask_words(const UnitShape& shape);

// ---- attend
size_t attend_scratch(const UnitShape& shape, const decide::Options& options, const KernelTable& exact,
                      const AdaptiveKernels& kernels);
void attend_query_tile(const AdaptiveCall& call, Unit& unit, int64_t member, int64_t tile, char* scratch);
void attend_exact_tile(const AdaptiveCall& call, const Unit& unit, int64_t member, int64_t tile, char* scratch);

// ---- verify
// Rows of a unit that are checked: `count` queries from `first` on, `step` apart.
struct SampledRows {
  int64_t first = 0, step = 1, count = 0;
};
SampledRows sampled_rows(const AdaptiveCall& call, const Unit& unit);
void compute_exact_rows(const AdaptiveCall& call, Unit& unit, char* scratch);
void measure_error(const AdaptiveCall& call, Unit& unit, char* scratch);

}  // namespace adaattn::cpu
