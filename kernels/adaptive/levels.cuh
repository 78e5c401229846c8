// The mass levels of one query tile by one warp: decide::measure_cells, in another order of integer sums.
#pragma once

#include "adaptive/analyze.h"
#include "adaptive/cells.cuh"
#include "common/ptx.cuh"
#include "decide/cells.h"

namespace adaattn::cuda {

// Descending, element lane * kEach + i in x[i].
template <int kEach>
__device__ __forceinline__ void sort_registers(uint32_t (&x)[kEach]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int size = 2; size <= 32 * kEach; size *= 2) {
#pragma unroll
    for (int step = size / 2; step > 0; step /= 2) {
      if (step >= kEach) {
        const bool ascending = (lane * kEach & size) != 0, low = (lane & step / kEach) == 0;
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          const uint32_t other = __shfl_xor_sync(~0u, x[i], step / kEach);
          x[i] = low != ascending ? max(x[i], other) : min(x[i], other);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          if ((i & step) != 0) continue;
          const uint32_t a = x[i], b = x[i + step];
          const bool ascending = ((lane * kEach + i) & size) != 0;
          x[i] = ascending ? min(a, b) : max(a, b);
          x[i + step] = ascending ? max(a, b) : min(a, b);
        }
      }
    }
  }
}

// Sums from the first lane to this one.
__device__ __forceinline__ uint32_t running_sum(uint32_t x) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(~0u, x, step);
    if (lane >= step) x += other;
  }
  return x;
}

// sums[i]: of the i + 1 largest masses. The masses of a query tile add up to 4 * 2^20 and their roundings.
template <int kEach>
__device__ __forceinline__ void sum_sorted_registers(const uint32_t* mass, int tiles, uint32_t* sums) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  uint32_t x[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int at = lane + 32 * i;  // any order will do
    x[i] = at < tiles ? mass[at] : 0;
  }
  sort_registers(x);
#pragma unroll
  for (int i = 1; i < kEach; ++i) x[i] += x[i - 1];
  const uint32_t before = running_sum(x[kEach - 1]) - x[kEach - 1];
#pragma unroll
  for (int i = 0; i < kEach; ++i) sums[lane * kEach + i] = before + x[i];
}

// The same for any number of tiles; count: a power of two of at least 32.
__device__ __forceinline__ void sum_sorted(const uint32_t* mass, int tiles, int count, uint32_t* sums) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int i = lane; i < count; i += 32) sums[i] = i < tiles ? mass[i] : 0;
  __syncwarp();
  for (int size = 2; size <= count; size *= 2) {
    for (int step = size / 2; step > 0; step /= 2) {
      for (int i = lane; i < count / 2; i += 32) {
        const int low = 2 * i - (i & (step - 1)), high = low + step;
        const uint32_t x = sums[low], y = sums[high];
        const bool ascending = (low & size) != 0;
        if ((x < y) != ascending) {
          sums[low] = y;
          sums[high] = x;
        }
      }
      __syncwarp();
    }
  }
  uint32_t before = 0;
  for (int first = 0; first < count; first += 32) {
    const uint32_t sum = before + running_sum(sums[first + lane]);
    sums[first + lane] = sum;
    before = __shfl_sync(~0u, sum, 31);
  }
}

// In units of 2^-16.
__device__ __forceinline__ uint16_t share_bits(float share) {
  return static_cast<uint16_t>(fminf(fmaf(share, 65536.0f, 0.5f), 65535.0f));
}

// floor(2^16 part / total), part <= total < 2^24: a quotient in single precision is off by less than 1.
__device__ __forceinline__ uint32_t share_of(uint32_t part, uint32_t total) {
  const auto near = static_cast<uint32_t>(__fdividef(static_cast<float>(part), static_cast<float>(total)) * 65536.0f);
  const int64_t rest = (int64_t{part} << 16) - static_cast<int64_t>(uint64_t{near} * total);
  return near + (rest >= int64_t{total} ? 1 : 0) - (rest < 0 ? 1 : 0);
}

// Over the lanes: of the masses, the keys of a tile counted as equal, over that of `visible` equal keys.
__device__ __forceinline__ float relative_entropy(float entropy, float visible) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) entropy += __shfl_xor_sync(kAll, entropy, step);
  entropy += 7.0f;  // log2 of the keys of a tile
  const float uniform = visible > 1.0f ? decide::fixed_log2(visible) : 0.0f;
  return uniform > 0.0f ? (entropy < uniform ? fmaxf(entropy, 0.0f) / uniform : 1.0f) : 0.0f;
}

