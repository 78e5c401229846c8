// Jacobi's eigenvalue method for small symmetric matrices, in registers (a systolic array with odd-even pairing; Luk
// and Park, SIAM J. Sci. Stat. Comput. 10, 1989): eight lanes hold two vectors, turn them against each other, and pass
// one on to their neighbours. After as many rounds as vectors every two have met once.
#pragma once

#include <cstdint>

namespace adaattn::cuda::subspace {

// Floats that hold a column on its way from warp to warp, and what all warps exchange theirs in.
inline constexpr int crossing_floats(int tiles) { return (tiles / 2 + 1) * 32; }
inline constexpr int systolic_floats(int tiles) { return (2 * tiles + 1) * crossing_floats(tiles); }

// One column of J and the same column of T J, an eighth of each: element 8 i + lane % 8 of both.
template <int kTiles>
struct SystolicColumn {
  float2 x[kTiles];  // (J, T J)
  float energy;      // of the column: its diagonal element of J^T T J
};

template <int kTiles>
__device__ __forceinline__ void store_column(float* to, const SystolicColumn<kTiles>& column) {
  auto* out = reinterpret_cast<float4*>(to);
#pragma unroll
  for (int i = 0; i + 1 < kTiles; i += 2)
    out[i / 2 * 8] = {column.x[i].x, column.x[i].y, column.x[i + 1].x, column.x[i + 1].y};
  const float2 odd = kTiles % 2 != 0 ? column.x[kTiles - 1] : float2{0, 0};
  out[kTiles / 2 * 8] = {odd.x, odd.y, column.energy, 0};
}

template <int kTiles>
__device__ __forceinline__ void load_column(const float* from, SystolicColumn<kTiles>& column) {
  const auto* in = reinterpret_cast<const float4*>(from);
#pragma unroll
  for (int i = 1; i < kTiles; i += 2) {
    const float4 both = in[i / 2 * 8];
    column.x[i - 1] = make_float2(both.x, both.y);
    column.x[i] = make_float2(both.z, both.w);
  }
  const float4 rest = in[kTiles / 2 * 8];
  if (kTiles % 2 != 0) column.x[kTiles - 1] = {rest.x, rest.y};
  column.energy = rest.z;
}

// Every pair's column becomes its neighbour's.
template <int kTiles>
__device__ __forceinline__ void shift_column(SystolicColumn<kTiles>& column, int lanes) {
  const int source = (static_cast<int>(threadIdx.x) + lanes) % 32;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    column.x[i].x = __shfl_sync(0xffffffffu, column.x[i].x, source);
    column.x[i].y = __shfl_sync(0xffffffffu, column.x[i].y, source);
  }
  column.energy = __shfl_sync(0xffffffffu, column.energy, source);
}

__device__ __forceinline__ float reciprocal_root(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Turns a against b by the rotation that makes the element of J^T T J between them vanish, and swaps them. Where b is
// nothing but zeros, `idle`, a stays where it is.
template <int kTiles>
__device__ __forceinline__ void turn_and_swap(SystolicColumn<kTiles>& a, SystolicColumn<kTiles>& b, float tolerance,
                                              bool idle) {
  float parts[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kTiles; ++i) parts[i % 2] = fmaf(a.x[i].x, b.x[i].y, parts[i % 2]);
  float g = parts[0] + parts[1];
#pragma unroll
  for (int step = 4; step > 0; step /= 2) g += __shfl_xor_sync(0xffffffffu, g, step);
  constexpr float kTiny = 1e-8f;  // rounding noise
  const float product = a.energy > 0 && b.energy > 0 ? a.energy * b.energy : 0.0f;
  const bool turns = g * g > tolerance * tolerance * product && fabsf(g) > kTiny;
  // tan 2 angle = 2 g / difference, the angle below 45 degrees.
  const float difference = b.energy - a.energy;
  const float root = reciprocal_root(fmaf(difference, difference, 4 * g * g));
  const float square = fmaf(0.5f, fabsf(difference) * root, 0.5f), inverse = reciprocal_root(square);
  const float sine = (difference < 0 ? -g : g) * root * inverse;
  const float s = turns ? sine : idle ? 1.0f : 0.0f;
  const float half = turns ? __fdividef(sine, fmaf(square, inverse, 1.0f)) : s;  // tan angle / 2
  const float change = turns ? sine * inverse * g : idle ? a.energy : 0.0f;
  // A rotation as three shears.
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    float2 x = a.x[i], y = b.x[i];
    x = {fmaf(-half, y.x, x.x), fmaf(-half, y.y, x.y)};
    y = {fmaf(s, x.x, y.x), fmaf(s, x.y, y.y)};
    a.x[i] = y;
    b.x[i] = {fmaf(-half, y.x, x.x), fmaf(-half, y.y, x.y)};
  }
  const float energy = a.energy - change;
  a.energy = b.energy + change;
  b.energy = energy;
}

