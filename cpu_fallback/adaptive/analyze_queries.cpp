// What analyze finds out about a tile of queries: estimates of its key tiles, and which of them are worth computing.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu_fallback/adaptive/call.h"
#include "decide/cells.h"
#include "decide/needles.h"

namespace adaattn::cpu {
namespace {

// Of the rows of a query tile, those whose mean stands for all of them where no needles are looked for: every fourth.
constexpr int64_t kQueryStep = 4;
// A threshold that no mass reaches.
constexpr uint32_t kNoMass = (1u << 23) - 1;

}  // namespace

TileMasses take_masses(Arena& arena, const UnitShape& s) {
  TileMasses x;
  x.scores = arena.take<float>(decide::kCellsOfTile * cell_pitch(s.key_tiles));
  x.mass = arena.take<uint32_t>(s.key_tiles);
  x.peak = arena.take<uint32_t>(s.key_tiles);
  x.rows = arena.take<decide::CellRow>(decide::kCellsOfTile);
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
  args.rows = x.rows;
  return args;
}

bool weigh_tiles(const AdaptiveCall& call, const Unit& unit, int64_t member, int64_t tile, const TileMasses& x) {
  return call.kernels.weigh_cells(cell_args(call, unit, member, tile, x));
}

namespace {

// What a level keeps and drops, as its mask has it.
void count_kept(const CellArgs& cells, const uint64_t* mask, int level, decide::TileLevels* levels) {
  const decide::TileRow& row = levels->row;
  uint64_t total = 0, dropped = 0;
  levels->kept[level] = 0;
  for (int32_t t = row.begin; t < row.end; ++t) {
    const uint32_t mass = cells.mass[t - row.begin];
    total += mass;
    dropped += tile_bit(mask, t) ? 0 : mass;
    levels->kept[level] += tile_bit(mask, t) ? 1 : 0;
  }
  levels->dropped[level] = static_cast<uint32_t>((dropped << 16) / total);
}

// Tiles that hold a needle come to a mask.
void add_needles(const AdaptiveCall& call, const Unit& unit, const decide::TileRow& row, const CellArgs& cells,
                 const char* rows, const float* scales, int64_t n, uint64_t* mask) {
  const float log2_share = decide::fixed_log2(call.problem.adaptive.needle_mass);
  float limits[decide::kNeedleRowsOfTile];
  for (int64_t r = 0; r < decide::kNeedleRowsOfTile; ++r) {
    const int64_t query = r * decide::kNeedleRows;
    limits[r] = query < n ? decide::needle_limit(cells.rows[query / decide::kCell], scales[r], log2_share)
                          : std::numeric_limits<float>::infinity();
  }
  NeedleArgs args;
  args.query_rows = rows;
  args.limits = limits;
  args.key_blocks = unit.needle_blocks;
  args.key_scales = unit.needle_scales;
  args.d = call.shape.d_qk;
  // Only tiles that every row sees whole can have been left out.
  args.tile_begin = std::max(row.begin, row.full_begin);
  args.tile_end = std::min(row.end, row.full_end);
  args.mask = mask;
  call.kernels.find_needles(args);
}

}  // namespace

namespace {

// What the analysis of a query tile works in.
struct QueryScratch {
  float* needle_means;  // [heads][8][d], of 16 rows each
  float* means;         // [4][d], of 32, and a row of Q
  TileMasses masses;
  int32_t *begin, *end;
  char* needle_rows;
};

QueryScratch lay_out_queries(Arena& arena, const UnitShape& s) {
  QueryScratch x;
  x.needle_means = arena.take<float>(s.needles ? kQueryHeads * decide::kNeedleRowsOfTile * s.d_qk : 0);
  x.means = arena.take<float>((decide::kCellsOfTile + 1) * s.d_qk);
  x.masses = take_masses(arena, s);
  x.begin = arena.take<int32_t>(decide::kTileQ);
  x.end = arena.take<int32_t>(decide::kTileQ);
  x.needle_rows = arena.take<char>(decide::kNeedleRowsOfTile * s.needle_row_bytes);
  return x;
}

// One head of a query tile.
struct QueryHead {
  Unit* unit;
  int64_t member;
  Operand q;     // from the tile's first row on
  int64_t rows;  // 0: nothing to analyze
};

// Brings rows to come into cache: they lie apart, where the processor does not look ahead.
void touch_rows(const Operand& q, int64_t first, int64_t last, int64_t bytes) {
  const int64_t stride = q.stride_s * static_cast<int64_t>(dtype_size(q.dtype));
  const char* row = static_cast<const char*>(q.data) + first * stride;
  for (int64_t j = first; j < last; ++j, row += stride) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at);
  }
}

