// The attention problems of a real text: Q, K and V of every layer of the shipped model.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "adaattn/adaattn.hpp"

namespace adaattn::bench {

struct LayerOperands {
  std::vector<char> q, k, v;  // [seqlen, heads, head_dim], in the type asked for
};

struct ModelAttention {
  int64_t seqlen = 0, heads_q = 0, heads_kv = 0, head_dim = 0;
  adaattn_dtype_t dtype = ADAATTN_DTYPE_NONE;
  std::vector<std::vector<LayerOperands>> windows;  // [windows][layers]

  AttnDesc desc() const;
  // One layer's call; o has the shape of q.
  Io io(const LayerOperands& layer, void* o) const;
};

// Runs the model in `folder` with exact attention over the first `windows` windows of its manual.txt.
ModelAttention capture_attention(const std::string& folder, int64_t seqlen, int64_t windows, adaattn_dtype_t dtype,
                                 int threads);

}  // namespace adaattn::bench
