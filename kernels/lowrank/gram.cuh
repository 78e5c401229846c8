// Gram matrices of tall matrices and their eigen-decomposition, one CTA per matrix.
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

// Eigenvalues in descending order, and eigenvectors: vectors[matrix][j] is the j-th, cols adjacent elements.
struct GramEigen {
  double* partial;  // [batch, splits, cols, cols]
  double* gram;     // [batch, cols, cols]
  double* vectors;  // [batch, cols, cols], in the order of rotation; column rank[j] is the j-th
  double* values;   // [batch, cols]
  int* order;       // [batch, cols]: index into vectors of the j-th largest
};

size_t gram_eigen_bytes(const TallView& a);
GramEigen gram_eigen_layout(const TallView& a, void* workspace);
void gram_eigen(const TallView& a, const GramEigen& w, cudaStream_t stream);

}  // namespace adaattn::cuda