// A lane's level of a query tile; adds the query tile, of so many rows, to its head.
__device__ __forceinline__ void put_levels(const decide::TileRow& row, int rows, bool usable, float entropy,
                                           uint32_t threshold, uint32_t kept, uint32_t dropped, decide::TileLevels* out,
                                           HeadSums* head) {
  using namespace decide;
  const int lane = static_cast<int>(threadIdx.x) % 32, tiles = row.end - row.begin;
  if (lane < kLevels) {
    out->threshold[lane] = threshold;
    out->kept[lane] = kept;
    out->dropped[lane] = dropped;
  }
  if (lane == 0) {
    out->row = row;
    out->usable = usable;
    out->log2_max = 0;
    out->entropy = entropy;
  }
  if (tiles <= 0) return;
  if (lane < kLevels && kept > 0) {
    atomicAdd(&head->kept[lane], kept);
    if (dropped > 0) {
      atomicAdd(&head->dropped_sq[lane], static_cast<unsigned long long>(dropped) * dropped);
      atomicAdd(&head->dropped[lane], static_cast<unsigned long long>(dropped) * static_cast<unsigned>(rows));
    }
  }
  if (lane > 1) return;
  atomicAdd(lane == 0 ? &head->tiles : &head->query_tiles, lane == 0 ? static_cast<unsigned long long>(tiles) : 1ull);
  if (lane == 0)
    atomicAdd(&head->entropy, static_cast<unsigned long long>(static_cast<double>(entropy) * kEntropyUnit));
}

// What a query tile keeps where shares decide: decide::measure_cells with the first mass level alone, by one warp.
// mass: of the tiles from row.begin on, with kKeptByPeak; found: bits of all key tiles, which keep them, or null. mask,
// kept: where the schedule has them, or null; shares: of the tiles from row.begin on, or null. levels, head: as below,
// or null.
struct ShareTargets {
  decide::TileLevels* levels;
  HeadSums* head;
  uint32_t* mask;  // mask_words pairs of words
  int32_t* kept;
  uint16_t* shares;
};
__device__ __forceinline__ void measure_shares(const uint32_t* mass, const uint32_t* found, float visible,
                                               const decide::TileRow& row, int rows, bool usable, int mask_words,
                                               const ShareTargets& to) {
  using namespace decide;
  const int lane = static_cast<int>(threadIdx.x) % 32, tiles = row.end - row.begin;
  uint32_t threshold = 0, total = 0;
  const bool measured = tiles > 0 && usable;
  if (measured) {
    constexpr int kEach = 4;
    uint32_t first[kEach];  // as many in registers, the others are read every time
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      first[i] = lane + 32 * i < tiles ? mass[lane + 32 * i] & ~kKeptByPeak : 0;
      total += first[i];
    }
    for (int b = lane + 32 * kEach; b < tiles; b += 32) total += mass[b] & ~kKeptByPeak;
    total = __reduce_add_sync(kAll, total);
    const auto wanted = static_cast<uint32_t>((uint64_t{total} * level_mass(0) + 65535u) >> 16);
    // The masses of a query tile add up to 4 * 2^20 and their roundings, which bounds each of them. Two bits at a time:
    // of the sums from their three values on, the more reach what is wanted the smaller the value.
#pragma unroll 1
    for (int shift = 22; shift >= 0; shift -= 2) {
      uint32_t sums[3] = {};
      const auto add = [&](uint32_t m) {
#pragma unroll
        for (uint32_t j = 0; j < 3; ++j) sums[j] += m >= (threshold | (j + 1) << shift) ? m : 0;
      };
#pragma unroll
      for (int i = 0; i < kEach; ++i) add(first[i]);
#pragma unroll 2
      for (int b = lane + 32 * kEach; b < tiles; b += 32) add(mass[b] & ~kKeptByPeak);
      uint32_t reached = 0;
#pragma unroll
      for (const uint32_t sum : sums) reached += __reduce_add_sync(kAll, sum) >= wanted ? 1 : 0;
      threshold |= reached << shift;
    }
  }
  uint32_t kept = 0, dropped = 0;
  float entropy = 0;
  const float inverse = measured ? 1.0f / static_cast<float>(total) : 0.0f;
