// What the key tiles that a query tile leaves out add to its rows in the mean: the mean of V over their masses by the
// cells' estimate, and for each block of 32 rows the logarithm of the mass itself.
#include <algorithm>
#include <type_traits>

#include "adaptive/sample.h"
#include "adaptive/stage_clock.cuh"
#include "attend/launch.h"
#include "common/ptx.cuh"
#include "core/error.h"
#include "runtime.h"

namespace adaattn::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kDim = 128, kWide = kDim / 32;  // columns of K and V, of a lane
static_assert(kWarps == decide::kCellsOfTile && kThreads == kDim && kRemainderWidth == kDim + kWarps);

// log2 of the mass of all keys of a block of rows in the units of the scores, which are of K less its mean.
__device__ __forceinline__ float log2_mass(const decide::CellRow& row) {
  constexpr float kKeysOfCell = 5.0f, kOne = 22.0f;  // log2 of a cell's keys, and of integer_mass() at the top
  return row.top - kOne - log2f(row.inverse) + kKeysOfCell;
}

// A CTA takes a query tile of up to kHeads heads of a unit, for they share V: its warps every fourth key tile, and a
// block of 32 rows each. The first of a unit leaves K's mean too.
template <int kHeads>
__global__ __launch_bounds__(kThreads) void remainder_kernel(const __grid_constant__ AnalyzeArgs args, int first_tile,
                                                             int count) {
  __shared__ float shares[kThreads][kHeads];  // of the key tiles at hand, 0 where they are kept
  __shared__ float parts[kWarps][kHeads][kDim + kWide];
  launch_dependents();
  wait_for_previous_grid();
  const TableShape& s = args.shape;
  const AnalyzeTables& t = args.tables;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int in_wave = static_cast<int>(blockIdx.x) % count, piece = static_cast<int>(blockIdx.x) / count;
  const int pieces = (s.group + kHeads - 1) / kHeads, unit = piece / pieces, inside = piece % pieces * kHeads;
  const int first_head = unit * s.group + inside, members = min(kHeads, s.group - inside);
  const auto item_of = [&](int i) { return int64_t{first_head + i} * s.wave_tiles + in_wave; };
  const decide::TileRow row = t.tile_range[int64_t{first_head} * s.query_tiles + first_tile + in_wave];
  bool leaves_out[kHeads];
  bool any = false;
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    leaves_out[i] = i < members && !t.choice[first_head + i].dense && t.kept[item_of(i)] < row.end - row.begin;
    any = any || leaves_out[i];
  }
  const __nv_bfloat16* const values = t.group_v + int64_t{unit} * s.key_tiles * kDim + kWide * lane;
  float sum[kHeads][kWide] = {}, total[kHeads] = {};
  for (int first = row.begin; any && first < row.end; first += kThreads) {
    const int own = first + thread;
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      float share = 0;
      if (leaves_out[i] && own < row.end && (t.mask[item_of(i) * s.mask_words + own / 64] >> own % 64 & 1) == 0)
        share = static_cast<float>(t.shares[item_of(i) * s.key_tiles + own - row.begin]);
      shares[thread][i] = share;
    }
    __syncthreads();
#pragma unroll 8
    for (int at = warp; at < min(kThreads, row.end - first); at += kWarps) {
      float weight[kHeads], most = 0;
#pragma unroll
      for (int i = 0; i < kHeads; ++i) most = fmaxf(most, weight[i] = shares[at][i]);
      // Tiles that no query sees whole may hold anything, and are never left out.
      const uint2 raw =
          most > 0 ? *reinterpret_cast<const uint2*>(values + int64_t{first + at} * kDim) : make_uint2(0, 0);
      const float v[kWide] = {__uint_as_float(raw.x << 16), __uint_as_float(raw.x & 0xffff0000u),
                              __uint_as_float(raw.y << 16), __uint_as_float(raw.y & 0xffff0000u)};
#pragma unroll
      for (int i = 0; i < kHeads; ++i) {
        total[i] += weight[i];
#pragma unroll
        for (int c = 0; c < kWide; ++c) sum[i][c] = fmaf(weight[i], v[c], sum[i][c]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
#pragma unroll
    for (int c = 0; c < kWide; ++c) parts[warp][i][kWide * lane + c] = sum[i][c];
    if (lane == 0) parts[warp][i][kDim] = total[i];
  }
  __syncthreads();
  for (int i = 0; i < members; ++i) {
    float left_out = 0, x = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      left_out += parts[w][i][kDim];
      x += parts[w][i][thread];
    }
    float* const out = t.remainder + item_of(i) * kRemainderWidth;
    out[thread] = left_out > 0 ? x / left_out : 0.0f;
    if (lane != 0) continue;
    const int64_t block = (int64_t{first_head + i} * s.query_tiles + first_tile + in_wave) * kWarps + warp;
    out[kDim + warp] =
        left_out > 0 ? log2f(left_out * (args.compensation / 65536.0f)) + log2_mass(t.cell_rows[block]) : -INFINITY;
  }
  if (in_wave != 0 || inside != 0) return;
  const float mean = t.k_mean[int64_t{unit} * kDim + thread];
  const __nv_bfloat16 rounded = __float2bfloat16(mean);
  __nv_bfloat16* const to = t.mean_k + int64_t{unit} * 2 * kDim + thread / 8 * 16 + thread % 8;
  to[0] = rounded;
  to[8] = __float2bfloat16(mean - __bfloat162float(rounded));
}

template <typename Visit>
void with_heads(const TableShape& s, const Visit& visit) {
  if (s.group == 1)
    visit(std::integral_constant<int, 1>{});
  else if (s.group == 2)
    visit(std::integral_constant<int, 2>{});
  else
    visit(std::integral_constant<int, 4>{});
}

}  // namespace

void prepare_remainder() {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, remainder_kernel<1>), "adaptive kernels");
  check(cudaFuncGetAttributes(&attributes, remainder_kernel<2>), "adaptive kernels");
  check(cudaFuncGetAttributes(&attributes, remainder_kernel<4>), "adaptive kernels");
}

void add_remainder(const AnalyzeArgs& args, int32_t first_tile, cudaStream_t stream) {
  const TableShape& s = args.shape;
  const int count = std::min(s.wave_tiles, s.query_tiles - first_tile);
  with_heads(s, [&](auto heads) {
    const int64_t pieces = args.p.batch * s.heads_kv * ((s.group + heads - 1) / heads);
    const dim3 grid(static_cast<unsigned>(pieces * count));
    check(launch_grid_overlapped(remainder_kernel<heads>, grid, kThreads, 0, stream, true, args, first_tile, count),
          "decide");
  });
}

}  // namespace adaattn::cuda
