// Mass levels of every query tile and a choice per head. Built without contraction: the same statistics
// give the same bits as the host's code in src/decide. One CTA takes several query tiles of a head, one warp each.
#include "adaptive/cells.cuh"
#include "adaptive/stage_clock.cuh"
#include "common/ptx.cuh"
#include "decide/choose.h"

namespace adaattn::cuda {
namespace {

constexpr int kThreads = kDecideThreads, kWarps = kDecideWarps;

struct QueryTile {
  decide::TileRow row;
  float visible = 0;  // mean number of keys that a row sees
  bool exists = false;
};

// One warp.
__device__ __forceinline__ QueryTile query_tile(const AttnParams& p, const Sequence& s, int tile) {
  const int lane = threadIdx.x % 32;
  const int64_t first = int64_t{tile} * decide::kTileQ, n = min(static_cast<int64_t>(decide::kTileQ), s.len_q - first);
  QueryTile q;
  if (n <= 0) return q;
  q.exists = true;
  long long lowest = s.len_k, highest = 0, begin_max = 0, end_min = s.len_k, seen = 0;
  for (int i = lane; i < n; i += 32) {
    const KeyRange range = visible_keys(p, s, first + i);
    begin_max = max(begin_max, static_cast<long long>(range.begin));
    end_min = min(end_min, static_cast<long long>(range.end));
    if (range.begin >= range.end) continue;
    lowest = min(lowest, static_cast<long long>(range.begin));
    highest = max(highest, static_cast<long long>(range.end));
    seen += range.end - range.begin;
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    lowest = min(lowest, __shfl_xor_sync(kAll, lowest, step));
    highest = max(highest, __shfl_xor_sync(kAll, highest, step));
    begin_max = max(begin_max, __shfl_xor_sync(kAll, begin_max, step));
    end_min = min(end_min, __shfl_xor_sync(kAll, end_min, step));
    seen += __shfl_xor_sync(kAll, seen, step);
  }
  if (lowest >= highest) return q;
  q.row.begin = static_cast<int32_t>(lowest / decide::kTileK);
  q.row.end = static_cast<int32_t>((highest + decide::kTileK - 1) / decide::kTileK);
  q.row.full_begin = static_cast<int32_t>((begin_max + decide::kTileK - 1) / decide::kTileK);
  q.row.full_end = static_cast<int32_t>(end_min / decide::kTileK);
  q.visible = static_cast<float>(seen) / static_cast<float>(n);
  return q;
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAll, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAll, x, 2));
}

__device__ __forceinline__ uint64_t warp_sum(uint64_t x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAll, static_cast<unsigned long long>(x), step);
  return x;
}

// Descending, by one warp; count is a power of two.
__device__ __forceinline__ void sort_masses(uint32_t* mass, int count) {
  const int lane = threadIdx.x % 32;
  for (int size = 2; size <= count; size *= 2) {
    for (int step = size / 2; step > 0; step /= 2) {
      for (int i = lane; i < count / 2; i += 32) {
        const int low = 2 * i - (i & (step - 1)), high = low + step;
        const uint32_t x = mass[low], y = mass[high];
        const bool ascending = (low & size) != 0;
        if ((x < y) != ascending) {
          mass[low] = y;
          mass[high] = x;
        }
      }
      __syncwarp();
    }
  }
}

__device__ __forceinline__ uint64_t wanted_mass(uint64_t total, int level) {
  return (total * decide::level_mass(level) + 65535u) >> 16;
}

