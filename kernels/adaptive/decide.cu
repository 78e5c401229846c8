// Mass levels of every query tile, a choice per head, and the masks. Built without contraction: the same statistics
// give the same bits as the host's code in src/decide. One CTA takes several query tiles of a head, one warp each.
#include <algorithm>

#include "adaptive/analyze.h"
#include "adaptive/stage_clock.cuh"
#include "attend/launch.h"
#include "common/ptx.cuh"
#include "core/error.h"
#include "decide/cells.h"
#include "decide/choose.h"
#include "runtime.h"

namespace adaattn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kCells = decide::kCellsOfTile;
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

__device__ __forceinline__ void mma_s8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Scores of the cells of kTiles query tiles of a head against pairs of key tiles, by the tensor cores; all warps go
// over all pairs together. A product's 16 rows are the blocks of four query tiles, its 8 columns the cells of two key
// tiles. A lane reads a quarter of a block's bytes, wherever they stand in the inner dimension: sums of integers have
// no order.
template <int kTiles, int kDim>
class Cells {
 public:
  static constexpr int kRows = kTiles * kCells, kProducts = (kRows + 15) / 16, kWords = kDim / 16;

  // first: the first query tile; count of them exist. len_q, len_k: of the sequence.
  __device__ __forceinline__ Cells(const AnalyzeArgs& args, int b, int head, int first, int count, const Sequence& seq)
      : len_k_(seq.len_k) {
    const TableShape& s = args.shape;
    const int lane = threadIdx.x % 32;
    const int64_t block = ((int64_t{b} * s.heads_q + head) * s.query_tiles + first) * kCells;
    const int64_t unit = int64_t{b} * s.heads_kv + head / s.group;
    key_cells_ = args.tables.key_cells + unit * key_cells_of_unit(s) * kDim;
    key_scales_ = args.tables.key_scales + unit * key_cells_of_unit(s);
#pragma unroll
    for (int m = 0; m < kProducts; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = 16 * m + lane / 4 + 8 * r;
        const bool there = row < count * kCells;
        exists_[m][r] = there && (int64_t{first} * kCells + row) * decide::kCell < seq.len_q;
        scale_[m][r] = there ? args.tables.query_scales[block + row] : 0.0f;
        uint32_t words[kWords] = {};
        if (there) read_block(args.tables.query_cells + (block + row) * kDim, words);
#pragma unroll
        for (int i = 0; i < kWords; ++i) a_[m][i / 2][2 * (i % 2) + r] = words[i];
      }
    }
  }

  // Row r of product m has queries.
  __device__ __forceinline__ bool exists(int m, int r) const { return exists_[m][r]; }
  __device__ __forceinline__ bool finite(int m, int r) const { return isfinite(scale_[m][r]); }

  // take(m, pair, scores, keys) for each pair of key tiles that overlaps [begin, end): of rows lane / 4 and 8 more,
  // cells 2 (lane % 4) and the next of the pair; keys of them.
  template <typename Take>
  __device__ __forceinline__ void each(int begin, int end, const Take& take) const {
    const int lane = threadIdx.x % 32;
    int pair = begin / 2 + static_cast<int>(threadIdx.x) / 32;
    uint32_t words[kWords], next[kWords];
    float2 scale, next_scale;
    const auto fetch = [&](int number) {
      if (2 * number >= end) return;
      read_block(key_cells_ + (int64_t{number} * 2 * kCells + lane / 4) * kDim, next);
      next_scale = *reinterpret_cast<const float2*>(key_scales_ + number * 2 * kCells + 2 * (lane % 4));
    };
    fetch(pair);
    for (; 2 * pair < end; pair += kWarps) {
      const int cell = pair * 2 * kCells + 2 * (lane % 4);
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[i] = next[i];
      scale = next_scale;
      fetch(pair + kWarps);  // its latency passes beside this one's work
      int keys[2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        keys[i] = static_cast<int>(
            max(int64_t{0}, min(len_k_ - int64_t{cell + i} * decide::kCell, static_cast<int64_t>(decide::kCell))));
#pragma unroll
      for (int m = 0; m < kProducts; ++m) {
        int c[4] = {};
#pragma unroll
        for (int i = 0; i < kWords / 2; ++i) mma_s8(c, a_[m][i], words[2 * i], words[2 * i + 1]);
        float scores[2][2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          scores[r][0] = decide::cell_score(c[2 * r], scale_[m][r], scale.x, keys[0]);
          scores[r][1] = decide::cell_score(c[2 * r + 1], scale_[m][r], scale.y, keys[1]);
        }
        take(m, pair, scores, keys);
      }
    }
  }

 private:
  // The lane's quarter.
  static __device__ __forceinline__ void read_block(const int8_t* block, uint32_t (&words)[kWords]) {
    const auto* from = reinterpret_cast<const uint4*>(block + threadIdx.x % 4 * (kDim / 4));
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      const uint4 x = __ldg(from + i);
      words[4 * i] = x.x;
      words[4 * i + 1] = x.y;
      words[4 * i + 2] = x.z;
      words[4 * i + 3] = x.w;
    }
  }

  const int64_t len_k_;
  const int8_t* key_cells_;
  const float* key_scales_;
  uint32_t a_[kProducts][kWords / 2][4];
  float scale_[kProducts][2];
  bool exists_[kProducts][2];
};

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

