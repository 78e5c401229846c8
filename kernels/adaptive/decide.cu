// Mass levels of every query tile and a choice per head. Built without contraction: the same statistics give the same
// bits as the host's code in src/decide.
#include <algorithm>

#include "adaptive/cells.cuh"
#include "adaptive/choose.cuh"
#include "adaptive/levels.cuh"
#include "adaptive/needles.cuh"
#include "adaptive/sample.h"
#include "adaptive/stage_clock.cuh"
#include "common/ptx.cuh"

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
  // Lengths are under 2^30.
  int lowest = static_cast<int>(s.len_k), highest = 0, begin_max = 0, end_min = lowest;
  uint64_t seen = 0;
#pragma unroll 1
  for (int i = lane; i < decide::kTileQ; i += 32) {
    if (i >= n) continue;
    const KeyRange range = visible_keys(p, s, first + i);
    const int begin = static_cast<int>(range.begin), end = static_cast<int>(range.end);
    begin_max = max(begin_max, begin);
    end_min = min(end_min, end);
    if (begin >= end) continue;
    lowest = min(lowest, begin);
    highest = max(highest, end);
    seen += static_cast<uint32_t>(end - begin);
  }
  lowest = __reduce_min_sync(kAll, lowest);
  highest = __reduce_max_sync(kAll, highest);
  begin_max = __reduce_max_sync(kAll, begin_max);
  end_min = __reduce_min_sync(kAll, end_min);
  seen = __reduce_add_sync(kAll, static_cast<uint32_t>(seen) & 0xffffu) +
         (uint64_t{__reduce_add_sync(kAll, static_cast<uint32_t>(seen >> 16))} << 16);
  if (lowest >= highest) return q;
  q.row.begin = static_cast<int32_t>(lowest / decide::kTileK);
  q.row.end = static_cast<int32_t>((highest + decide::kTileK - 1) / decide::kTileK);
  q.row.full_begin = static_cast<int32_t>((begin_max + decide::kTileK - 1) / decide::kTileK);
  q.row.full_end = static_cast<int32_t>(end_min / decide::kTileK);
  q.visible = static_cast<float>(seen) / static_cast<float>(n);
  return q;
}

// Integers in the order of floats, for a maximum of several warps.
__device__ __forceinline__ int ordered_bits(float x) {
  const int bits = __float_as_int(x);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}
__device__ __forceinline__ float float_of_ordered(int x) { return __int_as_float(x < 0 ? x ^ 0x7fffffff : x); }

// Of the query tiles [first_tile, first_tile + tiles) of every head. chooses: they are all there are, and the last CTA
// of a unit chooses for it; otherwise the masks of a wave are all that is asked for.
struct Wave {
  int32_t first_tile, tiles;
  bool chooses;
};

