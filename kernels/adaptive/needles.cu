// Adds to the masks of a wave the key tiles in which a needle holds its share of a row: decide/needles.h. Built without
// contraction: the same tables give the same bits as the host's code.
#include <algorithm>
#include <cmath>

#include "adaptive/cells.cuh"
#include "adaptive/sample.h"
#include "adaptive/stage_clock.cuh"
#include "common/ptx.cuh"
#include "decide/needles.h"

namespace adaattn::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTiles = 8;              // query tiles of a CTA
constexpr int kProducts = kTiles / 2;  // of 16 rows, two query tiles each
constexpr int kBlocksOfTile = 2;       // a product's 8 columns are half of a key tile
constexpr int kCellsOfBlock = kCells / kBlocksOfTile;
static_assert(2 * decide::kNeedleRowsOfTile == 16 && kCellsOfBlock * decide::kNeedlesOfCell == 8, "a product's shape");

// Scores of a CTA's query tiles against the needles of key tiles; all warps go over all blocks together. Bytes as in
// Cells: a lane reads a quarter of a needle's, wherever they stand in the inner dimension.
template <int kDim>
class NeedleScores {
 public:
  static constexpr int kWords = kDim / 16;

  __device__ __forceinline__ NeedleScores(const AnalyzeArgs& args, int b, int head, int first, int count) {
    const TableShape& s = args.shape;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int64_t row0 = ((int64_t{b} * s.heads_q + head) * s.query_tiles + first) * decide::kNeedleRowsOfTile;
    const int64_t cell0 = (int64_t{b} * s.heads_kv + head / s.group) * key_cells_of_unit(s);
    keys_ = reinterpret_cast<const uint4*>(args.tables.needle_keys +
                                           (cell0 * decide::kNeedlesOfCell + lane / 4) * kDim + lane % 4 * (kDim / 4));
    // Of columns 2 (lane % 4) and the next.
    key_scales_ = args.tables.needle_key_scales + cell0 + lane % 4 * 2 / decide::kNeedlesOfCell;
#pragma unroll
    for (int m = 0; m < kProducts; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const bool there = 2 * m + r < count;
        const int64_t row = row0 + (2 * m + r) * decide::kNeedleRowsOfTile + lane / 4;
        scale_[m][r] = there ? args.tables.needle_query_scales[row] : 0.0f;
        const auto* from =
            reinterpret_cast<const uint4*>(args.tables.needle_queries + row * kDim + lane % 4 * (kDim / 4));
#pragma unroll
        for (int i = 0; i < kWords / 4; ++i) {
          const uint4 x = there ? __ldg(from + i) : make_uint4(0, 0, 0, 0);
          a_[m][2 * i][r] = x.x;
          a_[m][2 * i][2 + r] = x.y;
          a_[m][2 * i + 1][r] = x.z;
          a_[m][2 * i + 1][2 + r] = x.w;
        }
      }
    }
  }

  // take(m, block, scores) for each block of the key tiles [begin, end): of the lane's rows in query tiles 2 m and
  // 2 m + 1, two needles.
  template <typename Take>
  __device__ __forceinline__ void each(int begin, int end, const Take& take) const {
    const int last = end * kBlocksOfTile;
    uint4 next[kWords / 4];
    float next_scale;
    const auto fetch = [&](int block) {
      if (block >= last) return;
      const uint4* const from = keys_ + int64_t{block} * (8 * kDim / 16);
#pragma unroll
      for (int i = 0; i < kWords / 4; ++i) next[i] = __ldg(from + i);
      next_scale = __ldg(key_scales_ + int64_t{block} * kCellsOfBlock);
    };
    int block = begin * kBlocksOfTile + static_cast<int>(threadIdx.x) / 32;
    fetch(block);
    for (; block < last; block += kWarps) {
      uint4 words[kWords / 4];
#pragma unroll
      for (int i = 0; i < kWords / 4; ++i) words[i] = next[i];
      const float scale = next_scale;
      fetch(block + kWarps);
#pragma unroll
      for (int m = 0; m < kProducts; ++m) {
        int c[4] = {};
#pragma unroll
        for (int i = 0; i < kWords / 4; ++i) {
          mma_s8(c, a_[m][2 * i], words[i].x, words[i].y);
          mma_s8(c, a_[m][2 * i + 1], words[i].z, words[i].w);
        }
        float scores[2][2];
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[i / 2][i % 2] = decide::needle_score(c[i], scale_[m][i / 2], scale);
        take(m, block, scores);
      }
    }
  }

 private:
  const uint4* keys_;
  const float* key_scales_;
  uint32_t a_[kProducts][kWords / 2][4];
  float scale_[kProducts][2];
};