// J with J^T T J nearly diagonal, T = scale * t of dimension n <= 8 kTiles, of which the tiles on and below the
// diagonal are read; t is overwritten and has room for systolic_floats(kTiles). rows: J^T, [n, ld]; values: the
// diagonal of J^T T J. The first kTiles warps work.
template <int kTiles>
__device__ __noinline__ void systolic_jacobi(double* t, int ldt, double scale, int n, int sweeps, float tolerance,
                                             double* rows, int ld, double* values) {
  constexpr int kColumns = 8 * kTiles;  // what is beyond n has no energy and never turns
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, group = thread % 32 / 8, lane = thread % 8;
  if (warp >= kTiles) return;
  const int pair = 4 * warp + group;
  const bool last = pair == kColumns / 2 - 1;
  SystolicColumn<kTiles> a, b;
  const auto start = [&](SystolicColumn<kTiles>& column, int j) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int r = 8 * i + lane, low = max(r, j);
      column.x[i] = {r == j ? 1.0f : 0.0f, low < n ? static_cast<float>(t[low * ldt + min(r, j)] * scale) : 0.0f};
    }
    column.energy = j < n ? static_cast<float>(t[j * (ldt + 1)] * scale) : 0.0f;
  };
  start(a, 2 * pair);
  start(b, 2 * pair + 1);
  constexpr int kCrossing = crossing_floats(kTiles);
  float* const down = reinterpret_cast<float*>(t) + 4 * lane;  // from a warp's first pair to the last of the one before
  float* const up = down + (kTiles + 1) * kCrossing;           // from a warp's last pair to the first of the next
  const auto meet = [&] { asm volatile("barrier.cta.sync 1, %0;" ::"n"(32 * kTiles) : "memory"); };
  meet();
  // What the very last vector meets in every other round.
  for (int i = thread; i < kCrossing; i += 32 * kTiles) reinterpret_cast<float*>(t)[kTiles * kCrossing + i] = 0;
  for (int round = 0; round < sweeps * kColumns; round += 2) {
    turn_and_swap(a, b, tolerance, false);
    // Next are the pairs one further on: b is the first of its new pair, a comes from the neighbour. The very first
    // vector waits.
    if (group == 0) store_column(down + warp * kCrossing, a);
    shift_column(a, 8);
    meet();
    if (group == 3) load_column(down + (warp + 1) * kCrossing, a);
    turn_and_swap(b, a, tolerance, last);
    // And back: b is the second of its pair.
    if (group == 3) store_column(up + warp * kCrossing, a);
    shift_column(a, 24);
    meet();
    if (group == 0) load_column(warp > 0 ? up + (warp - 1) * kCrossing : down, a);
  }
  const auto finish = [&](const SystolicColumn<kTiles>& column, int place) {
    const int j = sweeps % 2 == 0 ? place : kColumns - 1 - place;  // a sweep reverses the order
    float value = 0;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int r = 8 * i + lane;
      if (j < n && r < n) rows[j * ld + r] = static_cast<double>(column.x[i].x);
      value = fmaf(column.x[i].x, column.x[i].y, value);
    }
#pragma unroll
    for (int step = 4; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
    if (lane == 0 && j < n) values[j] = static_cast<double>(value);
  };
  finish(a, 2 * pair);
  finish(b, 2 * pair + 1);
}

}  // namespace adaattn::cuda::subspace
