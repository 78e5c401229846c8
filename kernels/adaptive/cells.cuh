// What levels and masks share: the scores of the cells of some query tiles, and the masses of tiles from them. Included
// by units that are built without contraction: the same statistics give the same bits as the host's code in src/decide.
#pragma once

#include "adaptive/analyze.h"
#include "attend/launch.h"
#include "core/error.h"
#include "decide/cells.h"
#include "runtime.h"

namespace adaattn::cuda {

constexpr int kDecideThreads = 256;
constexpr int kDecideWarps = kDecideThreads / 32;
constexpr int kCells = decide::kCellsOfTile;
constexpr unsigned kAll = 0xffffffffu;

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
      : len_k_(seq.len_k), whole_tiles_(static_cast<int>(seq.len_k / decide::kTileK)) {
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
    for (; 2 * pair < end; pair += kDecideWarps) {
      const int cell = pair * 2 * kCells + 2 * (lane % 4);
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[i] = next[i];
      scale = next_scale;
      fetch(pair + kDecideWarps);  // its latency passes beside this one's work
      int keys[2] = {decide::kCell, decide::kCell};
      const bool whole = 2 * pair + 2 <= whole_tiles_;  // the same in all lanes
      if (!whole) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
          keys[i] = static_cast<int>(
              max(int64_t{0}, min(len_k_ - int64_t{cell + i} * decide::kCell, static_cast<int64_t>(decide::kCell))));
      }
#pragma unroll
      for (int m = 0; m < kProducts; ++m) {
        int c[4] = {};
#pragma unroll
        for (int i = 0; i < kWords / 2; ++i) mma_s8(c, a_[m][i], words[2 * i], words[2 * i + 1]);
        float scores[2][2];
        if (whole) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            scores[r][0] = decide::cell_score(c[2 * r], scale_[m][r], scale.x, decide::kCell);
            scores[r][1] = decide::cell_score(c[2 * r + 1], scale_[m][r], scale.y, decide::kCell);
          }
        } else {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            scores[r][0] = decide::cell_score(c[2 * r], scale_[m][r], scale.x, keys[0]);
            scores[r][1] = decide::cell_score(c[2 * r + 1], scale_[m][r], scale.y, keys[1]);
          }
        }
        take(m, pair, scores, keys);
      }
    }
  }

 private:
  // The lane's quarter: 16 bytes of each 64, so that a load takes whole sectors.
  static __device__ __forceinline__ void read_block(const int8_t* block, uint32_t (&words)[kWords]) {
    const auto* from = reinterpret_cast<const uint4*>(block) + threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      const uint4 x = __ldg(from + 4 * i);
      words[4 * i] = x.x;
      words[4 * i + 1] = x.y;
      words[4 * i + 2] = x.z;
      words[4 * i + 3] = x.w;
    }
  }

  const int64_t len_k_;
  const int whole_tiles_;
  const int8_t* key_cells_;
  const float* key_scales_;
  uint32_t a_[kProducts][kWords / 2][4];
  float scale_[kProducts][2];
  bool exists_[kProducts][2];
};

// Where shares decide, what a tile's peak says stands in its mass: the masses of a query tile add up to 4 * 2^20 and
// their roundings.
constexpr uint32_t kKeptByPeak = 1u << 31;

