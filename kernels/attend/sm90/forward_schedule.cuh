// Which tile a CTA computes next, and which key blocks a tile visits.
#pragma once

#include "attend/sm90/forward_traits.cuh"

namespace adaattn::cuda::sm90 {

// sequence_of of the shared parameters in 32 bits: the producer has 24 registers.
__device__ __forceinline__ TileRange read_sequence(const ForwardArgs& args, int batch) {
  TileRange r{args.seqlen_q, args.seqlen_k, 0, 0, 0, 0, 0};
  if (const int32_t* starts = args.p.cu_seqlens_q; starts != nullptr) {
    r.q_start = min(max(starts[batch], 0), args.total_q);
    r.len_q = min(min(max(starts[batch + 1], r.q_start), args.total_q) - r.q_start, args.seqlen_q);
  }
  if (const int32_t* starts = args.p.cu_seqlens_k; starts != nullptr) {
    r.k_start = min(max(starts[batch], 0), args.total_k);
    r.len_k = min(min(max(starts[batch + 1], r.k_start), args.total_k) - r.k_start, args.seqlen_k);
  }
  if (args.p.seqused_k != nullptr) r.len_k = min(max(args.p.seqused_k[batch], 0), r.len_k);
  r.off = args.p.off_top_left ? 0 : r.len_k - r.len_q;
  return r;
}

// A row's query position.
template <class Traits>
__device__ __forceinline__ int position_of(const ForwardArgs& args, int row) {
  return Traits::kC.split ? row >> args.pack_shift : row;
}

// The first row of a tile in its sequence; below 0 where the first tile of those that are counted from the end has less
// than all of its warpgroups.
template <class Traits>
__device__ __forceinline__ int first_row(const Tile& tile) {
  if constexpr (Traits::kC.from_end) {
    return (tile.m_block - (Traits::kGroups - 1)) * kGroupRows;
  } else {
    return tile.m_block * Traits::kM;
  }
}

template <class Traits>
__device__ __forceinline__ TileRange tile_range(const ForwardArgs& args, const Tile& tile) {
  TileRange r = read_sequence(args, tile.batch);
  int first_key = 0, end_key = r.len_k;
  if constexpr (Traits::kC.masked) {
    const int first = first_row<Traits>(tile);
    const int m_start = position_of<Traits>(args, Traits::kC.from_end ? max(0, first) : first);
    const int m_last = min(position_of<Traits>(args, first + Traits::kM - 1), r.len_q - 1);
    if (args.window_right >= 0) end_key = min(end_key, max(0, m_last + r.off + args.window_right + 1));
    if (args.window_left >= 0) first_key = max(0, m_start + r.off - args.window_left);
  }
  r.n_max = (end_key + Traits::kN - 1) / Traits::kN;
  r.n_min = min(first_key / Traits::kN, r.n_max);
  if constexpr (Traits::kC.split) {
    const int part = (r.blocks() + args.splits - 1) / args.splits;
    r.n_min = min(r.n_min + tile.split * part, r.n_max);
    r.n_max = min(r.n_min + part, r.n_max);
  }
  return r;
}

// Run by all lanes of one warp. Tiles are numbered so that neighbours share K and V; masked kernels start with the
// longest rows of a section of heads and draw numbers from a counter, so that no SM is left with a long tile at the
// end.
template <class Traits>
class TileScheduler {
 public:
  __device__ __forceinline__ TileScheduler(const ForwardArgs& args, int lane) : args_(args), lane_(lane) {}

  __device__ __forceinline__ Tile first() { return decode(static_cast<int>(blockIdx.x)); }

  // Starts fetching the next number; its latency passes while the present tile is loaded. In dynamic instances run by
  // lane 0 alone. (nvcc makes of atomicAdd one for all lanes of the warp and waits for its result on the spot.)
  __device__ __forceinline__ void prefetch() {
    fetched_ = number_;
    if constexpr (Traits::kC.dynamic) {
      if (args_.counters != nullptr) {
        asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;" : "=r"(fetched_) : "l"(args_.counters) : "memory");
      }
    }
  }
  __device__ __forceinline__ Tile next() {
    if constexpr (Traits::kC.dynamic) fetched_ = __shfl_sync(~0u, fetched_, 0);
    return decode(fetched_ + static_cast<int>(gridDim.x));
  }

  // The last CTA to finish leaves the counters as it found them.
  __device__ __forceinline__ void finish() {
    if constexpr (Traits::kC.dynamic) {
      if (args_.counters != nullptr && lane_ == 0 && atomicAdd(args_.counters + 1, 1u) == gridDim.x - 1) {
        args_.counters[0] = 0;
        args_.counters[1] = 0;
      }
    }
  }

