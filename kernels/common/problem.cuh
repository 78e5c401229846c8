// Which rows, keys and heads one CTA works on, and what it reports about the lengths it found in device memory.
#pragma once

#include "attend/kernel.h"
#include "common/pairs.h"
#include "core/sampling.h"
#include "decide/tile_mass.h"

namespace adaattn::cuda {

struct TileIndex {
  int m, head, batch, split;  // head counts groups of args.pack query heads
};

// blockIdx.x walks (sequence, head) pairs in sections that share the L2 cache, within a section the tiles of most work
// first; blockIdx.y is the split.
__device__ __forceinline__ TileIndex tile_index(const AttendArgs& args) {
  const int pairs = static_cast<int>(args.p.batch) * args.heads;
  const int per_section = args.section * args.m_tiles;
  const int section = blockIdx.x / per_section;
  const int rest = blockIdx.x - section * per_section;
  const int width = min(args.section, pairs - section * args.section);
  TileIndex t;
  t.m = rest / width;
  const int pair = section * args.section + rest - t.m * width;
  if (args.causal_order) t.m = args.m_tiles - 1 - t.m;
  t.batch = pair / args.heads;
  t.head = pair - t.batch * args.heads;
  t.split = blockIdx.y;
  return t;
}

// Row m of a tile as query position and head.
struct RowMap {
  int pack, first_head;
  __device__ __forceinline__ int position(int m) const { return pack == 1 ? m : m / pack; }
  __device__ __forceinline__ int head(int m) const { return pack == 1 ? first_head : first_head + m % pack; }
};

// Rows that are not all of a sequence's: row m of (sequence, head) is the query drawn from its stratum. Without a
// sample every query is a row.
struct SampledRows {
  uint64_t seed;
  int batch, first_head, heads, rows, len_q;
  bool sampled;
  __device__ __forceinline__ SampledRows(const AttendArgs& args, const TileIndex& tile, const Sequence& s)
      : seed(args.sample.seed),
        batch(tile.batch),
        first_head(tile.head),
        heads(static_cast<int>(args.p.heads_q)),
        len_q(static_cast<int>(s.len_q)),
        sampled(args.sample.rows > 0) {
    rows = sampled ? static_cast<int>(number_of_strata(args.sample.rows, s.len_q)) : len_q;
  }
  __device__ __forceinline__ int position(int m) const {
    return sampled ? static_cast<int>(sampled_row(seed, batch, first_head, heads, min(m, rows - 1), rows, len_q)) : m;
  }
  __device__ __forceinline__ int head(int) const { return first_head; }
};

// Key blocks of kN that a tile of query positions [q_first, q_last] walks: blocks in [begin, end), of which those
// outside [full_begin, full_end) need a mask. Keys outside [first_key, end_key) are seen by no row of the tile and are
// never read.
struct BlockRange {
  int begin, end, full_begin, full_end, first_key, end_key;
};

template <int kN>
__device__ __forceinline__ BlockRange block_range(const AttendArgs& args, const Sequence& s, int q_first, int q_last,
                                                  int split) {
  const int len_k = static_cast<int>(s.len_k), off = static_cast<int>(s.off);
  const int left = static_cast<int>(args.p.window_left), right = static_cast<int>(args.p.window_right);
  int low = 0, high = len_k, full_low = 0, full_high = len_k;
  if (left >= 0) {
    low = max(0, q_first + off - left);
    full_low = max(0, q_last + off - left);
  }
  if (right >= 0) {
    high = min(len_k, q_last + off + right + 1);
    full_high = min(len_k, q_first + off + right + 1);
  }
  BlockRange r;
  r.first_key = low;
  r.end_key = high;
  r.begin = low / kN;
  r.end = high > low ? (high + kN - 1) / kN : r.begin;
  r.full_begin = (full_low + kN - 1) / kN;
  r.full_end = full_high > 0 ? full_high / kN : 0;
  if (args.splits > 1) {
    const int per_split = (r.end - r.begin + args.splits - 1) / args.splits;
    r.begin = min(r.begin + split * per_split, r.end);
    r.end = min(r.begin + per_split, r.end);
  }
  return r;
}

// One CTA per sequence counts its rows and checks its lengths and block table; the first violation is kept.
static __device__ __noinline__ void report_sequence(const AttendArgs& args, int b, int thread, int threads) {
  const AttnParams& p = args.p;
  const Sequence s = sequence_of(p, b);
  Violation bad;
  if (thread == 0) {
    AttnParams lengths = p;
    lengths.block_table = nullptr;  // walked below, by all threads
    bad = check_sequence(lengths, b);
    atomicAdd(&args.record->query_rows, static_cast<unsigned long long>(s.len_q * p.heads_q));
    atomicAdd(&args.record->score_pairs, static_cast<unsigned long long>(visible_pairs(p, s) * p.heads_q));
  }
  int64_t tiles = 0;
  for (int64_t q = int64_t{thread} * decide::kTileQ; q < s.len_q; q += int64_t{threads} * decide::kTileQ)
    tiles += visible_tiles(p, s, q, decide::kTileQ, decide::kTileK);
  if (tiles > 0) atomicAdd(&args.record->tiles, static_cast<unsigned long long>(tiles * p.heads_q));
  if (p.block_table != nullptr) {
    // Several entries at once: a long table would otherwise take the CTA longer than its keys.
    constexpr int kAtOnce = 16;
    const int64_t pages = (s.len_k + p.page_size - 1) / p.page_size;
    const int32_t* const table = p.block_table + b * p.block_table_stride;
    for (int64_t first = thread; first < pages && bad.field == Field::kNone; first += kAtOnce * int64_t{threads}) {
      int32_t page[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) page[i] = first + i * threads < pages ? table[first + i * threads] : 0;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (bad.field == Field::kNone && (page[i] < 0 || page[i] >= p.num_pages))
          bad = {Field::kBlockTable, b * p.pages_per_seq + first + i * threads, page[i]};
    }
  }
  if (bad.field != Field::kNone) {
    const unsigned long long packed =
        static_cast<unsigned long long>(bad.field) << 32 | static_cast<uint32_t>(static_cast<int32_t>(bad.value));
    if (atomicCAS(&args.record->violation, 0ull, packed) == 0ull)
      args.record->violation_index = static_cast<unsigned long long>(bad.index);
  }
}

__device__ __forceinline__ bool reports(const AttendArgs& args, const TileIndex& t) {
  return args.record != nullptr && t.m == 0 && t.head == 0 && t.split == 0;
}

}  // namespace adaattn::cuda
