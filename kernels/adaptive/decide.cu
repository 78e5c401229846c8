// Mass levels of every query tile, a choice per head, and the masks. Built without contraction: the same statistics
// give the same bits as the host's code in src/decide. One CTA takes several query tiles of a head, one warp each.
#include <algorithm>

#include "adaptive/analyze.h"
#include "adaptive/stage_clock.cuh"
#include "attend/launch.h"
#include "core/error.h"
#include "decide/choose.h"
#include "decide/estimate.h"
#include "runtime.h"

namespace adaattn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTileChunk = 128;  // key tiles estimated at a time
constexpr int kSlice = 32;       // of the inner dimension
constexpr unsigned kAll = 0xffffffffu;
constexpr int kMaxShared = 200 << 10;

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

// Estimates of the key tiles [begin, end) for kTiles query tiles, to estimate[query tile][key tile]; the inner products
// run in order, as tile_estimate() does. Query terms and a slice of the key terms pass through shared memory.
template <int kTiles>
__device__ __forceinline__ void estimate_tiles(const float* query_terms, int query_tiles, const float* key_terms,
                                               int width, int begin, int end, float* queries, float* slice,
                                               float* estimate, int stride) {
  constexpr int kEach = kTiles * kTileChunk / kThreads;  // query tiles of a thread
  const int thread = threadIdx.x;
  for (int i = thread; i < kTiles * width; i += kThreads) {
    const int r = i / width, c = i - r * width;
    queries[c * kTiles + r] = r < query_tiles ? query_terms[i] : 0.0f;
  }
  const int column = thread % kTileChunk, first = thread / kTileChunk * kEach;
  constexpr int kLoads = kTileChunk * kSlice / kThreads;
  for (int chunk = begin; chunk < end; chunk += kTileChunk) {
    float next[kLoads];
    const auto fetch = [&](int k) {
#pragma unroll
      for (int e = 0; e < kLoads; ++e) {
        const int t = (thread + e * kThreads) / kSlice, c = k + thread % kSlice;
        next[e] = chunk + t < end && c < width ? key_terms[static_cast<int64_t>(chunk + t) * width + c] : 0.0f;
      }
    };
    float sum[kEach] = {};
    fetch(0);
    for (int k = 0; k < width; k += kSlice) {
      __syncthreads();
#pragma unroll
      for (int e = 0; e < kLoads; ++e)
        slice[thread % kSlice * (kTileChunk + 1) + (thread + e * kThreads) / kSlice] = next[e];
      __syncthreads();
      if (k + kSlice < width) fetch(k + kSlice);
      const int depth = min(kSlice, width - k);
#pragma unroll 8
      for (int c = 0; c < depth; ++c) {
        const float key = slice[c * (kTileChunk + 1) + column];
        const float* q = queries + (k + c) * kTiles + first;
#pragma unroll
        for (int r = 0; r < kEach; ++r) sum[r] = decide::fixed_fma(q[r], key, sum[r]);
      }
    }
    if (chunk + column < end)
#pragma unroll
      for (int r = 0; r < kEach; ++r) estimate[(first + r) * stride + chunk + column] = sum[r];
  }
  __syncthreads();
}

__device__ __forceinline__ uint64_t warp_sum(uint64_t x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAll, static_cast<unsigned long long>(x), step);
  return x;
}

