#include <algorithm>
#include <cmath>

#include "cpu_fallback/adaptive/call.h"
#include "decide/cells.h"
#include "decide/needles.h"

namespace adaattn::cpu {
namespace {

constexpr float kHalfLn2 = 0.34657359027997264f;
constexpr float kLog2Cell = 5;  // log2 of a group's keys
constexpr int64_t kGroupsPerTile = decide::kTileK / decide::kGroupK;

int64_t tile_rows(const Unit& unit, int64_t tile) {
  return std::min<int64_t>(decide::kTileK, unit.seq.len_k - tile * decide::kTileK);
}

int64_t group_rows(const Unit& unit, int64_t group) {
  return std::min<int64_t>(decide::kGroupK, unit.seq.len_k - group * decide::kGroupK);
}

// Rows of one tile of keys in f32: those of the unit, or, where it keeps none, some that the next tile overwrites.
struct TileRows {
  float *k = nullptr, *v = nullptr, *v_low = nullptr;
};

TileRows rows_of_tile(const UnitShape& s, const Unit& unit, int64_t tile, Arena& arena) {
  TileRows rows;
  if (s.packs) {
    rows.k = arena.take<float>(decide::kTileK * s.k_stride);
    rows.v = arena.take<float>(decide::kTileK * s.v_stride);
    rows.v_low = arena.take<float>(decide::kTileK * s.low_stride);
  } else {
    const int64_t first = tile * decide::kTileK;
    rows = {unit.k + first * s.k_stride, unit.v + first * s.v_stride, unit.v_low + first * s.low_stride};
  }
  return rows;
}

// Of a cell, from those of its needles.
void mean_of_needles(const float* needles, int64_t d, float* mean) {
  static_assert(decide::kNeedlesOfCell == 4);
  for (int64_t c = 0; c < d; ++c)
    mean[c] = ((needles[c] + needles[d + c]) + (needles[2 * d + c] + needles[3 * d + c])) * 0.25f;
}

}  // namespace

size_t analyze_scratch(const UnitShape& s, const AdaptiveKernels& kernels) {
  Arena tile;
  tile.take<float>(decide::kTileQ * std::max(s.d_qk, padded_rank(s.probe_rank)));
  tile.take<double>(kGroupsPerTile * (s.d_qk + s.d_v));
  if (s.packs) {
    rows_of_tile(s, {}, 0, tile);
    tile.take<char>(static_cast<int64_t>(kernels.project_scratch(std::max(s.d_qk, s.d_v))));
  }
  return std::max({basis_scratch(s, kernels), tile.used(), query_scratch(s)}) + Arena::kAlignment;
}

namespace {

// Of `direct` shapes.
void load_whole_tile(const AdaptiveCall& call, Unit& unit, int64_t tile, const KeyOperand& k, const KeyOperand& v,
                     char* scratch) {
  const UnitShape& s = call.shape;
  const int64_t group = tile * kGroupsPerTile, d = s.d_qk;
  Arena arena(scratch);
  PackArgs args;
  args.k = k;
  args.v = v;
  args.first = tile * decide::kTileK;
  args.d_qk = d;
  args.d_v = s.d_v;
  args.packed_k = unit.packed_k + tile * packed_elements(d);
  args.packed_v = unit.packed_v + tile * packed_elements(s.d_v) / 2;
  args.key_means = s.needles ? unit.needle_means + tile * kNeedleLanes * d : arena.take<float>(kNeedleLanes * d);
  args.value_means = unit.group_v + group * s.v_stride;
  args.value_stride = s.v_stride;
  unit.tile_finite[tile] = call.kernels.pack_tile(args);
  unit.within[tile] = args.within;
  for (int64_t g = 0; g < kGroupsPerTile; ++g) {
    const float* of_needles = args.key_means + g * decide::kNeedlesOfCell * d;
    float* mean = unit.group_k + (group + g) * s.group_k_stride;
    mean_of_needles(of_needles, d, mean);
    mean[d] = kLog2Cell;
  }
}

}  // namespace

void load_key_tile(const AdaptiveCall& call, Unit& unit, int64_t tile, char* scratch) {
  const UnitShape& s = call.shape;
  const int64_t first = tile * decide::kTileK, n = tile_rows(unit, tile), group = tile * kGroupsPerTile;
  const KeyOperand k = key_operand(call.params, call.params.k, unit.b, unit.seq, unit.kv_head);
  const KeyOperand v = key_operand(call.params, call.params.v, unit.b, unit.seq, unit.kv_head);
  if (s.direct && n == decide::kTileK) {
    load_whole_tile(call, unit, tile, k, v, scratch);
    return;
  }
  Arena arena(scratch);
  const TileRows rows = rows_of_tile(s, unit, tile, arena);
  const bool k_finite = call.kernels.load_keys(k, first, n, s.d_qk, rows.k, s.k_stride);
  const bool v_finite = call.kernels.load_keys(v, first, n, s.d_v, rows.v, s.v_stride);
  unit.tile_finite[tile] = k_finite && v_finite;
  if (!unit.tile_finite[tile]) return;
  if (s.packs) {
    call.kernels.pack_keys(rows.k, n, s.d_qk, s.k_stride, unit.packed_k + tile * packed_elements(s.d_qk));
    call.kernels.pack_values(rows.v, n, s.d_v, s.v_stride, unit.packed_v + tile * packed_elements(s.d_v) / 2);
  }

  if (s.needles && n == decide::kTileK) {
    const Operand wide = {rows.k, 0, s.k_stride, 0, Dtype::kF32};
    call.kernels.row_means(wide, 1, 0, n, s.d_qk, decide::kNeedleKeys,
                           unit.needle_means + tile * kNeedleLanes * s.d_qk);
  }
  float* mean = unit.group_k + group * s.group_k_stride;
  call.kernels.group_stats(rows.k, n, s.d_qk, s.k_stride, mean, s.group_k_stride, mean + s.d_qk + 1, s.group_k_stride);
  float* variance = arena.take<float>(kGroupsPerTile * s.d_v);
  call.kernels.group_stats(rows.v, n, s.d_v, s.v_stride, unit.group_v + group * s.v_stride, s.v_stride, variance,
                           s.d_v);
  double within = 0;
  for (int64_t g = 0; g * decide::kGroupK < n; ++g) {
    const auto count = static_cast<double>(group_rows(unit, group + g));
    mean[g * s.group_k_stride + s.d_qk] = static_cast<float>(std::log2(count));
    for (int64_t c = 0; c < s.d_v; ++c) within += count * variance[g * s.d_v + c];
  }
  unit.within[tile] = within;
}

void measure_keys(const AdaptiveCall& call, Unit& unit, char* scratch) {
  const UnitShape& s = call.shape;
  const int64_t tiles = unit.keys.tiles, groups = unit.keys.groups, d = s.d_qk;
  unit.keys.probe_tiles = nullptr;
  unit.keys.probe_rank = 0;
  unit.finite = std::all_of(unit.tile_finite, unit.tile_finite + tiles, [](uint8_t x) { return x != 0; });
  if (!unit.finite || unit.seq.len_k == 0) return;
  const double n = static_cast<double>(unit.seq.len_k);
  Arena arena(scratch);
  double* sum = arena.take<double>(std::max(d, s.d_v));
  double* squares_of = arena.take<double>(s.d_v);
  std::fill(squares_of, squares_of + s.d_v, 0.0);

  const auto mean_of_groups = [&](const float* group, int64_t stride, int64_t width, float* mean) {
    std::fill(sum, sum + width, 0.0);
    for (int64_t g = 0; g < groups; ++g, group += stride) {
      const auto rows = static_cast<double>(group_rows(unit, g));
      for (int64_t c = 0; c < width; ++c) sum[c] += rows * group[c];
    }
    for (int64_t c = 0; c < width; ++c) mean[c] = static_cast<float>(sum[c] / n);
  };
  mean_of_groups(unit.group_k, s.group_k_stride, d, unit.k_mean);
  mean_of_groups(unit.group_v, s.v_stride, s.d_v, unit.v_mean);

  call.kernels.quantize_cells(unit.group_k, groups, d, s.group_k_stride, unit.k_mean, 1.0f, kCellBlock, unit.key_cells,
                              unit.key_scales);

  double within = 0, between_groups = 0, between_tiles = 0;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = t * kGroupsPerTile, last = std::min(first + kGroupsPerTile, groups);
    const float inverse = 1.0f / static_cast<float>(tile_rows(unit, t));
    for (int64_t g = first; g < last; ++g) {
      float* variance = unit.group_k + g * s.group_k_stride + d + 1;
      for (int64_t c = 0; c < d && !s.direct; ++c) variance[c] *= kHalfLn2;
    }
    within += unit.within[t];
    std::fill(sum, sum + s.d_v, 0.0);
    for (int64_t g = first; g < last; ++g) {
      const float* group = unit.group_v + g * s.v_stride;
      const auto rows = static_cast<double>(group_rows(unit, g));
      for (int64_t c = 0; c < s.d_v; ++c) {
        const double shift = static_cast<double>(group[c]) - unit.v_mean[c];
        squares_of[c] += rows * shift * shift;
        sum[c] += rows * inverse * shift;
      }
    }
    double squares = 0;
    for (int64_t c = 0; c < s.d_v; ++c) squares += sum[c] * sum[c];
    between_tiles += static_cast<double>(tile_rows(unit, t)) * squares;
  }
  for (int64_t c = 0; c < s.d_v; ++c) between_groups += squares_of[c];
  const double total = within + between_groups;
  unit.v_spread = static_cast<float>(std::sqrt(total / n));
  unit.errors = {};
  if (!(unit.v_spread > 0)) return;
  unit.errors.far_spread = static_cast<float>(std::sqrt(within / total));
  unit.errors.drop_spread = static_cast<float>(std::sqrt(between_tiles / total));
}