// Shared memory of the kernels below: masses of the tiles; for levels their peaks and sums of the sorted masses, for
// shares bits of the key tiles with needles; and for those that keep them the scores of the cells: each lane finds
// there what it left.
template <int kTiles>
struct Space {
  float4* scores;
  uint32_t *mass, *peak, *sorted, *found;
  int tiles, padded;
  __device__ explicit Space(const TableShape& s, bool stored = false, bool shares = false)
      : tiles(s.key_tiles), padded(shares ? 0 : padded_tiles(s)) {
    extern __shared__ float4 dynamic[];
    scores = dynamic;
    mass = reinterpret_cast<uint32_t*>(dynamic + (stored ? score_slots(s) : 0));
    peak = mass + kTiles * tiles;
    sorted = peak + kTiles * tiles;
    found = peak;
  }
  static ADAATTN_HD int padded_tiles(const TableShape& s) {
    int count = 128;  // as levels.cuh sorts them
    if (s.key_tiles > count) count = 512;
    while (count < s.key_tiles) count *= 2;
    return count;
  }
  static ADAATTN_HD int score_slots(const TableShape& s) { return (s.key_tiles / 2 + 1) * ((kTiles + 3) / 4) * 32; }
  static size_t bytes(const TableShape& s, bool stored, bool shares) {
    return sizeof(uint32_t) * size_t{kTiles} *
               static_cast<size_t>(s.key_tiles + (shares ? 2 * s.mask_words : s.key_tiles + padded_tiles(s))) +
           (stored ? sizeof(float4) * static_cast<size_t>(score_slots(s)) : 0);
  }
};

// Masses and peaks of a pair of key tiles from the masses of their cells, which a lane has of rows lane / 4 and 8 more.
// kShares: with kKeptByPeak from keep_peak on in place of the peak.
template <bool kShares = false, int kTiles>
__device__ __forceinline__ void weigh_pair(int m, int pair, const uint32_t (&cells)[2][2],
                                           const decide::CellRow (&rows)[2], const Space<kTiles>& space,
                                           uint32_t keep_peak = 0) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    uint32_t sum = cells[r][0] + cells[r][1], top = max(cells[r][0], cells[r][1]);
    // Of a tile: two lanes have its cells. Of a query tile: four rows, in lanes 4 and 8 away.
    sum += __shfl_xor_sync(kAll, sum, 1);
    top = max(top, __shfl_xor_sync(kAll, top, 1));
    uint32_t mass = decide::tile_share(sum, rows[r].inverse), peak = decide::cell_share(top, rows[r].inverse);
#pragma unroll
    for (int step = 4; step <= 8; step *= 2) {
      mass += __shfl_xor_sync(kAll, mass, step);
      peak = max(peak, __shfl_xor_sync(kAll, peak, step));
    }
    const int query = 4 * m + 2 * r + lane / 16, tile = 2 * pair + lane % 4 / 2;
    if (lane / 4 % 4 != 0 || lane % 2 != 0 || query >= kTiles || tile >= space.tiles) continue;
    if constexpr (kShares) {
      space.mass[query * space.tiles + tile] = mass | (keep_peak != 0 && peak >= keep_peak ? kKeptByPeak : 0u);
    } else {
      space.mass[query * space.tiles + tile] = mass;
      space.peak[query * space.tiles + tile] = peak;
    }
  }
}

// Those of the key tiles [begin, end) for all query tiles from the rows' tops and sums.
template <bool kShares = false, int kTiles, int kDim>
__device__ __forceinline__ void weigh_tiles(const Cells<kTiles, kDim>& cells, const decide::CellRow (*rows)[2],
                                            int begin, int end, const Space<kTiles>& space, uint32_t keep_peak = 0) {
  cells.each(begin, end, [&](int m, int pair, const float(&scores)[2][2], const int(&keys)[2]) {
    uint32_t mass[2][2];
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        mass[r][i] = keys[i] > 0 && cells.exists(m, r) ? decide::integer_mass(scores[r][i], rows[m][r].top) : 0;
    weigh_pair<kShares>(m, pair, mass, rows[m], space, keep_peak);
  });
}

// A head for which all tiles are kept. Of mass levels that shares leave only the first keeps less.
__device__ __forceinline__ bool keeps_all(const decide::HeadChoice& choice) { return choice.dense || choice.level > 0; }

// Causal tiles see more keys the later they are: those first.
template <int kTiles>
__device__ __forceinline__ int first_of(int query_tiles, int number) {
  return ((query_tiles + kTiles - 1) / kTiles - 1 - number) * kTiles;
}

