#include "model/synthetic_model.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

namespace model_test {

using Json = nlohmann::json;

Json separate_head() {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"hidden_size", 48},
          {"intermediate_size", 72},
          {"num_hidden_layers", 2},
          {"num_attention_heads", 6},
          {"num_key_value_heads", 2},
          {"head_dim", 20},
          {"vocab_size", 37},
          {"max_position_embeddings", 128},
          {"rope_theta", 500.0},
          {"rms_norm_eps", 1e-5}};
}

Json with(Json config, const Json& changes) {
  config.update(changes);
  return config;
}

Synthetic::Synthetic(const Json& config, const std::string& dtype, int shards) : random_(kSeed) {
  folder_.write("config.json", config.dump());
  config_ = generate::read_config(folder_.path());
  const int64_t hidden = config_.hidden_size, mlp = config_.intermediate_size;
  const bool bias = config_.attention_bias, mlp_bias = config_.mlp_bias;
  matrix("model.embed_tokens", config_.vocab_size, hidden, false);
  for (int64_t i = 0; i < config_.layers; ++i) {
    const std::string prefix = "model.layers." + std::to_string(i) + ".";
    vector(prefix + "input_layernorm.weight", hidden, 1.0f);
    matrix(prefix + "self_attn.q_proj", config_.q_size(), hidden, bias);
    matrix(prefix + "self_attn.k_proj", config_.kv_size(), hidden, bias);
    matrix(prefix + "self_attn.v_proj", config_.kv_size(), hidden, bias);
    matrix(prefix + "self_attn.o_proj", hidden, config_.q_size(), bias);
    vector(prefix + "post_attention_layernorm.weight", hidden, 1.0f);
    matrix(prefix + "mlp.gate_proj", mlp, hidden, mlp_bias);
    matrix(prefix + "mlp.up_proj", mlp, hidden, mlp_bias);
    matrix(prefix + "mlp.down_proj", hidden, mlp, mlp_bias);
  }
  vector("model.norm.weight", hidden, 1.0f);
  if (!config_.tied_embeddings) matrix("lm_head", config_.vocab_size, hidden, false);
  write(dtype, shards);
}

std::vector<int32_t> Synthetic::tokens(size_t count) {
  std::vector<int32_t> result(count);
  for (int32_t& token : result) token = static_cast<int32_t>(random_() % static_cast<uint32_t>(config_.vocab_size));
  return result;
}

void Synthetic::vector(const std::string& name, int64_t size, float mean) { fill(name, {size}, mean, 0.3f); }

void Synthetic::matrix(const std::string& name, int64_t out, int64_t in, bool bias) {
  fill(name + ".weight", {out, in}, 0.0f, 1.5f / std::sqrt(static_cast<float>(in)));
  if (bias) fill(name + ".bias", {out}, 0.0f, 0.5f);
}

void Synthetic::fill(const std::string& name, const std::vector<int64_t>& shape, float mean, float deviation) {
  std::normal_distribution<float> normal(mean, deviation);
  Tensor tensor = {name, shape, {}};
  int64_t count = 1;
  for (const int64_t extent : shape) count *= extent;
  for (int64_t i = 0; i < count; ++i) tensor.values.push_back(normal(random_));
  weights_[name] = tensor;
}

void Synthetic::write(const std::string& dtype, int shards) {
  std::vector<std::vector<Tensor>> files(shards);
  Json map;
  size_t next = 0;
  for (auto& [name, tensor] : weights_) {
    for (float& value : tensor.values) value = model_test::stored_value(value, dtype);
    const size_t file = next++ % files.size();
    files[file].push_back(tensor);
    map[name] = std::to_string(file) + ".safetensors";
  }
  if (shards == 1) {
    folder_.write("model.safetensors", model_test::safetensors(files[0], dtype));
    return;
  }
  for (size_t i = 0; i < files.size(); ++i)
    folder_.write(std::to_string(i) + ".safetensors", model_test::safetensors(files[i], dtype));
  folder_.write("model.safetensors.index.json", Json{{"weight_map", map}}.dump());
}

std::vector<Shape> shapes() {
  const Json head = separate_head();
  return {{"SeparateHeadF32", head, "F32", 1},
          {"SeparateHeadF16InThreeShards", head, "F16", 3},
          {"SeparateHeadBf16", head, "BF16", 1},
          {"TiedEmbeddings", with(head, {{"tie_word_embeddings", true}}), "F32", 1},
          {"Biases", with(head, {{"attention_bias", true}, {"mlp_bias", true}}), "F32", 2},
          {"OneKeyHeadForAll", with(head, {{"num_key_value_heads", 1}}), "F32", 1},
          {"KeyHeadForEach", with(head, {{"num_key_value_heads", 6}}), "F32", 1},
          {"SlidingWindow", with(head, {{"architectures", {"MistralForCausalLM"}}, {"sliding_window", 7}}), "F32", 1}};
}

void expect_close(const std::vector<float>& logits, const double* expected, double largest, double tolerance,
                  size_t row) {
  for (size_t i = 0; i < logits.size(); ++i)
    ASSERT_NEAR(logits[i], expected[i], tolerance * largest) << "row " << row << ", token " << i << ", seed " << kSeed;
}

double largest_of(const std::vector<double>& values) {
  double largest = 0;
  for (const double value : values) largest = std::max(largest, std::abs(value));
  return largest;
}

}  // namespace model_test
