// The factorisations of subspace iteration: Cholesky, triangular systems, and Jacobi's method in float64.
#pragma once

#include <cstdint>

#include "lowrank/subspace_products.cuh"

namespace adaattn::cuda::subspace {

// A vector whose part outside the span of those before it is under this share of its square is taken as dependent.
constexpr double kDependent = 1e-14;
// Above this share one pass leaves vectors orthonormal to f32.
constexpr double kIndependent = 1e-7;
// What factor_block() reports of its 8 pivots: a bit for each that vanishes, and whether any is small.
constexpr unsigned kDeadMask = 0xff, kWeak = 0x100;

// 1 / sqrt(x) of a normal x: the hardware's estimate is good to 20 bits, the correction is of third order.
__device__ __forceinline__ double reciprocal_root(double x) {
  double y;
  asm volatile("rsqrt.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(x));
  const double e = fma(-x * y, y, 1.0);
  return fma(y * e, fma(0.375, e, 0.5), y);
}

// Factors the 8 x 8 block at t and leaves the inverse of its factor there; where a pivot vanishes, its row and column
// of the inverse are 0. One warp.
__device__ __forceinline__ void factor_block(double* t, int ldt, uint16_t* marks) {
  const Lane l;
  const int c = l.lane % 8;
  double a[8][8], x[8];  // every lane has the block, and a column of the inverse
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    x[i] = i == c ? 1.0 : 0.0;
#pragma unroll
    for (int j = 0; j <= i; j += 2) {
      const double2 pair = *reinterpret_cast<const double2*>(t + i * ldt + j);
      a[i][j] = pair.x;
      a[i][j + 1] = pair.y;
    }
  }
  unsigned mark = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const bool alive = a[j][j] > kDependent;
    const double root = reciprocal_root(a[j][j]), inverse = alive ? root : 0.0;
    mark |= (alive ? 0u : 1u << j) | (a[j][j] > kIndependent ? 0u : kWeak);
#pragma unroll
    for (int i = j + 1; i < 8; ++i) a[i][j] *= inverse;
    x[j] *= inverse;
#pragma unroll
    for (int k = j + 1; k < 8; ++k)
#pragma unroll
      for (int i = k; i < 8; ++i) a[i][k] = fma(-a[i][j], a[k][j], a[i][k]);
#pragma unroll
    for (int i = j + 1; i < 8; ++i) x[i] = fma(-a[i][j], x[j], x[i]);
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

// As solve() for that number of tiles. A warp has 8 columns of y in registers as the transposed result of products;
// pairs of adjacent rows are then the operands of the next product as they are.
template <int kTiles>
__device__ __forceinline__ void solve_in_registers(const double* t, int ldt, const double* scale, double* y, int stride,
                                                   int width) {
  const Lane l;
  for (int c = 8 * l.warp; c < width; c += 8 * kWarps) {
    double* own = y + 2 * l.col * stride + c + l.row;
    double x[kTiles][2];
#pragma unroll
    for (int k = 0; k < kTiles; ++k)
#pragma unroll
      for (int e = 0; e < 2; ++e) x[k][e] = scale[8 * k + 2 * l.col + e] * own[(8 * k + e) * stride];
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      __syncwarp();  // no loads for later steps: registers are short
      const double* a = t + (8 * j + l.row) * ldt + 8 * j + 2 * l.col;
      const double2 inverse = *reinterpret_cast<const double2*>(a);
      double product[2] = {};
      mma_f64(product, x[j][0], inverse.x);
      mma_f64(product, x[j][1], inverse.y);
      x[j][0] = product[0];
      x[j][1] = product[1];
#pragma unroll
      for (int k = j + 1; k < kTiles; ++k) {
        const double2 below = *reinterpret_cast<const double2*>(a + 8 * (k - j) * ldt);
        mma_f64(x[k], -x[j][0], below.x);
        mma_f64(x[k], -x[j][1], below.y);
      }
    }
#pragma unroll
    for (int k = 0; k < kTiles; ++k)
#pragma unroll
      for (int e = 0; e < 2; ++e) own[(8 * k + e) * stride] = x[k][e];
  }
}

// Where a round of the tournament pairs its players, and by which rotation.
struct Rotation {
  int p, q;
  double c, s;
};

// Cyclic Jacobi on the symmetric n x n matrix t, n a multiple of 8, which is left nearly diagonal; the rows of w, the
// identity before, become its eigenvectors (ldw a multiple of 4). Pairs of a round are disjoint, and every thread turns
// 2 x 2 blocks. Off-diagonal elements under `tolerance` of their diagonal ones' geometric mean are left alone; the
// scale of t is such that its trace is 1.
__device__ __forceinline__ void jacobi(double* t, int ldt, double* w, int ldw, int n, double tolerance, int sweeps,
                                       Rotation* rotations, int* turned) {
  constexpr double kTiny = 1e-15;  // rounding noise
  const int half = n / 2, wide = n / 2, thread = static_cast<int>(threadIdx.x);
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
        const double a = t[p * ldt + p], b = t[q * ldt + q], g = t[p * ldt + q];
        double c = 1, s = 0;
        const double product = a > 0 && b > 0 ? a * b : 0.0;
        if (g * g > tolerance * tolerance * product && fabs(g) > kTiny) {
          // The angle needs no more than f32: what it misses is turned in the next sweep.
          const float zeta = __fdividef(static_cast<float>(b - a), 2.0f * static_cast<float>(g));
          const float tangent = copysignf(__fdividef(1.0f, fabsf(zeta) + sqrtf(fmaf(zeta, zeta, 1.0f))), zeta);
          const double exact = tangent;
          c = rsqrt(exact * exact + 1.0);
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
        const Rotation left = rotations[i], right = rotations[j];
        double *upper = t + left.p * ldt, *lower = t + left.q * ldt;
        const double pp = upper[right.p], pq = upper[right.q], qp = lower[right.p], qq = lower[right.q];
        const double a = left.c * pp - left.s * qp, b = left.c * pq - left.s * qq;
        const double c = left.s * pp + left.c * qp, d = left.s * pq + left.c * qq;
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
        const Rotation turn = rotations[i];
        double2* upper = reinterpret_cast<double2*>(w + turn.p * ldw) + c;
        double2* lower = reinterpret_cast<double2*>(w + turn.q * ldw) + c;
        const double2 x = *upper, y = *lower;
        *upper = {turn.c * x.x - turn.s * y.x, turn.c * x.y - turn.s * y.y};
        *lower = {turn.s * x.x + turn.c * y.x, turn.s * x.y + turn.c * y.y};
      }
      __syncthreads();
    }
    if (*turned == 0) break;
  }
}

}  // namespace adaattn::cuda::subspace
