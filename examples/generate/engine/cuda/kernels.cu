#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <algorithm>

#include "engine/cuda/kernels.h"

namespace generate::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// Elements are walked with a stride of the whole grid, so that the grid need not grow with them.
constexpr int64_t kMaxBlocks = 1 << 16;

__device__ float widen(float x) { return x; }
__device__ float widen(__half x) { return __half2float(x); }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void store(float* out, float x) { *out = x; }
__device__ void store(__half* out, float x) { *out = __float2half_rn(x); }
__device__ void store(__nv_bfloat16* out, float x) { *out = __float2bfloat16_rn(x); }

template <typename T, typename Combine>
__device__ T reduce_block(T value, Combine combine) {
  __shared__ T partial[kWarps];
  for (int lanes = 16; lanes > 0; lanes /= 2) value = combine(value, __shfl_xor_sync(~0u, value, lanes));
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  value = partial[0];
  for (int warp = 1; warp < kWarps; ++warp) value = combine(value, partial[warp]);
  __syncthreads();  // before a second reduction writes there
  return value;
}

__device__ int64_t first_element() { return int64_t{blockIdx.x} * kThreads + threadIdx.x; }
__device__ int64_t grid_stride() { return int64_t{gridDim.x} * kThreads; }

template <typename T>
__global__ void embed_kernel(const T* table, const int32_t* tokens, int64_t rows, int64_t size, float* x) {
  for (int64_t i = first_element(); i < rows * size; i += grid_stride())
    x[i] = widen(table[tokens[i / size] * size + i % size]);
}

template <typename T>
__global__ void rms_norm_kernel(const float* x, const float* weight, float eps, int64_t rows, int64_t size, T* out) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const float* in = x + row * size;
    float squares = 0;
    for (int64_t i = threadIdx.x; i < size; i += kThreads) squares += in[i] * in[i];
    squares = reduce_block(squares, [](float a, float b) { return a + b; });
    const float scale = 1.0f / sqrtf(squares / static_cast<float>(size) + eps);
    for (int64_t i = threadIdx.x; i < size; i += kThreads) store(out + row * size + i, in[i] * scale * weight[i]);
  }
}

__global__ void add_bias_kernel(const float* bias, int64_t rows, int64_t size, float* y) {
  for (int64_t i = first_element(); i < rows * size; i += grid_stride()) y[i] += bias[i % size];
}

// A thread for each pair (i, i + head_dim / 2) of a head.
template <typename T>
__global__ void store_qkv_kernel(const float* qkv, int64_t rows, QkvTarget t) {
  const int64_t half = t.head_dim / 2, all_heads = t.heads + 2 * t.kv_heads, pairs = all_heads * half;
  for (int64_t index = first_element(); index < rows * pairs; index += grid_stride()) {
    const int64_t row = index / pairs, head = index % pairs / half, i = index % half;
    const int64_t step_row = t.first_row + row, position = t.start + step_row % t.seqlen;
    const float* in = qkv + (row * all_heads + head) * t.head_dim;
    float a = in[i], b = in[i + half];
    if (head < t.heads + t.kv_heads) {
      const float cos = t.cos[position * half + i], sin = t.sin[position * half + i];
      const float rotated = a * cos - b * sin;
      b = b * cos + a * sin;
      a = rotated;
    }
    T* out = static_cast<T*>(t.q) + (step_row * t.heads + head) * t.head_dim;
    if (head >= t.heads) {
      const int64_t kv_head = (head - t.heads) % t.kv_heads;
      const int64_t slot = step_row / t.seqlen * t.capacity + position - t.first_position;
      out = static_cast<T*>(head < t.heads + t.kv_heads ? t.k : t.v) + (slot * t.kv_heads + kv_head) * t.head_dim;
    }
    store(out + i, a);
    store(out + i + half, b);
  }
}

// A CTA for each block of tokens that the step touches, head and sequence. A block's factor is set when its first token
// comes.
template <typename T>
__global__ void quantize_kernel(const T* values, QuantizeShape s, uint8_t* cache, float* factors) {
  const int64_t block = s.start / kFactorTokens + blockIdx.x, head = blockIdx.y, sequence = blockIdx.z;
  const int64_t begin = block * kFactorTokens, first = max(begin, s.start);
  const int64_t last = min(begin + kFactorTokens, s.start + s.seqlen), elements = (last - first) * s.head_dim;
  const auto at = [&](int64_t i) {
    const int64_t token = sequence * s.seqlen + first - s.start + i / s.head_dim;
    return widen(values[(token * s.kv_heads + head) * s.head_dim + i % s.head_dim]);
  };
  float largest = 0;
  for (int64_t i = threadIdx.x; i < elements; i += kThreads) largest = fmaxf(largest, fabsf(at(i)));
  largest = reduce_block(largest, [](float a, float b) { return fmaxf(a, b); });
  const int64_t blocks = (s.capacity + kFactorTokens - 1) / kFactorTokens;
  float* place = factors + (sequence * s.kv_heads + head) * blocks + block;
  const float room = last - first == kFactorTokens ? 1.0f : kE4m3Room;
  const float factor = first > begin ? *place : largest > 0 ? largest * room / kE4m3Max : 1.0f;
  if (first == begin && threadIdx.x == 0) *place = factor;
  for (int64_t i = threadIdx.x; i < elements; i += kThreads) {
    const int64_t token = sequence * s.capacity + first + i / s.head_dim;
    cache[(token * s.kv_heads + head) * s.head_dim + i % s.head_dim] =
        __nv_cvt_float_to_fp8(at(i) / factor, __NV_SATFINITE, __NV_E4M3);
  }
}

