// The last step of a truncated SVD: lengths of unscaled vectors become singular values.
#pragma once

#include <cuda_runtime_api.h>

#include "core/tool_params.h"

namespace adaattn::cuda {

struct LeftArgs {
  int64_t rows, cols, rank;
  int64_t blocks;         // of rows
  const double* squares;  // [batch, blocks, rank]
  double* norms;          // [batch, rank]
  // Right vector j of matrix i: right + (i * right_vectors + (order != null ? order[i * right_vectors + j] : j)) *
  // cols.
  const double* right;
  const int* order;
  int64_t right_vectors;
  MatrixBatch left, right_out, values;  // left unscaled; left and right_out: data null: not wanted
  uint64_t seed;
};

// Singular values and right vectors written, left vectors to unit length.
void finish_left(const LeftArgs& args, int64_t batch, cudaStream_t stream);

}  // namespace adaattn::cuda
