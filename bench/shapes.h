// The shapes that the suites run, in one table.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "adaattn/adaattn.h"

namespace adaattn::bench {

struct Shape {
  int64_t batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim;
  adaattn_mask_t mask = ADAATTN_MASK_NONE;
  int64_t page_size = 0;  // of k and v; 0: contiguous
  int64_t window = 0;     // keys that a query sees, its own and those before it; 0: all that the mask allows
};

// Few queries at a time over many keys: bound by the bytes of k and v.
inline bool is_decode(const Shape& s) { return s.seqlen_q <= 8 && s.seqlen_q < s.seqlen_k; }

struct NamedDtype {
  const char* name;
  adaattn_dtype_t dtype;
  adaattn_dtype_t dtype_kv = ADAATTN_DTYPE_NONE;  // of k and v where they differ
  int64_t descale_block = 0;                      // of E4M3 keys and values
};
inline constexpr NamedDtype kDtypes[] = {
    {"f32", ADAATTN_DTYPE_F32}, {"bf16", ADAATTN_DTYPE_BF16}, {"f16", ADAATTN_DTYPE_F16}};
// A cache of 8 bits with bf16 queries, one factor for each 64 keys of a head.
inline constexpr NamedDtype kE4m3Cache = {"e4m3kv", ADAATTN_DTYPE_BF16, ADAATTN_DTYPE_E4M3, 64};

// Prefill on the CPU: the sizes that the targets are stated for.
inline const std::vector<Shape>& cpu_prefill_shapes() {
  static const std::vector<Shape> shapes = {
      {1, 8, 8, 1024, 1024, 64},
      {1, 8, 8, 1024, 1024, 128},
      {1, 8, 8, 2048, 2048, 64},
      {1, 8, 8, 2048, 2048, 128},
      {1, 8, 8, 2048, 2048, 64, ADAATTN_MASK_CAUSAL},
      {1, 8, 8, 2048, 2048, 128, ADAATTN_MASK_CAUSAL},
  };
  return shapes;
}

inline const std::vector<Shape>& cpu_decode_shapes() {
  static const std::vector<Shape> shapes = {{1, 32, 8, 1, 8192, 128}, {4, 32, 8, 1, 8192, 128}};
  return shapes;
}

// On a GPU: 16k query tokens in all, head_dim 64 from 1k and 128 from 512 to 16k, then other widths, grouped heads.
inline const std::vector<Shape>& cuda_prefill_shapes() {
  static const std::vector<Shape> shapes = [] {
    std::vector<Shape> list;
    for (const adaattn_mask_t mask : {ADAATTN_MASK_NONE, ADAATTN_MASK_CAUSAL}) {
      for (const int64_t d : {int64_t{64}, int64_t{128}})
        for (int64_t s = d == 128 ? 512 : 1024; s <= 16384; s *= 2)
          list.push_back({16384 / s, 2048 / d, 2048 / d, s, s, d, mask});
      list.push_back({4, 16, 16, 4096, 4096, 96, mask});
      list.push_back({4, 8, 8, 4096, 4096, 256, mask});
      list.push_back({2, 32, 8, 8192, 8192, 128, mask});
    }
    for (const int64_t s : {int64_t{8192}, int64_t{32768}}) list.push_back({1, 64, 8, s, s, 128, ADAATTN_MASK_CAUSAL});
    return list;
  }();
  return shapes;
}

// 8-bit attention: 16k query tokens at head_dim 128 and 64, then grouped heads.
inline const std::vector<Shape>& cuda_int8_shapes() {
  static const std::vector<Shape> shapes = [] {
    std::vector<Shape> list;
    for (const adaattn_mask_t mask : {ADAATTN_MASK_NONE, ADAATTN_MASK_CAUSAL}) {
      for (const int64_t s : {int64_t{2048}, int64_t{4096}, int64_t{8192}, int64_t{16384}})
        list.push_back({16384 / s, 16, 16, s, s, 128, mask});
      list.push_back({1, 32, 32, 16384, 16384, 64, mask});
      list.push_back({2, 32, 8, 8192, 8192, 128, mask});
      list.push_back({1, 64, 8, 32768, 32768, 128, mask});
    }
    return list;
  }();
  return shapes;
}

inline const std::vector<Shape>& cuda_f32_shapes() {
  static const std::vector<Shape> shapes = {{2, 16, 16, 4096, 4096, 64, ADAATTN_MASK_CAUSAL},
                                            {2, 8, 8, 4096, 4096, 128, ADAATTN_MASK_CAUSAL}};
  return shapes;
}

inline const std::vector<Shape>& cuda_decode_shapes() {
  static const std::vector<Shape> shapes = {
      {1, 32, 8, 1, 1024, 128}, {1, 32, 8, 1, 8192, 128},  {1, 32, 8, 1, 32768, 128}, {1, 32, 8, 1, 131072, 128},
      {4, 32, 8, 1, 8192, 128}, {16, 32, 8, 1, 8192, 128}, {64, 32, 8, 1, 8192, 128}};
  return shapes;
}

// As inference engines call it: decode from pages, several queries at once (drafts that a model verifies), windows, a
// chunk of a long prompt.
inline const std::vector<Shape>& cuda_engine_shapes() {
  static const std::vector<Shape> shapes = {
      {1, 32, 8, 1, 8192, 128, ADAATTN_MASK_NONE, 16},          {16, 32, 8, 1, 8192, 128, ADAATTN_MASK_NONE, 16},
      {16, 32, 8, 1, 8192, 128, ADAATTN_MASK_NONE, 64},         {16, 32, 8, 1, 8192, 128, ADAATTN_MASK_NONE, 1},
      {1, 32, 8, 1, 131072, 128, ADAATTN_MASK_NONE, 16},        {16, 32, 8, 4, 8192, 128, ADAATTN_MASK_CAUSAL},
      {16, 64, 8, 8, 8192, 128, ADAATTN_MASK_CAUSAL},           {16, 64, 8, 8, 8192, 128, ADAATTN_MASK_CAUSAL, 16},
      {16, 32, 8, 1, 32768, 128, ADAATTN_MASK_CAUSAL, 0, 4096}, {1, 32, 8, 1024, 32768, 128, ADAATTN_MASK_CAUSAL, 16},
  };
  return shapes;
}

// Prefill over a cache of 8 bits: whole prompts, a chunk of a long one, grouped heads.
inline const std::vector<Shape>& cuda_cache_prefill_shapes() {
  static const std::vector<Shape> shapes = {{2, 32, 8, 8192, 8192, 128, ADAATTN_MASK_CAUSAL},
                                            {1, 32, 8, 1024, 32768, 128, ADAATTN_MASK_CAUSAL},
                                            {2, 32, 8, 8192, 8192, 64, ADAATTN_MASK_CAUSAL}};
  return shapes;
}

// "f32/d128/causal/b1h8kv8/s2048", with q<queries> where they differ from the keys, /page<size> of a paged cache and
// /window<keys>.
inline std::string shape_name(const Shape& s, const char* dtype) {
  std::string name = std::string(dtype) + "/d" + std::to_string(s.head_dim) +
                     (s.mask == ADAATTN_MASK_NONE ? "/full/b" : "/causal/b") + std::to_string(s.batch) + "h" +
                     std::to_string(s.heads_q) + "kv" + std::to_string(s.heads_kv) + "/s" + std::to_string(s.seqlen_k);
  if (s.seqlen_q != s.seqlen_k) name.append("q").append(std::to_string(s.seqlen_q));
  if (s.page_size > 0) name.append("/page").append(std::to_string(s.page_size));
  if (s.window > 0) name.append("/window").append(std::to_string(s.window));
  return name;
}

}  // namespace adaattn::bench