// decide::measure_levels by one warp; the sums are of integers, only the entropy's order differs.
__device__ __forceinline__ void measure_levels(const float* estimate, uint32_t* mass, float visible,
                                               uint32_t keep_share, decide::TileLevels* levels) {
  using namespace decide;
  const int lane = threadIdx.x % 32;
  const TileRow row = levels->row;
  const int tiles = row.end - row.begin;
  if (tiles <= 0) return;
  float top = estimate[0];
  bool finite = true;
  for (int b = lane; b < tiles; b += 32) {
    finite = finite && (bits_of(estimate[b]) & 0x7f800000u) != 0x7f800000u;
    top = estimate[b] > top ? estimate[b] : top;
  }
  finite = __all_sync(kAll, finite);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(kAll, top, step);
    top = other > top ? other : top;
  }
  levels->usable = finite;
  levels->log2_max = top;
  if (!finite) return;
  uint64_t total = 0;
  for (int b = lane; b < tiles; b += 32) {
    const uint32_t m = integer_mass(estimate[b], top);
    mass[b] = m;
    total += m;
  }
  __syncwarp();
  total = warp_sum(total);
  const float inverse = 1.0f / static_cast<float>(total);
  float entropy = 0;
  for (int b = lane; b < tiles; b += 32) {
    if (mass[b] == 0) continue;
    const float share = static_cast<float>(mass[b]) * inverse;
    entropy = fixed_fma(-share, fixed_log2(share), entropy);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) entropy += __shfl_xor_sync(kAll, entropy, step);
  entropy += 7.0f;  // log2 of the keys of a tile
  const float uniform = visible > 1.0f ? fixed_log2(visible) : 0.0f;
  levels->entropy = uniform > 0.0f ? (entropy < uniform ? entropy / uniform : 1.0f) : 0.0f;
  // A lane has a level, and every other lane half of the tiles.
  const int level = min(lane / 2, kDenseLevel), parity = lane % 2;
  const auto pair_sum = [](uint64_t x) { return x + __shfl_xor_sync(kAll, static_cast<unsigned long long>(x), 1); };
  const uint64_t wanted = (total * level_mass(level) + 65535u) >> 16;
  uint32_t x = 0;
  for (int bit = 22; bit >= 0; --bit) {
    const uint32_t candidate = x | (1u << bit);
    uint64_t sum = 0;
#pragma unroll 4
    for (int b = parity; b < tiles; b += 2) {
      const uint32_t m = mass[b];
      sum += m >= candidate ? m : 0;
    }
    if (pair_sum(sum) >= wanted) x = candidate;
  }
  x = level == kDenseLevel ? 0 : min(x, share_threshold(total, keep_share));
  uint64_t kept = 0, dropped = 0;
  for (int b = parity; b < tiles; b += 2) {
    const bool keep = mass[b] >= x || is_forced(row, row.begin + b);
    kept += keep ? 1 : 0;
    dropped += keep ? 0 : mass[b];
  }
  kept = pair_sum(kept);
  dropped = pair_sum(dropped);
#pragma unroll
  for (int i = 0; i < kLevels; ++i) {
    levels->threshold[i] = __shfl_sync(kAll, x, 2 * i);
    levels->kept[i] = __shfl_sync(kAll, static_cast<uint32_t>(kept), 2 * i);
    levels->dropped[i] = __shfl_sync(kAll, static_cast<uint32_t>((dropped << 16) / total), 2 * i);
  }
}

// Shared memory of the kernels below: query terms, a slice of key terms, estimates.
template <int kTiles>
struct Space {
  float *queries, *slice, *estimate;
  __device__ explicit Space(const TableShape& s) {
    extern __shared__ float dynamic[];
    queries = dynamic;
    slice = queries + kTiles * 3 * s.d_qk;
    estimate = slice + kSlice * (kTileChunk + 1);
  }
  static size_t bytes(const TableShape& s) {
    return sizeof(float) * (size_t{kTiles} * 3 * static_cast<size_t>(s.d_qk) + kSlice * (kTileChunk + 1) +
                            size_t{kTiles} * static_cast<size_t>(s.key_tiles));
  }
};

