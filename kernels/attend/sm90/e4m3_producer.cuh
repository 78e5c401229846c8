// The producer warpgroup of the e4m3 kernels: warp 0 loads, the others transpose V.
#pragma once

#include "attend/sm90/e4m3_tail.cuh"
#include "attend/sm90/e4m3_traits.cuh"
#include "attend/sm90/forward_producer.cuh"
#include "common/ptx.cuh"

namespace adaattn::cuda::sm90 {

template <class Traits>
class E4m3Producer : Producer<Traits> {
  using Loads = Producer<Traits>;
  using Loads::args_, Loads::shared_, Loads::keep_, Loads::v_count_;
  static constexpr int kN = Traits::kN, kRawStages = Traits::kRawStages;

 public:
  __device__ __forceinline__ E4m3Producer(const E4m3Args& args, typename Traits::Shared& shared)
      : Loads(args, shared) {}

  __device__ __forceinline__ void run() {
    Loads::draw_tiles(
        [&](const Tile& tile, const TileRange& range, const auto& draw) { load_tile(tile, range, draw); });
    if (threadIdx.x == 0) {
      const int stage = v_count_ % kRawStages;
      mbarrier_wait(&shared_.raw_empty[stage], (v_count_ / kRawStages & 1) ^ 1);
      shared_.raw_valid[stage] = Traits::kNoMore;
      mbarrier_arrive(&shared_.raw_full[stage]);
    }
  }

 private:
  // V follows its K at once, for it has to be transposed.
  template <class Draw>
  __device__ __forceinline__ void load_tile(const Tile& tile, const TileRange& range, const Draw& draw) {
    const int head = tile.head / args_.group_size;
    // K and its factors, which are V's too.
    const auto load_k = [&](int n, [[maybe_unused]] const BlockFactors& factors) {
      Loads::load_k(args_.k_map, 0, range.k_start + n * kN, head * args_.k_head_step, tile.batch * args_.k_batch_step,
                    [&](int stage) {
                      if constexpr (Traits::kBlockFactors) shared_.k_factors[stage] = factors;
                    });
    };
    const auto load_all = [&](const auto& factors_of) {
      BlockFactors factors = factors_of(range.n_max - 1);
      load_k(range.n_max - 1, factors);
      Loads::load_q(tile, range, args_.p.cu_seqlens_q != nullptr ? 0 : tile.batch);
      if (range.blocks() == 1) draw();
      load_v(range, range.n_max - 1, head, tile.batch, factors);
      for (int n = range.n_max - 2; n >= range.n_min; --n) {
        if (n == range.n_min) draw();
        factors = factors_of(n);
        load_k(n, factors);
        load_v(range, n, head, tile.batch, factors);
      }
    };
    if constexpr (Traits::kBlockFactors) {
      FactorWalk walk(static_cast<const E4m3Args&>(args_), shared_.largest_factor, tile.batch, head, range.n_max - 1);
      load_all([&](int n) { return walk.next(n); });
    } else {
      load_all([](int) { return BlockFactors{}; });
    }
  }

  __device__ __forceinline__ void load_v(const TileRange& range, int n, int head, int batch,
                                         [[maybe_unused]] const BlockFactors& factors) {
    const int stage = v_count_ % kRawStages, key = n * kN;
    mbarrier_wait(&shared_.raw_empty[stage], (v_count_ / kRawStages & 1) ^ 1);
    // V beyond a sequence's end is readable memory and may hold NaN.
    shared_.raw_valid[stage] = args_.zero_v_tail ? range.len_k - key : kN;
    if constexpr (Traits::kBlockFactors) {
      if (factors.nothing) shared_.raw_valid[stage] = 0;
      shared_.raw_lead[stage] = factors.lead;
    }
    mbarrier_arrive_expect_tx(&shared_.raw_full[stage], Traits::kVBytes);
    tma_load_4d(shared_.raw[stage], &args_.v_map, &shared_.raw_full[stage], keep_, 0, range.k_start + key,
                head * args_.v_head_step, batch * args_.v_batch_step);
    ++v_count_;
  }
};

// Warps 1 to 3: V's tiles from rows of keys to lines of a head dimension, 32 keys each. Keys of a line lie in the order
// in which the accumulators of S are the 8-bit A operand: of 16 keys, lane t of a quad has 2t, 2t + 1, 2t + 8, 2t + 9.
// Lines 16 c to 16 c + 7 are the even columns of 16 c to 16 c + 15, the next eight the odd ones, for a matrix is
// stored without bank conflicts when its lines are neighbours.
template <class Traits>
class Transposer {
  static constexpr int kWarps = 3, kColumns = 16, kParts = Traits::kDv / kColumns;
  // Parts of a slab that are loaded before the first is stored.
  static constexpr int kTogether = Traits::kSlabs % kWarps == 0 ? 4 : 2, kUnits = kParts / kTogether;

