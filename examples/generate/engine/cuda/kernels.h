// The element-wise parts of a Llama layer on the GPU; engine/elementwise.h has their formulas. Arithmetic is in f32,
// results are rounded once to `dtype`. Pointers are device memory, rows at least 1; each call enqueues one kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "engine/dtype.h"

namespace generate::cuda {

// x [rows, size] = rows of the table, which is in dtype.
cudaError_t embed(const void* table, DType dtype, const int32_t* tokens, int64_t rows, int64_t size, float* x,
                  cudaStream_t stream);

// out [rows, size] in dtype.
cudaError_t rms_norm(const float* x, const float* weight, float eps, int64_t rows, int64_t size, DType dtype, void* out,
                     cudaStream_t stream);

cudaError_t add_bias(const float* bias, int64_t rows, int64_t size, float* y, cudaStream_t stream);

// Rotates q and k of qkv [rows, heads + 2 kv_heads, head_dim] and writes q, k and v where attention reads them. Row r
// is row first_row + r of a step: of its sequence (first_row + r) / seqlen, at position start + (first_row + r) %
// seqlen.
struct QkvTarget {
  const float* cos;  // [positions, head_dim / 2]
  const float* sin;
  void* q;  // [rows of the step, heads, head_dim]
  void* k;  // [sequences, capacity, kv_heads, head_dim]
  void* v;
  int64_t heads, kv_heads, head_dim;
  int64_t first_row, seqlen, start, capacity;
  int64_t first_position;  // of k and v
};
cudaError_t store_qkv(const float* qkv, int64_t rows, DType dtype, const QkvTarget& target, cudaStream_t stream);

// A step's keys or values [batch, seqlen, kv_heads, head_dim] in dtype into a cache [batch, capacity, kv_heads,
// head_dim] of E4M3 with factors [batch, kv_heads, blocks of kFactorTokens].
struct QuantizeShape {
  int64_t batch, kv_heads, head_dim;
  int64_t seqlen, start, capacity;
};
cudaError_t quantize(const void* values, DType dtype, const QuantizeShape& shape, void* cache, float* factors,
                     cudaStream_t stream);

// out [rows, size] in dtype from gate_up [rows, 2 size].
cudaError_t swiglu(const float* gate_up, int64_t rows, int64_t size, DType dtype, void* out, cudaStream_t stream);

// losses[r] = -ln softmax(logits[r])[targets[r]], logits [rows, size].
cudaError_t negative_log_likelihood(const float* logits, const int32_t* targets, int64_t rows, int64_t size,
                                    double* losses, cudaStream_t stream);

}  // namespace generate::cuda