// Estimates of the query tiles [first, first + kTiles) of a head; warp w's, if w < kTiles, with its row.
template <int kTiles>
__device__ __forceinline__ QueryTile estimate_head(const AnalyzeArgs& args, const Space<kTiles>& space, int b, int head,
                                                   int first, int count) {
  __shared__ int2 range[kTiles];
  const TableShape& s = args.shape;
  const Sequence seq = sequence_of(args.p, b);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  QueryTile q;
  if (warp < count) q = query_tile(args.p, seq, first + warp);
  if (warp < kTiles && lane == 0) range[warp] = {q.row.begin, q.row.end};
  __syncthreads();
  int begin = s.key_tiles, end = 0;
#pragma unroll
  for (int r = 0; r < kTiles; ++r) {
    if (range[r].x >= range[r].y) continue;
    begin = min(begin, range[r].x);
    end = max(end, range[r].y);
  }
  const int64_t unit = int64_t{b} * s.heads_kv + head / s.group;
  const int width = 3 * s.d_qk;
  estimate_tiles<kTiles>(args.tables.query_terms + ((int64_t{b} * s.heads_q + head) * s.query_tiles + first) * width,
                         count, args.tables.key_terms + unit * s.key_tiles * width, width, begin, end, space.queries,
                         space.slice, space.estimate, s.key_tiles);
  if (warp < kTiles && lane == 0 && q.row.begin < q.row.end) {
    const int64_t rows = min(static_cast<int64_t>(decide::kTileK), seq.len_k - int64_t{q.row.end - 1} * decide::kTileK);
    space.estimate[warp * s.key_tiles + q.row.end - 1] += decide::ragged_term(rows);
  }
  __syncwarp();
  return q;
}

template <int kTiles>
__global__ __launch_bounds__(kThreads) void levels_kernel(const __grid_constant__ AnalyzeArgs args) {
  begin_stage(args.state, kDecideStage);
  const TableShape& s = args.shape;
  const Space<kTiles> space(s);
  const int first = blockIdx.y * kTiles, head = blockIdx.x % s.heads_q, b = blockIdx.x / s.heads_q;
  const int warp = threadIdx.x / 32, count = min(kTiles, s.query_tiles - first);
  const QueryTile q = estimate_head<kTiles>(args, space, b, head, first, count);
  if (warp >= count) return;
  decide::TileLevels levels;
  levels.row = q.row;
  float* estimate = space.estimate + warp * s.key_tiles + q.row.begin;
  // A mass takes the place of its estimate.
  measure_levels(estimate, reinterpret_cast<uint32_t*>(estimate), q.visible, args.keep_share, &levels);
  if (threadIdx.x % 32 != 0) return;
  const int64_t index = (int64_t{b} * s.heads_q + head) * s.query_tiles + first + warp;
  args.tables.levels[index] = levels;
  args.tables.tile_range[index] = q.row;
}

__device__ __forceinline__ double warp_sum_in_order(double x) {
  double sum = 0;
  for (int i = 0; i < 32; ++i) sum += __shfl_sync(kAll, x, i);
  return sum;
}