// decide::mass_threshold of every level under the dense one by one warp: the mass at which the sums of the sorted
// masses reach what the level wants. sorted: a power of two of at least 32.
__device__ __forceinline__ void find_thresholds(const uint32_t* sorted, int count, uint64_t total,
                                                uint32_t* threshold) {
  const int lane = threadIdx.x % 32, each = count / 32;
  uint64_t own = 0;
  for (int i = 0; i < each; ++i) own += sorted[lane * each + i];
  uint64_t before = 0, sum = own;  // of the lanes before, and with this one
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t other = __shfl_up_sync(kAll, static_cast<unsigned long long>(sum), step);
    if (lane >= step) sum += other;
  }
  before = sum - own;
  int level = 0;
  while (level < decide::kDenseLevel && wanted_mass(total, level) <= before) ++level;
  if (level < decide::kDenseLevel && wanted_mass(total, level) <= sum) {
    for (int i = 0; i < each; ++i) {
      const uint32_t mass = sorted[lane * each + i];
      before += mass;
      for (; level < decide::kDenseLevel && wanted_mass(total, level) <= before; ++level) threshold[level] = mass;
    }
  }
  __syncwarp();
}

// decide::measure_cells by one warp; the sums are of integers, only the entropy's order differs. sorted: room for as
// many masses, rounded up to a power of two of at least 32.
__device__ __forceinline__ void measure_cells(const uint32_t* mass, const uint32_t* peak, uint32_t keep_peak,
                                              uint32_t* sorted, float visible, decide::TileLevels* levels) {
  using namespace decide;
  __shared__ uint32_t thresholds[kWarps][kLevels];
  const int lane = threadIdx.x % 32;
  const TileRow row = levels->row;
  const int tiles = row.end - row.begin;
  if (tiles <= 0 || !levels->usable) return;
  const int count = max(32, 1 << (32 - __clz(tiles - 1)));
  uint64_t total = 0;
  for (int b = lane; b < count; b += 32) {
    const uint32_t m = b < tiles ? mass[b] : 0;
    sorted[b] = m;
    total += m;
  }
  total = warp_sum(total);
  const float inverse = 1.0f / static_cast<float>(total);
  float entropy = 0;
  for (int b = lane; b < tiles; b += 32) {
    if (mass[b] == 0) continue;
    const float share = static_cast<float>(mass[b]) * inverse;
    entropy = fixed_fma(-share, fixed_log2(share), entropy);
  }
  __syncwarp();
#pragma unroll
  for (int step = 16; step > 0; step /= 2) entropy += __shfl_xor_sync(kAll, entropy, step);
  entropy += 7.0f;  // log2 of the keys of a tile
  const float uniform = visible > 1.0f ? fixed_log2(visible) : 0.0f;
  levels->entropy = uniform > 0.0f ? (entropy < uniform ? entropy / uniform : 1.0f) : 0.0f;
  uint32_t* const threshold = thresholds[threadIdx.x / 32];
  if (lane == kDenseLevel) threshold[lane] = 0;
  sort_masses(sorted, count);
  find_thresholds(sorted, count, total, threshold);
  // In the order of the tiles again, those that every level keeps above all masses.
  constexpr uint32_t kAlways = 1u << 31;
  for (int b = lane; b < tiles; b += 32)
    sorted[b] = mass[b] | (is_forced(row, row.begin + b) || (keep_peak != 0 && peak[b] >= keep_peak) ? kAlways : 0);
  __syncwarp();
  // A lane has a level, and every other lane half of the tiles.
  const int level = min(lane / 2, kDenseLevel), parity = lane % 2;
  const uint32_t x = threshold[level];
  uint64_t dropped = 0;
  uint32_t kept = 0;
#pragma unroll 4
  for (int b = parity; b < tiles; b += 2) {
    const uint32_t m = sorted[b];
    const bool keep = m >= x;
    kept += keep ? 1 : 0;
    dropped += keep ? 0 : m;
  }
  kept += __shfl_xor_sync(kAll, kept, 1);
  dropped += __shfl_xor_sync(kAll, static_cast<unsigned long long>(dropped), 1);
#pragma unroll
  for (int i = 0; i < kLevels; ++i) {
    levels->threshold[i] = __shfl_sync(kAll, x, 2 * i);
    levels->kept[i] = __shfl_sync(kAll, kept, 2 * i);
    levels->dropped[i] = __shfl_sync(kAll, static_cast<uint32_t>((dropped << 16) / total), 2 * i);
  }
}

