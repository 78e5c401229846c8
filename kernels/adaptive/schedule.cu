// The schedule of a wave of query tiles: masks at the chosen levels, and the work lists. Built without contraction.
#include <algorithm>

#include "adaptive/cells.cuh"
#include "adaptive/levels.cuh"
#include "adaptive/sample.h"
#include "adaptive/stage_clock.cuh"
#include "common/ptx.cuh"

namespace adaattn::cuda {
namespace {

constexpr int kThreads = kDecideThreads;
constexpr int kCodeThreads = 1024;  // ordering a section is a chain of latencies: the fewer items a thread, the better

__device__ __forceinline__ int bucket_of(int kept, int key_tiles) {
  const int bucket =
      static_cast<int>(static_cast<uint32_t>(kept) * kWorkBuckets / static_cast<uint32_t>(key_tiles + 1));
  return kWorkBuckets - 1 - bucket;  // most work first
}

// Of a section of the work lists; all about as large, for a small last one would end unevenly.
int section_units(const AnalyzeArgs& args) {
  const TableShape& s = args.shape;
  const int64_t all = args.p.batch * s.heads_kv;
  const int64_t most = std::clamp<int64_t>(args.cache_bytes / (s.key_rows() * (s.d_qk + s.d_v) * 2), 1, all);
  const int64_t sections = (all + most - 1) / most;
  return static_cast<int>((all + sections - 1) / sections);
}

// Query tiles of a sequence in the wave.
__device__ __forceinline__ int wave_items(const AnalyzeArgs& args, int64_t b, int first_tile) {
  const int64_t tiles = (sequence_of(args.p, b).len_q + decide::kTileQ - 1) / decide::kTileQ - first_tile;
  return static_cast<int>(max(int64_t{0}, min(tiles, static_cast<int64_t>(args.shape.wave_tiles))));
}

// By all threads of a CTA: whether the exact kernel computes this call. What it is read from is there without waiting,
// for a call's first grid is launched in order, and nothing in the call changes it before the grids that compute it are
// done.
__device__ __forceinline__ bool left_to_exact(const AnalyzeArgs& args) {
  if (args.dense_units == 0) return false;
  bool dense = true;
  for (int u = static_cast<int>(threadIdx.x); u < args.dense_units; u += static_cast<int>(blockDim.x))
    dense = __ldcg(args.state.dense_left + u) > 0 && dense;
  return __syncthreads_and(dense) != 0;
}

// One CTA appends a section's items to the lists: a counting sort by the tiles they keep. empty: the lists are to have
// no items.
template <int kThreads>
__device__ __forceinline__ void order_section(const AnalyzeArgs& args, int first_tile, int units, int section,
                                              bool empty) {
  constexpr int kEach = 2;               // items of a thread whose reads are on their way together
  constexpr int kRemembered = 8192;      // items whose place is read but once
  constexpr uint16_t kNowhere = 0xffff;  // of an item that there is not
  __shared__ uint32_t start[kWorkLists][kWorkBuckets], base[kWorkLists], before[kWorkLists];
  __shared__ uint16_t places[kRemembered];  // list and bucket
  const TableShape& s = args.shape;
  const int heads = static_cast<int>(args.p.batch) * s.heads_q, thread = threadIdx.x;
  const int first = section * units * s.group, last = min(first + units * s.group, heads);
  const decide::HeadChoice* const choices = args.tables.choice;
  for (int i = thread; i < kWorkLists * kWorkBuckets; i += kThreads) start[i / kWorkBuckets][i % kWorkBuckets] = 0;
  if (thread < kWorkLists) base[thread] = 0;
  __syncthreads();
#pragma unroll 1
  for (int head = thread; head < first; head += kThreads)
    atomicAdd(&base[list_of(choices[head])], static_cast<uint32_t>(wave_items(args, head / s.heads_q, first_tile)));
  const auto place_of = [&](int head, int in_wave) {
    const decide::HeadChoice& choice = choices[head];
    const int64_t index = int64_t{head} * s.query_tiles + first_tile + in_wave;
    const decide::TileRow row = args.tables.tile_range[index];
    int kept = row.end - row.begin;
    if (s.by_shares && !keeps_all(choice))
      kept = args.tables.kept[int64_t{head} * s.wave_tiles + in_wave];
    else if (!s.by_shares && !choice.dense)
      kept = static_cast<int>(args.tables.levels[index].kept[choice.level]);
    return static_cast<uint16_t>(list_of(choice) * kWorkBuckets + bucket_of(kept, s.key_tiles));
  };
  const int items = (last - first) * s.wave_tiles;
  // Item i of the section is number first * wave_tiles + i of all.
  const auto place_of_item = [&](int i) {
    const int head = first + i / s.wave_tiles, in_wave = i % s.wave_tiles;
    return in_wave < wave_items(args, head / s.heads_q, first_tile) ? place_of(head, in_wave) : kNowhere;
  };
#pragma unroll 1
  for (int from = thread; from < items; from += kEach * kThreads) {
    uint16_t place[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int i = from + j * kThreads;
      place[j] = i < items ? place_of_item(i) : kNowhere;
    }
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int i = from + j * kThreads;
      if (i < min(items, kRemembered)) places[i] = place[j];
      if (place[j] != kNowhere) atomicAdd(&start[0][place[j]], 1u);
    }
  }
  __syncthreads();
  if (thread / 32 < kWorkLists) {
    constexpr int kBuckets = kWorkBuckets / 32;
    uint32_t* const counts = &start[thread / 32][thread % 32 * kBuckets];
    uint32_t own = 0;
    for (int i = 0; i < kBuckets; ++i) own += counts[i];
    const uint32_t sum = running_sum(own);
    uint32_t at = base[thread / 32] + sum - own;
    if (thread % 32 == 31) before[thread / 32] = base[thread / 32] + sum;
    for (int i = 0; i < kBuckets; ++i) {
      const uint32_t count = counts[i];
      counts[i] = at;
      at += count;
    }
  }
  __syncthreads();
  if (last == heads && thread < kWorkLists) args.tables.work_count[thread] = empty ? 0 : before[thread];
#pragma unroll 1
  for (int i = thread; i < items; i += kThreads) {
    const uint16_t place = i < kRemembered ? places[i] : place_of_item(i);
    if (place == kNowhere) continue;
    const uint32_t at = atomicAdd(&start[0][place], 1u);
    args.tables.work[int64_t{place / kWorkBuckets} * s.batch * s.heads_q * s.wave_tiles + at] =
        static_cast<uint32_t>(first * s.wave_tiles + i);
  }
}

// One warp: the mask of a query tile, of which keeps(tile) says whether a visible key tile is kept.
template <typename Keeps>
__device__ __forceinline__ void put_mask(const AnalyzeArgs& args, int64_t item, const decide::TileRow& row,
                                         const Keeps& keeps) {
  const TableShape& s = args.shape;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  uint64_t* const mask = args.tables.mask + item * s.mask_words;
  int kept = 0;
#pragma unroll 1
  for (int word = 0; word < s.mask_words; ++word) {
    uint64_t bits = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int tile = 64 * word + 32 * half + lane;
      const bool keep = tile >= row.begin && tile < row.end && keeps(tile);
      bits |= static_cast<uint64_t>(__ballot_sync(kAll, keep)) << 32 * half;
    }
    kept += __popcll(bits);
    if (lane == 0) mask[word] = bits;
  }
  if (lane == 0) args.tables.kept[item] = kept;
}

