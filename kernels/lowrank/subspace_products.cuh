// The products of subspace iteration, each by all threads of a CTA. Sets of vectors are stored a vector per row, padded
// to whole tiles of 8 rows; row strides are 4 modulo 16 doubles, so that the fragments of products fall on distinct
// banks. A step reads what the one before it wrote: callers put a barrier between two.
#pragma once

#include <cstdint>

#include "lowrank/mma_f64.cuh"

namespace adaattn::cuda::subspace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxTiles = 24;  // of 8 vectors

struct Lane {
  int warp = static_cast<int>(threadIdx.x) / 32;
  int lane = static_cast<int>(threadIdx.x) % 32;
  int row = lane / 4, col = lane % 4;
};

// y = b gram for `tiles` tiles of vectors; gram [ld, ld] symmetric in global memory, ld a multiple of 16.
__device__ __forceinline__ void multiply(const double* gram, int ld, const double* b, double* y, int stride,
                                         int tiles) {
  constexpr int kChunk = 5;
  const Lane l;
  const int chunks = (tiles + kChunk - 1) / kChunk;
  for (int item = l.warp; item < ld / 16 * chunks; item += kWarps) {
    const int m = item % (ld / 16) * 16, first = item / (ld / 16) * kChunk;
    const double* a = gram + static_cast<int64_t>(m + l.row) * ld + l.col;
    const double* rows[kChunk];
#pragma unroll
    for (int t = 0; t < kChunk; ++t) {
      const int tile = first + t < tiles ? first + t : tiles - 1;  // the surplus of the last chunk is not stored
      rows[t] = b + (tile * 8 + l.row) * stride + l.col;
    }
    double sum[kChunk][2][2] = {};
    double next[2][4];
    const auto fetch = [&](int k) {
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        next[0][s] = a[k + 4 * s];
        next[1][s] = a[8 * ld + k + 4 * s];
      }
    };
    fetch(0);
    for (int k = 0; k < ld; k += 16) {
      double now[2][4];
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        now[0][s] = next[0][s];
        now[1][s] = next[1][s];
      }
      if (k + 16 < ld) fetch(k + 16);
#pragma unroll
      for (int t = 0; t < kChunk; ++t) {
        const double x[4] = {rows[t][k], rows[t][k + 4], rows[t][k + 8], rows[t][k + 12]};
        mma_f64_16x16(sum[t], now, x);
      }
    }
#pragma unroll
    for (int t = 0; t < kChunk; ++t) {
      if (first + t >= tiles) break;
      double* out = y + ((first + t) * 8 + 2 * l.col) * stride + m + l.row;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        out[e * stride] = sum[t][0][e];
        out[e * stride + 8] = sum[t][1][e];
      }
    }
  }
}

// The products of the vectors of x with those of y, [tiles * 8, tiles * 8] with row stride ldt: the tiles on and below
// the diagonal. excess: the largest distance of an element from the identity's, as the
// bits of a non-negative double, to be 0 before; null: not wanted.
__device__ __forceinline__ void products(const double* x, const double* y, int stride, int width, int tiles, double* t,
                                         int ldt, unsigned long long* excess) {
  const Lane l;
  double worst = 0;
  const int blocks = (tiles + 1) / 2;  // of 16 vectors
  for (int item = l.warp; item < blocks * (blocks + 1) / 2; item += kWarps) {
    int i = 0, j = item;
    while (j > i) j -= ++i;
    const double *a[2], *b[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {  // the surplus of the last block is not stored
      a[h] = x + (8 * min(2 * i + h, tiles - 1) + l.row) * stride + l.col;
      b[h] = y + (8 * min(2 * j + h, tiles - 1) + l.row) * stride + l.col;
    }
    double sum[2][2][2] = {};
#pragma unroll 2
    for (int k = 0; k < width; k += 16) {
      double rows[2][4], columns[2][4];
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          rows[h][s] = a[h][k + 4 * s];
          columns[h][s] = b[h][k + 4 * s];
        }
#pragma unroll
      for (int g = 0; g < 2; ++g) mma_f64_16x16(sum[g], rows, columns[g]);
    }
#pragma unroll
    for (int g = 0; g < 2; ++g)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (2 * i + h >= tiles || j + j + g > i + i + h) continue;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int r = 16 * i + 8 * h + l.row, c = 16 * j + 8 * g + 2 * l.col + e;
          const double value = sum[g][h][e];
          t[r * ldt + c] = value;
          if (excess == nullptr) continue;
          const double distance = fabs(value - (r == c ? 1.0 : 0.0));
          worst = distance > worst || distance != distance ? distance : worst;
        }
      }
  }
  if (excess == nullptr) return;
  auto bits = static_cast<unsigned long long>(__double_as_longlong(worst));
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const unsigned long long other = __shfl_xor_sync(0xffffffffu, bits, step);
    bits = other > bits ? other : bits;
  }
  if (l.lane == 0) atomicMax(excess, bits);
}

// out[place[i]][0, width) = sum over j of w[i][j] b[j][0, width), and so copy; both have rows of `dim` adjacent
// doubles.
__device__ __forceinline__ void rotate(const double* w, int ldw, const double* b, int stride, int tiles, int width,
                                       const int* place, double* out, double* copy, int dim) {
  const Lane l;
  const int across = width / 16;
  for (int item = l.warp; item < (tiles + 1) / 2 * across; item += kWarps) {
    const int i = item / across, c = item % across * 16;
    const double* a[2];
#pragma unroll
    for (int h = 0; h < 2; ++h)  // the surplus of the last block is not stored
      a[h] = w + (8 * min(2 * i + h, tiles - 1) + l.row) * ldw + l.col;
    const double* x = b + l.col * stride + c + l.row;
    double sum[2][2][2] = {};
#pragma unroll 2
    for (int k = 0; k < 8 * tiles; k += 8) {
      const double rows[2][2] = {{a[0][k], a[0][k + 4]}, {a[1][k], a[1][k + 4]}};
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        const double columns[2] = {x[k * stride + 8 * g], x[(k + 4) * stride + 8 * g]};
        mma_f64_16x8(sum[g], rows, columns);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (2 * i + h >= tiles) continue;
      const int64_t row = static_cast<int64_t>(place[16 * i + 8 * h + l.row]) * dim;
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        const int column = c + 8 * g + 2 * l.col;
        const double2 pair = {sum[g][h][0], sum[g][h][1]};
        if (dim % 2 == 0 && column < dim) {
          *reinterpret_cast<double2*>(out + row + column) = *reinterpret_cast<double2*>(copy + row + column) = pair;
        } else {
          if (column < dim) out[row + column] = copy[row + column] = pair.x;
          if (column + 1 < dim) out[row + column + 1] = copy[row + column + 1] = pair.y;
        }
      }
    }
  }
}

}  // namespace adaattn::cuda::subspace
