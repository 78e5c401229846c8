// From the device's counts to what a plan tells about itself.
#pragma once

#include <vector>

#include "adaptive/tile_tally.h"
#include "backend.h"

namespace adaattn::cuda {

AdaptiveCounters counters_of(const TileTotals& totals);
std::vector<HeadRecord> records_of(const std::vector<HeadTally>& tallies, const Problem& problem);
// bits, ranges: of one head's query tiles.
TileMap map_of(const HeadTally& tally, const std::vector<uint64_t>& bits, const std::vector<decide::TileRow>& ranges,
               int32_t mask_words);

// Of plans that compute every call exactly.
void add_exact_call(const AttnParams& params, Dtype dtype, AdaptiveCounters* sum);
std::vector<HeadRecord> exact_records(const Problem& problem, int64_t batch);

}  // namespace adaattn::cuda