// What kTiles query tiles of a head keep. kShares: by shares of cells and needles, with their masks where the schedule
// has room for them; otherwise at every mass level.
template <int kTiles, int kDim, bool kStored, bool kShares, int kCtas>
__global__ __launch_bounds__(kThreads, kCtas) void levels_kernel(const __grid_constant__ AnalyzeArgs args,
                                                                 const Wave wave) {
  using Block = Cells<kTiles, kDim>;
  static_assert(kTiles <= kWarps);
  __shared__ int4 range[kTiles];  // of a query tile's key tiles: what it sees, and what all of its rows see whole
  __shared__ int tops[Block::kProducts * 16];  // ordered as the floats they stand for
  __shared__ unsigned long long sums[Block::kProducts * 16];
  __shared__ float limits[kTiles * decide::kNeedleRowsOfTile];
  __shared__ decide::CellRow cell_rows[Block::kProducts * 16];
  __shared__ int usable[kTiles], last_cta;
  launch_dependents();
  const TableShape& s = args.shape;
  const Space<kTiles> space(s, kStored, kShares);
  const int head = blockIdx.x % s.heads_q, b = blockIdx.x / s.heads_q, head_index = b * s.heads_q + head;
  const int in_wave = first_of<kTiles>(wave.tiles, static_cast<int>(blockIdx.y)), first = wave.first_tile + in_wave;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, count = min(kTiles, wave.tiles - in_wave);
  const Sequence seq = sequence_of(args.p, b);
  QueryTile q;
  if (warp < count) q = query_tile(args.p, seq, first + warp);
  if (warp < kTiles && lane == 0) {
    range[warp] = {q.row.begin, q.row.end, max(q.row.begin, q.row.full_begin), min(q.row.end, q.row.full_end)};
    usable[warp] = 1;
  }
  if (threadIdx.x < Block::kProducts * 16) {
    tops[threadIdx.x] = ordered_bits(-INFINITY);
    sums[threadIdx.x] = 0;
  }
  uint32_t* const found = kShares && s.needles ? space.found : nullptr;
  if (found != nullptr)
    for (int i = threadIdx.x; i < kTiles * 2 * s.mask_words; i += kThreads) found[i] = 0;
  __syncthreads();
  wait_for_previous_grid();
  if (wave.chooses || wave.first_tile > 0) begin_stage(args.state, kDecideStage);
  if (kShares && !wave.chooses && keeps_all(args.tables.choice[head_index])) return;
  int begin = s.key_tiles, end = 0;
  int whole_begin = 0, whole_end = static_cast<int>(seq.len_k / decide::kTileK);  // that all query tiles see
  int full_begin = s.key_tiles, full_end = 0;                                     // that some may leave out
#pragma unroll 1
  for (int r = 0; r < kTiles; ++r) {
    whole_begin = max(whole_begin, range[r].x);
    whole_end = min(whole_end, range[r].y);
    if (range[r].x >= range[r].y) continue;
    begin = min(begin, range[r].x);
    end = max(end, range[r].y);
    if (range[r].z >= range[r].w) continue;
    full_begin = min(full_begin, range[r].z);
    full_end = max(full_end, range[r].w);
  }
  const int64_t index = int64_t{head_index} * s.query_tiles + first;
  if (begin < end) {
    const Block cells(args, b, head, first, count, seq);
    // A cell counts where its tile is one that the query tile sees.
    const auto counts = [&](int m, int r, int pair, int keys) {
      const int4 seen = range[min(4 * m + 2 * r + lane / 16, kTiles - 1)];
      const int tile = 2 * pair + lane % 4 / 2;
      return keys > 0 && tile >= seen.x && tile < seen.y;
    };
    // Scores, then masses of a pair of key tiles, where a lane has left them.
    const auto own = [&](int m, int pair) {
      return space.scores + ((pair - begin / 2) * Block::kProducts + m) * 32 + lane;
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
      float counted[2][2];
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          counted[r][i] = scores[r][i];
          if (2 * pair < whole_begin || 2 * pair + 2 > whole_end) {
            const bool counting = counts(m, r, pair, keys[i]);
            counted[r][i] = counting ? scores[r][i] : -INFINITY;
            finite[m][r] = finite[m][r] && (!counting || isfinite(scores[r][i]) || !cells.exists(m, r));
          } else {
            finite[m][r] = finite[m][r] && isfinite(scores[r][i]);
          }
          top[m][r] = fmaxf(top[m][r], counted[r][i]);
        }
      if constexpr (kStored) *own(m, pair) = {counted[0][0], counted[0][1], counted[1][0], counted[1][1]};
    });