// Levels of kTiles query tiles of a head, a warp each.
template <int kTiles, int kDim>
__global__ __launch_bounds__(kThreads, 2) void levels_kernel(const __grid_constant__ AnalyzeArgs args) {
  using Block = Cells<kTiles, kDim>;
  static_assert(kTiles <= kWarps);
  __shared__ int2 range[kTiles];
  __shared__ float tops[kWarps][Block::kProducts * 16];
  __shared__ unsigned long long sums[kWarps][Block::kProducts * 16];
  __shared__ int usable[kTiles];
  launch_dependents();
  wait_for_previous_grid();
  begin_stage(args.state, kDecideStage);
  const TableShape& s = args.shape;
  const Space<kTiles> space(s);
  const int head = blockIdx.x % s.heads_q, b = blockIdx.x / s.heads_q;
  const int first = first_of<kTiles>(s.query_tiles, static_cast<int>(blockIdx.y));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, count = min(kTiles, s.query_tiles - first);
  const Sequence seq = sequence_of(args.p, b);
  QueryTile q;
  if (warp < count) q = query_tile(args.p, seq, first + warp);
  if (warp < kTiles && lane == 0) {
    range[warp] = {q.row.begin, q.row.end};
    usable[warp] = 1;
  }
  __syncthreads();
  int begin = s.key_tiles, end = 0;
#pragma unroll
  for (int r = 0; r < kTiles; ++r) {
    if (range[r].x >= range[r].y) continue;
    begin = min(begin, range[r].x);
    end = max(end, range[r].y);
  }
  const int64_t index = (int64_t{b} * s.heads_q + head) * s.query_tiles + first;
  if (begin < end) {
    const Block cells(args, b, head, first, count, seq);
    // A cell counts where its tile is one that the query tile sees.
    const auto counts = [&](int m, int r, int pair, int keys) {
      const int2 seen = range[min(4 * m + 2 * r + lane / 16, kTiles - 1)];
      const int tile = 2 * pair + lane % 4 / 2;
      return keys > 0 && tile >= seen.x && tile < seen.y;
    };
    float top[Block::kProducts][2];
    bool finite[Block::kProducts][2];
#pragma unroll
    for (int m = 0; m < Block::kProducts; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        top[m][r] = -INFINITY;
        finite[m][r] = cells.finite(m, r) || !cells.exists(m, r);
      }
    cells.each(begin, end, [&](int m, int pair, const float(&scores)[2][2], const int(&keys)[2]) {
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (!counts(m, r, pair, keys[i])) continue;
          finite[m][r] = finite[m][r] && (isfinite(scores[r][i]) || !cells.exists(m, r));
          top[m][r] = fmaxf(top[m][r], scores[r][i]);
        }
    });
#pragma unroll
    for (int m = 0; m < Block::kProducts; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float x = quad_max(top[m][r]);
        if (lane % 4 == 0) tops[warp][16 * m + lane / 4 + 8 * r] = x;
        const int query = 4 * m + 2 * r + lane / 16;
        if (!finite[m][r] && query < kTiles) usable[query] = 0;
      }
    __syncthreads();
    decide::CellRow rows[Block::kProducts][2];
    unsigned long long sum[Block::kProducts][2];
#pragma unroll
    for (int m = 0; m < Block::kProducts; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float x = -INFINITY;
        for (int w = 0; w < kWarps; ++w) x = fmaxf(x, tops[w][16 * m + lane / 4 + 8 * r]);
        rows[m][r].top = x;
        sum[m][r] = 0;
      }
    cells.each(begin, end, [&](int m, int pair, const float(&scores)[2][2], const int(&keys)[2]) {
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (counts(m, r, pair, keys[i])) sum[m][r] += decide::integer_mass(scores[r][i], rows[m][r].top);
    });
#pragma unroll
    for (int m = 0; m < Block::kProducts; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        unsigned long long x = sum[m][r];
        x += __shfl_xor_sync(kAll, x, 1);
        x += __shfl_xor_sync(kAll, x, 2);
        if (lane % 4 == 0) sums[warp][16 * m + lane / 4 + 8 * r] = x;
      }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < Block::kProducts; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = 16 * m + lane / 4 + 8 * r;
        unsigned long long x = 0;
        for (int w = 0; w < kWarps; ++w) x += sums[w][row];
        rows[m][r].inverse = x > 0 && cells.exists(m, r) ? 1.0f / static_cast<float>(x) : 0.0f;
        if (warp == 0 && lane % 4 == 0 && row < count * kCells)
          args.tables.cell_rows[index * kCells + row] = rows[m][r];
      }
    weigh_tiles<kTiles, kDim>(cells, rows, begin, end, space);
  }
  __syncthreads();
  if (warp >= count) return;
  decide::TileLevels levels;
  levels.row = q.row;
  levels.usable = usable[warp] != 0;
  measure_cells(space.mass + warp * space.tiles + q.row.begin, space.peak + warp * space.tiles + q.row.begin,
                args.keep_peak, space.sorted + warp * space.padded, q.visible, &levels);
  if (lane != 0) return;
  args.tables.levels[index + warp] = levels;
  args.tables.tile_range[index + warp] = q.row;
}

