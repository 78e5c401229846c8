// The warps that feed the mask-walking kernels: the list's draws query tiles from the work list, one lane of the
// producer's loads the key tiles whose bits are set and the centroids of the others.
#pragma once

#include "attend/sm90/forward_producer.cuh"
#include "attend/sm90/walk.h"
#include "attend/sm90/walk_traits.cuh"

namespace adaattn::cuda::sm90 {

// One box of a rank-4 tensor into the L2 cache.
__device__ __forceinline__ void tma_prefetch_4d(const CUtensorMap* map, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];" ::"l"(map), "r"(c0), "r"(c1),
               "r"(c2), "r"(c3)
               : "memory");
}

// A query tile's number, range and mask are a chain of reads from memory, so they are fetched while the tile before is
// still at work; as late as hides the chain, for who draws early takes from others that end sooner. The rows of tiles
// that see no keys are answered on the way. All lanes of a warp run it.
template <class Traits>
class WalkList {
 public:
  __device__ __forceinline__ WalkList(const WalkArgs& args, typename Traits::Shared& shared)
      : walk_(args), tables_(args.tables), shared_(shared), lane_(static_cast<int>(threadIdx.x) % 32) {}

  __device__ __forceinline__ void run() {
    const uint32_t count = *walk_.work_count;
    uint32_t* const counters = walk_.forward.counters;
    uint32_t number = blockIdx.x;
    for (int i = 0;;) {
      const bool more = number < count;
      if (put(i, more, more ? static_cast<int>(walk_.work[number]) : 0)) {
        if (!more) break;
        mbarrier_wait(&shared_.draw, i & 1);
        ++i;
      }
      if (lane_ == 0) number = atomicAdd(counters, 1u) + gridDim.x;
      number = __shfl_sync(~0u, number, 0);
    }
    // The last CTA to finish leaves the counters as it found them.
    if (lane_ == 0 && atomicAdd(counters + 1, 1u) == gridDim.x - 1) {
      counters[0] = 0;
      counters[1] = 0;
    }
  }

 private:
  // False: the tile has no keys, and is done with.
  __device__ __forceinline__ bool put(int i, bool more, int item) {
    WalkTile walk;
    const int slot = i % 2;
    uint64_t words[2];
    const uint64_t* const mask = tables_.mask + int64_t{item} * tables_.shape.mask_words;
    const int mask_words = min(tables_.shape.mask_words, kListWords);
    if (more) {
      const TableShape& shape = tables_.shape;
      walk.item = item;
      const int row = item / shape.wave_tiles;
      walk.m_block = item - row * shape.wave_tiles + tables_.first_tile;
      walk.batch = row / shape.heads_q;
      walk.head = row - walk.batch * shape.heads_q;
      const decide::TileRow range = tables_.tile_range[int64_t{row} * shape.query_tiles + walk.m_block];
      walk.kept = tables_.kept[item];
#pragma unroll
      for (int w = 0; w < 2; ++w) words[w] = w < mask_words ? mask[w] : 0;
      const TileRange sequence = read_sequence(walk_.forward, walk.batch);
      if (range.begin >= range.end) {
        answer_empty(walk, sequence);
        return false;
      }
      prefetch_q(walk, sequence);
      walk.begin = range.begin;
      walk.end = range.end;
      // Narrow windows leave no tile that every row sees whole.
      walk.full_begin = max(range.full_begin, range.begin);
      walk.full_end = min(range.full_end, range.end);
      if (walk.full_begin >= walk.full_end) walk.full_begin = walk.full_end = range.begin;
    }
    mbarrier_wait(&shared_.tile_empty[slot], (i / 2 & 1) ^ 1);
    if (lane_ == 0) {
      shared_.walk[slot] = walk;
      if (more) {
#pragma unroll
        for (int w = 0; w < 2; ++w) shared_.mask[slot][w] = words[w];
        for (int w = 2; w < mask_words; ++w) shared_.mask[slot][w] = mask[w];
      }
      mbarrier_arrive(&shared_.tile_full[slot]);
    }
    __syncwarp();
    return true;
  }

