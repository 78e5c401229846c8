#include <algorithm>
#include <cmath>

#include "cpu_fallback/adaptive/call.h"
#include "decide/cells.h"

namespace adaattn::cpu {
namespace {

constexpr float kHalfLn2 = 0.34657359027997264f;
constexpr int64_t kGroupsPerTile = decide::kTileK / decide::kGroupK;
// Of the rows of a query tile, those whose mean and variance stand for all of them: every fourth.
constexpr int64_t kQueryStep = 4;

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

}  // namespace

size_t analyze_scratch(const UnitShape& s, const AdaptiveKernels& kernels) {
  Arena tile;
  tile.take<float>((decide::kTileQ + 2 * decide::kCellsOfTile) * std::max(s.d_qk, padded_rank(s.probe_rank)));
  take_masses(tile, s);
  tile.take<int32_t>(2 * decide::kTileQ);
  tile.take<double>(kGroupsPerTile * (s.d_qk + s.d_v));
  if (s.packs) {
    rows_of_tile(s, {}, 0, tile);
    tile.take<char>(static_cast<int64_t>(kernels.project_scratch(std::max(s.d_qk, s.d_v))));
  }
  return std::max(basis_scratch(s, kernels), tile.used() + Arena::kAlignment);
}

void load_key_tile(const AdaptiveCall& call, Unit& unit, int64_t tile, char* scratch) {
  const UnitShape& s = call.shape;
  const int64_t first = tile * decide::kTileK, n = tile_rows(unit, tile), group = tile * kGroupsPerTile;
  const KeyOperand k = key_operand(call.params, call.params.k, unit.b, unit.seq, unit.kv_head);
  const KeyOperand v = key_operand(call.params, call.params.v, unit.b, unit.seq, unit.kv_head);
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
      for (int64_t c = 0; c < d; ++c) variance[c] *= kHalfLn2;
    }
    within += unit.within[t];
    std::fill(sum, sum + s.d_v, 0.0);
    for (int64_t g = first; g < last; ++g) {
      const float* group = unit.group_v + g * s.v_stride;
      const auto rows = static_cast<double>(group_rows(unit, g));
      double squares = 0;
      for (int64_t c = 0; c < s.d_v; ++c) {
        const double shift = static_cast<double>(group[c]) - unit.v_mean[c];
        squares += shift * shift;
        sum[c] += rows * inverse * shift;
      }
      between_groups += rows * squares;
    }
    double squares = 0;
    for (int64_t c = 0; c < s.d_v; ++c) squares += sum[c] * sum[c];
    between_tiles += static_cast<double>(tile_rows(unit, t)) * squares;
  }
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
  if (s.packs)
    call.kernels.pack_groups(unit.group_k + group * s.group_k_stride, groups, s.d_qk, s.group_k_stride, unit.k_mean,
                             unit.packed_groups + group * 2 * packed_width(s.d_qk));
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

TileMasses take_masses(Arena& arena, const UnitShape& s) {
  TileMasses x;
  x.scores = arena.take<float>(decide::kCellsOfTile * cell_pitch(s.key_tiles));
  x.mass = arena.take<uint32_t>(s.key_tiles);
  x.peak = arena.take<uint32_t>(s.key_tiles);
  return x;
}

CellArgs cell_args(const AdaptiveCall& call, const Unit& unit, int64_t member, int64_t tile, const TileMasses& x) {
  const UnitShape& s = call.shape;
  const int64_t index = member * s.query_tiles + tile;
  const decide::TileRow& row = unit.tile_levels[index].row;
  const int64_t rows = std::min<int64_t>(decide::kTileQ, unit.seq.len_q - tile * decide::kTileQ);
  const int64_t last_cell = unit.seq.len_k % decide::kCell;
  CellArgs args;
  args.query_cells = unit.query_cells + index * decide::kCellsOfTile * s.d_qk;
  args.query_scales = unit.query_scales + index * decide::kCellsOfTile;
  args.blocks = (rows + decide::kCell - 1) / decide::kCell;
  args.key_cells = unit.key_cells;
  args.key_scales = unit.key_scales;
  args.d = s.d_qk;
  args.len = unit.seq.len_k;
  args.last_log2 = last_cell == 0 ? 0.0f : decide::fixed_log2(static_cast<float>(last_cell) * (1.0f / decide::kCell));
  args.tile_begin = row.begin;
  args.tile_end = row.end;
  args.scores = x.scores;
  args.mass = x.mass;
  args.peak = x.peak;
  return args;
}