// One CTA per unit: the errors that analyze measured, and the choice for its query heads, which share the rank.
__global__ __launch_bounds__(kThreads) void choose_kernel(const __grid_constant__ AnalyzeArgs args) {
  using namespace decide;
  __shared__ UnitStats stats;
  __shared__ int usable;
  const TableShape& s = args.shape;
  const int unit = blockIdx.x, b = unit / s.heads_kv, first_head = unit % s.heads_kv * s.group;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Sequence seq = sequence_of(args.p, b);
  const int tiles_k = static_cast<int>((seq.len_k + kTileK - 1) / kTileK);
  const int tiles_q = static_cast<int>((seq.len_q + kTileQ - 1) / kTileQ);
  const AnalyzeTables& t = args.tables;
  if (threadIdx.x == 0) usable = 1;
  __syncthreads();

  const int64_t heads = int64_t{b} * s.heads_q + first_head;
  for (int member = warp; member < s.group; member += kWarps) {
    HeadLevels sum;
    float entropy = 0;
    bool all_usable = true;
    for (int tile = lane; tile < tiles_q; tile += 32) {
      const TileLevels& levels = t.levels[(heads + member) * s.query_tiles + tile];
      all_usable = all_usable && levels.usable;
      add_block(levels, &sum);
      if (levels.row.begin < levels.row.end) entropy += levels.entropy;
    }
    sum.query_tiles = warp_sum(sum.query_tiles);
    sum.tiles = warp_sum(sum.tiles);
#pragma unroll
    for (int level = 0; level < kLevels; ++level) {
      sum.kept[level] = warp_sum(sum.kept[level]);
      sum.dropped_sq[level] = warp_sum(sum.dropped_sq[level]);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) entropy += __shfl_xor_sync(kAll, entropy, step);
    if (!__all_sync(kAll, all_usable) && lane == 0) usable = 0;
    if (lane != 0) continue;
    t.head_levels[heads + member] = sum;
    t.head_entropy[heads + member] = sum.query_tiles > 0 ? entropy / static_cast<float>(sum.query_tiles) : 0.0f;
  }
  __syncthreads();

  if (warp == 0) {
    double within = 0, groups = 0, tiles = 0, captured = 0;
    bool finite = true;
    const int rank_class = t.units[unit].rank_class;
    for (int i = lane; i < tiles_k; i += 32) {
      const TileEnergy& e = t.energy[int64_t{unit} * s.key_tiles + i];
      within += e.within;
      groups += e.between_groups;
      tiles += e.between_tiles;
      captured += e.captured[rank_class];
      finite = finite && e.k_finite != 0 && e.v_finite != 0;
    }
    within = warp_sum_in_order(within);
    groups = warp_sum_in_order(groups);
    tiles = warp_sum_in_order(tiles);
    captured = warp_sum_in_order(captured);
    finite = __all_sync(kAll, finite);
    if (lane == 0) {
      UnitStats u;
      const double total = within + groups;
      u.v_spread = seq.len_k > 0 ? static_cast<float>(sqrt(total / static_cast<double>(seq.len_k))) : 0.0f;
      u.usable = usable != 0 && finite && u.v_spread > 0;
      u.rank_class = u.usable ? rank_class : 0;
      if (u.usable) {
        u.errors.far_spread = static_cast<float>(sqrt(within / total));
        u.errors.drop_spread = static_cast<float>(sqrt(tiles / total));
      }
      if (u.rank_class > 0) {
        u.rank_energy = static_cast<float>(fmin(1.0, captured / total));
        u.errors.rank_allowed[u.rank_class] = true;
        u.errors.rank_error[u.rank_class] = sqrtf(1.0f - u.rank_energy);
      }
      stats = u;
      t.units[unit] = u;
    }
  }
  __syncthreads();
  if (warp != 0) return;

  // decide::choose_group, a lane for each mass level at the exact rank and at the candidate.
  Options options = args.options;
  options.tiles = options.tiles && stats.usable != 0;
  const HeadFeedback none;
  const HeadFeedback* feedback = args.state.feedback != nullptr ? args.state.feedback + heads : nullptr;
  const int rank = lane < 16 ? 0 : stats.rank_class, level = lane % 16;
  const bool taken =
      level < kLevels && (lane < 16 || rank > 0) && (options.tiles ? level >= options.min_level : level == kDenseLevel);
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
  // Groups of more than 64 choose in pieces, as the host's do.
  for (int first = 0; first < s.group; first += 64) {
    const int last = min(first + 64, s.group);
    float dense_cost = 0, group_cost = lane < 16 ? 0.0f : static_cast<float>(tiles_k) * args.costs.rank_setup;
    bool feasible = lane < 16 || rank > 0;
    for (int member = first; member < last; ++member) {
      dense_cost += static_cast<float>(t.head_levels[heads + member].tiles);
      HeadChoice choice;
      feasible = best_of(member, &choice) && feasible;
      group_cost += choice.predicted_cost;
    }
    const bool exact_feasible = __shfl_sync(kAll, feasible, 0), rank_feasible = __shfl_sync(kAll, feasible, 16);
    const float exact_cost = __shfl_sync(kAll, group_cost, 0), rank_cost = __shfl_sync(kAll, group_cost, 16);
    // choose_group() goes through the classes in order, and the exact one is the first.
    const bool take_rank = rank_feasible && (!exact_feasible || rank_cost < exact_cost);
    const bool dense =
        unseen || (!exact_feasible && !rank_feasible) || (take_rank ? rank_cost : exact_cost) * kMinGain > dense_cost;
    all_dense = all_dense && (dense || stats.usable == 0);
    for (int member = first; member < last; ++member) {
      HeadChoice chosen;
      best_of(member, &chosen);
      if (lane != (take_rank ? 16 : 0)) continue;
      if (dense) {
        chosen = {};
        chosen.predicted_cost = static_cast<float>(t.head_levels[heads + member].tiles);
        chosen.predicted_error = stats.errors.round_error;
      }
      t.choice[heads + member] = stats.usable != 0 ? chosen : HeadChoice{};
    }
  }
  if (lane != 0 || dense_calls == nullptr) return;
  if (unseen) {
    --*dense_calls;
  } else if (all_dense) {
    *dense_calls = kDenseCalls - 1;
  }
}