// The first CTAs order the work lists, a section each, once the grid before has ended.
template <int kThreads>
__device__ __forceinline__ bool order_lists(const AnalyzeArgs& args, int first_tile, int units, int sections) {
  const int section = static_cast<int>(blockIdx.x);
  if (section >= sections) return false;
  const bool empty = left_to_exact(args);
  wait_for_previous_grid();
  order_section<kThreads>(args, first_tile, units, section, empty);
  begin_stage(args.state, kAttendStage);  // as good as: the masks take as long
  return true;
}

// Masks from the codes of the tiles, a query tile in each warp.
__global__ __launch_bounds__(kCodeThreads) void code_mask_kernel(const __grid_constant__ AnalyzeArgs args, int units,
                                                                 int sections) {
  launch_dependents();
  if (order_lists<kCodeThreads>(args, 0, units, sections)) return;
  wait_for_previous_grid();
  const TableShape& s = args.shape;
  const int64_t index = (int64_t{blockIdx.x} - sections) * (kCodeThreads / 32) + threadIdx.x / 32;
  if (index >= args.p.batch * s.heads_q * s.query_tiles) return;
  const decide::HeadChoice choice = args.tables.choice[index / s.query_tiles];
  const decide::TileRow row = args.tables.tile_range[index];
  const uint8_t* const codes = args.tables.codes + index * s.key_tiles - row.begin;
  put_mask(args, index, row, [&](int tile) { return code_keeps(codes[tile], choice); });
}