bool weigh_tiles(const AdaptiveCall& call, const Unit& unit, int64_t member, int64_t tile, const TileMasses& x) {
  return call.kernels.weigh_cells(cell_args(call, unit, member, tile, x));
}

void analyze_query_tile(const AdaptiveCall& call, Unit& unit, int64_t member, int64_t tile, char* scratch) {
  const UnitShape& s = call.shape;
  const int64_t d = s.d_qk, first = tile * decide::kTileQ;
  const int64_t n = std::min<int64_t>(decide::kTileQ, unit.seq.len_q - first);
  Arena arena(scratch);
  float* rows = arena.take<float>(decide::kTileQ * d);
  float* means = arena.take<float>(decide::kCellsOfTile * d);
  float* variances = arena.take<float>(decide::kCellsOfTile * d);
  const TileMasses x = take_masses(arena, s);
  int32_t* begin = arena.take<int32_t>(2 * decide::kTileQ);
  int32_t* end = begin + decide::kTileQ;

  Operand q = row_operands(call.params, unit.b, unit.seq, unit.kv_head * s.group + member, 1).q;
  q.data = static_cast<char*>(q.data) + first * q.stride_s * dtype_size(q.dtype);
  q.stride_s *= kQueryStep;
  const int64_t samples = (n + kQueryStep - 1) / kQueryStep;
  call.kernels.load_rows(q, 1, 0, samples, d, 1.0f, rows);
  constexpr int64_t kSamples = decide::kCell / kQueryStep;
  const int64_t blocks = (samples + kSamples - 1) / kSamples, index = member * s.query_tiles + tile;
  for (int64_t b = 0; b < blocks; ++b)
    call.kernels.group_stats(rows + b * kSamples * d, std::min(kSamples, samples - b * kSamples), d, d, means + b * d,
                             d, variances + b * d, d);
  call.kernels.quantize_cells(means, blocks, d, d, nullptr, query_factor(call), 1,
                              unit.query_cells + index * decide::kCellsOfTile * d,
                              unit.query_scales + index * decide::kCellsOfTile);

  decide::TileLevels& levels = unit.tile_levels[index];
  levels = {};
  fill_ranges(call.params, unit.seq, 1, first, n, begin, end);
  decide::TileRow& row = levels.row;
  int64_t lowest = unit.seq.len_k, highest = 0, begin_max = 0, end_min = unit.seq.len_k, seen = 0;
  for (int64_t i = 0; i < n; ++i) {
    begin_max = std::max<int64_t>(begin_max, begin[i]);
    end_min = std::min<int64_t>(end_min, end[i]);
    if (begin[i] >= end[i]) continue;
    lowest = std::min<int64_t>(lowest, begin[i]);
    highest = std::max<int64_t>(highest, end[i]);
    seen += end[i] - begin[i];
  }
  if (lowest >= highest) return;
  row.begin = static_cast<int32_t>(lowest / decide::kTileK);
  row.end = static_cast<int32_t>((highest + decide::kTileK - 1) / decide::kTileK);
  row.full_begin = static_cast<int32_t>((begin_max + decide::kTileK - 1) / decide::kTileK);
  row.full_end = static_cast<int32_t>(end_min / decide::kTileK);

  levels.usable = weigh_tiles(call, unit, member, tile, x);
  if (!levels.usable) return;
  const decide::Options& o = call.problem.adaptive;
  const int first_level = o.tiles ? o.min_level : decide::kDenseLevel;
  // Where peaks decide, levels above the lowest are hardly ever taken: they are not worth their search.
  const int end_level = o.keep_peak != 0 ? first_level + 1 : decide::kDenseLevel;
  decide::measure_cells(x.mass, x.peak, o.keep_peak, static_cast<float>(seen) / static_cast<float>(n), &levels,
                        first_level, end_level);
}

}  // namespace adaattn::cpu
