// Passes over rows of Q, K and V for the statistics, bases and projections that adaptive attention decides by.
#pragma once

#include "cpu_fallback/adaptive/kernels.h"
#include "cpu_fallback/isa/prefill-inl.h"

namespace adaattn::cpu {
namespace {

constexpr int64_t kTileKeys = decide::kTileK;

bool load_keys(const KeyOperand& operand, int64_t first, int64_t n, int64_t d, float* out, int64_t stride) {
  bool finite = true;
  // The rows of one head may lie far apart, where the processor does not look ahead.
  const int64_t bytes = d * element_bytes(operand.dtype);
  for (int64_t j = 0; j < n; ++j) {
    const char* row = key_address(operand, first + j);
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at);
  }
  for (int64_t j = 0; j < n; ++j)
    finite = widen_row(key_address(operand, first + j), operand.dtype, out + j * stride, d, 1.0f) && finite;
  return finite;
}

void load_rows(const Operand& operand, int64_t group, int64_t first, int64_t n, int64_t d, float factor, float* out) {
  const int64_t bytes = d * element_bytes(operand.dtype);
  for (int64_t i = 0; i < n; ++i) {
    const char* row = row_address(operand, group, first + i);
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at);
  }
  for (int64_t i = 0; i < n; ++i)
    widen_row(row_address(operand, group, first + i), operand.dtype, out + i * d, d, factor);
}

template <typename T>
HWY_INLINE void mean_of_rows(const Operand& operand, int64_t group, int64_t first, int64_t n, int64_t d, float* mean) {
  const float inverse = 1.0f / static_cast<float>(n);
  const auto row = [&](int64_t i) { return reinterpret_cast<const T*>(row_address(operand, group, first + i)); };
  int64_t c = 0;
  for (; c + 4 * kLanes <= d; c += 4 * kLanes) {
    F32 sum[4];
    ADAATTN_UNROLL for (int v = 0; v < 4; ++v) sum[v] = hn::Zero(kF32);
    for (int64_t i = 0; i < n; ++i) {
      const T* from = row(i) + c;
      ADAATTN_UNROLL for (int v = 0; v < 4; ++v) sum[v] = hn::Add(sum[v], load(from + v * kLanes));
    }
    ADAATTN_UNROLL for (int v = 0; v < 4; ++v)
        hn::StoreU(hn::Mul(sum[v], hn::Set(kF32, inverse)), kF32, mean + c + v * kLanes);
  }
  for (; c < d; ++c) {
    float sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += to_float(load_scalar<T>(row(i) + c));
    mean[c] = sum * inverse;
  }
}

void row_means(const Operand& operand, int64_t group, int64_t first, int64_t n, int64_t d, int64_t count,
               float* means) {
  for (int64_t i = 0; i < n; i += count, means += d) {
    const int64_t there = n - i < count ? n - i : count;
    // Rows of one head lie apart, where the processor does not look ahead.
    for (int64_t j = i + count; j < i + 2 * count && j < n; ++j) {
      const char* row = row_address(operand, group, first + j);
      for (int64_t at = 0; at < d * element_bytes(operand.dtype); at += 64) __builtin_prefetch(row + at);
    }
    if (operand.dtype == Dtype::kF32) mean_of_rows<float>(operand, group, first + i, there, d, means);
    if (operand.dtype == Dtype::kBF16) mean_of_rows<Brain>(operand, group, first + i, there, d, means);
    if (operand.dtype == Dtype::kF16) mean_of_rows<Half>(operand, group, first + i, there, d, means);
  }
}

// Mean and variance of `count` rows, in kVectors vectors of columns.
template <int kVectors>
HWY_INLINE void column_stats(const float* HWY_RESTRICT rows, int64_t count, int64_t stride, float inverse,
                             float* HWY_RESTRICT mean, float* HWY_RESTRICT variance) {
  const F32 scale = hn::Set(kF32, inverse);
  F32 sum[kVectors], square[kVectors];
  ADAATTN_UNROLL for (int v = 0; v < kVectors; ++v) sum[v] = square[v] = hn::Zero(kF32);
  for (int64_t i = 0; i < count; ++i) {
    ADAATTN_UNROLL for (int v = 0; v < kVectors; ++v) {
      sum[v] = hn::Add(sum[v], hn::LoadU(kF32, rows + i * stride + v * kLanes));
    }
  }
  ADAATTN_UNROLL for (int v = 0; v < kVectors; ++v) sum[v] = hn::Mul(sum[v], scale);
  for (int64_t i = 0; i < count; ++i) {
    ADAATTN_UNROLL for (int v = 0; v < kVectors; ++v) {
      const F32 x = hn::Sub(hn::LoadU(kF32, rows + i * stride + v * kLanes), sum[v]);
      square[v] = hn::MulAdd(x, x, square[v]);
    }
  }
  ADAATTN_UNROLL for (int v = 0; v < kVectors; ++v) {
    hn::StoreU(sum[v], kF32, mean + v * kLanes);
    hn::StoreU(hn::Mul(square[v], scale), kF32, variance + v * kLanes);
  }
}