// Shared memory of the kernels below: masses and peaks of the tiles, and for the levels the masses again.
template <int kTiles>
struct Space {
  uint32_t *mass, *peak, *sorted;
  int tiles, padded;
  __device__ explicit Space(const TableShape& s) : tiles(s.key_tiles), padded(padded_tiles(s)) {
    extern __shared__ uint32_t dynamic[];
    mass = dynamic;
    peak = mass + kTiles * tiles;
    sorted = peak + kTiles * tiles;
  }
  static ADAATTN_HD int padded_tiles(const TableShape& s) {
    int count = 32;
    while (count < s.key_tiles) count *= 2;
    return count;
  }
  static size_t bytes(const TableShape& s) {
    return sizeof(uint32_t) * size_t{kTiles} * static_cast<size_t>(2 * s.key_tiles + padded_tiles(s));
  }
};

// Masses and peaks of the key tiles [begin, end) for all query tiles from the rows' tops and sums.
template <int kTiles, int kDim>
__device__ __forceinline__ void weigh_tiles(const Cells<kTiles, kDim>& cells, const decide::CellRow (*rows)[2],
                                            int begin, int end, const Space<kTiles>& space) {
  const int lane = threadIdx.x % 32;
  cells.each(begin, end, [&](int m, int pair, const float(&scores)[2][2], const int(&keys)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t sum = 0, top = 0;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t mass =
            keys[i] > 0 && cells.exists(m, r) ? decide::integer_mass(scores[r][i], rows[m][r].top) : 0;
        sum += mass;
        top = max(top, mass);
      }
      // Of a tile: two lanes have its cells. Of a query tile: four rows, in lanes 4 and 8 away.
      sum += __shfl_xor_sync(kAll, sum, 1);
      top = max(top, __shfl_xor_sync(kAll, top, 1));
      uint32_t mass = decide::tile_share(sum, rows[m][r].inverse), peak = decide::cell_share(top, rows[m][r].inverse);
#pragma unroll
      for (int step = 4; step <= 8; step *= 2) {
        mass += __shfl_xor_sync(kAll, mass, step);
        peak = max(peak, __shfl_xor_sync(kAll, peak, step));
      }
      const int query = 4 * m + 2 * r + lane / 16, tile = 2 * pair + lane % 4 / 2;
      if (lane / 4 % 4 != 0 || lane % 2 != 0 || query >= kTiles || tile >= space.tiles) continue;
      space.mass[query * space.tiles + tile] = mass;
      space.peak[query * space.tiles + tile] = peak;
    }
  });
}

// Causal tiles see more keys the later they are: those first.
template <int kTiles>
__device__ __forceinline__ int first_of(int query_tiles, int number) {
  return ((query_tiles + kTiles - 1) / kTiles - 1 - number) * kTiles;
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

template <int kTiles, int kDim>
struct Instance {
  static constexpr int kTilesOfCta = kTiles;
  static constexpr auto levels = levels_kernel<kTiles, kDim>;
  static constexpr auto masks = mask_kernel<kTiles, kDim>;
  static size_t bytes(const TableShape& s) { return Space<kTiles>::bytes(s); }
};

// Calls back with the kernels for as many query tiles at a time as fit shared memory.
template <typename Take>
void with_instance(const TableShape& s, const Take& take) {
  const auto of_dim = [&](auto eight, auto two) {
    if (eight.bytes(s) <= kMaxShared) return take(eight);
    if (two.bytes(s) <= kMaxShared) return take(two);
    fail(ADAATTN_ERROR_NOT_SUPPORTED, "max_seqlen_k: %lld keys are more than the adaptive schedule takes",
         static_cast<long long>(s.key_rows()));
  };
  if (s.d_qk == 64) return of_dim(Instance<8, 64>{}, Instance<2, 64>{});
  of_dim(Instance<8, 128>{}, Instance<2, 128>{});
}

// head_rows: rows of CTAs that take no query tiles.
template <typename... Params, typename... Extra>
void launch(void (*kernel)(Params...), size_t bytes, int tiles_of_cta, const AnalyzeArgs& args, int query_tiles,
            int head_rows, cudaStream_t stream, Extra... extra) {
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        "decide");
  const dim3 grid(static_cast<unsigned>(args.p.batch * args.shape.heads_q),
                  static_cast<unsigned>((query_tiles + tiles_of_cta - 1) / tiles_of_cta + head_rows));
  check(launch_grid_overlapped(kernel, grid, kThreads, bytes, stream, true, args, extra...), "decide");
}

}  // namespace

void decide_heads(const AnalyzeArgs& args, cudaStream_t stream) {
  const TableShape& s = args.shape;
  with_instance(s, [&](auto x) { launch(x.levels, x.bytes(s), x.kTilesOfCta, args, s.query_tiles, 0, stream); });
  const dim3 units(static_cast<unsigned>(args.p.batch * s.heads_kv));
  check(launch_grid_overlapped(choose_kernel, units, kChooseThreads, 0, stream, true, args), "decide");
}

void write_schedule(const AnalyzeArgs& args, int32_t first_tile, cudaStream_t stream) {
  const TableShape& s = args.shape;
  const int count = std::min(s.wave_tiles, s.query_tiles - first_tile), units = section_units(args);
  with_instance(s,
                [&](auto x) { launch(x.masks, x.bytes(s), x.kTilesOfCta, args, count, 1, stream, first_tile, units); });
}

}  // namespace adaattn::cuda