 private:
  __device__ __forceinline__ Tile decode(int number) {
    number_ = number;
    if constexpr (Traits::kC.split) {
      const int tile_number = number / args_.splits;
      Tile tile = decode_tile(tile_number);
      tile.split = number - tile_number * args_.splits;
      return tile;
    } else {
      return decode_tile(number);
    }
  }
  __device__ __forceinline__ Tile decode_tile(int number) {
    if (args_.p.cu_seqlens_q != nullptr) return decode_packed(number);
    Tile tile;
    if (number >= args_.num_tiles / (Traits::kC.split ? args_.splits : 1)) return tile;
    const int heads = args_.heads_q;
    int row;  // batch * heads + head
    if constexpr (Traits::kC.from_end) {
      row = decode_from_end(number, tile);
    } else if constexpr (Traits::kC.dynamic) {
      const int all = args_.batch * heads;
      const int per_section = args_.section_heads * args_.m_blocks;
      const int section = number / per_section, rest = number - section * per_section;
      const int first_row = section * args_.section_heads;
      const int rows = min(args_.section_heads, all - first_row);
      const int m_reversed = rest / rows;
      tile.m_block = args_.m_blocks - 1 - m_reversed;
      row = first_row + rest - m_reversed * rows;
    } else {
      row = number / args_.m_blocks;
      tile.m_block = number - row * args_.m_blocks;
    }
    tile.batch = row / heads;
    tile.head = row - tile.batch * heads;
    return tile;
  }

  // Sections as above, but the late tiles of the last pairs, short ones, come after all others and fill the gaps that a
  // section's end leaves: a last section of few pairs would end unevenly, and one of many does not stay in L2.
  __device__ __forceinline__ int decode_from_end(int number, Tile& tile) {
    const int all = args_.batch * args_.heads_q, before = all - args_.late_heads;
    int tiles = args_.m_blocks, skipped = 0, section_heads = args_.section_heads, first_row = 0, end_row = before;
    if (number >= before * tiles) {
      number -= before * tiles;
      first_row = before, end_row = all;
      tiles -= args_.late_tiles;
      if (number >= args_.late_heads * tiles) {
        number -= args_.late_heads * tiles;
        section_heads = args_.late_heads;
        skipped = tiles;
        tiles = args_.late_tiles;
      }
    }
    const int section = number / (section_heads * tiles), rest = number - section * section_heads * tiles;
    first_row += section * section_heads;
    const int rows = min(section_heads, end_row - first_row), m_reversed = rest / rows;
    tile.m_block = (args_.seqlen_q - 1) / kGroupRows - (m_reversed + skipped) * Traits::kGroups;
    return first_row + rest - m_reversed * rows;
  }

  // Lengths are known to the device only: 32 sequences at a time, a prefix sum of their tile counts. Numbers only grow,
  // so the walk continues where it stopped.
  __device__ __forceinline__ Tile decode_packed(int number) {
    const int heads = args_.heads_q, batches = args_.batch;
    for (; first_batch_ < batches; first_batch_ += 32) {
      const int b = first_batch_ + lane_;
      int count = 0, len_q = 0;
      if (b < batches) {
        len_q = read_sequence(args_, b).len_q;
        if constexpr (Traits::kC.split) len_q <<= args_.pack_shift;
        count = (len_q + Traits::kM - 1) / Traits::kM * heads;
      }
      int end = count;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, end, step);
        if (lane_ >= step) end += other;
      }
      const int total = __shfl_sync(~0u, end, 31);
      const int rest = number - first_number_;
      if (rest < total) {
        const int owner = __ffs(static_cast<int>(__ballot_sync(~0u, rest < end))) - 1;
        const int tiles = __shfl_sync(~0u, count, owner);
        const int inside = rest - (__shfl_sync(~0u, end, owner) - tiles);
        Tile tile;
        const int m_reversed = inside / heads;
        if constexpr (Traits::kC.from_end) {
          tile.m_block = (__shfl_sync(~0u, len_q, owner) - 1) / kGroupRows - m_reversed * Traits::kGroups;
        } else {
          tile.m_block = tiles / heads - 1 - m_reversed;
        }
        tile.head = inside - m_reversed * heads;
        tile.batch = first_batch_ + owner;
        return tile;
      }
      first_number_ += total;
    }
    return Tile{};
  }

  const ForwardArgs& args_;
  int lane_;
  int number_ = 0, fetched_ = 0;
  int first_batch_ = 0, first_number_ = 0;  // packed walk: sequences before and their tiles
};

}  // namespace adaattn::cuda::sm90