void group_stats(const float* HWY_RESTRICT rows, int64_t n, int64_t d, int64_t stride, float* HWY_RESTRICT mean,
                 int64_t mean_stride, float* HWY_RESTRICT variance, int64_t variance_stride) {
  for (int64_t first = 0; first < n; first += decide::kGroupK) {
    const int64_t count = n - first < decide::kGroupK ? n - first : decide::kGroupK;
    const float inverse = 1.0f / static_cast<float>(count);
    const float* group = rows + first * stride;
    int64_t c = 0;
    for (; c + 4 * kLanes <= d; c += 4 * kLanes)
      column_stats<4>(group + c, count, stride, inverse, mean + c, variance + c);
    for (; c + kLanes <= d; c += kLanes) column_stats<1>(group + c, count, stride, inverse, mean + c, variance + c);
    for (; c < d; ++c) {
      float sum = 0, square = 0;
      for (int64_t i = 0; i < count; ++i) sum += group[i * stride + c];
      sum *= inverse;
      for (int64_t i = 0; i < count; ++i) {
        const float x = group[i * stride + c] - sum;
        square += x * x;
      }
      mean[c] = sum;
      variance[c] = square * inverse;
    }
    mean += mean_stride;
    variance += variance_stride;
  }
}

struct GramScratch {
  float *rows, *panel, *ones, *out;
};

HWY_INLINE void lay_out(Arena& arena, GramScratch& x, int64_t n, int64_t d) {
  x.rows = arena.take<float>(n * packed_stride(d));
  x.panel = arena.take<float>(n * kPanel);
  x.ones = arena.take<float>(kPanel);
  x.out = arena.take<float>(d * kPanel);
}

size_t gram_scratch(int64_t n, int64_t d) {
  Arena arena{nullptr};
  GramScratch unused;
  lay_out(arena, unused, n, d);
  return arena.used;
}

void gram(const float* rows, int64_t n, int64_t step, int64_t d, int64_t stride, const float* mean, float* out,
          char* scratch) {
  const int64_t samples = (n + step - 1) / step, packed = packed_stride(d);
  Arena arena{scratch};
  GramScratch x;
  lay_out(arena, x, samples, d);
  for (int64_t i = 0; i < samples; ++i) {
    for (int64_t c = 0; c < d; ++c) x.rows[i * packed + c] = rows[i * step * stride + c] - mean[c];
  }
  for (int64_t v = 0; v < kPanel; ++v) x.ones[v] = 1;
  for (int64_t first = 0; first < d; first += kPanel) {
    const int64_t columns = d - first < kPanel ? d - first : kPanel;
    for (int64_t i = 0; i < samples; ++i) {
      for (int64_t c = 0; c < kPanel; ++c) x.panel[i * kPanel + c] = c < columns ? x.rows[i * packed + first + c] : 0;
    }
    memset(x.out, 0, static_cast<size_t>(d * kPanel) * sizeof(float));
    value_panel(x.rows, packed, samples, x.panel, d, x.ones, x.out);
    for (int64_t r = 0; r < d; ++r) {
      for (int64_t c = 0; c < columns; ++c) out[r * d + first + c] = x.out[r * kPanel + c];
    }
  }
}