template <typename T>
__global__ void swiglu_kernel(const float* gate_up, int64_t rows, int64_t size, T* out) {
  for (int64_t i = first_element(); i < rows * size; i += grid_stride()) {
    const float* row = gate_up + i / size * 2 * size;
    const float gate = row[i % size];
    store(out + i, gate / (1.0f + expf(-gate)) * row[size + i % size]);
  }
}

__global__ void negative_log_likelihood_kernel(const float* logits, const int32_t* targets, int64_t rows, int64_t size,
                                               double* losses) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const float* in = logits + row * size;
    float max = -INFINITY;
    for (int64_t i = threadIdx.x; i < size; i += kThreads) max = fmaxf(max, in[i]);
    max = reduce_block(max, [](float a, float b) { return fmaxf(a, b); });
    double sum = 0;
    for (int64_t i = threadIdx.x; i < size; i += kThreads) sum += expf(in[i] - max);
    sum = reduce_block(sum, [](double a, double b) { return a + b; });
    if (threadIdx.x == 0) losses[row] = log(sum) + max - in[targets[row]];
  }
}

unsigned blocks_for(int64_t blocks) { return static_cast<unsigned>(std::min(blocks, kMaxBlocks)); }
unsigned blocks_of_elements(int64_t elements) { return blocks_for((elements + kThreads - 1) / kThreads); }

template <typename T>
struct Tag {
  using Type = T;
};

// Calls launch with the tag of the C++ type that dtype means.
template <typename Launch>
cudaError_t with_type(DType dtype, const Launch& launch) {
  switch (dtype) {
    case DType::kF32:
      launch(Tag<float>());
      break;
    case DType::kF16:
      launch(Tag<__half>());
      break;
    case DType::kBf16:
      launch(Tag<__nv_bfloat16>());
      break;
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t embed(const void* table, DType dtype, const int32_t* tokens, int64_t rows, int64_t size, float* x,
                  cudaStream_t stream) {
  return with_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    embed_kernel<<<blocks_of_elements(rows * size), kThreads, 0, stream>>>(static_cast<const T*>(table), tokens, rows,
                                                                           size, x);
  });
}

cudaError_t rms_norm(const float* x, const float* weight, float eps, int64_t rows, int64_t size, DType dtype, void* out,
                     cudaStream_t stream) {
  return with_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    rms_norm_kernel<<<blocks_for(rows), kThreads, 0, stream>>>(x, weight, eps, rows, size, static_cast<T*>(out));
  });
}

cudaError_t add_bias(const float* bias, int64_t rows, int64_t size, float* y, cudaStream_t stream) {
  add_bias_kernel<<<blocks_of_elements(rows * size), kThreads, 0, stream>>>(bias, rows, size, y);
  return cudaGetLastError();
}

cudaError_t store_qkv(const float* qkv, int64_t rows, DType dtype, const QkvTarget& target, cudaStream_t stream) {
  const int64_t pairs = rows * (target.heads + 2 * target.kv_heads) * (target.head_dim / 2);
  return with_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    store_qkv_kernel<T><<<blocks_of_elements(pairs), kThreads, 0, stream>>>(qkv, rows, target);
  });
}

cudaError_t quantize(const void* values, DType dtype, const QuantizeShape& shape, void* cache, float* factors,
                     cudaStream_t stream) {
  const int64_t end = shape.start + shape.seqlen, blocks = (end - 1) / kFactorTokens - shape.start / kFactorTokens + 1;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(shape.kv_heads),
                  static_cast<unsigned>(shape.batch));
  return with_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    quantize_kernel<<<grid, kThreads, 0, stream>>>(static_cast<const T*>(values), shape, static_cast<uint8_t*>(cache),
                                                   factors);
  });
}

cudaError_t swiglu(const float* gate_up, int64_t rows, int64_t size, DType dtype, void* out, cudaStream_t stream) {
  return with_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    swiglu_kernel<<<blocks_of_elements(rows * size), kThreads, 0, stream>>>(gate_up, rows, size, static_cast<T*>(out));
  });
}

cudaError_t negative_log_likelihood(const float* logits, const int32_t* targets, int64_t rows, int64_t size,
                                    double* losses, cudaStream_t stream) {
  negative_log_likelihood_kernel<<<blocks_for(rows), kThreads, 0, stream>>>(logits, targets, rows, size, losses);
  return cudaGetLastError();
}

}  // namespace generate::cuda