__device__ __forceinline__ int bucket_of(int kept, int key_tiles) {
  const int bucket = static_cast<int>(int64_t{kept} * kWorkBuckets / (key_tiles + 1));
  return kWorkBuckets - 1 - bucket;  // most work first
}

template <int kTiles>
__global__ __launch_bounds__(kThreads) void mask_kernel(const __grid_constant__ AnalyzeArgs args, int first_tile) {
  if (first_tile > 0) begin_stage(args.state, kDecideStage);
  const TableShape& s = args.shape;
  const Space<kTiles> space(s);
  const int first = first_tile + blockIdx.y * kTiles, head = blockIdx.x % s.heads_q, b = blockIdx.x / s.heads_q;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int count = min(kTiles, min(s.query_tiles, first_tile + s.wave_tiles) - first);
  const int64_t head_index = int64_t{b} * s.heads_q + head;
  const decide::HeadChoice choice = args.tables.choice[head_index];
  QueryTile q;
  if (choice.dense) {
    if (warp < count) q = query_tile(args.p, sequence_of(args.p, b), first + warp);
  } else {
    q = estimate_head<kTiles>(args, space, b, head, first, count);
  }
  if (warp >= count) return;
  const decide::TileLevels& levels = args.tables.levels[head_index * s.query_tiles + first + warp];
  const float* estimate = space.estimate + warp * s.key_tiles;
  const int64_t item = head_index * s.wave_tiles + first - first_tile + warp;
  uint64_t* mask = args.tables.mask + item * s.mask_words;
  int kept = 0;
  for (int word = 0; word < s.mask_words; ++word) {
    uint64_t bits = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int tile = 64 * word + 32 * half + lane;
      const bool seen = tile >= q.row.begin && tile < q.row.end;
      const bool keep = seen && (choice.dense || decide::keeps(levels, choice.level, tile, estimate[tile]));
      bits |= static_cast<uint64_t>(__ballot_sync(kAll, keep)) << 32 * half;
    }
    kept += __popcll(bits);
    if (lane == 0) mask[word] = bits;
  }
  if (lane != 0) return;
  args.tables.kept[item] = kept;
  if (q.exists) atomicAdd(args.tables.buckets + choice.rank_class * kWorkBuckets + bucket_of(kept, s.key_tiles), 1u);
}

