// What the key tiles that a query tile leaves out add to its rows in the mean: their share of the mass by the cells'
// estimate, and the mean of V over it.
#include <algorithm>

#include "adaptive/sample.h"
#include "adaptive/stage_clock.cuh"
#include "attend/launch.h"
#include "common/ptx.cuh"
#include "core/error.h"
#include "runtime.h"

namespace adaattn::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kDim = 128, kWide = kDim / 32;  // columns of V, of a lane

// A CTA takes a query tile, its warps every fourth key tile.
__global__ __launch_bounds__(kThreads) void remainder_kernel(const __grid_constant__ AnalyzeArgs args, int first_tile,
                                                             int count) {
  __shared__ float parts[kWarps][kDim + kWide];
  launch_dependents();
  wait_for_previous_grid();
  const TableShape& s = args.shape;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int head_index = static_cast<int>(blockIdx.x) / count, in_wave = static_cast<int>(blockIdx.x) % count;
  const int64_t item = int64_t{head_index} * s.wave_tiles + in_wave;
  decide::TileRow row = args.tables.tile_range[int64_t{head_index} * s.query_tiles + first_tile + in_wave];
  if (args.tables.choice[head_index].dense || args.tables.kept[item] == row.end - row.begin) row.end = row.begin;
  const int head = head_index % s.heads_q, b = head_index / s.heads_q;
  const uint64_t* const mask = args.tables.mask + item * s.mask_words;
  const uint16_t* const shares = args.tables.shares + item * s.key_tiles - row.begin;
  const __nv_bfloat16* const values =
      args.tables.group_v + (int64_t{b} * s.heads_kv + head / s.group) * s.key_tiles * kDim + kWide * lane;
  float sum[kWide] = {}, total = 0;
#pragma unroll 8
  for (int tile = row.begin + warp; tile < row.end; tile += kWarps) {
    const bool left_out = (mask[tile / 64] >> tile % 64 & 1) == 0;
    const uint2 raw = *reinterpret_cast<const uint2*>(values + int64_t{tile} * kDim);
    const float share = left_out ? static_cast<float>(shares[tile]) * (args.compensation / 65536.0f) : 0.0f;
    total += share;
    // Tiles that no query sees whole may hold anything, and are never left out.
    if (!left_out) continue;
    sum[0] = fmaf(share, __uint_as_float(raw.x << 16), sum[0]);
    sum[1] = fmaf(share, __uint_as_float(raw.x & 0xffff0000u), sum[1]);
    sum[2] = fmaf(share, __uint_as_float(raw.y << 16), sum[2]);
    sum[3] = fmaf(share, __uint_as_float(raw.y & 0xffff0000u), sum[3]);
  }
#pragma unroll
  for (int c = 0; c < kWide; ++c) parts[warp][kWide * lane + c] = sum[c];
  if (lane == 0) parts[warp][kDim] = total;
  __syncthreads();
  float* const out = args.tables.remainder + item * kRemainderWidth;
  for (int c = static_cast<int>(threadIdx.x); c <= kDim; c += kThreads) {
    float x = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) x += parts[w][c];
    out[c] = x;
  }
}

}  // namespace

void prepare_remainder() {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, remainder_kernel), "adaptive kernels");
}

void add_remainder(const AnalyzeArgs& args, int32_t first_tile, cudaStream_t stream) {
  const int count = std::min(args.shape.wave_tiles, args.shape.query_tiles - first_tile);
  const dim3 grid(static_cast<unsigned>(args.p.batch * args.shape.heads_q * count));
  check(launch_grid_overlapped(remainder_kernel, grid, kThreads, 0, stream, true, args, first_tile, count), "decide");
}

}  // namespace adaattn::cuda
