// The steps of analyze and decide.
#pragma once

#include "adaptive/analyze.h"
#include "lowrank/gram.cuh"

namespace adaattn::cuda {

TallView sample_view(float* rows, int64_t samples, int64_t dim);  // of kSampleRows rows each
int32_t sample_columns(const TableShape& shape);                  // vectors of a basis, those of oversampling included

// Means, bases and rank classes.
void sample(const AnalyzeArgs& args, cudaStream_t stream);
// After that, where the shape has probe_columns: Q and K as the probe reads them.
void probe_tables(const AnalyzeArgs& args, cudaStream_t stream);
int32_t probe_vectors_of(const TableShape& shape);  // those of oversampling included
// Tables of all key and query tiles.
void tile_statistics(const AnalyzeArgs& args, cudaStream_t stream);
// The same where streams(args): bf16, head_dim 128, no far field, V as it is. With needles it is the only way.
bool streams(const AnalyzeArgs& args);
void stream_statistics(const AnalyzeArgs& args, cudaStream_t stream);

// The masks of a wave where shares decide and decide_heads() had no room for all of them.
void mask_shares(const AnalyzeArgs& args, int32_t first_tile, cudaStream_t stream);

// What the masks of a wave leave out, where there are shares.
void add_remainder(const AnalyzeArgs& args, int32_t first_tile, cudaStream_t stream);

// Parts of prepare_analyze().
void prepare_statistics();
void prepare_stream();
void prepare_levels();
void prepare_masks();
void prepare_remainder();
void prepare_probe();

}  // namespace adaattn::cuda
