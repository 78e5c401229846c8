// Shared-memory tiles of rows of 16- or 8-bit elements: layout, and filling them from strided or paged rows.
#pragma once

#include <type_traits>

#include "attend/kernel.h"
#include "common/ptx.cuh"

namespace adaattn::cuda {

// Rows of kD 16-bit elements in 16-byte chunks; chunks are XORed with the row so that the eight rows of an ldmatrix
// matrix fall into different banks.
template <int kD>
struct TileLayout {
  static_assert(kD % 32 == 0);
  static constexpr int kChunks = kD / 8;
  static constexpr int kPitch = kD * 2;  // bytes
  static constexpr bool kWhole = kChunks % 8 == 0;
  // The XOR pattern of a row; the same for all rows that are equal modulo 8.
  __device__ static __forceinline__ int twist(int row) { return kWhole ? row & 7 : (row >> 1) & 3; }
  __device__ static __forceinline__ uint32_t offset(int row, int chunk) {
    return row * kPitch + ((chunk ^ twist(row)) << 4);
  }
  // From the address of (row, chunk 0 or 1) to that of the chunk 2 * step further: one XOR within the twisted bits.
  // Tiles start on 128 bytes, so that those bits of the address are the chunk's.
  static constexpr int kTwisted = kWhole ? 4 : 2;
  __device__ static __forceinline__ uint32_t advance(uint32_t address, int step) {
    return (address ^ (step % kTwisted << 5)) + step / kTwisted * (kTwisted * 32);
  }
  // The same from chunk 0 to chunk `chunk`.
  __device__ static __forceinline__ uint32_t advance_chunk(uint32_t address, int chunk) {
    return (address ^ (chunk % (2 * kTwisted) << 4)) + chunk / (2 * kTwisted) * (kTwisted * 32);
  }
};

// Rows of kD elements of type T.
template <typename T, int kD>
using RowLayout = TileLayout<kD* static_cast<int>(sizeof(T)) / 2>;

// Where key j of one (sequence, head) lives. Kernels that never page carry a base and a stride only.
template <typename T, bool kMayBePaged>
struct KeyRows {
  const T* base = nullptr;
  int64_t stride_s = 0;

  __device__ __forceinline__ KeyRows(const AttendArgs& args, const Operand& x, const Sequence& s, int b, int head_kv)
      : base(static_cast<const T*>(x.data) + b * x.stride_b + s.k_start * x.stride_s + head_kv * x.stride_h),
        stride_s(x.stride_s) {}
  __device__ __forceinline__ bool paged() const { return false; }
  __device__ __forceinline__ const T* row(int key) const { return base + key * stride_s; }
};

template <typename T>
struct KeyRows<T, true> {
  const T* base = nullptr;
  int64_t stride_s = 0;
  const int32_t* table = nullptr;  // of this sequence, null unless paged
  int64_t stride_page = 0;
  int32_t num_pages = 0, page_size = 0, page_shift = 0;

  __device__ __forceinline__ KeyRows(const AttendArgs& args, const Operand& x, const Sequence& s, int b, int head_kv) {
    const AttnParams& p = args.p;
    base = static_cast<const T*>(x.data) + head_kv * x.stride_h;
    stride_s = x.stride_s;
    if (p.block_table != nullptr) {
      table = p.block_table + b * p.block_table_stride;
      stride_page = x.stride_b;
      num_pages = static_cast<int32_t>(p.num_pages);
      page_size = static_cast<int32_t>(p.page_size);
      page_shift = args.page_shift;
    } else {
      base += b * x.stride_b + s.k_start * x.stride_s;
    }
  }
  __device__ __forceinline__ bool paged() const { return table != nullptr; }
  __device__ __forceinline__ const T* row(int key) const { return row(key, paged() ? entry(key) : 0); }
  // The two halves of that, for those who look up entries of the table ahead.
  __device__ __forceinline__ int32_t entry(int key) const { return table[slot(key)]; }
  __device__ __forceinline__ const T* row(int key, int32_t entry) const {
    if (!paged()) return base + key * stride_s;
    return base + min(max(entry, 0), num_pages - 1) * stride_page + (key - slot(key) * page_size) * stride_s;
  }

