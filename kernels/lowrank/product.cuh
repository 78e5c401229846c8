// The product of an f32 matrix of a batch with float64 vectors, in float64: y_j = a x_j.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/tool_params.h"
#include "lowrank/gram.cuh"

namespace adaattn::cuda {

struct ProductArgs {
  TallView a;
  // Vector j of matrix i: x + (i * x_vectors + (order != null ? order[i * x_vectors + j] : j)) * x_stride.
  const double* x = nullptr;
  const int* order = nullptr;
  int64_t x_vectors = 0, x_stride = 0;
  int64_t vectors = 0;  // wanted
  double* y = nullptr;  // [batch, vectors, y_stride], or null and
  int64_t y_stride = 0;
  MatrixBatch out;  // f32 [a.rows, vectors]; data null: only the squares are wanted
  double* squares =
      nullptr;  // [batch, product_blocks(a), vectors]: sums of squares over blocks of rows; null: unwanted
  // [product_splits(a, vectors), batch, vectors, y_stride], where y alone is wanted: a matrix of few rows is split by
  // its columns, so that it fills the device. Null: not split.
  double* partial = nullptr;
};

int64_t product_blocks(const TallView& a);
int64_t product_splits(const TallView& a, int64_t vectors);
void product(const ProductArgs& args, cudaStream_t stream);

}  // namespace adaattn::cuda
