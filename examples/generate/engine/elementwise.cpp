#include "engine/elementwise.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "engine/float_types.h"

// One copy of a loop for each vector width, picked when the program is loaded. Not under sanitizers: the picking runs
// before their own start.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define GENERATE_PER_ISA __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define GENERATE_PER_ISA
#endif

namespace generate {
namespace {

// e^x for finite x, within 2e-7 relatively: 2^n e^r with n = round(x log2 e), ln 2 in two parts so that r is exact
// (Cody and Waite, 1980), and the Taylor polynomial of degree 7, which is below half an ulp off on |r| <= ln(2) / 2.
inline float exp_approx(float x) {
  x = std::min(std::max(x, -87.0f), 88.0f);
  constexpr float kRoundMagic = 0x1.8p23f;  // adding it leaves the nearest integer in the low mantissa bits
  const float shifted = x * 0x1.715476p0f + kRoundMagic;
  const float n = shifted - kRoundMagic;
  const float r = x - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const uint32_t exponent = (std::bit_cast<uint32_t>(shifted) + 127u) << 23;
  return p * std::bit_cast<float>(exponent);
}

// Sums as many independent lanes as the widest vectors have: a plain sum could not be reordered by the compiler.
inline float sum_of_squares(const float* x, int64_t size) {
  constexpr int kLanes = 32;
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += x[i + lane] * x[i + lane];
  float sum = 0;
  for (; i < size; ++i) sum += x[i] * x[i];
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

}  // namespace

GENERATE_PER_ISA void rms_norm(const float* x, const float* weight, float eps, int64_t rows, int64_t size, float* out) {
  for (int64_t row = 0; row < rows; ++row, x += size, out += size) {
    const float scale = 1.0f / std::sqrt(sum_of_squares(x, size) / static_cast<float>(size) + eps);
    for (int64_t i = 0; i < size; ++i) out[i] = x[i] * scale * weight[i];
  }
}

GENERATE_PER_ISA void apply_rope(float* head, const float* cos, const float* sin, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  float* __restrict first = head;
  float* __restrict second = head + half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = first[i], b = second[i];
    first[i] = a * cos[i] - b * sin[i];
    second[i] = b * cos[i] + a * sin[i];
  }
}

GENERATE_PER_ISA void swiglu(const float* gate_up, int64_t rows, int64_t size, float* out) {
  for (int64_t row = 0; row < rows; ++row, gate_up += 2 * size, out += size) {
    const float* gate = gate_up;
    const float* up = gate_up + size;
    for (int64_t i = 0; i < size; ++i) out[i] = gate[i] / (1.0f + exp_approx(-gate[i])) * up[i];
  }
}

GENERATE_PER_ISA void add_bias(const float* bias, int64_t rows, int64_t size, float* y, int64_t ldy) {
  for (int64_t row = 0; row < rows; ++row, y += ldy)
    for (int64_t i = 0; i < size; ++i) y[i] += bias[i];
}

double negative_log_likelihood(const float* logits, int64_t size, int64_t target) {
  const double max = *std::max_element(logits, logits + size);
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += std::exp(logits[i] - max);
  return std::log(sum) + max - logits[target];
}

GENERATE_PER_ISA void convert_from_f32(const float* in, int64_t count, DType dtype, void* out) {
  auto* bits = static_cast<uint16_t*>(out);
  if (dtype == DType::kF32)
    std::memcpy(out, in, static_cast<size_t>(count) * sizeof(float));
  else if (dtype == DType::kF16)
    for (int64_t i = 0; i < count; ++i) bits[i] = f32_to_f16(in[i]);
  else
    for (int64_t i = 0; i < count; ++i) bits[i] = f32_to_bf16(in[i]);
}

GENERATE_PER_ISA void convert_to_f32(const void* in, int64_t count, DType dtype, float* out) {
  const auto* bits = static_cast<const uint16_t*>(in);
  if (dtype == DType::kF32)
    std::memcpy(out, in, static_cast<size_t>(count) * sizeof(float));
  else if (dtype == DType::kF16)
    for (int64_t i = 0; i < count; ++i) out[i] = f16_to_f32(bits[i]);
  else
    for (int64_t i = 0; i < count; ++i) out[i] = bf16_to_f32(bits[i]);
}

}  // namespace generate
