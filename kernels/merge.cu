// Two partial results over disjoint keys into one: lse = ln(e^a + e^b), o = o_a e^(a - lse) + o_b e^(b - lse).
#include "attend/launch.h"
#include "common/scores.cuh"
#include "runtime.h"
#include "tools.h"

namespace adaattn::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float load(const Operand& x, int64_t i) {
  if (x.dtype == Dtype::kF32) return static_cast<const float*>(x.data)[i];
  if (x.dtype == Dtype::kBF16) return to_float(static_cast<const __nv_bfloat16*>(x.data)[i]);
  return to_float(static_cast<const __half*>(x.data)[i]);
}

__device__ __forceinline__ void store(const Operand& x, int64_t i, float value) {
  if (x.dtype == Dtype::kF32) {
    static_cast<float*>(x.data)[i] = value;
  } else if (x.dtype == Dtype::kBF16) {
    static_cast<__nv_bfloat16*>(x.data)[i] = __float2bfloat16_rn(value);
  } else {
    static_cast<__half*>(x.data)[i] = __float2half_rn(value);
  }
}

// One warp per row, which reads both sides before it writes: the outputs may be the inputs.
__global__ __launch_bounds__(kThreads) void merge_kernel(const __grid_constant__ MergeParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= p.batch * p.tokens * p.heads) return;
  const int lane = threadIdx.x % 32;
  const int64_t head = row % p.heads, token = row / p.heads % p.tokens, b = row / p.heads / p.tokens;
  const auto at = [&](const Operand& x) { return b * x.stride_b + token * x.stride_s + head * x.stride_h; };
  const float lse_a = static_cast<const float*>(p.lse_a.data)[at(p.lse_a)];
  const float lse_b = static_cast<const float*>(p.lse_b.data)[at(p.lse_b)];
  const float top = fmaxf(lse_a, lse_b);
  float lse = kNegInf, w_a = 0, w_b = 0;
  if (!(lse_a == kNegInf && lse_b == kNegInf)) {
    const float a = expf(lse_a - top), c = expf(lse_b - top), sum = a + c;
    w_a = a / sum;
    w_b = c / sum;
    lse = top + logf(sum);
  }
  for (int64_t i = lane; i < p.d_v; i += 32) {
    // A side of weight 0 has no keys; its values are not defined.
    const float a = w_a == 0 ? 0.0f : w_a * load(p.o_a, at(p.o_a) + i);
    const float c = w_b == 0 ? 0.0f : w_b * load(p.o_b, at(p.o_b) + i);
    store(p.o, at(p.o) + i, a + c);
  }
  __syncwarp();  // every lane has read both lse
  if (lane == 0 && p.lse.data != nullptr) static_cast<float*>(p.lse.data)[at(p.lse)] = lse;
}

}  // namespace

void merge(const MergeParams& p, cudaStream_t stream) {
  const int64_t rows = p.batch * p.tokens * p.heads;
  if (rows == 0) return;
  const int64_t grid = (rows + kThreads / 32 - 1) / (kThreads / 32);
  check(launch_grid(merge_kernel, dim3(static_cast<unsigned>(grid)), kThreads, 0, stream, p), "merge");
}

}  // namespace adaattn::cuda
