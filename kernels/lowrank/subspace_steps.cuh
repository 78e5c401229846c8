// The steps of subspace iteration, each by all threads of a CTA. Sets of vectors are stored a vector per row, padded to
// whole tiles of 8 rows; row strides are 4 modulo 16 doubles, so that the fragments of products fall on distinct banks.
// A step reads what the one before it wrote: callers put a barrier between two.
#pragma once

#include <cstdint>

#include "core/sampling.h"
#include "lowrank/mma_f64.cuh"

namespace adaattn::cuda::subspace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxTiles = 24;  // of 8 vectors
// A vector whose part outside the span of those before it is under this share of its square is taken as dependent.
constexpr double kDependent = 1e-14;
// Above this share one pass leaves vectors orthonormal to f32.
constexpr double kIndependent = 1e-7;
// What factor_block() reports of its 8 pivots: a bit for each that vanishes, and whether any is small.
constexpr unsigned kDeadMask = 0xff, kWeak = 0x100;

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
  for (int item = l.warp; item < tiles * (tiles + 1) / 2; item += kWarps) {
    int i = 0, j = item;
    while (j > i) j -= ++i;
    const double* a = x + (8 * i + l.row) * stride + l.col;
    const double* b = y + (8 * j + l.row) * stride + l.col;
    double sum[2][2] = {};
#pragma unroll 4
    for (int k = 0; k < width; k += 8) {
      mma_f64(sum[0], a[k], b[k]);
      mma_f64(sum[1], a[k + 4], b[k + 4]);
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int r = 8 * i + l.row, c = 8 * j + 2 * l.col + e;
      const double value = sum[0][e] + sum[1][e];
      t[r * ldt + c] = value;
      const double distance = fabs(value - (r == c ? 1.0 : 0.0));
      worst = distance > worst || distance != distance ? distance : worst;
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

// Factors the 8 x 8 block at t and leaves the inverse of its factor there; where a pivot vanishes, its row and column
// of the inverse are 0. One warp.
__device__ __forceinline__ void factor_block(double* t, int ldt, uint16_t* marks) {
  const Lane l;
  double a[8][8], inverse[8];
#pragma unroll
  for (int i = 0; i < 8; ++i)
#pragma unroll
    for (int j = 0; j <= i; ++j) a[i][j] = t[i * ldt + j];
  unsigned mark = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const bool alive = a[j][j] > kDependent;
    inverse[j] = alive ? rsqrt(a[j][j]) : 0.0;
    mark |= (alive ? 0u : 1u << j) | (a[j][j] > kIndependent ? 0u : kWeak);
#pragma unroll
    for (int i = j + 1; i < 8; ++i) a[i][j] *= inverse[j];
#pragma unroll
    for (int i = j + 1; i < 8; ++i)
#pragma unroll
      for (int k = j + 1; k <= i; ++k) a[i][k] = fma(-a[i][j], a[k][j], a[i][k]);
  }
  // Forward substitution, one column of the inverse per lane.
  double x[8];
  const int c = l.lane % 8;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    double sum = i == c ? 1.0 : 0.0;
#pragma unroll
    for (int k = 0; k < i; ++k) sum = fma(-a[i][k], x[k], sum);
    x[i] = sum * inverse[i];
  }
  __syncwarp();
  if (l.lane < 8) {
#pragma unroll
    for (int i = 0; i < 8; ++i) t[i * ldt + c] = x[i];
  }
  if (l.lane == 0) *marks = static_cast<uint16_t>(mark);
  __syncwarp();
}

// t(i, j) -= L(i, k) L(j, k)^T for blocks of 8 x 8. One warp.
__device__ __forceinline__ void update_block(double* t, int ldt, int i, int j, int k) {
  const Lane l;
  double* out = t + (8 * i + l.row) * ldt + 8 * j + 2 * l.col;
  const double* a = t + (8 * i + l.row) * ldt + 8 * k + l.col;
  const double* b = t + (8 * j + l.row) * ldt + 8 * k + l.col;
  double sum[2] = {out[0], out[1]};
  mma_f64(sum, -a[0], b[0]);
  mma_f64(sum, -a[4], b[4]);
  out[0] = sum[0];
  out[1] = sum[1];
  __syncwarp();
}