// The lists where shares have decided, and full masks of the heads that keep all; a query tile in each warp.
__global__ __launch_bounds__(kCodeThreads) void full_mask_kernel(const __grid_constant__ AnalyzeArgs args,
                                                                 int first_tile, int count, int units, int sections) {
  launch_dependents();
  if (order_lists<kCodeThreads>(args, first_tile, units, sections)) return;
  wait_for_previous_grid();
  const TableShape& s = args.shape;
  const int64_t number = (int64_t{blockIdx.x} - sections) * (kCodeThreads / 32) + threadIdx.x / 32;
  if (number >= args.p.batch * s.heads_q * count) return;
  const int64_t head = number / count, in_wave = number % count;
  if (!keeps_all(args.tables.choice[head])) return;
  const decide::TileRow row = args.tables.tile_range[head * s.query_tiles + first_tile + in_wave];
  put_mask(args, head * s.wave_tiles + in_wave, row, [](int) { return true; });
}

// Full masks and the list of the heads over the tolerance, in their order; a CTA per head.
__global__ __launch_bounds__(kThreads) void exact_mask_kernel(const __grid_constant__ AnalyzeArgs args,
                                                              int first_tile) {
  __shared__ uint32_t before;
  launch_dependents();
  wait_for_previous_grid();
  const TableShape& s = args.shape;
  const int own = static_cast<int>(blockIdx.x);
  const auto items_of = [&](int head) {
    return args.tables.exceeds[head] != 0 ? static_cast<uint32_t>(wave_items(args, head / s.heads_q, first_tile)) : 0u;
  };
  if (threadIdx.x == 0) before = 0;
  __syncthreads();
  for (int head = static_cast<int>(threadIdx.x); head < own; head += kThreads) atomicAdd(&before, items_of(head));
  __syncthreads();
  const int items = static_cast<int>(items_of(own));
  if (own == static_cast<int>(gridDim.x) - 1 && threadIdx.x == 0)
    args.tables.work_count[0] = before + static_cast<uint32_t>(items);
  for (int i = static_cast<int>(threadIdx.x) / 32; i < items; i += kDecideWarps) {
    const int64_t item = int64_t{own} * s.wave_tiles + i;
    const decide::TileRow row = args.tables.tile_range[int64_t{own} * s.query_tiles + first_tile + i];
    put_mask(args, item, row, [](int) { return true; });
    if (threadIdx.x % 32 == 0) args.tables.work[before + static_cast<uint32_t>(i)] = static_cast<uint32_t>(item);
  }
}

