// Gram matrices of tall matrices, and their eigen-decomposition by one CTA per matrix.
#pragma once

#include <cuda_runtime_api.h>

#include "core/tool_params.h"

namespace adaattn::cuda {

// A matrix of the batch seen with at least as many rows as columns.
struct TallView {
  const float* data;
  int64_t rows, cols, stride_row, stride_col, batch0_stride, batch1_stride, batch1, batch;
  bool transposed;
  ADAATTN_HD const float* matrix(int64_t i) const {
    return data + i / batch1 * batch0_stride + i % batch1 * batch1_stride;
  }
};

TallView tall_view(const MatrixBatch& a);

// Parts that the rows of each matrix are split into, so that the partial sums fill the device.
int64_t gram_splits(const TallView& a);

// A^T A of every matrix, [batch, ld, ld] with ld = subspace_ld(cols), 0 beyond cols; it lies in the workspace.
size_t gram_bytes(const TallView& a);
double* gram_of(const TallView& a, void* workspace, cudaStream_t stream);

// Whole eigen-decompositions of Gram matrices of at most kMaxGramDim, which are overwritten.
struct Eigen {
  double* vectors;  // [batch, n, n], one per row in the order of rotation
  double* values;   // [batch, n], descending
  int* order;       // [batch, n]: row of vectors that belongs to the j-th value
};
size_t eigen_bytes(int64_t n, int64_t batch);
Eigen eigen_of(int64_t n, int64_t batch, double* gram, void* workspace, cudaStream_t stream);

}  // namespace adaattn::cuda