// Cholesky factor of t, of which the lower tiles are read: below the diagonal blocks L, in them the inverses of L's.
// `marks`: factor_block's for each tile. Ends with a barrier.
__device__ __forceinline__ void cholesky(double* t, int ldt, int tiles, uint16_t* marks) {
  const Lane l;
  if (l.warp == 0) factor_block(t, ldt, marks);
  __syncthreads();
  for (int k = 0; k + 1 < tiles; ++k) {
    for (int i = k + 1 + l.warp; i < tiles; i += kWarps) {
      double* block = t + (8 * i + l.row) * ldt + 8 * k;
      const double* inverse = t + (8 * k + l.row) * ldt + 8 * k + l.col;
      double sum[2] = {};
      mma_f64(sum, block[l.col], inverse[0]);
      mma_f64(sum, block[l.col + 4], inverse[4]);
      __syncwarp();
      block[2 * l.col] = sum[0];
      block[2 * l.col + 1] = sum[1];
    }
    __syncthreads();
    // The first warp hurries to the next diagonal block, the others bring the rest up to date.
    if (l.warp == 0) {
      update_block(t, ldt, k + 1, k + 1, k);
      factor_block(t + 8 * (k + 1) * (ldt + 1), ldt, marks + k + 1);
    } else {
      const int left = tiles - k - 1;
      for (int item = l.warp; item < left * (left + 1) / 2; item += kWarps - 1) {
        int i = 0, j = item;
        while (j > i) j -= ++i;
        update_block(t, ldt, k + 1 + i, k + 1 + j, k);
      }
    }
    __syncthreads();
  }
}

// y <- L^-1 diag(scale) y with L as cholesky() leaves it. A warp owns 8 columns of y and needs no other.
template <typename Index>
__device__ __forceinline__ void solve(const double* t, int ldt, int tiles, const double* scale, double* y, Index stride,
                                      int width) {
  const Lane l;
  for (int c = 8 * l.warp; c < width; c += 8 * kWarps) {
    for (int k = 0; k < tiles; ++k) {
      double* out = y + (8 * k + l.row) * stride + c + 2 * l.col;
      const double factor = scale[8 * k + l.row];
      double sum[2][2] = {{factor * out[0], factor * out[1]}, {0, 0}};
      const double* a = t + (8 * k + l.row) * ldt + l.col;
      const double* b = y + l.col * stride + c + l.row;
#pragma unroll 4
      for (int j = 0; j < 8 * k; j += 8) {
        mma_f64(sum[0], -a[j], b[j * stride]);
        mma_f64(sum[1], -a[j + 4], b[(j + 4) * stride]);
      }
      __syncwarp();
      out[0] = sum[0][0] + sum[1][0];
      out[1] = sum[0][1] + sum[1][1];
      __syncwarp();
      double product[2] = {};
      mma_f64(product, a[8 * k], b[8 * k * stride]);
      mma_f64(product, a[8 * k + 4], b[(8 * k + 4) * stride]);
      __syncwarp();
      out[0] = product[0];
      out[1] = product[1];
      __syncwarp();
    }
  }
}

// Where a round of the tournament pairs its players, and by which rotation.
template <typename Real>
struct Rotation {
  int p, q;
  Real c, s;
};

template <typename Real>
struct Vector;  // 16 bytes
template <>
struct Vector<float> {
  using Type = float4;
  __device__ static void turn(Type& x, Type& y, float c, float s) {
    const Type a = x, b = y;
    x = {c * a.x - s * b.x, c * a.y - s * b.y, c * a.z - s * b.z, c * a.w - s * b.w};
    y = {s * a.x + c * b.x, s * a.y + c * b.y, s * a.z + c * b.z, s * a.w + c * b.w};
  }
};
template <>
struct Vector<double> {
  using Type = double2;
  __device__ static void turn(Type& x, Type& y, double c, double s) {
    const Type a = x, b = y;
    x = {c * a.x - s * b.x, c * a.y - s * b.y};
    y = {s * a.x + c * b.x, s * a.y + c * b.y};
  }
};

