#include "engine/weights.h"

#include <array>
#include <set>
#include <string>

#include "engine/error.h"

namespace generate {
namespace {

// Reads by name and remembers what was read.
class Reader {
 public:
  explicit Reader(const Checkpoint& checkpoint) : checkpoint_(checkpoint) {}

  std::vector<float> vector(const std::string& name, int64_t size) {
    std::vector<float> values;
    append(name, std::array{size}, values);
    return values;
  }

  // Adds the rows of `name`.weight, and of its bias, below those that `linear` has.
  void stack(const std::string& name, int64_t out, int64_t in, bool bias, Linear& linear) {
    append(name + ".weight", std::array{out, in}, linear.weight);
    if (bias) append(name + ".bias", std::array{out}, linear.bias);
    linear.out += out;
    linear.in = in;
  }

  void require_all_read(bool tied_embeddings) const {
    for (const std::string& name : checkpoint_.names()) {
      // Both are derived from what was read; some checkpoints store them all the same.
      const bool derived = name.ends_with("rotary_emb.inv_freq") || (tied_embeddings && name == "lm_head.weight");
      if (!derived && !read_.contains(name))
        fail("tensor '%s' has no place in the model that config.json describes", name.c_str());
    }
  }

 private:
  void append(const std::string& name, std::span<const int64_t> shape, std::vector<float>& out) {
    checkpoint_.append_f32(name, shape, out);
    read_.insert(name);
  }

  const Checkpoint& checkpoint_;
  std::set<std::string> read_;
};

}  // namespace

Weights load_weights(const ModelConfig& config, const Checkpoint& checkpoint) {
  Reader reader(checkpoint);
  const int64_t hidden = config.hidden_size, intermediate = config.intermediate_size;
  Weights weights;
  reader.stack("model.embed_tokens", config.vocab_size, hidden, false, weights.embedding);
  for (int64_t i = 0; i < config.layers; ++i) {
    const std::string prefix = "model.layers." + std::to_string(i) + ".";
    LayerWeights& layer = weights.layers.emplace_back();
    layer.attention_norm = reader.vector(prefix + "input_layernorm.weight", hidden);
    reader.stack(prefix + "self_attn.q_proj", config.q_size(), hidden, config.attention_bias, layer.qkv);
    reader.stack(prefix + "self_attn.k_proj", config.kv_size(), hidden, config.attention_bias, layer.qkv);
    reader.stack(prefix + "self_attn.v_proj", config.kv_size(), hidden, config.attention_bias, layer.qkv);
    reader.stack(prefix + "self_attn.o_proj", hidden, config.q_size(), config.attention_bias, layer.attention_output);
    layer.mlp_norm = reader.vector(prefix + "post_attention_layernorm.weight", hidden);
    reader.stack(prefix + "mlp.gate_proj", intermediate, hidden, config.mlp_bias, layer.gate_up);
    reader.stack(prefix + "mlp.up_proj", intermediate, hidden, config.mlp_bias, layer.gate_up);
    reader.stack(prefix + "mlp.down_proj", hidden, intermediate, config.mlp_bias, layer.down);
  }
  weights.final_norm = reader.vector("model.norm.weight", hidden);
  if (!config.tied_embeddings) reader.stack("lm_head", config.vocab_size, hidden, false, weights.separate_head);
  reader.require_all_read(config.tied_embeddings);
  return weights;
}

}  // namespace generate
