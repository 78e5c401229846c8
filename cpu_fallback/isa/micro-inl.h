// The inner product kernels of prefill. Queries lie in lanes, so that softmax never reduces across lanes:
//   S^T [keys][kPanel] = K Q^T        O^T [d_v][kPanel] = alpha O^T + V^T P^T
// Elements of K and V are broadcast; a micro tile is up to 6 rows of them by kPanelVectors vectors of queries.
#pragma once

#include "cpu_fallback/isa/simd-inl.h"

namespace adaattn::cpu {
namespace {

constexpr int kMicroRows = 6;

#define ADAATTN_UNROLL _Pragma("GCC unroll 8")

// Rows r of `a` (element t at a[r * row_step + t * step]) times the panel b [steps][kPanel].
template <int kRows>
struct MicroTile {
  F32 acc[kRows][kPanelVectors];

  HWY_INLINE void clear() {
    ADAATTN_UNROLL for (int r = 0; r < kRows; ++r) {
      ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) acc[r][v] = hn::Zero(kF32);
    }
  }

  HWY_INLINE void load_scaled(const float* HWY_RESTRICT c, const F32* factor) {
    ADAATTN_UNROLL for (int r = 0; r < kRows; ++r) {
      ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) {
        acc[r][v] = hn::Mul(hn::Load(kF32, c + r * kPanel + v * kLanes), factor[v]);
      }
    }
  }

  HWY_INLINE void multiply(const float* HWY_RESTRICT a, int64_t row_step, int64_t step, const float* HWY_RESTRICT b,
                           int64_t steps) {
    for (int64_t t = 0; t < steps; ++t) {
      F32 row[kPanelVectors];
      ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) row[v] = hn::Load(kF32, b + t * kPanel + v * kLanes);
      ADAATTN_UNROLL for (int r = 0; r < kRows; ++r) {
        const F32 x = hn::Set(kF32, a[r * row_step + t * step]);
        ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) acc[r][v] = hn::MulAdd(x, row[v], acc[r][v]);
      }
    }
  }

  HWY_INLINE void store(float* HWY_RESTRICT c) const {
    ADAATTN_UNROLL for (int r = 0; r < kRows; ++r) {
      ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) {
        hn::Store(acc[r][v], kF32, c + r * kPanel + v * kLanes);
      }
    }
  }
};

template <int kRows>
HWY_NOINLINE void score_rows(const float* HWY_RESTRICT k, int64_t k_stride, const float* HWY_RESTRICT qt, int64_t d,
                             float* HWY_RESTRICT s, float* HWY_RESTRICT max) {
  MicroTile<kRows> tile;
  tile.clear();
  tile.multiply(k, k_stride, 1, qt, d);
  tile.store(s);
  ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) {
    F32 m = hn::Load(kF32, max + v * kLanes);
    ADAATTN_UNROLL for (int r = 0; r < kRows; ++r) m = hn::Max(tile.acc[r][v], m);
    hn::Store(m, kF32, max + v * kLanes);
  }
}

template <int kRows>
HWY_NOINLINE void value_rows(const float* HWY_RESTRICT v, int64_t v_stride, const float* HWY_RESTRICT p, int64_t keys,
                             const float* HWY_RESTRICT alpha, float* HWY_RESTRICT ot) {
  F32 factor[kPanelVectors];
  ADAATTN_UNROLL for (int i = 0; i < kPanelVectors; ++i) factor[i] = hn::Load(kF32, alpha + i * kLanes);
  MicroTile<kRows> tile;
  tile.load_scaled(ot, factor);
  tile.multiply(v, 1, v_stride, p, keys);
  tile.store(ot);
}

// Splits n into groups of at most 6 rows; a remainder of 1 or 2 borrows from the last six, for thin tiles cannot hide
// the latency of the multiply-add.
HWY_INLINE int next_rows(int64_t left) {
  if (left == 7 || left == 8) return 4;
  return left < kMicroRows ? static_cast<int>(left) : kMicroRows;
}

// Runs a statement with kRows, a constant, as n. No function that takes a lambda: behind one the compiler does not know
// that loops of the callees run at least once, and the inner loop moves off its alignment.
// clang-format off
#define ADAATTN_WITH_ROWS(n, ...)                                     \
  switch (n) {                                                        \
    case 1: { constexpr int kRows = 1; __VA_ARGS__; } break;          \
    case 2: { constexpr int kRows = 2; __VA_ARGS__; } break;          \
    case 3: { constexpr int kRows = 3; __VA_ARGS__; } break;          \
    case 4: { constexpr int kRows = 4; __VA_ARGS__; } break;          \
    case 5: { constexpr int kRows = 5; __VA_ARGS__; } break;          \
    default: { constexpr int kRows = kMicroRows; __VA_ARGS__; } break;\
  }
// clang-format on

HWY_INLINE void score_panel(const float* k, int64_t k_stride, int64_t keys, const float* qt, int64_t d, float* s,
                            float* max) {
  for (int64_t j = 0; j < keys;) {
    const int rows = next_rows(keys - j);
    const float* kj = k + j * k_stride;
    float* sj = s + j * kPanel;
    ADAATTN_WITH_ROWS(rows, score_rows<kRows>(kj, k_stride, qt, d, sj, max))
    j += rows;
  }
}

HWY_INLINE void value_panel(const float* v, int64_t v_stride, int64_t keys, const float* p, int64_t d,
                            const float* alpha, float* ot) {
  for (int64_t c = 0; c < d;) {
    const int rows = next_rows(d - c);
    float* oc = ot + c * kPanel;
    ADAATTN_WITH_ROWS(rows, value_rows<kRows>(v + c, v_stride, p, keys, alpha, oc))
    c += rows;
  }
}

}  // namespace
}  // namespace adaattn::cpu
