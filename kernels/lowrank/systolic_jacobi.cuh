// Jacobi's eigenvalue method for small symmetric matrices, in registers (a systolic array with odd-even pairing; Luk
// and Park, SIAM J. Sci. Stat. Comput. 10, 1989): eight lanes hold two vectors, turn them against each other, and pass
// one on to their neighbours. After as many rounds as vectors every two have met once.
#pragma once

#include <cstdint>

namespace adaattn::cuda::subspace {

inline constexpr int kMaxSystolicTiles = 16;  // a warp for each 8 vectors

// One column of J and the same column of T J, an eighth of each: element 8 i + lane % 8 of both.
template <int kTiles>
struct SystolicColumn {
  float2 x[kTiles];  // (J, T J)
  float energy;      // of the column: its diagonal element of J^T T J
};

template <int kTiles>
__device__ __forceinline__ void store_column(float* to, const SystolicColumn<kTiles>& column, int tiles) {
  auto* out = reinterpret_cast<float4*>(to);
#pragma unroll
  for (int i = 0; i < kTiles; i += 2)
    if (i < tiles) out[i / 2 * 8] = {column.x[i].x, column.x[i].y, column.x[i + 1].x, column.x[i + 1].y};
  to[kTiles / 2 * 32] = column.energy;
}

template <int kTiles>
__device__ __forceinline__ void load_column(const float* from, SystolicColumn<kTiles>& column, int tiles) {
  const auto* in = reinterpret_cast<const float4*>(from);
#pragma unroll
  for (int i = 0; i < kTiles; i += 2)
    if (i < tiles) {
      const float4 pair = in[i / 2 * 8];
      column.x[i] = {pair.x, pair.y};
      column.x[i + 1] = {pair.z, pair.w};
    }
  column.energy = from[kTiles / 2 * 32];
}

template <int kTiles>
__device__ __forceinline__ void shift_column(SystolicColumn<kTiles>& to, const SystolicColumn<kTiles>& from, int tiles,
                                             bool down) {
  const int lane = static_cast<int>(threadIdx.x) % 32, source = down ? (lane + 8) % 32 : (lane + 24) % 32;
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
    if (i < tiles) {
      to.x[i].x = __shfl_sync(0xffffffffu, from.x[i].x, source);
      to.x[i].y = __shfl_sync(0xffffffffu, from.x[i].y, source);
    }
  to.energy = __shfl_sync(0xffffffffu, from.energy, source);
}

// Turns a against b by the rotation that makes the element of J^T T J between them vanish, and swaps them.
template <int kTiles>
__device__ __forceinline__ void turn_and_swap(SystolicColumn<kTiles>& a, SystolicColumn<kTiles>& b, int tiles,
                                              float tolerance) {
  float even = 0, odd = 0;
#pragma unroll
  for (int i = 0; i < kTiles; i += 2)
    if (i < tiles) {
      even = fmaf(a.x[i].x, b.x[i].y, even);
      odd = fmaf(a.x[i + 1].x, b.x[i + 1].y, odd);
    }
  float g = even + odd;
#pragma unroll
  for (int step = 4; step > 0; step /= 2) g += __shfl_xor_sync(0xffffffffu, g, step);
  constexpr float kTiny = 1e-8f;  // rounding noise
  const float product = a.energy > 0 && b.energy > 0 ? a.energy * b.energy : 0.0f;
  float tangent = 0;
  if (g * g > tolerance * tolerance * product && fabsf(g) > kTiny) {
    const float zeta = __fdividef(b.energy - a.energy, 2.0f * g);
    tangent = copysignf(__fdividef(1.0f, fabsf(zeta) + sqrtf(fmaf(zeta, zeta, 1.0f))), zeta);
  }
  const float c = rsqrtf(fmaf(tangent, tangent, 1.0f)), s = c * tangent;
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
    if (i < tiles) {
      const float2 x = a.x[i], y = b.x[i];
      a.x[i] = {fmaf(s, x.x, c * y.x), fmaf(s, x.y, c * y.y)};
      b.x[i] = {fmaf(c, x.x, -s * y.x), fmaf(c, x.y, -s * y.y)};
    }
  const float energy = fmaf(-tangent, g, a.energy);
  a.energy = fmaf(tangent, g, b.energy);
  b.energy = energy;
}

// The first `tiles` warps: J with J^T T J nearly diagonal, T = scale * t of which the tiles on and below the diagonal
// are read; t is overwritten. rows: J^T, [8 tiles, ld]; values: the diagonal of J^T T J.
template <int kTiles>
__device__ __forceinline__ void systolic_jacobi(double* t, int ldt, double scale, int tiles, int sweeps,
                                                float tolerance, float* rows, int ld, double* values) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, group = thread % 32 / 8, lane = thread % 8;
  if (warp >= tiles) return;
  const int n = 8 * tiles, pair = 4 * warp + group;
  const bool last = pair == n / 2 - 1;
  SystolicColumn<kTiles> a, b;
  const auto start = [&](SystolicColumn<kTiles>& column, int j) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int r = 8 * i + lane;
      column.x[i] = {0, 0};
      if (i < tiles) column.x[i] = {r == j ? 1.0f : 0.0f, static_cast<float>(t[max(r, j) * ldt + min(r, j)] * scale)};
    }
    column.energy = static_cast<float>(t[j * (ldt + 1)] * scale);
  };
  start(a, 2 * pair);
  start(b, 2 * pair + 1);
  constexpr int kCrossing = kTiles / 2 * 32 + 32;              // floats that hold a column
  float* const down = reinterpret_cast<float*>(t) + 4 * lane;  // from a warp's first pair to the last of the one before
  float* const up = down + tiles * kCrossing;                  // from a warp's last pair to the first of the next
  const auto meet = [&] { asm volatile("barrier.cta.sync 1, %0;" ::"r"(32 * tiles) : "memory"); };
  meet();
  for (int round = 0; round < sweeps * n; round += 2) {
    turn_and_swap(a, b, tiles, tolerance);
    // Next are the pairs one further on: b stays as the first of its new pair. The very first vector waits.
    if (group == 0) store_column(down + warp * kCrossing, a, tiles);
    const SystolicColumn<kTiles> stays = b;
    shift_column(b, a, tiles, true);
    a = stays;
    meet();
    if (group == 3 && !last) load_column(down + (warp + 1) * kCrossing, b, tiles);
    const SystolicColumn<kTiles> alone = a;
    turn_and_swap(a, b, tiles, tolerance);
    // And back: a stays as the second of its pair. The very last vector had none to meet.
    if (group == 3) store_column(up + warp * kCrossing, b, tiles);
    const SystolicColumn<kTiles> second = last ? alone : a;
    shift_column(a, b, tiles, false);
    b = second;
    meet();
    if (group == 0) load_column(warp > 0 ? up + (warp - 1) * kCrossing : down, a, tiles);
  }
  const auto finish = [&](const SystolicColumn<kTiles>& column, int j) {
    float value = 0;
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
      if (i < tiles) {
        rows[j * ld + 8 * i + lane] = column.x[i].x;
        value = fmaf(column.x[i].x, column.x[i].y, value);
      }
#pragma unroll
    for (int step = 4; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
    if (lane == 0) values[j] = value;
  };
  finish(a, 2 * pair);
  finish(b, 2 * pair + 1);
}

}  // namespace adaattn::cuda::subspace
