// A few query rows of every head computed exactly, and what their distance from the call's results teaches.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "adaptive/analyze.h"

namespace adaattn::cuda {

// How the sampled rows of a unit are shared among CTAs: tiles of 16 rows, each with its keys in parts.
struct VerifyShape {
  int32_t rows = 0;   // per head
  int32_t every = 1;  // so many calls
  int32_t row_tiles = 0, splits = 0;
};
VerifyShape verify_shape(const TableShape& shape, int32_t rows, int32_t multiprocessors);
size_t verify_bytes(const TableShape& shape, const VerifyShape& verify);

inline constexpr int kVerifyTile = 16;

// Of a sampled row and a part of its keys: maximum in log2 units (-inf: no key seen), sum of 2^(x - maximum), and the
// values with these weights.
struct VerifyPart {
  float2 statistics;
  float o[128];
};

// bf16, d_qk 128, d_v 128, rows on 16 bytes. parts: verify_bytes(); launch_tally judges by them.
cudaError_t launch_exact_rows(const AnalyzeArgs& args, const VerifyShape& verify, VerifyPart* parts,
                              cudaStream_t stream);

// Once per device, before the first launch.
void prepare_verify();

}  // namespace adaattn::cuda