// Masks from the estimates, which are made again.
template <int kTiles, int kDim>
__global__ __launch_bounds__(kThreads, 2) void mask_kernel(const __grid_constant__ AnalyzeArgs args, int first_tile,
                                                           int units, int sections) {
  using Block = Cells<kTiles, kDim>;
  launch_dependents();
  wait_for_previous_grid();
  if (first_tile > 0) begin_stage(args.state, kDecideStage);
  if (order_lists<kThreads>(args, first_tile, units, sections)) return;
  const TableShape& s = args.shape;
  const Space<kTiles> space(s);
  const int heads = static_cast<int>(args.p.batch) * s.heads_q, number = static_cast<int>(blockIdx.x) - sections;
  const int head_index = number % heads, head = head_index % s.heads_q, b = head_index / s.heads_q;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int tiles = min(s.query_tiles - first_tile, s.wave_tiles);
  const int in_wave = first_of<kTiles>(tiles, number / heads), first = first_tile + in_wave;
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
      weigh_tiles(cells, rows, begin, end, space);
    }
    __syncthreads();
  }
  if (warp >= count) return;
  const decide::TileLevels& levels = args.tables.levels[index + warp];
  put_mask(args, int64_t{head_index} * s.wave_tiles + in_wave + warp, levels.row, [&](int tile) {
    const int at = warp * space.tiles + tile;
    return choice.dense ||
           decide::keeps_tile(levels, choice.level, tile, space.mass[at], space.peak[at], args.keep_peak);
  });
}

}  // namespace

void prepare_masks() {
  const auto prepare = [](auto... shapes) {
    (prepare_shared(&mask_kernel<shapes.kTiles, shapes.kDim>, kMaxMaskBytes), ...);
  };
  prepare(CellsShape<8, 64, false>{}, CellsShape<2, 64, false>{});
  prepare(CellsShape<8, 128, false>{}, CellsShape<2, 128, false>{});
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, code_mask_kernel), "adaptive kernels");
  check(cudaFuncGetAttributes(&attributes, full_mask_kernel), "adaptive kernels");
  check(cudaFuncGetAttributes(&attributes, exact_mask_kernel), "adaptive kernels");
}

void write_exact_schedule(const AnalyzeArgs& args, int32_t first_tile, cudaStream_t stream) {
  check(launch_grid_overlapped(exact_mask_kernel, dim3(static_cast<unsigned>(args.p.batch * args.shape.heads_q)),
                               kThreads, 0, stream, true, args, first_tile),
        "recompute");
}

void write_schedule(const AnalyzeArgs& args, int32_t first_tile, cudaStream_t stream) {
  const TableShape& s = args.shape;
  const int count = std::min(s.wave_tiles, s.query_tiles - first_tile), units = section_units(args);
  const int heads = static_cast<int>(args.p.batch) * s.heads_q;
  const int sections = (static_cast<int>(args.p.batch) * s.heads_kv + units - 1) / units;
  const auto launch = [&](auto kernel, int threads, int64_t masks, size_t bytes, auto... extra) {
    check(launch_grid_overlapped(kernel, dim3(static_cast<unsigned>(sections + masks)), threads, bytes, stream, true,
                                 args, extra...),
          "decide");
  };
  constexpr int kEach = kCodeThreads / 32;
  if (s.by_shares) {
    if (s.wave_tiles < s.query_tiles) mask_shares(args, first_tile, stream);
    launch(full_mask_kernel, kCodeThreads, (int64_t{heads} * count + kEach - 1) / kEach, 0, first_tile, count, units,
           sections);
  } else if (args.tables.codes != nullptr) {
    launch(code_mask_kernel, kCodeThreads, (int64_t{heads} * s.query_tiles + kEach - 1) / kEach, 0, units, sections);
  } else {
    with_mask_shape(s, [&](auto x) {
      launch(mask_kernel<x.kTiles, x.kDim>, kThreads, int64_t{heads} * ((count + x.kTiles - 1) / x.kTiles), x.bytes(s),
             first_tile, units, sections);
    });
  }
  if (args.tables.shares != nullptr) add_remainder(args, first_tile, stream);
}

}  // namespace adaattn::cuda