// found: words of bits of the key tiles, [kTiles][2 mask_words].
template <int kDim>
__global__ __launch_bounds__(kThreads, 2) void needles_kernel(const __grid_constant__ AnalyzeArgs args,
                                                              int first_tile) {
  extern __shared__ uint32_t found[];
  launch_dependents();
  wait_for_previous_grid();
  const TableShape& s = args.shape;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  // The masks' stamp was too early: the last CTA to start comes close.
  if (args.state.clock != nullptr && thread == 0 && blockIdx.x == gridDim.x - 1 && blockIdx.y == gridDim.y - 1)
    args.state.clock->start[kAttendStage] = device_nanoseconds();
  const int head_index = static_cast<int>(blockIdx.x), head = head_index % s.heads_q, b = head_index / s.heads_q;
  if (args.tables.choice[head_index].dense) return;
  const int tiles = min(s.query_tiles - first_tile, s.wave_tiles);
  const int in_wave = first_of<kTiles>(tiles, static_cast<int>(blockIdx.y)), first = first_tile + in_wave;
  const int count = min(kTiles, tiles - in_wave), words = 2 * s.mask_words;
  for (int i = thread; i < kTiles * words; i += kThreads) found[i] = 0;
  int begin = s.key_tiles, end = 0;
#pragma unroll
  for (int q = 0; q < kTiles; ++q) {
    if (q >= count) break;
    const decide::TileRow row = args.tables.tile_range[int64_t{head_index} * s.query_tiles + first + q];
    // Only tiles that every row sees whole can have been left out.
    if (row.begin >= row.end || row.full_begin >= row.full_end) continue;
    begin = min(begin, max(row.begin, row.full_begin));
    end = max(end, min(row.end, row.full_end));
  }
  __syncthreads();
  if (begin >= end) return;
  const NeedleScores<kDim> scores_of(args, b, head, first, count);
  float limit[kProducts][2];
  const int64_t rows_there = sequence_of(args.p, b).len_q - int64_t{first} * decide::kTileQ;
#pragma unroll
  for (int m = 0; m < kProducts; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = (2 * m + r) * decide::kNeedleRowsOfTile + lane / 4;
      limit[m][r] = INFINITY;
      if (2 * m + r >= count || int64_t{row} * decide::kNeedleRows >= rows_there) continue;
      const int64_t block =
          (int64_t{head_index} * s.query_tiles + first) * kCells + row * decide::kNeedleRows / decide::kCell;
      limit[m][r] = decide::needle_limit(args.tables.cell_rows[block], args.log2_needle);
    }
  uint32_t hits = 0;
  scores_of.each(begin, end, [&](int m, int block, const float(&scores)[2][2]) {
    if (m == 0) hits = 0;
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (fmaxf(scores[r][0], scores[r][1]) >= limit[m][r]) hits |= 1u << (2 * m + r);
    if (m != kProducts - 1) return;
    hits = __reduce_or_sync(kAll, hits);
    const int tile = block / kBlocksOfTile;
    if (lane < kTiles && (hits >> lane & 1) != 0) atomicOr(&found[lane * words + tile / 32], 1u << tile % 32);
  });
  __syncthreads();
  if (warp >= count) return;
  const decide::TileRow row = args.tables.tile_range[int64_t{head_index} * s.query_tiles + first + warp];
  const int64_t item = int64_t{head_index} * s.wave_tiles + in_wave + warp;
  auto* const mask = reinterpret_cast<uint32_t*>(args.tables.mask + item * s.mask_words);
  int more = 0;
  for (int word = lane; word < words; word += 32) {
    const int low = max(0, max(row.begin, row.full_begin) - 32 * word),
              high = min(32, min(row.end, row.full_end) - 32 * word);
    if (low >= high) continue;
    const uint32_t inside = (~0u >> (32 - (high - low))) << low, before = mask[word];
    const uint32_t bits = found[warp * words + word] & inside & ~before;
    if (bits == 0) continue;
    mask[word] = before | bits;
    more += __popc(bits);
  }
  more = __reduce_add_sync(kAll, more);
  if (lane == 0) args.tables.kept[item] += more;
}

size_t found_bytes(const TableShape& s) { return sizeof(uint32_t) * 2 * kTiles * static_cast<size_t>(s.mask_words); }
constexpr int kMaxFoundBytes = 100 << 10;

}  // namespace

void prepare_needles() {
  const auto prepare = [](auto... kernels) {
    (check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernels), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                kMaxFoundBytes),
           "adaptive kernels"),
     ...);
  };
  prepare(&needles_kernel<64>, &needles_kernel<128>);
}

void add_needles(const AnalyzeArgs& args, int32_t first_tile, cudaStream_t stream) {
  const TableShape& s = args.shape;
  const int count = std::min(s.wave_tiles, s.query_tiles - first_tile);
  const dim3 grid(static_cast<unsigned>(args.p.batch * s.heads_q),
                  static_cast<unsigned>((count + kTiles - 1) / kTiles));
  const auto kernel = s.d_qk == 64 ? &needles_kernel<64> : &needles_kernel<128>;
  check(launch_grid_overlapped(kernel, grid, kThreads, found_bytes(s), stream, true, args, first_tile), "decide");
}

}  // namespace adaattn::cuda