#pragma unroll
    for (int m = 0; m < Block::kProducts; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float x = quad_max(top[m][r]);
        if (lane % 4 == 0) atomicMax(&tops[16 * m + lane / 4 + 8 * r], ordered_bits(x));
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
        rows[m][r].top = float_of_ordered(tops[16 * m + lane / 4 + 8 * r]);
        sum[m][r] = 0;
      }
    if constexpr (kStored) {
      uint32_t there[Block::kProducts][2], own_sum[Block::kProducts][2] = {};  // of a few hundred masses of 2^22
#pragma unroll
      for (int m = 0; m < Block::kProducts; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) there[m][r] = cells.exists(m, r) ? ~0u : 0u;
#pragma unroll 1
      for (int pair = begin / 2 + warp; 2 * pair < end; pair += kWarps) {
#pragma unroll
        for (int m = 0; m < Block::kProducts; ++m) {
          const float4 x = *own(m, pair);
          const float scores[2][2] = {{x.x, x.y}, {x.z, x.w}};
          uint32_t mass[2][2];
#pragma unroll
          for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              mass[r][i] = decide::integer_mass(scores[r][i], rows[m][r].top) & there[m][r];
              own_sum[m][r] += mass[r][i];
            }
          *reinterpret_cast<uint4*>(own(m, pair)) = {mass[0][0], mass[0][1], mass[1][0], mass[1][1]};
        }
      }
#pragma unroll
      for (int m = 0; m < Block::kProducts; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) sum[m][r] = own_sum[m][r];
    } else {
      cells.each(begin, end, [&](int m, int pair, const float(&scores)[2][2], const int(&keys)[2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            if (counts(m, r, pair, keys[i])) sum[m][r] += decide::integer_mass(scores[r][i], rows[m][r].top);
      });
    }
#pragma unroll
    for (int m = 0; m < Block::kProducts; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        unsigned long long x = sum[m][r];
        x += __shfl_xor_sync(kAll, x, 1);
        x += __shfl_xor_sync(kAll, x, 2);
        if (lane % 4 == 0) atomicAdd(&sums[16 * m + lane / 4 + 8 * r], x);
      }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < Block::kProducts; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = 16 * m + lane / 4 + 8 * r;
        const unsigned long long x = sums[row];
        rows[m][r].inverse = x > 0 && cells.exists(m, r) ? 1.0f / static_cast<float>(x) : 0.0f;
        if (warp == 0 && lane % 4 == 0) cell_rows[row] = rows[m][r];
        if (args.tables.codes == nullptr && warp == 0 && lane % 4 == 0 && row < count * kCells)
          args.tables.cell_rows[index * kCells + row] = rows[m][r];
      }
    if constexpr (kStored) {
#pragma unroll 1
      for (int pair = begin / 2 + warp; 2 * pair < end; pair += kWarps) {
#pragma unroll
        for (int m = 0; m < Block::kProducts; ++m) {
          const uint4 x = *reinterpret_cast<const uint4*>(own(m, pair));
          const uint32_t mass[2][2] = {{x.x, x.y}, {x.z, x.w}};
          weigh_pair<kShares>(m, pair, mass, rows[m], space, args.keep_peak);
        }
      }
    } else {
      weigh_tiles<kShares>(cells, rows, begin, end, space, args.keep_peak);
    }
    __syncthreads();
    if (found != nullptr && full_begin < full_end) {
      needle_limits<kTiles>(args, b, head, first, count, seq, cell_rows, limits);
      __syncthreads();
      const NeedleSearch<kTiles, kDim, kTiles == 4 && kCtas == 2> search(args, b, head, first, limits);
      search.each(full_begin, full_end, [&](int of_query, int tile) {
        const int4 seen = range[of_query];
        if (tile >= seen.z && tile < seen.w) atomicOr(&found[of_query * 2 * s.mask_words + tile / 32], 1u << tile % 32);
      });
    }
  }
  __syncthreads();
  const int unit = b * s.heads_kv + head / s.group;
  UnitSums& unit_sums = args.tables.unit_sums[unit];
  if (warp < count) {
    const int64_t at = index + warp, in_space = int64_t{warp} * space.tiles + q.row.begin;
    const int rows = min(decide::kTileQ, static_cast<int>(seq.len_q) - (first + warp) * decide::kTileQ);
    const uint32_t* const mass = space.mass + in_space;
    if constexpr (kShares) {
      const bool all = s.wave_tiles == s.query_tiles;
      const int64_t item = int64_t{head_index} * s.wave_tiles + in_wave + warp;
      ShareTargets to{};
      if (wave.chooses) {
        to.levels = args.tables.levels + at;
        to.head = args.tables.head_sums + head_index;
      }
      if (all || !wave.chooses) {
        to.mask = reinterpret_cast<uint32_t*>(args.tables.mask + item * s.mask_words);
        to.kept = args.tables.kept + item;
        to.shares = args.tables.shares != nullptr ? args.tables.shares + item * s.key_tiles : nullptr;
      }
      measure_shares(mass, found != nullptr ? found + warp * 2 * s.mask_words : nullptr, q.visible, q.row, rows,
                     usable[warp] != 0, s.mask_words, to);
    } else {
      measure_levels(mass, space.peak + in_space, args.keep_peak, space.sorted + warp * space.padded, q.visible, q.row,
                     rows, usable[warp] != 0, args.tables.levels + at,
                     args.tables.codes != nullptr ? args.tables.codes + at * s.key_tiles : nullptr,
                     args.tables.head_sums + head_index);
    }
    if (lane == 0 && wave.chooses) {
      args.tables.tile_range[at] = q.row;
      if (usable[warp] == 0) atomicAdd(&unit_sums.unusable, 1u);
    }
  }
  if (!wave.chooses) return;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // of what the CTA has written: the barrier comes before it
    last_cta = atomicAdd(&unit_sums.ctas, 1u) == static_cast<uint32_t>(s.group) * gridDim.y - 1 ? 1 : 0;
  }
  __syncthreads();
  if (last_cta == 0) return;
  __threadfence();
  choose_unit<!kShares>(args, unit);
}

}  // namespace

