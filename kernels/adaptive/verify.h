// A few query rows of every head computed exactly, and what their distance from the call's results teaches.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "adaptive/tile_tally.h"

namespace adaattn::cuda {

// How the sampled rows of a unit are shared among CTAs: tiles of 16 rows, each with its keys in parts.
struct VerifyShape {
  int32_t rows = 0;   // per head
  int32_t every = 1;  // so many calls
  int32_t row_tiles = 0, splits = 0;
};
VerifyShape verify_shape(const TableShape& shape, int32_t rows, int32_t multiprocessors);
size_t verify_bytes(const TableShape& shape, const VerifyShape& verify);

// bf16, d_qk 128, d_v 128, rows on 16 bytes. After attend and the tallies of the last wave, before the totals: leaves
// each head's error in its tally and corrects its multiplier, if there is one. partial: verify_bytes().
cudaError_t launch_verify(const AnalyzeArgs& args, const VerifyShape& verify, void* partial, HeadTally* heads,
                          cudaStream_t stream);

// Once per device, before the first launch.
void prepare_verify();

}  // namespace adaattn::cuda