constexpr int kChooseThreads = 512, kChooseWarps = kChooseThreads / 32;
constexpr int kPiece = 64;  // heads that choose together; the host's groups are as long

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAll, x, step);
  return x;
}
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAll, x, step);
  return x;
}

struct HeadSums {
  decide::HeadLevels levels;
  float entropy = 0;
  bool usable = true;
};

// Over every `step`-th block of 32 of a head's query tiles from `block` on; the whole warp has the sums.
__device__ __forceinline__ HeadSums sum_levels(const decide::TileLevels* list, int count, int block, int step) {
  HeadSums sums;
  const int lane = threadIdx.x % 32;
  for (int tile = block * 32 + lane; tile < count; tile += step * 32) {
    const decide::TileLevels& levels = list[tile];
    sums.usable = sums.usable && levels.usable;
    add_block(levels, &sums.levels);
    if (levels.row.begin < levels.row.end) sums.entropy += levels.entropy;
  }
  sums.levels.query_tiles = warp_sum(sums.levels.query_tiles);
  sums.levels.tiles = warp_sum(sums.levels.tiles);
#pragma unroll
  for (int level = 0; level < decide::kLevels; ++level) {
    sums.levels.kept[level] = warp_sum(sums.levels.kept[level]);
    sums.levels.dropped_sq[level] = warp_sum(sums.levels.dropped_sq[level]);
  }
  sums.entropy = warp_sum(sums.entropy);
  sums.usable = __all_sync(kAll, sums.usable);
  return sums;
}

// The levels of a unit's query heads; false if some estimate was not finite. parts: scratch.
__device__ __forceinline__ bool sum_heads(const AnalyzeArgs& args, int64_t first_head, int tiles_q, HeadSums* parts) {
  const TableShape& s = args.shape;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int at_a_time = min(s.group, kChooseWarps), shares = kChooseWarps / at_a_time;
  bool usable = true;
  for (int base = 0; base < s.group; base += at_a_time) {
    const int member = base + warp / shares;
    if (warp < at_a_time * shares && member < s.group) {
      const HeadSums sums =
          sum_levels(args.tables.levels + (first_head + member) * s.query_tiles, tiles_q, warp % shares, shares);
      if (lane == 0) parts[warp] = sums;
    }
    __syncthreads();
    const int own = base + static_cast<int>(threadIdx.x);
    if (static_cast<int>(threadIdx.x) < at_a_time && own < s.group) {
      HeadSums sums = parts[threadIdx.x * shares];
      for (int i = 1; i < shares; ++i) {
        const HeadSums& other = parts[threadIdx.x * shares + i];
        sums.levels.query_tiles += other.levels.query_tiles;
        sums.levels.tiles += other.levels.tiles;
        for (int level = 0; level < decide::kLevels; ++level) {
          sums.levels.kept[level] += other.levels.kept[level];
          sums.levels.dropped_sq[level] += other.levels.dropped_sq[level];
        }
        sums.entropy += other.entropy;
        sums.usable = sums.usable && other.usable;
      }
      args.tables.head_levels[first_head + own] = sums.levels;
      args.tables.head_entropy[first_head + own] =
          sums.levels.query_tiles > 0 ? sums.entropy / static_cast<float>(sums.levels.query_tiles) : 0.0f;
      usable = usable && sums.usable;
    }
    __syncthreads();
  }
  return __syncthreads_and(usable) != 0;
}

