// Rows of Q, K and V as analyze reads them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/attn_params.h"

namespace adaattn::cuda {

// The tokens of one sequence and head.
template <typename T>
struct TokenRows {
  const T* base;
  int64_t stride;
  const int32_t* pages = nullptr;  // of the sequence; null: not paged
  int64_t page_size = 1, page_stride = 0, last_page = 0;
  __device__ __forceinline__ const T* row(int64_t j) const {
    if (pages == nullptr) return base + j * stride;
    // Entries out of range are reported by the attention kernel; here they must only not be followed.
    const int64_t page = clamp_to(pages[j / page_size], 0, last_page);
    return base + page * page_stride + j % page_size * stride;
  }
};

template <typename T>
__device__ __forceinline__ TokenRows<T> key_rows(const AttnParams& p, const Operand& x, const Sequence& s, int64_t b,
                                                 int64_t head) {
  TokenRows<T> rows;
  rows.stride = x.stride_s;
  rows.base = static_cast<const T*>(x.data) + head * x.stride_h;
  if (p.block_table != nullptr) {
    rows.pages = p.block_table + b * p.block_table_stride;
    rows.page_size = p.page_size;
    rows.page_stride = x.stride_b;
    rows.last_page = p.num_pages - 1;
  } else {
    rows.base += b * x.stride_b + s.k_start * x.stride_s;
  }
  return rows;
}

template <typename T>
__device__ __forceinline__ TokenRows<T> query_rows(const AttnParams& p, const Sequence& s, int64_t b, int64_t head) {
  return {static_cast<const T*>(p.q.data) + b * p.q.stride_b + s.q_start * p.q.stride_s + head * p.q.stride_h,
          p.q.stride_s};
}

template <typename T>
__device__ __forceinline__ float2 widen2(uint32_t raw);
template <>
__device__ __forceinline__ float2 widen2<__nv_bfloat16>(uint32_t raw) {
  return {__uint_as_float(raw << 16), __uint_as_float(raw & 0xffff0000u)};
}
template <>
__device__ __forceinline__ float2 widen2<__half>(uint32_t raw) {
  return __half22float2(*reinterpret_cast<const __half2*>(&raw));
}

// Elements 2 column and the next.
template <typename T>
__device__ __forceinline__ uint32_t pair_at(const T* row, int column) {
  return *reinterpret_cast<const uint32_t*>(row + 2 * column);
}

}  // namespace adaattn::cuda