// Means of 16 rows, for all heads at once: those of a query mostly lie side by side, and then a part of the queries to
// come is touched whole with each head, one line after another.
void mean_needle_rows(const AdaptiveCall& call, const QueryHead* heads, int64_t count, float* means) {
  const int64_t d = call.shape.d_qk, bytes = d * static_cast<int64_t>(dtype_size(heads[0].q.dtype));
  bool joined = true;
  for (int64_t h = 1; h < count; ++h) {
    joined = joined && heads[h].rows == heads[0].rows &&
             heads[h].q.data == static_cast<const char*>(heads[0].q.data) + h * bytes;
  }
  for (int64_t first = 0; first < decide::kTileQ; first += decide::kNeedleRows) {
    for (int64_t h = 0; h < count; ++h) {
      const QueryHead& head = heads[h];
      const int64_t n = std::min<int64_t>(decide::kNeedleRows, head.rows - first);
      if (n <= 0) continue;
      const int64_t next = first + n, to_come = std::min<int64_t>(decide::kNeedleRows, head.rows - next);
      if (joined) {
        touch_rows(heads[0].q, next + to_come * h / count, next + to_come * (h + 1) / count, count * bytes);
      } else {
        touch_rows(head.q, next, next + to_come, bytes);
      }
      call.kernels.row_means(head.q, 1, first, n, d, decide::kNeedleRows,
                             means + (h * decide::kNeedleRowsOfTile + first / decide::kNeedleRows) * d);
    }
  }
}

// Means of blocks of 32 rows, from those of their halves. Returns the number of blocks.
int64_t mean_of_needle_rows(const float* rows, int64_t n, int64_t d, float* means) {
  static_assert(decide::kCell == 2 * decide::kNeedleRows);
  const int64_t blocks = (n + decide::kCell - 1) / decide::kCell;
  for (int64_t b = 0; b < blocks; ++b) {
    // The second half of the last block may be short, or not there.
    const int64_t there = std::min<int64_t>(decide::kCell, n - b * decide::kCell);
    const float of_second =
        static_cast<float>(std::max<int64_t>(there - decide::kNeedleRows, 0)) / static_cast<float>(there);
    const float *x = rows + 2 * b * d, *y = of_second > 0 ? x + d : x;
    for (int64_t c = 0; c < d; ++c) means[b * d + c] = x[c] + of_second * (y[c] - x[c]);
  }
  return blocks;
}

// The same from a sample of the rows.
int64_t mean_of_sample(const AdaptiveCall& call, const QueryHead& head, float* means) {
  Operand sampled = head.q;
  sampled.stride_s *= kQueryStep;
  constexpr int64_t kSamples = decide::kCell / kQueryStep;
  const int64_t samples = (head.rows + kQueryStep - 1) / kQueryStep;
  call.kernels.row_means(sampled, 1, 0, samples, call.shape.d_qk, kSamples, means);
  return (samples + kSamples - 1) / kSamples;
}

// What rounding of Q and K does to scores, from every sixteenth row. row: scratch.
void sample_squares(const AdaptiveCall& call, const QueryHead& head, float* row, int64_t index) {
  constexpr int64_t kStep = 16;
  const int64_t d = call.shape.d_qk;
  float squares = 0, steps = 0;
  int64_t samples = 0;
  for (int64_t j = 0; j < head.rows; j += kStep, ++samples) {
    call.kernels.load_rows(head.q, 1, j, 1, d, 1.0f, row);
    float top = 0;
    for (int64_t c = 0; c < d; ++c) {
      squares += row[c] * row[c];
      top = std::max(top, std::abs(row[c]));
    }
    steps += top * top * (1.0f / (127 * 127));
  }
  head.unit->query_squares[index] = squares / static_cast<float>(samples);
  head.unit->query_steps[index] = steps / static_cast<float>(samples);
}

// The key tiles of a query tile, from what its rows see; and how many keys they see in all.
int64_t see_tiles(const int32_t* begin, const int32_t* end, int64_t n, int64_t len_k, decide::TileRow* row) {
  int64_t lowest = len_k, highest = 0, begin_max = 0, end_min = len_k, seen = 0;
  for (int64_t i = 0; i < n; ++i) {
    begin_max = std::max<int64_t>(begin_max, begin[i]);
    end_min = std::min<int64_t>(end_min, end[i]);
    if (begin[i] >= end[i]) continue;
    lowest = std::min<int64_t>(lowest, begin[i]);
    highest = std::max<int64_t>(highest, end[i]);
    seen += end[i] - begin[i];
  }
  *row = {};
  if (lowest >= highest) return 0;
  row->begin = static_cast<int32_t>(lowest / decide::kTileK);
  row->end = static_cast<int32_t>((highest + decide::kTileK - 1) / decide::kTileK);
  row->full_begin = static_cast<int32_t>((begin_max + decide::kTileK - 1) / decide::kTileK);
  row->full_end = static_cast<int32_t>(end_min / decide::kTileK);
  return seen;
}

