#include "cpu_fallback/attend/layout.h"

#include <algorithm>

namespace adaattn::cpu {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kMaxTiles = 8;
// Decode units in flight per lane: enough splits to balance the lanes, few enough to bound the memory.
constexpr int64_t kUnitsPerLane = 4, kSplitsPerLane = 64;

int64_t align(int64_t bytes) { return ceil_div(bytes, kAlignment) * kAlignment; }

}  // namespace

WorkLayout lay_out_work(const Problem& problem, const KernelTable& kernels, int64_t lanes) {
  WorkLayout w;
  const int64_t group = problem.heads_q / problem.heads_kv;
  const int64_t max_rows = problem.max_seqlen_q * group;
  const int64_t tile_bytes = kTileRows * (problem.d_qk + problem.d_v) * static_cast<int64_t>(sizeof(float));
  w.tiles = std::clamp<int64_t>(kernels.tile_budget / tile_bytes, 1, kMaxTiles);
  w.tiles = std::clamp<int64_t>(ceil_div(max_rows, kTileRows), 1, w.tiles);

  w.splits = std::max<int64_t>(ceil_div(problem.max_seqlen_k, kSplitKeys), 1);
  const int64_t partials = w.splits * decode_rows(problem.max_seqlen_q, group) * partial_floats(problem.d_v);
  w.unit_bytes = align(kUnitHeader + partials * static_cast<int64_t>(sizeof(float)));
  const int64_t units_per_sequence = problem.heads_kv * ceil_div(group, kDecodeRows);
  const int64_t items = std::max(kUnitsPerLane * lanes, kSplitsPerLane * lanes / w.splits);
  w.wave_sequences = std::clamp<int64_t>(items / units_per_sequence, 1, problem.max_batch);

  int64_t scratch = static_cast<int64_t>(kernels.decode_scratch(problem.d_qk, problem.d_v));
  const bool prefills = problem.max_seqlen_q > 1 && max_rows > kDecodeRows;
  if (prefills) {
    scratch = std::max(scratch, static_cast<int64_t>(kernels.prefill_scratch(problem.d_qk, problem.d_v, w.tiles)));
  }
  const int64_t rows = prefills ? w.tiles * kTileRows : kDecodeRows;
  w.ranges_bytes = align(2 * rows * static_cast<int64_t>(sizeof(int32_t)));
  w.lane_bytes = align(w.ranges_bytes + scratch);
  // The caller's memory may have any alignment.
  w.workspace_bytes = kAlignment + lanes * w.lane_bytes + w.wave_sequences * units_per_sequence * w.unit_bytes;
  return w;
}

}  // namespace adaattn::cpu