 public:
  __device__ __forceinline__ Transposer(typename Traits::Shared& shared)
      : shared_(shared),
        warp_(__shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32 - 1, 0)),
        lane_(static_cast<int>(threadIdx.x) % 32) {}

  __device__ __forceinline__ void run() {
    for (uint32_t count = 0;; ++count) {
      const uint32_t stage = count % Traits::kVStages, from = count % Traits::kRawStages;
      mbarrier_wait(&shared_.raw_full[from], count / Traits::kRawStages & 1);
      const int valid = __shfl_sync(~0u, lane_ == 0 ? shared_.raw_valid[from] : 0, 0);
      if (valid == Traits::kNoMore) return;
      mbarrier_wait(&shared_.v_empty[stage], (count / Traits::kVStages & 1) ^ 1);
      const uint32_t raw = shared_address(shared_.raw[from]), out = shared_address(shared_.v[stage]);
      if (valid >= Traits::kN) {
        transpose_block<false>(raw, out, 0);
      } else {
        transpose_block<true>(raw, out, valid);
      }
      if constexpr (Traits::kBlockFactors) write_lines(from, stage);
      ptx::fence_proxy_async(ptx::space_shared);
      __syncwarp();
      if (lane_ == 0) {
        mbarrier_arrive(&shared_.raw_empty[from]);
        mbarrier_arrive(&shared_.v_full[stage]);
      }
    }
  }

 private:
  // The lines behind V, alike for all keys; a word of 16 bytes for each lane. Run by whole warps.
  __device__ __forceinline__ void write_lines(uint32_t from, uint32_t stage) const {
    static_assert(Traits::kSlabs * 16 == 32);
    if (warp_ != kWarps - 1) return;  // it has the fewest parts of V
    const int line = lane_ / 2 % 8, slab = lane_ / 16;
    const float lead = __shfl_sync(~0u, lane_ == 0 ? shared_.raw_lead[from] : 0, 0);
    const uint32_t word = line_byte(lines_of(exp2_approx(-lead)), line) * 0x01010101u;
    uint8_t* const to = shared_.v[stage] + slab * Traits::kSlabBytes + (Traits::kDv + line) * kSlabKeys;
    reinterpret_cast<uint4*>(to)[lane_ % 2] = make_uint4(word, word, word, word);
  }

  template <bool kTail>
  __device__ __forceinline__ void transpose_block(uint32_t from, uint32_t to, int valid) const {
#pragma unroll 1
    for (int unit = warp_; unit < Traits::kSlabs * kUnits; unit += kWarps) {
      const int slab = unit / kUnits;
      transpose<kTail>(from + slab * kSlabKeys * Traits::kDv, to + slab * Traits::kSlabBytes, unit % kUnits * kTogether,
                       valid - slab * kSlabKeys);
    }
  }

  // kTogether parts from `first` on of a slab of which the first `valid` keys exist.
  template <bool kTail>
  __device__ __forceinline__ void transpose(uint32_t from, uint32_t to, int first, int valid) const {
    uint32_t keep[2];
    if constexpr (kTail) {
      keep[0] = existing(valid);
      keep[1] = existing(valid - 16);
    }
    // Row `lane` of a slab; 16-byte words are swizzled within it.
    const int atom = Traits::kDv == 128 ? lane_ % 8 : lane_ / 2 % 4;
    const uint32_t row = from + lane_ * Traits::kDv + atom * 16;
    // Lane l addresses matrix l / 8: even and odd columns of the first 16 keys, then of the others.
    const int line = 8 * (lane_ / 8 % 2) + lane_ % 8, half = lane_ / 16;
    const uint32_t lines = to + line * kSlabKeys + (half ^ (line / 4 & 1)) * 16;
    uint32_t in[kTogether][4];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) ldmatrix_x4_trans(in[i], row ^ ((first + i) * 16));
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      uint32_t out[4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        out[2 * j] = __byte_perm(in[i][2 * j], in[i][2 * j + 1], 0x6420);
        out[2 * j + 1] = __byte_perm(in[i][2 * j], in[i][2 * j + 1], 0x7531);
        if constexpr (kTail) {
          out[2 * j] &= keep[j];
          out[2 * j + 1] &= keep[j];
        }
      }
      store_matrices(lines + (first + i) * kColumns * kSlabKeys, out);
    }
  }

  // Bytes of the lane's four keys among 16 of which `valid` exist.
  __device__ __forceinline__ uint32_t existing(int valid) const {
    const int key = 2 * (lane_ % 4);
    return (key < valid ? 0xffu : 0) | (key + 1 < valid ? 0xff00u : 0) | (key + 8 < valid ? 0xff0000u : 0) |
           (key + 9 < valid ? 0xff000000u : 0);
  }

  typename Traits::Shared& shared_;
  const int warp_, lane_;
};

}  // namespace adaattn::cuda::sm90
