// The steps of analyze and decide.
#pragma once

#include "adaptive/analyze.h"
#include "lowrank/gram.cuh"

namespace adaattn::cuda {

TallView sample_view(const TableShape& shape, const AnalyzeTables& tables);
int32_t sample_columns(const TableShape& shape);  // vectors of a basis, those of oversampling included

// Means, bases and rank classes.
void sample(const AnalyzeArgs& args, cudaStream_t stream);
// Tables of all key and query tiles.
void tile_statistics(const AnalyzeArgs& args, cudaStream_t stream);

// Parts of prepare_analyze().
void prepare_statistics();
void prepare_levels();
void prepare_masks();

}  // namespace adaattn::cuda