void prepare_levels() {
  const auto prepare = [](auto... shapes) {
    (prepare_shared(&levels_kernel<shapes.kTiles, shapes.kDim, shapes.kStored, shapes.kShares, shapes.kCtas>,
                    kMaxLevelsBytes),
     ...);
  };
  prepare(CellsShape<4, 64, true, false>{}, CellsShape<8, 64, false, false>{}, CellsShape<2, 64, false, false>{});
  prepare(CellsShape<4, 128, true, false>{}, CellsShape<8, 128, false, false>{}, CellsShape<2, 128, false, false>{});
  prepare(CellsShape<4, 128, true, true>{}, CellsShape<8, 128, true, true>{}, CellsShape<4, 128, true, true, 2>{},
          CellsShape<8, 128, false, true>{}, CellsShape<2, 128, false, true>{});
}

namespace {

void launch_levels(const AnalyzeArgs& args, const Wave& wave, cudaStream_t stream) {
  const TableShape& s = args.shape;
  with_levels_shape(args, wave.tiles, [&](auto x) {
    const dim3 grid(static_cast<unsigned>(args.p.batch * s.heads_q),
                    static_cast<unsigned>((wave.tiles + x.kTiles - 1) / x.kTiles));
    check(launch_grid_overlapped(levels_kernel<x.kTiles, x.kDim, x.kStored, x.kShares, x.kCtas>, grid, kThreads,
                                 x.bytes(s), stream, true, args, wave),
          "decide");
  });
}

}  // namespace

void decide_heads(const AnalyzeArgs& args, cudaStream_t stream) {
  launch_levels(args, {0, args.shape.query_tiles, true}, stream);
}

void mask_shares(const AnalyzeArgs& args, int32_t first_tile, cudaStream_t stream) {
  launch_levels(args, {first_tile, std::min(args.shape.wave_tiles, args.shape.query_tiles - first_tile), false},
                stream);
}

}  // namespace adaattn::cuda
