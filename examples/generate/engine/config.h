// What config.json says about a Llama-architecture model.
#pragma once

#include <cstdint>
#include <filesystem>

namespace generate {

struct ModelConfig {
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t layers = 0;
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;
  int64_t vocab_size = 0;
  int64_t max_positions = 0;
  int64_t sliding_window = 0;  // keys a query sees, itself included; 0: all before it
  int64_t eos_token = -1;      // -1: none
  double rope_theta = 10000.0;
  float rms_norm_eps = 1e-6f;
  bool tied_embeddings = false;
  bool attention_bias = false;
  bool mlp_bias = false;

  int64_t q_size() const { return heads * head_dim; }
  int64_t kv_size() const { return kv_heads * head_dim; }
};

// Reads and checks folder/config.json. Whatever would change the arithmetic and is not served (another
// architecture or activation, scaled or partial rotary embeddings) is refused by name.
ModelConfig read_config(const std::filesystem::path& folder);

}  // namespace generate