// The errors that analyze measured of a unit, by one warp; all lanes have them.
__device__ __forceinline__ UnitStats unit_stats(const AnalyzeArgs& args, int unit, int64_t len_k, bool usable) {
  const AnalyzeTables& t = args.tables;
  const int tiles = static_cast<int>((len_k + decide::kTileK - 1) / decide::kTileK);
  double within = 0, between = 0, captured = 0;
  bool finite = true;
  const int rank_class = t.units[unit].rank_class;
  for (int i = threadIdx.x % 32; i < tiles; i += 32) {
    const TileEnergy& e = t.energy[int64_t{unit} * args.shape.key_tiles + i];
    within += e.within;
    between += e.between;
    captured += e.captured[rank_class];
    finite = finite && e.k_finite != 0 && e.v_finite != 0;
  }
  within = warp_sum(within);
  between = warp_sum(between);
  captured = warp_sum(captured);
  finite = __all_sync(kAll, finite);
  UnitStats u;
  const double total = within + between;
  u.v_spread = len_k > 0 ? static_cast<float>(sqrt(total / static_cast<double>(len_k))) : 0.0f;
  u.usable = usable && finite && u.v_spread > 0;
  u.rank_class = u.usable ? rank_class : 0;
  if (u.usable) {
    u.errors.far_spread = static_cast<float>(sqrt(within / total));
    u.errors.drop_spread = static_cast<float>(sqrt(between / total));
  }
  if (u.rank_class > 0) {
    u.rank_energy = static_cast<float>(fmin(1.0, captured / total));
    u.errors.rank_allowed[u.rank_class] = true;
    u.errors.rank_error[u.rank_class] = sqrtf(1.0f - u.rank_energy);
  }
  return u;
}