  // O = 0, LSE that of the sink alone.
  __device__ __forceinline__ void answer_empty(const WalkTile& walk, const TileRange& sequence) const {
    const AttnParams& p = walk_.forward.p;
    const int first = walk.m_block * Traits::kM, rows = min(Traits::kM, sequence.len_q - first);
    uint8_t* const o = static_cast<uint8_t*>(p.o.data) + 2 * (walk.batch * p.o.stride_b + walk.head * p.o.stride_h);
    for (int i = lane_ / 16; i < rows; i += 2) {
      const int64_t position = sequence.q_start + first + i;
      reinterpret_cast<uint4*>(o + 2 * position * p.o.stride_s)[lane_ % 16] = make_uint4(0, 0, 0, 0);
      if (p.lse.data != nullptr && lane_ % 16 == 0) {
        static_cast<float*>(
            p.lse.data)[walk.batch * p.lse.stride_b + position * p.lse.stride_s + walk.head * p.lse.stride_h] =
            p.sinks != nullptr ? p.sinks[walk.head * p.sinks_stride] : -INFINITY;
      }
    }
    if (Traits::kFar && walk_.far_share != nullptr && lane_ < kWalkShares)
      walk_.far_share[int64_t{walk.item} * kWalkShares + lane_] = 0;
    if constexpr (Traits::kProbe) {
      if (lane_ == 0) walk_.found[walk.item] = 0;
    }
  }

  // Its rows are read but once, and there is room for them only when the tile before is done with its own: the way from
  // memory would be waited for.
  __device__ __forceinline__ void prefetch_q(const WalkTile& walk, const TileRange& sequence) const {
    const ForwardArgs& args = walk_.forward;
    const int first = sequence.q_start + walk.m_block * Traits::kM;
    const int batch = args.p.cu_seqlens_q != nullptr ? 0 : walk.batch;
    if (lane_ >= Traits::kGroups * Traits::kChunks) return;
    tma_prefetch_4d(&args.q_map, lane_ % Traits::kChunks * Traits::kChunk, first + lane_ / Traits::kChunks * kGroupRows,
                    walk.head, batch);
  }

  const WalkArgs& walk_;
  const AdaptiveTables& tables_;
  typename Traits::Shared& shared_;
  const int lane_;
};

// In lane 0 of the producer's warp: every query tile that the list's hands over, with the first words of its mask.
template <class Shared, class Load>
__device__ __forceinline__ void each_walk_tile(Shared& shared, const Load& load) {
  for (int i = 0;; ++i) {
    // The slot is not written again before the draw that load() lets go of in the tile after this one.
    const int slot = i % 2;
    mbarrier_wait(&shared.tile_full[slot], i / 2 & 1);
    const WalkTile walk = shared.walk[slot];
    if (walk.m_block < 0) break;
    load(walk, shared.mask[slot]);
  }
}

// The key tiles that a query tile keeps, in the order in which they are computed.
template <class Load>
__device__ __forceinline__ void each_kept_tile(const WalkTile& walk, const uint64_t* first_words, const uint64_t* mask,
                                               const Load& load) {
  // The sequence's first tile comes as soon as no limits apply: where it draws attention, the maxima of later blocks
  // stay under its own. Full masks keep the exact kernels' order.
  const int first_whole = min(walk.full_end, walk.end - 1) - 1;
  const bool sink_early =
      walk.kept < walk.end - walk.begin && walk.full_begin == 0 && first_whole > 0 && (first_words[0] & 1) != 0;
  bool pending = sink_early;
  for (int word = (walk.end - 1) / 64; word >= walk.begin / 64; --word) {
    for (uint64_t bits = word < kListWords ? first_words[word] : mask[word]; bits != 0;) {
      const int n = 63 - __clzll(static_cast<long long>(bits));
      bits ^= uint64_t{1} << n;
      const int tile = word * 64 + n;
      if (pending && tile <= first_whole) {
        load(0);
        pending = false;
      }
      if (tile > 0 || !sink_early) load(tile);
    }
  }
}

