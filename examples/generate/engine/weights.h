// The weights of a Llama-architecture model, widened to f32 and stacked for few, large matrix products.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/config.h"
#include "engine/safetensors.h"

namespace generate {

// y = x weight^T + bias, weight [out, in]; bias may be empty.
struct Linear {
  int64_t out = 0;
  int64_t in = 0;
  std::vector<float> weight;
  std::vector<float> bias;
};

struct LayerWeights {
  std::vector<float> attention_norm;  // [hidden]
  Linear qkv;                         // rows of q, k and v one after another
  Linear attention_output;
  std::vector<float> mlp_norm;  // [hidden]
  Linear gate_up;               // rows of gate, then of up
  Linear down;
};

struct Weights {
  Linear embedding;  // [vocab, hidden]; the output head too where the embeddings are tied
  std::vector<LayerWeights> layers;
  std::vector<float> final_norm;  // [hidden]
  Linear separate_head;           // empty where the embeddings are tied

  const Linear& head() const { return separate_head.out > 0 ? separate_head : embedding; }
};

// Throws if a tensor is missing, has another shape, or is one that this architecture has no place for.
Weights load_weights(const ModelConfig& config, const Checkpoint& checkpoint);

}  // namespace generate
