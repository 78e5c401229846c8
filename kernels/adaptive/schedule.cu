// The schedule of a wave of query tiles: masks at the chosen levels, and the work lists. Built without contraction.
#include <algorithm>

#include "adaptive/cells.cuh"
#include "adaptive/stage_clock.cuh"
#include "common/ptx.cuh"

namespace adaattn::cuda {
namespace {

constexpr int kThreads = kDecideThreads;

__device__ __forceinline__ int bucket_of(int kept, int key_tiles) {
  const int bucket = static_cast<int>(int64_t{kept} * kWorkBuckets / (key_tiles + 1));
  return kWorkBuckets - 1 - bucket;  // most work first
}

// Of a section of the work lists.
int section_units(const AnalyzeArgs& args) {
  const TableShape& s = args.shape;
  const int64_t units = args.cache_bytes / (s.key_rows() * (s.d_qk + s.d_v) * 2);
  return static_cast<int>(std::clamp<int64_t>(units, 1, int64_t{s.batch} * s.heads_kv));
}

// Query tiles of a sequence in the wave.
__device__ __forceinline__ int wave_items(const AnalyzeArgs& args, int64_t b, int first_tile) {
  const int64_t tiles = (sequence_of(args.p, b).len_q + decide::kTileQ - 1) / decide::kTileQ - first_tile;
  return static_cast<int>(max(int64_t{0}, min(tiles, static_cast<int64_t>(args.shape.wave_tiles))));
}

// One CTA appends a section's items to the lists: a counting sort by the tiles they keep.
__device__ __forceinline__ void order_section(const AnalyzeArgs& args, int first_tile, int units, int section) {
  using decide::kRankClasses;
  __shared__ uint32_t start[kRankClasses][kWorkBuckets], base[kRankClasses], before[kRankClasses];
  const TableShape& s = args.shape;
  const int heads = static_cast<int>(args.p.batch) * s.heads_q, thread = threadIdx.x;
  const int first = section * units * s.group, last = min(first + units * s.group, heads);
  for (int i = thread; i < kRankClasses * kWorkBuckets; i += kThreads) start[i / kWorkBuckets][i % kWorkBuckets] = 0;
  if (thread < kRankClasses) base[thread] = 0;
  __syncthreads();
  for (int head = thread; head < first; head += kThreads)
    atomicAdd(&base[args.tables.choice[head].rank_class],
              static_cast<uint32_t>(wave_items(args, head / s.heads_q, first_tile)));
  const auto each_item = [&](const auto& take) {
    for (int i = thread; i < (last - first) * s.wave_tiles; i += kThreads) {
      const int head = first + i / s.wave_tiles, in_wave = i % s.wave_tiles;
      if (in_wave >= wave_items(args, head / s.heads_q, first_tile)) continue;
      const decide::HeadChoice& choice = args.tables.choice[head];
      const decide::TileLevels& levels = args.tables.levels[int64_t{head} * s.query_tiles + first_tile + in_wave];
      const int kept = choice.dense ? levels.row.end - levels.row.begin : static_cast<int>(levels.kept[choice.level]);
      take(head, in_wave, choice.rank_class, bucket_of(kept, s.key_tiles));
    }
  };
  each_item([&](int, int, int rank_class, int bucket) { atomicAdd(&start[rank_class][bucket], 1u); });
  __syncthreads();
  if (thread / 32 < kRankClasses) {
    constexpr int kEach = kWorkBuckets / 32;
    uint32_t* const counts = &start[thread / 32][thread % 32 * kEach];
    uint32_t own = 0;
    for (int i = 0; i < kEach; ++i) own += counts[i];
    uint32_t sum = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(kAll, sum, step);
      if (thread % 32 >= step) sum += other;
    }
    uint32_t at = base[thread / 32] + sum - own;
    if (thread % 32 == 31) before[thread / 32] = base[thread / 32] + sum;
    for (int i = 0; i < kEach; ++i) {
      const uint32_t count = counts[i];
      counts[i] = at;
      at += count;
    }
  }
  __syncthreads();
  if (last == heads && thread < kRankClasses) args.tables.work_count[thread] = before[thread];
  each_item([&](int head, int in_wave, int rank_class, int bucket) {
    const uint32_t place = atomicAdd(&start[rank_class][bucket], 1u);
    args.tables.work[int64_t{rank_class} * s.batch * s.heads_q * s.wave_tiles + place] =
        static_cast<uint32_t>(head * s.wave_tiles + in_wave);
  });
}

// The first row of CTAs orders the work lists, a section each; the others write masks.
template <int kTiles, int kDim>
__global__ __launch_bounds__(kThreads, 2) void mask_kernel(const __grid_constant__ AnalyzeArgs args, int first_tile,
                                                           int units) {
  using Block = Cells<kTiles, kDim>;
  launch_dependents();
  wait_for_previous_grid();
  const TableShape& s = args.shape;
  const int head_index = static_cast<int>(blockIdx.x);
  if (first_tile > 0) begin_stage(args.state, kDecideStage);
  if (blockIdx.y == 0) {
    if (head_index * units * s.group < static_cast<int>(gridDim.x)) order_section(args, first_tile, units, head_index);
    begin_stage(args.state, kAttendStage);  // as good as: the masks take as long
    return;
  }
  const Space<kTiles> space(s);
  const int head = head_index % s.heads_q, b = head_index / s.heads_q, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int tiles = min(s.query_tiles - first_tile, s.wave_tiles);
  const int in_wave = first_of<kTiles>(tiles, static_cast<int>(blockIdx.y) - 1), first = first_tile + in_wave;
  const int count = min(kTiles, tiles - in_wave);
  const decide::HeadChoice choice = args.tables.choice[head_index];
  const int64_t index = int64_t{head_index} * s.query_tiles + first;
  if (!choice.dense) {
    int begin = s.key_tiles, end = 0;
    for (int r = 0; r < count; ++r) {
      const decide::TileRow row = args.tables.tile_range[index + r];
      if (row.begin >= row.end) continue;
      begin = min(begin, row.begin);
      end = max(end, row.end);
    }
    if (begin < end) {
      const Block cells(args, b, head, first, count, sequence_of(args.p, b));
      decide::CellRow rows[Block::kProducts][2];
#pragma unroll
      for (int m = 0; m < Block::kProducts; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r)
          if (cells.exists(m, r)) rows[m][r] = args.tables.cell_rows[index * kCells + 16 * m + lane / 4 + 8 * r];
      weigh_tiles<kTiles, kDim>(cells, rows, begin, end, space);
    }
    __syncthreads();
  }
  if (warp >= count) return;
  const decide::TileLevels& levels = args.tables.levels[index + warp];
  const decide::TileRow row = levels.row;
  const int64_t item = int64_t{head_index} * s.wave_tiles + in_wave + warp;
  uint64_t* mask = args.tables.mask + item * s.mask_words;
  int kept = 0;
  for (int word = 0; word < s.mask_words; ++word) {
    uint64_t bits = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int tile = 64 * word + 32 * half + lane, at = warp * space.tiles + tile;
      const bool seen = tile >= row.begin && tile < row.end;
      const bool keep = seen && (choice.dense || decide::keeps_tile(levels, choice.level, tile, space.mass[at],
                                                                    space.peak[at], args.keep_peak));
      bits |= static_cast<uint64_t>(__ballot_sync(kAll, keep)) << 32 * half;
    }
    kept += __popcll(bits);
    if (lane == 0) mask[word] = bits;
  }
  if (lane == 0) args.tables.kept[item] = kept;
}

}  // namespace

void write_schedule(const AnalyzeArgs& args, int32_t first_tile, cudaStream_t stream) {
  const TableShape& s = args.shape;
  const int count = std::min(s.wave_tiles, s.query_tiles - first_tile), units = section_units(args);
  with_cells_shape(s, [&](auto x) {
    launch_cells(mask_kernel<x.kTiles, x.kDim>, x.bytes(s), x.kTiles, args, count, 1, stream, first_tile, units);
  });
}

}  // namespace adaattn::cuda