#pragma unroll 1
  for (int word = 0; word < 2 * mask_words; ++word) {
    const int tile = 32 * word + lane, b = tile - row.begin;
    bool keep = false;
    if (measured && tile >= row.begin && tile < row.end) {
      const uint32_t marked = mass[b], m = marked & ~kKeptByPeak;
      keep =
          m >= threshold || is_forced(row, tile) || marked != m || (found != nullptr && (found[word] >> lane & 1) != 0);
      dropped += keep ? 0 : m;
      const float share = static_cast<float>(m) * inverse;
      entropy -= m == 0 ? 0.0f : share * __log2f(share);
      if (to.shares != nullptr) to.shares[b] = share_bits(share);
    }
    const uint32_t bits = __ballot_sync(kAll, keep);
    kept += __popc(bits);
    if (to.mask != nullptr && lane == 0) to.mask[word] = bits;
  }
  if (to.kept != nullptr && lane == 0) *to.kept = static_cast<int32_t>(kept);
  if (to.levels == nullptr) return;
  if (measured) {
    dropped = __reduce_add_sync(kAll, dropped);
    dropped = share_of(dropped, total);
    entropy = relative_entropy(entropy, visible);
  }
  // From the second level on all is kept.
  const bool first = lane == 0;
  put_levels(row, rows, usable, entropy, first ? threshold : 0,
             !measured ? 0
             : first   ? kept
                       : static_cast<uint32_t>(tiles),
             first ? dropped : 0, to.levels, to.head);
}

// A tile's code: the lowest mass level that keeps it.
__device__ __forceinline__ bool code_keeps(uint8_t code, const decide::HeadChoice& choice) {
  return choice.dense || code <= choice.level;
}

// mass, peak: of the tiles from row.begin on. sums: room for 128, 512 or a larger power of two, as many as the tiles
// need. codes: of the tiles from row.begin on, or null. Adds the query tile to its head. Leaves row, usable and
// entropy in `levels`, the levels in *out.
__device__ __forceinline__ void measure_levels(const uint32_t* mass, const uint32_t* peak, uint32_t keep_peak,
                                               uint32_t* sums, float visible, const decide::TileRow& row, int rows,
                                               bool usable, decide::TileLevels* out, uint8_t* codes, HeadSums* head) {
  using namespace decide;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int tiles = row.end - row.begin;
  uint32_t threshold = 0, kept = 0, dropped = 0;  // of the lane's level
  float entropy = 0;
  if (tiles > 0 && usable) {
    const int count = max(32, 1 << (32 - __clz(tiles - 1)));
    if (count <= 128)
      sum_sorted_registers<4>(mass, tiles, sums);
    else if (count <= 512)
      sum_sorted_registers<16>(mass, tiles, sums);
    else
      sum_sorted(mass, tiles, count, sums);
    __syncwarp();
    const uint32_t total = sums[tiles - 1];
    // The mass at which the sums reach what the level wants.
    const int level = min(lane, kDenseLevel);
    const auto wanted = static_cast<uint32_t>((uint64_t{total} * level_mass(level) + 65535u) >> 16);
    int low = 0, high = tiles - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (sums[middle] >= wanted)
        high = middle;
      else
        low = middle + 1;
    }
    threshold = level == kDenseLevel ? 0 : sums[low] - (low > 0 ? sums[low - 1] : 0);
    uint32_t thresholds[kDenseLevel], kept_sum[kDenseLevel] = {}, dropped_sum[kDenseLevel] = {};
#pragma unroll
    for (int i = 0; i < kDenseLevel; ++i) thresholds[i] = __shfl_sync(~0u, threshold, i);
    const float inverse = 1.0f / static_cast<float>(total);
    for (int b = lane; b < tiles; b += 32) {
      const uint32_t m = mass[b];
      const float share = static_cast<float>(m) * inverse;
      entropy -= m == 0 ? 0.0f : share * __log2f(share);
      const bool always = is_forced(row, row.begin + b) || (keep_peak != 0 && peak[b] >= keep_peak);
      uint8_t code = 0;
#pragma unroll
      for (int i = 0; i < kDenseLevel; ++i) {
        const bool keep = always || m >= thresholds[i];
        kept_sum[i] += keep ? 1 : 0;
        dropped_sum[i] += keep ? 0 : m;
        code += keep ? 0 : 1;
      }
      if (codes != nullptr) codes[b] = code;
    }
    kept = tiles;
#pragma unroll
    for (int i = 0; i < kDenseLevel; ++i) {
      const uint32_t all_kept = __reduce_add_sync(~0u, kept_sum[i]),
                     all_dropped = __reduce_add_sync(~0u, dropped_sum[i]);
      kept = lane == i ? all_kept : kept;
      dropped = lane == i ? all_dropped : dropped;
    }
    // The quotient differs from any integer above it by 2^-23 at least: the division's rounding does not reach that.
    dropped = static_cast<uint32_t>(static_cast<double>(dropped) * 65536.0 / static_cast<double>(total));
    entropy = relative_entropy(entropy, visible);
  }
  put_levels(row, rows, usable, entropy, threshold, kept, dropped, out, head);
}

}  // namespace adaattn::cuda
