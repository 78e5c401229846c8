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
};

struct NamedDtype {
  const char* name;
  adaattn_dtype_t dtype;
};
inline constexpr NamedDtype kDtypes[] = {
    {"f32", ADAATTN_DTYPE_F32}, {"bf16", ADAATTN_DTYPE_BF16}, {"f16", ADAATTN_DTYPE_F16}};

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

// "f32/d128/causal/b1h8kv8/s2048", with q<queries> where they differ from the keys.
inline std::string shape_name(const Shape& s, const char* dtype) {
  std::string name = std::string(dtype) + "/d" + std::to_string(s.head_dim) +
                     (s.mask == ADAATTN_MASK_NONE ? "/full/b" : "/causal/b") + std::to_string(s.batch) + "h" +
                     std::to_string(s.heads_q) + "kv" + std::to_string(s.heads_kv) + "/s" + std::to_string(s.seqlen_k);
  if (s.seqlen_q != s.seqlen_k) name += "q" + std::to_string(s.seqlen_q);
  return name;
}

}  // namespace adaattn::bench
