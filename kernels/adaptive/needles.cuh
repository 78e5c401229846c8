// The search for needles: decide/needles.h. Included by units that are built without contraction: the same tables give
// the same bits as the host's code.
#pragma once

#include "adaptive/cells.cuh"
#include "decide/needles.h"

namespace adaattn::cuda {

constexpr int kBlocksOfTile = 2;  // a product's 8 columns are half of a key tile
constexpr int kCellsOfBlock = kCells / kBlocksOfTile;
static_assert(2 * decide::kNeedleRowsOfTile == 16 && kCellsOfBlock * decide::kNeedlesOfCell == 8, "a product's shape");

// limits[row]: of the needle rows of the CTA's query tiles, of which `count` exist; infinite where there is no query.
template <int kTiles>
__device__ __forceinline__ void needle_limits(const AnalyzeArgs& args, int b, int head, int first, int count,
                                              const Sequence& seq, const decide::CellRow* cells, float* limits) {
  const TableShape& s = args.shape;
  const int row = static_cast<int>(threadIdx.x);
  if (row >= kTiles * decide::kNeedleRowsOfTile) return;
  const int64_t row0 = ((int64_t{b} * s.heads_q + head) * s.query_tiles + first) * decide::kNeedleRowsOfTile;
  const bool there = row < count * decide::kNeedleRowsOfTile &&
                     int64_t{row} * decide::kNeedleRows < seq.len_q - int64_t{first} * decide::kTileQ;
  limits[row] = there ? decide::needle_limit(cells[row * decide::kNeedleRows / decide::kCell],
                                             args.tables.needle_query_scales[row0 + row], args.log2_needle)
                      : INFINITY;
}

// Rows of kTiles query tiles against the needles of key tiles; all warps go over all blocks together. A product's 16
// rows are two query tiles. Bytes as in Cells: a lane reads a quarter of a needle's. kDeep: a whole key tile at a time,
// where there are registers for two.
template <int kTiles, int kDim, bool kDeep>
class NeedleSearch {
 public:
  static constexpr int kProducts = (kTiles + 1) / 2, kWords = kDim / 16;

  // limits: of the rows, needle_limits().
  __device__ __forceinline__ NeedleSearch(const AnalyzeArgs& args, int b, int head, int first, const float* limits) {
    const TableShape& s = args.shape;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int64_t row0 = ((int64_t{b} * s.heads_q + head) * s.query_tiles + first) * decide::kNeedleRowsOfTile;
    const int64_t cell0 = (int64_t{b} * s.heads_kv + head / s.group) * key_cells_of_unit(s);
    keys_ = reinterpret_cast<const uint4*>(args.tables.needle_keys +
                                           (cell0 * decide::kNeedlesOfCell + lane / 4) * kDim + lane % 4 * 16);
    // Of columns 2 (lane % 4) and the next.
    key_scales_ = args.tables.needle_key_scales + cell0 + lane % 4 * 2 / decide::kNeedlesOfCell;
#pragma unroll
    for (int m = 0; m < kProducts; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = (2 * m + r) * decide::kNeedleRowsOfTile + lane / 4;
        limit_[m][r] = limits[row];
        // Rows without a limit need no bytes either: those beyond the last tile.
        const bool there = limit_[m][r] != INFINITY;
        const auto* from =
            reinterpret_cast<const uint4*>(args.tables.needle_queries + (row0 + row) * kDim + lane % 4 * 16);
#pragma unroll
        for (int i = 0; i < kWords / 4; ++i) {
          const uint4 x = there ? __ldg(from + 4 * i) : make_uint4(0, 0, 0, 0);
          a_[m][2 * i][r] = x.x;
          a_[m][2 * i][2 + r] = x.y;
          a_[m][2 * i + 1][r] = x.z;
          a_[m][2 * i + 1][2 + r] = x.w;
        }
      }
    }
  }

  // found(q, tile): a key tile of [begin, end) with a needle that some row of query tile q has.
  template <typename Found>
  __device__ __forceinline__ void each(int begin, int end, const Found& found) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const auto tell = [&](uint32_t misses, int tile) {
      const uint32_t hits = __reduce_or_sync(kAll, ~misses);
      if (lane < kTiles && (hits >> (2 * kProducts - 1 - lane) & 1) != 0) found(lane, tile);
    };
    if constexpr (!kDeep) {
      // Two blocks are on their way beside the one at hand.
      const int last = end * kBlocksOfTile, first = begin * kBlocksOfTile + static_cast<int>(threadIdx.x) / 32;
      Block words, next, after;
      fetch(first, last, next);
      fetch(first + kDecideWarps, last, after);
#pragma unroll 1
      for (int block = first; block < last; block += kDecideWarps) {
        words = next;
        next = after;
        fetch(block + 2 * kDecideWarps, last, after);
        tell(search(words), block / kBlocksOfTile);
      }
      return;
    }
    // A tile is on its way beside the one at hand.
    Block blocks[kBlocksOfTile], next[kBlocksOfTile];
    const auto fetch_tile = [&](int tile) {
#pragma unroll
      for (int i = 0; i < kBlocksOfTile; ++i) fetch(tile * kBlocksOfTile + i, end * kBlocksOfTile, next[i]);
    };
    int tile = begin + static_cast<int>(threadIdx.x) / 32;
    fetch_tile(tile);
#pragma unroll 1
    for (; tile < end; tile += kDecideWarps) {
      uint32_t misses = ~0u;
#pragma unroll
      for (int i = 0; i < kBlocksOfTile; ++i) blocks[i] = next[i];
      fetch_tile(tile + kDecideWarps);
#pragma unroll
      for (int i = 0; i < kBlocksOfTile; ++i) misses &= search(blocks[i]);
      tell(misses, tile);
    }
  }

 private:
  // What a lane needs of a block.
  struct Block {
    uint4 words[kWords / 4];
    float scale;
  };
  __device__ __forceinline__ void fetch(int block, int last, Block& to) const {
    if (block >= last) return;
    const uint4* const from = keys_ + int64_t{block} * (8 * kDim / 16);
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) to.words[i] = __ldg(from + 4 * i);
    to.scale = __ldg(key_scales_ + int64_t{block} * kCellsOfBlock);
  }

  // Bit q of the query tiles, the first one the highest of 2 kProducts: no row of the lane's has one of its needles.
  __device__ __forceinline__ uint32_t search(const Block& keys) const {
    uint32_t misses = 0;
#pragma unroll
    for (int m = 0; m < kProducts; ++m) {
      int c[4] = {};
#pragma unroll
      for (int i = 0; i < kWords / 4; ++i) {
        mma_s8(c, a_[m][2 * i], keys.words[i].x, keys.words[i].y);
        mma_s8(c, a_[m][2 * i + 1], keys.words[i].z, keys.words[i].w);
      }
      // A lane's two needles are of one cell: the larger product has the larger score.
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float dot = decide::float_of_integer(max(c[2 * r], c[2 * r + 1]));
        misses = __funnelshift_l(__float_as_uint(decide::needle_margin(dot, keys.scale, limit_[m][r])), misses, 1);
      }
    }
    return misses;
  }

  const uint4* keys_;
  const float* key_scales_;
  uint32_t a_[kProducts][kWords / 2][4];
  float limit_[kProducts][2];
};

}  // namespace adaattn::cuda