// Cyclic Jacobi on the symmetric n x n matrix t, n a multiple of 8, which is left nearly diagonal; the rows of w, the
// identity before, become its eigenvectors (ldw a multiple of 4). Pairs of a round are disjoint, and every thread turns
// 2 x 2 blocks. Off-diagonal elements under `tolerance` of their diagonal ones' geometric mean are left alone; the
// scale of t is such that its trace is 1.
template <typename Real>
__device__ __forceinline__ void jacobi(Real* t, int ldt, Real* w, int ldw, int n, Real tolerance, int sweeps,
                                       Rotation<Real>* rotations, int* turned) {
  using Wide = typename Vector<Real>::Type;
  constexpr int kWide = 16 / sizeof(Real);
  constexpr Real kTiny = sizeof(Real) == 8 ? Real(1e-15) : Real(1e-8);  // rounding noise
  const int half = n / 2, wide = n / kWide, thread = static_cast<int>(threadIdx.x);
  const int block_i = thread / half, block_j = thread % half, step_i = kThreads / half, step_j = kThreads % half;
  const int pair_i = thread / wide, pair_c = thread % wide, pair_step = kThreads / wide, pair_rest = kThreads % wide;
  for (int sweep = 0; sweep < sweeps; ++sweep) {
    __syncthreads();
    if (thread == 0) *turned = 0;
    __syncthreads();
    for (int round = 0; round < n - 1; ++round) {
      if (thread < half) {
        // Player 0 stays, the others walk around the table.
        const int ahead = thread + round, behind = n - 1 - thread + round;
        const int p = thread == 0 ? 0 : ahead < n ? ahead : ahead - (n - 1);
        const int q = behind < n ? behind : behind - (n - 1);
        const Real a = t[p * ldt + p], b = t[q * ldt + q], g = t[p * ldt + q];
        Real c = 1, s = 0;
        const Real product = a > 0 && b > 0 ? a * b : Real(0);
        if (g * g > tolerance * tolerance * product && fabs(g) > kTiny) {
          // The angle needs no more than f32: what it misses is turned in the next sweep.
          const float zeta = __fdividef(static_cast<float>(b - a), 2.0f * static_cast<float>(g));
          const float tangent = copysignf(__fdividef(1.0f, fabsf(zeta) + sqrtf(fmaf(zeta, zeta, 1.0f))), zeta);
          const Real exact = tangent;
          c = rsqrt(exact * exact + Real(1));
          s = c * exact;
          *turned = 1;
        }
        rotations[thread] = {p, q, c, s};
      }
      __syncthreads();
      for (int i = block_i, j = block_j; i < half; i += step_i, j += step_j) {
        if (j >= half) {
          j -= half;
          if (++i >= half) break;
        }
        const Rotation<Real> left = rotations[i], right = rotations[j];
        Real *upper = t + left.p * ldt, *lower = t + left.q * ldt;
        const Real pp = upper[right.p], pq = upper[right.q], qp = lower[right.p], qq = lower[right.q];
        const Real a = left.c * pp - left.s * qp, b = left.c * pq - left.s * qq;
        const Real c = left.s * pp + left.c * qp, d = left.s * pq + left.c * qq;
        upper[right.p] = right.c * a - right.s * b;
        upper[right.q] = right.s * a + right.c * b;
        lower[right.p] = right.c * c - right.s * d;
        lower[right.q] = right.s * c + right.c * d;
      }
      for (int i = pair_i, c = pair_c; i < half; i += pair_step, c += pair_rest) {
        if (c >= wide) {
          c -= wide;
          if (++i >= half) break;
        }
        const Rotation<Real> turn = rotations[i];
        Wide* upper = reinterpret_cast<Wide*>(w + turn.p * ldw) + c;
        Wide* lower = reinterpret_cast<Wide*>(w + turn.q * ldw) + c;
        Wide x = *upper, y = *lower;
        Vector<Real>::turn(x, y, turn.c, turn.s);
        *upper = x;
        *lower = y;
      }
      __syncthreads();
    }
    if (*turned == 0) break;
  }
}

// out[place[i]][0, width) = sum over j of w[i][j] b[j][0, width), and so copy; both have rows of `dim` adjacent
// doubles.
template <typename Real>
__device__ __forceinline__ void rotate(const Real* w, int ldw, const double* b, int stride, int tiles, int width,
                                       const int* place, double* out, double* copy, int dim) {
  const Lane l;
  for (int item = l.warp; item < tiles * (width / 8); item += kWarps) {
    const int i = item / (width / 8), c = item % (width / 8) * 8;
    const Real* a = w + (8 * i + l.row) * ldw + l.col;
    const double* x = b + l.col * stride + c + l.row;
    double sum[2][2] = {};
#pragma unroll 2
    for (int k = 0; k < 8 * tiles; k += 8) {
      mma_f64(sum[0], static_cast<double>(a[k]), x[k * stride]);
      mma_f64(sum[1], static_cast<double>(a[k + 4]), x[(k + 4) * stride]);
    }
    const int64_t row = static_cast<int64_t>(place[8 * i + l.row]) * dim;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = c + 2 * l.col + e;
      if (column < dim) out[row + column] = copy[row + column] = sum[0][e] + sum[1][e];
    }
  }
}

}  // namespace adaattn::cuda::subspace