 private:
  __device__ __forceinline__ int slot(int key) const { return page_shift >= 0 ? key >> page_shift : key / page_size; }
};

__host__ __device__ constexpr int chunk_lanes(int chunks) { return chunks % 16 == 0 ? 16 : chunks % 8 == 0 ? 8 : 4; }

template <typename T>
using RawBits = std::conditional_t<sizeof(T) == 1, unsigned char, unsigned short>;

template <typename T>
__device__ __forceinline__ void store_chunk_by_element(uint32_t shared, const T* source, int elements) {
  constexpr int kPerWord = 4 / sizeof(T);
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 4 * kPerWord; ++i) {
    uint32_t bits = 0;
    if (i < elements) bits = *reinterpret_cast<const RawBits<T>*>(source + i);
    words[i / kPerWord] |= bits << (8 * static_cast<int>(sizeof(T)) * (i % kPerWord));
  }
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(shared), "r"(words[0]), "r"(words[1]), "r"(words[2]),
               "r"(words[3])
               : "memory");
}

// Rows of a tile that exist: [begin, end).
struct RowSpan {
  int begin, end;
};

// Fills kRows rows at `shared` by kThreads threads. row_of(r) gives the address of row r; rows outside `valid` and
// columns from d on become zero, so that 0 * V never meets what lies beyond a sequence or before a window.
template <int kD, int kRows, int kThreads, bool kMayBeUnaligned, typename RowOf>
__device__ __forceinline__ void load_rows(uint32_t shared, int thread, int d, RowSpan valid, bool aligned,
                                          const RowOf& row_of) {
  using T = std::remove_cvref_t<decltype(*row_of(0))>;
  using Layout = RowLayout<T, kD>;
  constexpr int kPerChunk = 16 / static_cast<int>(sizeof(T));
  constexpr int kLanes = chunk_lanes(Layout::kChunks);
  constexpr int kRowStep = kThreads / kLanes;
  constexpr int kPerRow = Layout::kChunks / kLanes;
  static_assert(kRowStep % 8 == 0 || kRows <= kRowStep || kRowStep < 8);
  const int lane = thread % kLanes, first = thread / kLanes;
#pragma unroll 1
  for (int i = 0; i < kRows; i += kRowStep) {
    const int r = first + i;
    if (kRows % kRowStep != 0 && r >= kRows) break;
    const bool ok = r >= valid.begin && r < valid.end;
    const auto* source = row_of(ok ? r : max(valid.begin, 0));
#pragma unroll
    for (int c = 0; c < kPerRow; ++c) {
      const int chunk = lane + c * kLanes;
      const int elements = ok ? min(max(d - chunk * kPerChunk, 0), kPerChunk) : 0;
      const uint32_t to = shared + Layout::offset(r, chunk);
      if (kMayBeUnaligned && !aligned) {
        store_chunk_by_element(to, source + chunk * kPerChunk, elements);
      } else {
        cp_async16(to, elements > 0 ? source + chunk * kPerChunk : source, elements * static_cast<int>(sizeof(T)));
      }
    }
  }
}

// The same for kRows whole rows of kD elements that start on 16 bytes: nothing to test per row.
template <int kD, int kRows, int kThreads, typename T>
__device__ __forceinline__ void load_whole_rows(uint32_t shared, int thread, const T* base, int64_t stride) {
  using Layout = RowLayout<T, kD>;
  constexpr int kPerChunk = 16 / static_cast<int>(sizeof(T));
  constexpr int kLanes = chunk_lanes(Layout::kChunks);
  constexpr int kRowStep = kThreads / kLanes;
  static_assert(kRows % kRowStep == 0);
  const int lane = thread % kLanes, first = thread / kLanes;
  const T* source = base + first * stride + lane * kPerChunk;
  const int64_t step = kRowStep * stride;
#pragma unroll
  for (int i = 0; i < kRows; i += kRowStep, source += step) {
#pragma unroll
    for (int c = 0; c < Layout::kChunks; c += kLanes)
      cp_async16(shared + Layout::offset(first + i, lane + c), source + c * kPerChunk);
  }
}