// Counting sort of the wave's items by the tiles they keep.
__global__ __launch_bounds__(kThreads) void order_kernel(const __grid_constant__ AnalyzeArgs args, int first_tile) {
  begin_stage(args.state, kAttendStage);
  __shared__ uint32_t start[decide::kRankClasses][kWorkBuckets];
  const TableShape& s = args.shape;
  const int64_t heads = int64_t{s.batch} * s.heads_q, items = args.p.batch * s.heads_q * int64_t{s.wave_tiles};
  if (threadIdx.x < decide::kRankClasses) {
    uint32_t sum = 0;
    for (int i = 0; i < kWorkBuckets; ++i) {
      start[threadIdx.x][i] = sum;
      sum += args.tables.buckets[threadIdx.x * kWorkBuckets + i];
    }
    if (blockIdx.x == 0) args.tables.work_count[threadIdx.x] = sum;
  }
  __syncthreads();
  const int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (item >= items) return;
  const int64_t head = item / s.wave_tiles, tile = first_tile + item % s.wave_tiles;
  if (tile * decide::kTileQ >= sequence_of(args.p, head / s.heads_q).len_q) return;
  const int rank_class = args.tables.choice[head].rank_class;
  const int bucket = bucket_of(args.tables.kept[item], s.key_tiles);
  uint32_t* next = args.tables.buckets + (decide::kRankClasses + rank_class) * kWorkBuckets + bucket;
  const uint32_t place = start[rank_class][bucket] + atomicAdd(next, 1u);
  args.tables.work[rank_class * heads * s.wave_tiles + place] = static_cast<uint32_t>(item);
}

// Query tiles of a CTA: as many as their estimates fit shared memory.
int tiles_of_cta(const TableShape& s) {
  if (Space<8>::bytes(s) <= kMaxShared) return 8;
  if (Space<2>::bytes(s) <= kMaxShared) return 2;
  fail(ADAATTN_ERROR_NOT_SUPPORTED, "max_seqlen_k: %lld keys are more than the adaptive schedule takes",
       static_cast<long long>(s.key_rows()));
}

template <int kTiles, typename... Params, typename... Extra>
void launch(void (*kernel)(Params...), const AnalyzeArgs& args, int query_tiles, cudaStream_t stream, Extra... extra) {
  const size_t bytes = Space<kTiles>::bytes(args.shape);
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        "decide");
  const dim3 grid(static_cast<unsigned>(args.p.batch * args.shape.heads_q),
                  static_cast<unsigned>((query_tiles + kTiles - 1) / kTiles));
  check(launch_grid(kernel, grid, kThreads, bytes, stream, args, extra...), "decide");
}

}  // namespace

void decide_heads(const AnalyzeArgs& args, cudaStream_t stream) {
  const TableShape& s = args.shape;
  if (tiles_of_cta(s) == 8)
    launch<8>(levels_kernel<8>, args, s.query_tiles, stream);
  else
    launch<2>(levels_kernel<2>, args, s.query_tiles, stream);
  check(launch_grid(choose_kernel, dim3(static_cast<unsigned>(args.p.batch * s.heads_kv)), kThreads, 0, stream, args),
        "decide");
}

void write_schedule(const AnalyzeArgs& args, int32_t first_tile, cudaStream_t stream) {
  const TableShape& s = args.shape;
  check(cudaMemsetAsync(args.tables.buckets, 0, 2 * decide::kRankClasses * kWorkBuckets * sizeof(uint32_t), stream),
        "decide");
  const int tiles = std::min(s.wave_tiles, s.query_tiles - first_tile);
  if (tiles_of_cta(s) == 8)
    launch<8>(mask_kernel<8>, args, tiles, stream, first_tile);
  else
    launch<2>(mask_kernel<2>, args, tiles, stream, first_tile);
  const int64_t items = args.p.batch * s.heads_q * int64_t{s.wave_tiles};
  check(launch_grid(order_kernel, dim3(static_cast<unsigned>((items + kThreads - 1) / kThreads)), kThreads, 0, stream,
                    args, first_tile),
        "decide");
}

}  // namespace adaattn::cuda
