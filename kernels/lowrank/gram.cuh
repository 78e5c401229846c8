// Gram matrices of tall matrices and of sets of vectors.
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

// Float64 vectors, one per row of `length` adjacent elements [batch, count, length], seen as the columns of a matrix.
struct VectorView {
  const double* data;
  int64_t rows, cols, stride_row, stride_col, batch;  // rows: length, cols: count
  VectorView(const double* vectors, int64_t count, int64_t length, int64_t matrices)
      : data(vectors), rows(length), cols(count), stride_row(1), stride_col(length), batch(matrices) {}
  ADAATTN_HD const double* matrix(int64_t i) const { return data + i * rows * cols; }
};

// A^T A of every matrix, [batch, ld, ld] with ld = subspace_ld(cols), 0 beyond cols; it lies in the workspace.
size_t gram_bytes(const TallView& a);
size_t gram_bytes(const VectorView& v);
double* gram_of(const TallView& a, void* workspace, cudaStream_t stream);
double* gram_of(const VectorView& v, void* workspace, cudaStream_t stream);

}  // namespace adaattn::cuda
