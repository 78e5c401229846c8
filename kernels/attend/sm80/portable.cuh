// What the portable kernels have in common: the query rows of a tile, and their registry rows.
#pragma once

#include "attend/launch.h"
#include "common/problem.cuh"

namespace adaattn::cuda::sm80 {

// The rows of a (sequence, head): all of them with the heads that are packed into a tile, or the entropy tool's.
template <bool kEntropyTool>
__device__ __forceinline__ auto row_map_of(const AttendArgs& args, const TileIndex& tile, const Sequence& s) {
  if constexpr (kEntropyTool)
    return SampledRows(args, tile, s);
  else
    return RowMap{args.pack, tile.head * args.pack};
}
__device__ __forceinline__ int row_count(const AttendArgs& args, const RowMap&, const Sequence& s) {
  return static_cast<int>(s.len_q) * args.pack;
}
__device__ __forceinline__ int row_count(const AttendArgs&, const SampledRows& map, const Sequence&) {
  return map.rows;
}

// Instance has Shape (kM query rows, kN keys, kThreads, kSharedBytes) and kernel(). A CTA takes a tile of one head and
// sequence, and one part of its keys.
template <typename Instance>
AttendKernel portable_row(const char* name, Phase phase, Dtype dtype, int d_qk, int d_v, uint32_t features,
                          int ctas_per_sm) {
  using Shape = typename Instance::Shape;
  AttendKernel k{};
  k.name = name;
  k.arch = 80;
  k.phase = phase;
  k.dtype = dtype;
  k.d_qk = d_qk;
  k.d_v = d_v;
  k.features = features;
  k.tile_q = Shape::kM;
  k.tile_k = Shape::kN;
  k.ctas_per_sm = ctas_per_sm;
  k.reports = true;
  k.shared_bytes = Shape::kSharedBytes;
  k.function = reinterpret_cast<const void*>(Instance::kernel());
  k.launch = [](const AttendArgs& args, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(args.m_tiles * args.heads * args.p.batch), args.splits);
    return launch_grid(Instance::kernel(), grid, Shape::kThreads, Shape::kSharedBytes, stream, args);
  };
  return k;
}

}  // namespace adaattn::cuda::sm80