template <class Traits>
class WalkProducer : Producer<Traits> {
  using Loads = Producer<Traits>;
  using Loads::args_, Loads::shared_, Loads::keep_, Loads::stream_, Loads::q_count_, Loads::k_count_;

 public:
  __device__ __forceinline__ WalkProducer(const WalkArgs& args, typename Traits::Shared& shared)
      : Loads(args.forward, shared), walk_(args), tables_(args.tables) {}

  __device__ __forceinline__ void run() {
    each_walk_tile(shared_, [&](const WalkTile& walk, const uint64_t* words) { load_tile(walk, words); });
  }

 private:
  // The far field first, or behind a probe last. Order of arrival as in the forward kernels: K of a block ahead of V of
  // the block before it.
  __device__ __forceinline__ void load_tile(const WalkTile& walk, const uint64_t* first_words) {
    const int head_kv = walk.head / args_.group_size, batch = walk.batch;
    const TileRange range = read_sequence(args_, batch);
    const uint64_t* mask = tables_.mask + int64_t{walk.item} * tables_.shape.mask_words;
    const int head_k = head_kv * args_.k_head_step, batch_k = batch * args_.k_batch_step;
    const int head_v = head_kv * args_.v_head_step, batch_v = batch * args_.v_batch_step;
    const int v_start = Traits::kLowRank ? 0 : range.k_start;  // V in the basis is not packed
    constexpr int kQueries = -1, kNothing = -2;
    int before = kQueries;  // block whose V is yet to be loaded
    bool far_before = false;
    const auto load_other = [&] {
      if constexpr (Traits::kProbe) {
        if (before == kNothing) return;
      }
      if (before < 0) {
        load_queries(walk, range.q_start + walk.m_block * Traits::kM, args_.p.cu_seqlens_q != nullptr ? 0 : batch,
                     int64_t{batch} * tables_.shape.heads_kv + head_kv);
      } else if (far_before) {
        Loads::load_v(walk_.group_v_map, before * Traits::kN, head_kv, batch);
      } else {
        Loads::load_v(args_.v_map, v_start + before * Traits::kN, head_v, batch_v);
      }
    };
    [[maybe_unused]] const auto load_centroids = [&] {
      if constexpr (Traits::kFar) {
        int block = walk.full_begin / kFarTiles;
        FarBlock far, next;
        find_skipped(walk, mask, block, far);
        for (;; far = next) {
          int next_block = block + 1;
          far.last = !find_skipped(walk, mask, next_block, next);
          Loads::load_k(walk_.group_k_map, 0, block * Traits::kN, head_kv, batch, [&](int s) { shared_.far[s] = far; });
          load_other();
          Loads::load_k(walk_.group_k_map, kWalkDim, block * Traits::kN, head_kv, batch, [](int) {});
          before = block;
          far_before = true;
          block = next_block;
          if (far.last) break;
        }
      }
    };
    if constexpr (Traits::kFar && !Traits::kProbe) {
      if (walk_.far_field && walk.kept < walk.end - walk.begin) load_centroids();
    }
    const bool sweeps = Traits::kProbe && walk.kept < walk.end - walk.begin;
    int left = walk.kept;
    each_kept_tile(walk, first_words, mask, [&](int tile) {
      if (--left == 0 && !sweeps) mbarrier_arrive(&shared_.draw);
      Loads::load_k(args_.k_map, 0, range.k_start + tile * Traits::kN, head_k, batch_k, [](int) {});
      load_other();
      before = tile;
      far_before = false;
      // Behind what the tile's first product takes, which consumers may wait for before they store the tile before.
      if constexpr (Traits::kRemainder) {
        if (left == 0) load_remainder(walk.item);
      }
    });
    load_other();
    if constexpr (Traits::kProbe) {
      before = kNothing;
      int rest = walk.end - walk.begin - walk.kept, found_tiles = 0;
      int word = (walk.full_end - 1) / 64;
      uint64_t bits = skipped_bits(walk, first_words, mask, word);
      while (rest > 0) {
        const int count = min(rest, kSweepTiles);
        rest -= count;
        for (int i = 0; i < count; ++i) {
          while (bits == 0) bits = skipped_bits(walk, first_words, mask, --word);
          const int n = 63 - __clzll(static_cast<long long>(bits));
          bits ^= uint64_t{1} << n;
          const int tile = word * 64 + n;
          shared_.swept[i] = tile;
          if (rest == 0 && i + 1 == count) mbarrier_arrive(&shared_.draw);
          if constexpr (Traits::kLowProbe)
            load_low_k(i, count, tile * Traits::kN, head_kv, batch);
          else
            Loads::load_k(args_.k_map, 0, range.k_start + tile * Traits::kN, head_k, batch_k, [](int) {});
        }
        const int slot = sweep_count_ & 1;
        mbarrier_wait(&shared_.found_full, slot);
        const uint64_t found = shared_.found[slot];
        // Every warp is done with the sweep before, whose tiles are computed.
        shared_.found[slot ^ 1] = 0;
        ++sweep_count_;
        for (uint64_t f = found; f != 0; f &= f - 1) {
          const int tile = shared_.swept[__ffsll(static_cast<long long>(f)) - 1];
          Loads::load_k(args_.k_map, 0, range.k_start + tile * Traits::kN, head_k, batch_k, [](int) {});
          load_other();
          before = tile;
          far_before = false;
          atomicOr(reinterpret_cast<unsigned long long*>(&walk_.mask[mask - tables_.mask + tile / 64]),
                   1ull << tile % 64);
        }
        load_other();
        before = kNothing;
        found_tiles += __popcll(found);
      }
      walk_.found[walk.item] = found_tiles;
      if (walk_.far_field && found_tiles < walk.end - walk.begin - walk.kept) {
        load_centroids();
        load_other();
      }
    }
    if constexpr (Traits::kLowRank) load_basis(head_kv, batch);
  }

