// The element-wise parts of a Llama layer, in f32 on the calling thread.
#pragma once

#include <cstdint>

#include "engine/dtype.h"

namespace generate {

// out_i = x_i / sqrt(mean(x^2) + eps) * weight_i for each row (Zhang and Sennrich, 2019).
void rms_norm(const float* x, const float* weight, float eps, int64_t rows, int64_t size, float* out);

// Rotates a head's pairs (i, i + head_dim / 2) in place by the angles of one position (Su et al., 2021, in the
// half-split order); cos and sin have head_dim / 2 entries.
void apply_rope(float* head, const float* cos, const float* sin, int64_t head_dim);

// out_i = silu(gate_i) * up_i for rows of [gate | up] (Shazeer, 2020), silu(x) = x / (1 + e^-x).
void swiglu(const float* gate_up, int64_t rows, int64_t size, float* out);

// y[r, i] += bias_i; ldy is the row stride of y.
void add_bias(const float* bias, int64_t rows, int64_t size, float* y, int64_t ldy);

// -ln softmax(logits)[target], accumulated in double.
double negative_log_likelihood(const float* logits, int64_t size, int64_t target);

void convert_from_f32(const float* in, int64_t count, DType dtype, void* out);
void convert_to_f32(const void* in, int64_t count, DType dtype, float* out);

}  // namespace generate