// The same where row_of(r) gives the address of row r.
template <int kD, int kRows, int kThreads, typename RowOf>
__device__ __forceinline__ void load_whole_rows(uint32_t shared, int thread, const RowOf& row_of) {
  using T = std::remove_cvref_t<decltype(*row_of(0))>;
  using Layout = RowLayout<T, kD>;
  constexpr int kPerChunk = 16 / static_cast<int>(sizeof(T));
  constexpr int kLanes = chunk_lanes(Layout::kChunks);
  constexpr int kRowStep = kThreads / kLanes;
  static_assert(kRows % kRowStep == 0);
  const int lane = thread % kLanes, first = thread / kLanes;
#pragma unroll
  for (int i = 0; i < kRows; i += kRowStep) {
    const T* source = row_of(first + i) + lane * kPerChunk;
#pragma unroll
    for (int c = 0; c < Layout::kChunks; c += kLanes)
      cp_async16(shared + Layout::offset(first + i, lane + c), source + c * kPerChunk);
  }
}

// The same for paged keys: the pages of several rows of a thread are looked up side by side.
template <int kD, int kRows, int kThreads, typename T>
__device__ __forceinline__ void load_whole_paged_rows(uint32_t shared, int thread, const KeyRows<T, true>& keys,
                                                      int first_key) {
  using Layout = RowLayout<T, kD>;
  constexpr int kPerChunk = 16 / static_cast<int>(sizeof(T));
  constexpr int kLanes = chunk_lanes(Layout::kChunks);
  constexpr int kRowStep = kThreads / kLanes, kAtOnce = kRows / kRowStep % 4 == 0 ? 4 : kRows / kRowStep;
  static_assert(kRows % kRowStep == 0);
  const int lane = thread % kLanes;
#pragma unroll 1
  for (int first = thread / kLanes; first < kRows; first += kAtOnce * kRowStep) {
    int32_t entry[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) entry[i] = keys.entry(first_key + first + i * kRowStep);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int r = first + i * kRowStep;
      const T* source = keys.row(first_key + r, entry[i]) + lane * kPerChunk;
#pragma unroll
      for (int c = 0; c < Layout::kChunks; c += kLanes)
        cp_async16(shared + Layout::offset(r, lane + c), source + c * kPerChunk);
    }
  }
}

// The same for the keys of block `block` that lie in [keys_begin, keys_end).
template <int kD, int kRows, int kThreads, bool kMayBeUnaligned, typename T, bool kMayBePaged>
__device__ __forceinline__ void load_keys(uint32_t shared, int thread, int d, const KeyRows<T, kMayBePaged>& keys,
                                          int block, int keys_begin, int keys_end, bool aligned) {
  const int first_key = block * kRows;
  const RowSpan valid{keys_begin - first_key, keys_end - first_key};
  const bool whole = valid.begin <= 0 && valid.end >= kRows && d == kD && (!kMayBeUnaligned || aligned);
  if constexpr (kMayBePaged) {
    if (keys.paged()) {
      if (whole) {
        load_whole_paged_rows<kD, kRows, kThreads>(shared, thread, keys, first_key);
      } else {
        load_rows<kD, kRows, kThreads, kMayBeUnaligned>(shared, thread, d, valid, aligned,
                                                        [&](int r) { return keys.row(first_key + r); });
      }
      return;
    }
  }
  const T* base = keys.base + first_key * keys.stride_s;
  if (whole) {
    load_whole_rows<kD, kRows, kThreads>(shared, thread, base, keys.stride_s);
  } else {
    load_rows<kD, kRows, kThreads, kMayBeUnaligned>(shared, thread, d, valid, aligned,
                                                    [&](int r) { return base + r * keys.stride_s; });
  }
}

}  // namespace adaattn::cuda