void project_key_tile(const AdaptiveCall& call, Unit& unit, int64_t tile, char* scratch) {
  const UnitShape& s = call.shape;
  const int64_t first = tile * decide::kTileK, n = tile_rows(unit, tile);
  const int64_t group = tile * kGroupsPerTile, groups = (n + decide::kGroupK - 1) / decide::kGroupK;
  if (s.needles && n == decide::kTileK)
    call.kernels.quantize_needles(unit.needle_means + tile * kNeedleLanes * s.d_qk, s.d_qk, s.d_qk, unit.k_mean,
                                  unit.needle_blocks + tile * s.needle_block_bytes,
                                  unit.needle_scales + tile * decide::kCellsOfTile);
  Arena arena(scratch);
  const TileRows rows = rows_of_tile(s, unit, tile, arena);
  char* const work =
      s.packs ? arena.take<char>(static_cast<int64_t>(call.kernels.project_scratch(std::max(s.d_qk, s.d_v)))) : nullptr;
  // Rows of K or V, read once more where the unit does not keep them.
  const auto project = [&](const Operand& tensor, float* wide, int64_t d, int64_t stride, const float* mean,
                           const float* basis, int64_t columns, float* y, int64_t y_stride) {
    if (!s.packs) return call.kernels.project(wide, n, d, stride, mean, basis, columns, y, y_stride);
    const KeyOperand keys = key_operand(call.params, tensor, unit.b, unit.seq, unit.kv_head);
    call.kernels.load_keys(keys, first, n, d, wide, stride);
    return call.kernels.project_tile(wide, n, d, stride, mean, basis, columns, y, y_stride, work);
  };
  if (s.packs && call.problem.adaptive.far_field)
    call.kernels.pack_groups(unit.group_k + group * s.group_k_stride, groups, s.d_qk, s.group_k_stride, unit.k_mean,
                             unit.packed_groups + group * 2 * packed_width(s.d_qk));
  const auto squares_of = [&](const float* wide) {
    double sum = 0;
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t c = 0; c < s.d_qk; ++c)
        sum += static_cast<double>(wide[j * s.k_stride + c]) * wide[j * s.k_stride + c];
    }
    return sum;
  };
  if (s.bytes || s.rounds) {
    if (s.packs)
      call.kernels.load_keys(key_operand(call.params, call.params.k, unit.b, unit.seq, unit.kv_head), first, n, s.d_qk,
                             rows.k, s.k_stride);
    if (s.bytes) {
      call.kernels.pack_bytes(rows.k, n, s.d_qk, s.k_stride, unit.k_mean,
                              unit.byte_tiles + tile * byte_tile_bytes(s.d_qk), &unit.key_squares[tile],
                              &unit.key_steps[tile]);
    } else {
      unit.key_squares[tile] = squares_of(rows.k);
      unit.key_steps[tile] = 0;
    }
  }
  unit.captured[tile] = 0;
  if (unit.rank_class > 0) {
    const int64_t rank = decide::rank_of_class(static_cast<int>(unit.rank_class));
    unit.captured[tile] =
        project(call.params.v, rows.v, s.d_v, s.v_stride, unit.v_mean, unit.basis, rank, rows.v_low, s.low_stride);
    if (s.packs)
      call.kernels.pack_values(rows.v_low, n, rank, s.low_stride, unit.packed_v_low + tile * packed_elements(rank) / 2);
    call.kernels.project(unit.group_v + group * s.v_stride, groups, s.d_v, s.v_stride, unit.v_mean, unit.basis, rank,
                         unit.group_v_low + group * s.low_stride, s.low_stride);
  }
  if (unit.keys.probe_rank > 0) {
    const int64_t columns = padded_rank(s.probe_rank);
    float* y = arena.take<float>(decide::kTileK * columns);
    project(call.params.k, rows.k, s.d_qk, s.k_stride, unit.k_mean, unit.probe_key_basis, columns, y, columns);
    call.kernels.pack_probe(y, columns, n, s.probe_rank, unit.probe_tiles + tile * s.probe_tile_bytes);
  }
}

}  // namespace adaattn::cpu