  // Of a word of the mask, the tiles that are not kept.
  __device__ __forceinline__ uint64_t skipped_bits(const WalkTile& walk, const uint64_t* first_words,
                                                   const uint64_t* mask, int word) const {
    return whole_tiles(walk, ~(word < kListWords ? first_words[word] : mask[word]), word);
  }

  // The skipped tiles of the first block of centroids from `block` on that has any; false: none is left.
  __device__ __forceinline__ bool find_skipped(const WalkTile& walk, const uint64_t* mask, int& block,
                                               FarBlock& far) const {
    for (; block * kFarTiles < walk.full_end; ++block) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int word = 2 * block + i;
        // The probe sets bits.
        const uint64_t bits = 64 * word >= walk.full_end ? 0 : Traits::kProbe ? ~__ldcg(mask + word) : ~mask[word];
        far.skipped[i] = whole_tiles(walk, bits, word);
      }
      if ((far.skipped[0] | far.skipped[1]) != 0) return true;
    }
    return false;
  }
  // Of bits of a word, those of tiles that every row sees whole.
  __device__ __forceinline__ uint64_t whole_tiles(const WalkTile& walk, uint64_t bits, int word) const {
    const int skip = walk.full_begin - 64 * word, room = walk.full_end - 64 * word;
    if (skip > 0) bits = skip < 64 ? bits & ~uint64_t{0} << skip : 0;
    if (room < 64) bits = room > 0 ? bits & ~(~uint64_t{0} << room) : 0;
    return bits;
  }

  // Q, and for the remainder K's mean beside the queries of each group, which is let go of with them, as is what a
  // probe reads of them: it stands where the squares for the centroids come later.
  __device__ __forceinline__ void load_queries(const WalkTile& walk, int first_row, int batch, int64_t unit) {
    const int parity = q_count_++ & 1;
#pragma unroll
    for (int group = 0; group < Traits::kGroups; ++group) {
      mbarrier_wait(&shared_.q_empty[group], parity ^ 1);
      const bool in_basis = Traits::kLowProbe && walk.kept < walk.end - walk.begin;
      mbarrier_arrive_expect_tx(&shared_.q_full[group], Traits::kQBytes +
                                                            (Traits::kRemainder ? Traits::kMeanBytes : 0) +
                                                            (in_basis ? kGroupRows * Traits::kProbeWidth : 0));
      if constexpr (Traits::kLowProbe) {
        if (in_basis)
          tma_load_4d(shared_.q_squared[group], &walk_.probe_q_map, &shared_.q_full[group], stream_, 0,
                      walk.m_block * Traits::kM + group * kGroupRows, walk.head, walk.batch);
      }
#pragma unroll
      for (int c = 0; c < Traits::kChunks; ++c) {
        tma_load_4d(shared_.q[group] + c * kGroupRows * Traits::kWidth, &args_.q_map, &shared_.q_full[group], stream_,
                    c * Traits::kChunk, first_row + group * kGroupRows, walk.head, batch);
      }
      if constexpr (Traits::kRemainder) {
        bulk_load(shared_.mean_k[group], tables_.mean_k + unit * (Traits::kMeanBytes / 2), Traits::kMeanBytes,
                  &shared_.q_full[group], keep_);
      }
    }
  }
  // Of tile i of a sweep of so many what the probe reads.
  __device__ __forceinline__ void load_low_k(int i, int count, int row, int head_kv, int batch) {
    constexpr int kTogether = Traits::kSweptTogether, kBytes = Traits::kSweptBytes;
    const int stage = k_count_ % Traits::kKStages, place = i % kTogether;
    if (place == 0) {
      mbarrier_wait(&shared_.k_empty[stage], (k_count_ / Traits::kKStages & 1) ^ 1);
      mbarrier_arrive_expect_tx(&shared_.k_full[stage], min(count - i, kTogether) * kBytes);
    }
    tma_load_4d(shared_.k[stage] + place * kBytes, &walk_.probe_k_map, &shared_.k_full[stage], keep_, 0, row, head_kv,
                batch);
    if (place == kTogether - 1 || i + 1 == count) ++k_count_;
  }
  __device__ __forceinline__ void load_remainder(int item) {
    constexpr uint32_t kBytes = kRemainderWidth * sizeof(float);
    mbarrier_wait(&shared_.remainder_empty, (remainder_count_++ & 1) ^ 1);
    mbarrier_arrive_expect_tx(&shared_.remainder_full, kBytes);
    bulk_load(shared_.remainder, tables_.remainder + int64_t{item} * kRemainderWidth, kBytes, &shared_.remainder_full,
              stream_);
  }

  __device__ __forceinline__ void load_basis(int head_kv, int batch) {
    mbarrier_wait(&shared_.basis_empty, (basis_count_++ & 1) ^ 1);
    mbarrier_arrive_expect_tx(&shared_.basis_full, Traits::kBasisBytes);
#pragma unroll
    for (int c = 0; c < Traits::kChunksV; ++c) {
      tma_load_4d(shared_.basis + c * kWalkDim * Traits::kWidthV, &walk_.basis_map, &shared_.basis_full, keep_,
                  c * Traits::kChunkV, 0, head_kv, batch);
    }
  }

  const WalkArgs& walk_;
  const AdaptiveTables& tables_;
  uint32_t basis_count_ = 0, remainder_count_ = 0, sweep_count_ = 0;
};

}  // namespace adaattn::cuda::sm90