// rows: the head's means where there are needles. seen: keys that all rows see together.
void analyze_head(const AdaptiveCall& call, const QueryHead& head, int64_t tile, const float* rows,
                  const decide::TileRow& row, int64_t seen, const QueryScratch& scratch) {
  const UnitShape& s = call.shape;
  Unit& unit = *head.unit;
  const int64_t d = s.d_qk, n = head.rows, index = head.member * s.query_tiles + tile;
  const TileMasses& x = scratch.masses;
  float needle_scales[decide::kNeedleRowsOfTile];
  int64_t blocks = 0;
  if (s.needles) {
    const int64_t needles = (n + decide::kNeedleRows - 1) / decide::kNeedleRows;
    call.kernels.quantize_needle_rows(rows, needles, d, d, query_factor(call), scratch.needle_rows, needle_scales);
    blocks = mean_of_needle_rows(rows, n, d, scratch.means);
  } else {
    blocks = mean_of_sample(call, head, scratch.means);
  }
  if (s.bytes || s.rounds) sample_squares(call, head, scratch.means + decide::kCellsOfTile * d, index);
  call.kernels.quantize_cells(scratch.means, blocks, d, d, nullptr, query_factor(call), 1,
                              unit.query_cells + index * decide::kCellsOfTile * d,
                              unit.query_scales + index * decide::kCellsOfTile);

  decide::TileLevels& levels = unit.tile_levels[index];
  levels = {};
  if (s.masked) unit.covered[index] = 0;
  levels.row = row;
  if (row.begin >= row.end) return;

  const CellArgs cells = cell_args(call, unit, head.member, tile, x);
  levels.usable = call.kernels.weigh_cells(cells);
  if (!levels.usable) return;
  const decide::Options& o = call.problem.adaptive;
  const int first_level = o.tiles ? o.min_level : decide::kDenseLevel;
  // Where peaks decide, levels above the lowest are hardly ever taken: they are not worth their search.
  const int end_level = o.keep_peak != 0 ? first_level + 1 : decide::kDenseLevel;
  decide::measure_cells(x.mass, x.peak, s.masked ? 0 : o.keep_peak, static_cast<float>(seen) / static_cast<float>(n),
                        &levels, first_level, end_level);
  if (s.masked) {
    // What the level's mass keeps tells whether the estimates are worth going by; then the heaviest cells and needles
    // say which tiles, and the rest of that mass need not be computed.
    unit.covered[index] = levels.kept[first_level];
    levels.threshold[first_level] = kNoMass;
    uint64_t* mask = unit.masks + index * s.mask_words;
    mask_of_level(levels, first_level, x, o.keep_peak, s.mask_words, mask);
    if (s.needles) add_needles(call, unit, row, cells, scratch.needle_rows, needle_scales, n, mask);
    count_kept(cells, mask, first_level, &levels);
    if (s.dropped_floats > 0)
      call.kernels.weigh_dropped({.cells = cells,
                                  .mask = mask,
                                  .group_v = unit.group_v,
                                  .v_stride = s.v_stride,
                                  .d_v = s.d_v,
                                  .k_mean = unit.k_mean,
                                  .dropped = unit.dropped + index * s.dropped_floats});
  }
}

}  // namespace

size_t query_scratch(const UnitShape& s) {
  Arena arena;
  lay_out_queries(arena, s);
  return arena.used();
}

void analyze_query_tile(const AdaptiveCall& call, Unit* units, int64_t first, int64_t count, int64_t tile,
                        char* scratch) {
  const UnitShape& s = call.shape;
  Arena arena(scratch);
  const QueryScratch x = lay_out_queries(arena, s);
  QueryHead heads[kQueryHeads];
  const int64_t row = tile * decide::kTileQ;
  for (int64_t h = 0; h < count; ++h) {
    Unit& unit = units[(first + h) / s.group];
    const int64_t member = (first + h) % s.group;
    heads[h] = {&unit, member, row_operands(call.params, unit.b, unit.seq, unit.kv_head * s.group + member, 1).q, 0};
    if (!unit.analyzed || !unit.finite || row >= unit.seq.len_q) continue;
    heads[h].q.data = static_cast<char*>(heads[h].q.data) + row * heads[h].q.stride_s * dtype_size(heads[h].q.dtype);
    heads[h].rows = std::min<int64_t>(decide::kTileQ, unit.seq.len_q - row);
  }
  if (s.needles) mean_needle_rows(call, heads, count, x.needle_means);
  decide::TileRow tiles;
  int64_t seen = 0, sequence = -1;
  for (int64_t h = 0; h < count; ++h) {
    const Unit& unit = *heads[h].unit;
    if (heads[h].rows == 0) continue;
    if (unit.b != sequence) {
      sequence = unit.b;
      fill_ranges(call.params, unit.seq, 1, row, heads[h].rows, x.begin, x.end);
      seen = see_tiles(x.begin, x.end, heads[h].rows, unit.seq.len_k, &tiles);
    }
    analyze_head(call, heads[h], tile, x.needle_means + h * decide::kNeedleRowsOfTile * s.d_qk, tiles, seen, x);
  }
}

}  // namespace adaattn::cpu
