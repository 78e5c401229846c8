// Arguments of merge and of the tools in plain numbers, validated; what both back-ends read.
#pragma once

#include <cstdint>

#include "core/attn_params.h"

namespace adaattn {

// A batch of matrices [b0, b1, rows, cols] with free strides; data null: not wanted. Vectors have cols 1.
struct MatrixBatch {
  void* data = nullptr;
  int64_t batch0 = 1, batch1 = 1, rows = 0, cols = 1;
  int64_t stride0 = 0, stride1 = 0, stride_row = 0, stride_col = 0;
  Dtype dtype = Dtype::kF32;
  ADAATTN_HD int64_t batch() const { return batch0 * batch1; }
  ADAATTN_HD int64_t offset(int64_t matrix) const { return matrix / batch1 * stride0 + matrix % batch1 * stride1; }
};

// o*, lse*: [batch, tokens, heads(, d_v)]; batch 1 for packed tokens. lse.data null: not wanted.
struct MergeParams {
  Operand o_a, o_b, o;
  Operand lse_a, lse_b, lse;
  int64_t batch = 0, tokens = 0, heads = 0, d_v = 0;
};

struct EntropyParams {
  AttnParams attn;                // v and o unset; attn.entropy is the per-row output
  float* head_entropy = nullptr;  // [batch, heads_q], null: not wanted
  int64_t head_stride_b = 0, head_stride_h = 0;
  bool sampled = false;
  bool normalized = false;
  int64_t sample_rows = 0;
  uint64_t seed = 0;
};

struct LowRankParams {
  MatrixBatch a, u, s, v;  // u, v optional
  int64_t rank = 0, oversampling = 0, power_iterations = 0;
  uint64_t seed = 0;
};

struct ProjectParams {
  MatrixBatch a, basis, mean, y, row_residual, residual;  // all but a and basis optional
};

struct EffectiveRankParams {
  MatrixBatch a, singular_values;  // singular_values optional
  MatrixBatch ranks;               // i32
  double threshold = 0;
};

struct SpectralNormParams {
  MatrixBatch a, norms;
  double tolerance = 0;
  int64_t max_iterations = 0;
  uint64_t seed = 0;
};

}  // namespace adaattn