// Query tiles of a CTA, head_dim, whether the scores of cells stay in shared memory, and whether shares decide.
// kCtasOfSm: of a multiprocessor, which bounds the registers.
template <int kTilesOfCta, int kHeadDim, bool kStoredScores, bool kByShares = false,
          int kCtasOfSm = (kStoredScores && kTilesOfCta == 4) ? 3 : 2>
struct CellsShape {
  static constexpr int kCtas = kCtasOfSm;
  static constexpr int kTiles = kTilesOfCta, kDim = kHeadDim;
  static constexpr bool kStored = kStoredScores, kShares = kByShares;
  static size_t bytes(const TableShape& s) { return Space<kTiles>::bytes(s, kStored, kShares); }
};

constexpr size_t kMaxLevelsBytes = size_t{200} << 10;  // of a Hopper SM

// Once per device, before the first launch of a kernel with up to `bytes` of dynamic shared memory.
template <typename... Params>
void prepare_shared(void (*kernel)(Params...), size_t bytes) {
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        "adaptive kernels");
}

[[noreturn]] inline void refuse_cells(const TableShape& s) {
  fail(ADAATTN_ERROR_NOT_SUPPORTED, "max_seqlen_k: %lld keys are more than the adaptive schedule takes",
       static_cast<long long>(s.key_rows()));
}

// Calls back with the first shape whose shared memory is within its limit. query_tiles: of a head.
template <typename Take>
void with_levels_shape(const AnalyzeArgs& args, int query_tiles, const Take& take) {
  constexpr size_t kHalf = size_t{110} << 10;  // two CTAs at a time
  const TableShape& s = args.shape;
  const auto of_dim = [&](auto stored, auto eight, auto two) {
    if (stored.bytes(s) <= kHalf) return take(stored);
    if (eight.bytes(s) <= kMaxLevelsBytes) return take(eight);
    if (two.bytes(s) <= kMaxLevelsBytes) return take(two);
    refuse_cells(s);
  };
  if (s.by_shares) {
    // The more query tiles a CTA has, the less is read; but all multiprocessors should have some.
    const int64_t ctas = args.p.batch * s.heads_q * ((query_tiles + 7) / 8);
    using Eight = CellsShape<8, 128, true, true>;
    if (ctas >= 2 * args.multiprocessors && Eight::bytes(s) <= kHalf) return take(Eight{});
    constexpr size_t kThird = size_t{71} << 10;  // beside what is not dynamic
    if (CellsShape<4, 128, true, true>::bytes(s) > kThird)
      return of_dim(CellsShape<4, 128, true, true, 2>{}, CellsShape<8, 128, false, true>{},
                    CellsShape<2, 128, false, true>{});
    return of_dim(CellsShape<4, 128, true, true>{}, CellsShape<8, 128, false, true>{},
                  CellsShape<2, 128, false, true>{});
  }
  if (s.d_qk == 64) return of_dim(CellsShape<4, 64, true>{}, CellsShape<8, 64, false>{}, CellsShape<2, 64, false>{});
  of_dim(CellsShape<4, 128, true>{}, CellsShape<8, 128, false>{}, CellsShape<2, 128, false>{});
}

constexpr size_t kMaxMaskBytes = size_t{200} << 10;  // beside what ordering the lists takes
template <typename Take>
void with_mask_shape(const TableShape& s, const Take& take) {
  const auto of_dim = [&](auto eight, auto two) {
    if (eight.bytes(s) <= kMaxMaskBytes) return take(eight);
    if (two.bytes(s) <= kMaxMaskBytes) return take(two);
    refuse_cells(s);
  };
  if (s.d_qk == 64) return of_dim(CellsShape<8, 64, false>{}, CellsShape<2, 64, false>{});
  of_dim(CellsShape<8, 128, false>{}, CellsShape<2, 128, false>{});
}

}  // namespace adaattn::cuda