// One CTA per unit: the errors that analyze measured, and the choice for its query heads, which share the rank.
__global__ __launch_bounds__(kChooseThreads) void choose_kernel(const __grid_constant__ AnalyzeArgs args) {
  using namespace decide;
  __shared__ HeadSums parts[kChooseWarps];
  __shared__ UnitStats stats;
  __shared__ HeadChoice best[2][kPiece];  // at the exact rank, and at the candidate
  __shared__ bool found_any[2][kPiece], take_rank, dense;
  launch_dependents();
  wait_for_previous_grid();
  const TableShape& s = args.shape;
  const AnalyzeTables& t = args.tables;
  const int unit = blockIdx.x, b = unit / s.heads_kv, first_head = unit % s.heads_kv * s.group;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Sequence seq = sequence_of(args.p, b);
  const int tiles_k = static_cast<int>((seq.len_k + kTileK - 1) / kTileK);
  const int64_t heads = int64_t{b} * s.heads_q + first_head;
  const bool usable = sum_heads(args, heads, static_cast<int>((seq.len_q + kTileQ - 1) / kTileQ), parts);
  if (warp == 0) {
    const UnitStats u = unit_stats(args, unit, seq.len_k, usable);
    __syncwarp();
    if (lane == 0) t.units[unit] = stats = u;
  }
  __syncthreads();

  // decide::choose_group, a lane for each mass level at the exact rank and at the candidate.
  Options options = args.options;
  options.tiles = options.tiles && stats.usable != 0;
  const HeadFeedback none;
  const HeadFeedback* feedback = args.state.feedback != nullptr ? args.state.feedback + heads : nullptr;
  const int half = lane / 16, rank = half == 0 ? 0 : stats.rank_class, level = lane % 16;
  const bool taken =
      level < kLevels && (half == 0 || rank > 0) && (options.tiles ? level >= options.min_level : level == kDenseLevel);
  // The best of a half-warp: the least cost, of equal ones the lowest level.
  const auto best_of = [&](int member, HeadChoice* choice) {
    const HeadLevels& levels = t.head_levels[heads + member];
    const float multiplier = (feedback != nullptr ? feedback[member] : none).multiplier[rank];
    bool found = false;
    float error = 0, cost = 0;
    if (taken && (level == kDenseLevel || is_selective(levels, level))) {
      error = level_error(options, stats.errors, levels, level, rank, multiplier);
      found = !(error > options.tolerance) || (level == kDenseLevel && rank == 0);
      cost = level_cost(options, args.costs, levels, level, rank);
    }
    int at = level;
#pragma unroll
    for (int step = 8; step > 0; step /= 2) {
      const bool other_found = __shfl_xor_sync(kAll, found, step);
      const float other_cost = __shfl_xor_sync(kAll, cost, step), other_error = __shfl_xor_sync(kAll, error, step);
      const int other_at = __shfl_xor_sync(kAll, at, step);
      const bool better = other_found && (!found || other_cost < cost || (other_cost == cost && other_at < at));
      found = found || other_found;
      cost = better ? other_cost : cost;
      error = better ? other_error : error;
      at = better ? other_at : at;
    }
    *choice = {at, rank, false, error, cost};
    return found;
  };
  int32_t* const dense_calls = args.state.dense_calls != nullptr ? args.state.dense_calls + unit : nullptr;
  const bool unseen = dense_calls != nullptr && *dense_calls > 0;
  bool all_dense = true;
  for (int first = 0; first < s.group; first += kPiece) {
    const int members = min(kPiece, s.group - first);
    for (int i = warp; i < members; i += kChooseWarps) {
      HeadChoice choice;
      const bool found = best_of(first + i, &choice);
      if (lane % 16 != 0) continue;
      best[half][i] = choice;
      found_any[half][i] = found;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      float dense_cost = 0, cost[2] = {0.0f, static_cast<float>(tiles_k) * args.costs.rank_setup};
      bool feasible[2] = {true, stats.rank_class > 0};
      for (int i = 0; i < members; ++i) {
        dense_cost += static_cast<float>(t.head_levels[heads + first + i].tiles);
        for (int h = 0; h < 2; ++h) {
          feasible[h] = found_any[h][i] && feasible[h];
          cost[h] += best[h][i].predicted_cost;
        }
      }
      // choose_group() goes through the classes in order, and the exact one is the first.
      take_rank = feasible[1] && (!feasible[0] || cost[1] < cost[0]);
      dense = unseen || (!feasible[0] && !feasible[1]) || (take_rank ? cost[1] : cost[0]) * kMinGain > dense_cost;
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < members) {
      HeadChoice chosen = best[take_rank ? 1 : 0][threadIdx.x];
      const int64_t head = heads + first + threadIdx.x;
      if (dense) {
        chosen = {};
        chosen.predicted_cost = static_cast<float>(t.head_levels[head].tiles);
        chosen.predicted_error = stats.errors.round_error;
      }
      t.choice[head] = stats.usable != 0 ? chosen : HeadChoice{};
    }
    all_dense = all_dense && (dense || stats.usable == 0);
    __syncthreads();
  }
  if (threadIdx.x != 0 || dense_calls == nullptr) return;
  if (unseen) {
    --*dense_calls;
  } else if (all_dense) {
    *dense_calls = kDenseCalls - 1;
  }
}

}  // namespace

void decide_heads(const AnalyzeArgs& args, cudaStream_t stream) {
  const TableShape& s = args.shape;
  with_cells_shape(s, [&](auto x) {
    launch_cells(levels_kernel<x.kTiles, x.kDim>, x.bytes(s), x.kTiles, args, s.query_tiles, 0, stream);
  });
  const dim3 units(static_cast<unsigned>(args.p.batch * s.heads_kv));
  check(launch_grid_overlapped(choose_kernel, units, kChooseThreads, 0, stream, true, args), "decide");
}

}  // namespace adaattn::cuda