// kRows rows by kVectors vectors of columns; adds y^2 to `squares`, lane by lane.
template <int kRows, int kVectors>
HWY_NOINLINE void project_rows(const float* HWY_RESTRICT rows, int64_t stride, const float* HWY_RESTRICT basis,
                               int64_t r, int64_t d, const float* HWY_RESTRICT offset, float* HWY_RESTRICT y,
                               int64_t y_stride, float* HWY_RESTRICT squares) {
  F32 acc[kRows][kVectors];
  ADAATTN_UNROLL for (int i = 0; i < kRows; ++i) {
    ADAATTN_UNROLL for (int v = 0; v < kVectors; ++v) acc[i][v] = hn::Zero(kF32);
  }
  for (int64_t t = 0; t < d; ++t) {
    F32 u[kVectors];
    ADAATTN_UNROLL for (int v = 0; v < kVectors; ++v) u[v] = hn::LoadU(kF32, basis + t * r + v * kLanes);
    ADAATTN_UNROLL for (int i = 0; i < kRows; ++i) {
      const F32 x = hn::Set(kF32, rows[i * stride + t]);
      ADAATTN_UNROLL for (int v = 0; v < kVectors; ++v) acc[i][v] = hn::MulAdd(x, u[v], acc[i][v]);
    }
  }
  F32 sum = hn::Load(kF32, squares);
  ADAATTN_UNROLL for (int v = 0; v < kVectors; ++v) {
    const F32 shift = hn::LoadU(kF32, offset + v * kLanes);
    ADAATTN_UNROLL for (int i = 0; i < kRows; ++i) {
      const F32 value = hn::Sub(acc[i][v], shift);
      sum = hn::MulAdd(value, value, sum);
      hn::StoreU(value, kF32, y + i * y_stride + v * kLanes);
    }
  }
  hn::Store(sum, kF32, squares);
}

template <int kVectors>
HWY_INLINE void project_columns(const float* rows, int64_t n, int64_t d, int64_t stride, const float* mean,
                                const float* basis, int64_t r, float* y, int64_t y_stride, float* squares) {
  HWY_ALIGN float offset[kPanel];
  for (int v = 0; v < kVectors; ++v) {
    F32 sum = hn::Zero(kF32);
    for (int64_t t = 0; t < d; ++t)
      sum = hn::MulAdd(hn::Set(kF32, mean[t]), hn::LoadU(kF32, basis + t * r + v * kLanes), sum);
    hn::Store(sum, kF32, offset + v * kLanes);
  }
  int64_t j = 0;
  for (; j + 4 <= n; j += 4)
    project_rows<4, kVectors>(rows + j * stride, stride, basis, r, d, offset, y + j * y_stride, y_stride, squares);
  for (; j < n; ++j)
    project_rows<1, kVectors>(rows + j * stride, stride, basis, r, d, offset, y + j * y_stride, y_stride, squares);
}

double project(const float* rows, int64_t n, int64_t d, int64_t stride, const float* mean, const float* basis,
               int64_t r, float* y, int64_t y_stride) {
  HWY_ALIGN float squares[kLanes] = {};
  for (int64_t first = 0; first < r;) {
    const int64_t vectors = (r - first) / kLanes;
    const float* u = basis + first;
    float* to = y + first;
#if defined(ADAATTN_UNIT_AVX512) || defined(ADAATTN_UNIT_NEON)
    if (vectors >= 4) {
      project_columns<4>(rows, n, d, stride, mean, u, r, to, y_stride, squares);
      first += 4 * kLanes;
      continue;
    }
#endif
    if (vectors >= 2) {
      project_columns<2>(rows, n, d, stride, mean, u, r, to, y_stride, squares);
      first += 2 * kLanes;
    } else {
      project_columns<1>(rows, n, d, stride, mean, u, r, to, y_stride, squares);
      first += kLanes;
    }
  }
  double total = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) total += squares[lane];
  return total;
}

#if defined(ADAATTN_UNIT_INT8)
#include "cpu_fallback/isa/probe_int8-inl.h"
#else
// f32 rows followed by a 1, which meets a query's product with the mean of K.
size_t probe_tile_bytes(int64_t rank) {
  return static_cast<size_t>(kTileKeys * packed_stride(rank + 1)) * sizeof(float);
}

void pack_probe(const float* y, int64_t y_stride, int64_t n, int64_t rank, char* tile) {
  float* rows = reinterpret_cast<float*>(tile);
  const int64_t stride = packed_stride(rank + 1);
  for (int64_t j = 0; j < n; ++j) {
    memcpy(rows + j * stride, y + j * y_stride, static_cast<size_t>(rank) * sizeof(float));
    rows[j * stride + rank] = 1;
  }
}
#endif

}  // namespace
}  // namespace adaattn::cpu
