// Small random checkpoints of every shape the engine serves, against the float64 model.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <random>
#include <string>

#include "engine/model.h"
#include "engine/run.h"
#include "model/checkpoint_writer.h"
#include "model/expect_error.h"
#include "model/reference_model.h"

namespace {

using generate::KvCache;
using generate::Model;
using generate::ModelConfig;
using generate::ModelOptions;
using model_test::expect_error;
using model_test::TemporaryFolder;
using model_test::Tensor;
using model_test::TensorMap;
using Json = nlohmann::json;

constexpr uint32_t kSeed = 20;

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

// A checkpoint with random weights, in as many shards as asked for.
class Synthetic {
 public:
  Synthetic(const Json& config, const std::string& dtype, int shards) : random_(kSeed) {
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

  const TemporaryFolder& folder() const { return folder_; }
  const ModelConfig& config() const { return config_; }
  const TensorMap& weights() const { return weights_; }

  std::vector<int32_t> tokens(size_t count) {
    std::vector<int32_t> result(count);
    for (int32_t& token : result) token = static_cast<int32_t>(random_() % static_cast<uint32_t>(config_.vocab_size));
    return result;
  }

 private:
  void vector(const std::string& name, int64_t size, float mean) { fill(name, {size}, mean, 0.3f); }

  void matrix(const std::string& name, int64_t out, int64_t in, bool bias) {
    fill(name + ".weight", {out, in}, 0.0f, 1.5f / std::sqrt(static_cast<float>(in)));
    if (bias) fill(name + ".bias", {out}, 0.0f, 0.5f);
  }

  void fill(const std::string& name, const std::vector<int64_t>& shape, float mean, float deviation) {
    std::normal_distribution<float> normal(mean, deviation);
    Tensor tensor = {name, shape, {}};
    int64_t count = 1;
    for (const int64_t extent : shape) count *= extent;
    for (int64_t i = 0; i < count; ++i) tensor.values.push_back(normal(random_));
    weights_[name] = tensor;
  }

  void write(const std::string& dtype, int shards) {
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

  std::mt19937 random_;
  TemporaryFolder folder_;
  ModelConfig config_;
  TensorMap weights_;
};

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

struct Shape {
  const char* name;
  Json config;
  const char* dtype;
  int shards;
};

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

class SyntheticModel : public testing::TestWithParam<Shape> {};

TEST_P(SyntheticModel, MatchesTheFloat64ModelInOneStepAndInMany) {
  Synthetic synthetic(GetParam().config, GetParam().dtype, GetParam().shards);
  const std::vector<int32_t> tokens = synthetic.tokens(61);
  const std::vector<double> expected = model_test::reference_logits(synthetic.config(), synthetic.weights(), tokens);
  const double largest = largest_of(expected);
  const auto vocab = static_cast<size_t>(synthetic.config().vocab_size);
  const auto check = [&](Model& model, size_t first, size_t count) {
    for (size_t row = 0; row < count; ++row)
      expect_close(model.logits(static_cast<int64_t>(row)), expected.data() + (first + row) * vocab, largest, 1e-5,
                   first + row);
  };
  for (const int threads : {1, 3}) {
    ModelOptions options;
    options.threads = threads;
    Model model(synthetic.folder().path(), options);

    KvCache once = model.make_cache(1, 61, KvCache::Use::kOneStep);
    model.forward(tokens, once);
    check(model, 0, tokens.size());

    // Prompt, a longer chunk after it, then token by token; the cache has room to spare.
    KvCache cache = model.make_cache(1, 80, KvCache::Use::kManySteps);
    size_t done = 0;
    for (const size_t step : {5, 40, 1, 1, 1, 9, 4}) {
      model.forward(std::span(tokens).subspan(done, step), cache);
      check(model, done, step);
      done += step;
    }
    EXPECT_EQ(done, tokens.size());
    EXPECT_EQ(cache.length(), 61);
  }
}

INSTANTIATE_TEST_SUITE_P(Engine, SyntheticModel, testing::ValuesIn(shapes()),
                         [](const testing::TestParamInfo<Shape>& info) { return info.param.name; });

TEST(SyntheticModel, SequencesOfABatchDoNotSeeEachOther) {
  Synthetic synthetic(separate_head(), "F32", 1);
  const std::vector<int32_t> tokens = synthetic.tokens(3 * 20);
  Model model(synthetic.folder().path(), {});
  KvCache cache = model.make_cache(3, 24, KvCache::Use::kOneStep);
  model.forward(tokens, cache);
  for (int64_t sequence = 0; sequence < 3; ++sequence) {
    const std::vector<int32_t> alone(tokens.begin() + sequence * 20, tokens.begin() + sequence * 20 + 20);
    const std::vector<double> expected = model_test::reference_logits(synthetic.config(), synthetic.weights(), alone);
    expect_close(model.logits(sequence * 20 + 19), expected.data() + 19 * 37, largest_of(expected), 1e-5, 19);
  }
}

TEST(SyntheticModel, LossIsTheMeanOverWholeWindows) {
  Synthetic synthetic(separate_head(), "F32", 1);
  // Three windows of 10 need 31 tokens; the 38 here make three, and the rest is left over.
  const std::vector<int32_t> tokens = synthetic.tokens(38);
  double bits = 0;
  for (size_t window = 0; window < 3; ++window) {
    const std::vector<int32_t> inputs(tokens.begin() + window * 10, tokens.begin() + window * 10 + 10);
    const std::vector<double> logits = model_test::reference_logits(synthetic.config(), synthetic.weights(), inputs);
    for (size_t i = 0; i < 10; ++i) {
      double sum = 0;
      for (size_t token = 0; token < 37; ++token) sum += std::exp(logits[i * 37 + token]);
      bits -= std::log2(std::exp(logits[i * 37 + tokens[window * 10 + i + 1]]) / sum) / 30;
    }
  }
  Model model(synthetic.folder().path(), {});
  std::vector<int64_t> progress;
  const generate::LossResult result =
      generate::evaluate_loss(model, tokens, 10, 0, [&](int64_t done, int64_t) { progress.push_back(done); });
  EXPECT_EQ(result.windows, 3);
  EXPECT_EQ(result.tokens, 30);
  EXPECT_NEAR(result.bits_per_token, bits, 1e-5);
  EXPECT_EQ(progress.back(), 30);
  EXPECT_EQ(generate::evaluate_loss(model, tokens, 10, 2, [](int64_t, int64_t) {}).windows, 2);
  expect_error([&] { generate::evaluate_loss(model, tokens, 38, 0, [](int64_t, int64_t) {}); }, "too few");
}

TEST(SyntheticModel, AttentionInNarrowTypesStaysNearFloat64) {
  Synthetic synthetic(separate_head(), "F32", 1);
  const std::vector<int32_t> tokens = synthetic.tokens(50);
  const std::vector<double> expected = model_test::reference_logits(synthetic.config(), synthetic.weights(), tokens);
  // Half an ulp is 2^-9 in bf16 and 2^-12 in f16; a few roundings add up on the way to the logits.
  const std::pair<generate::DType, double> cases[] = {{generate::DType::kBf16, 0.03}, {generate::DType::kF16, 0.004}};
  for (const auto& [dtype, tolerance] : cases) {
    ModelOptions options;
    options.dtype = dtype;
    Model model(synthetic.folder().path(), options);
    KvCache cache = model.make_cache(1, 50, KvCache::Use::kManySteps);
    model.forward(std::span(tokens).first(49), cache);
    model.forward(std::span(tokens).subspan(49), cache);
    expect_close(model.logits(0), expected.data() + 49 * 37, largest_of(expected), tolerance, 49);
  }
}

TEST(SyntheticModel, StopsAtTheEndOfTextToken) {
  Synthetic synthetic(separate_head(), "F32", 1);
  Model model(synthetic.folder().path(), {});
  generate::SamplingOptions greedy;
  greedy.greedy = true;
  const std::vector<int32_t> prompt = synthetic.tokens(5);
  const auto write = [&](Model& m) { return generate::write_tokens(m, prompt, 20, greedy, [](int32_t) {}).tokens; };
  const std::vector<int32_t> unstopped = write(model);
  ASSERT_EQ(unstopped.size(), 20u);
  synthetic.folder().write("config.json", with(separate_head(), {{"eos_token_id", unstopped[6]}}).dump());
  Model stopping(synthetic.folder().path(), {});
  const auto end = std::find(unstopped.begin(), unstopped.end(), unstopped[6]);
  EXPECT_EQ(write(stopping), std::vector<int32_t>(unstopped.begin(), end));
}

TEST(SyntheticModel, RefusesStepsThatDoNotFit) {
  Synthetic synthetic(separate_head(), "F32", 1);
  Model model(synthetic.folder().path(), {});
  KvCache cache = model.make_cache(2, 4, KvCache::Use::kManySteps);
  expect_error([&] { model.forward(std::vector<int32_t>{1, 2, 3}, cache); }, "cannot be shared by 2");
  expect_error([&] { model.forward(std::vector<int32_t>{}, cache); }, "0 tokens");
  expect_error([&] { model.forward(std::vector<int32_t>(10), cache); }, "5 more tokens do not fit");
  expect_error([&] { model.forward(std::vector<int32_t>{1, 37}, cache); }, "token 37");
  expect_error([&] { model.forward(std::vector<int32_t>{1, -1}, cache); }, "token -1");
  EXPECT_EQ(cache.length(), 0);
  model.forward(std::vector<int32_t>{1, 2}, cache);
  expect_error([&] { model.logits(2); }, "row 2");
  expect_error([&] { model.losses(std::vector<int32_t>{1}); }, "1 targets");
  expect_error([&] { model.losses(std::vector<int32_t>{1, 37}); }, "token 37");
  KvCache once = model.make_cache(1, 4, KvCache::Use::kOneStep);
  model.forward(std::vector<int32_t>{1}, once);
  expect_error([&] { model.forward(std::vector<int32_t>{1}, once); }, "cannot take a second");
  expect_error([&] { model.make_cache(1, 129, KvCache::Use::kManySteps); },
               "max_position_embeddings of the model is 128");
}

TEST(SyntheticModel, RefusesCheckpointsThatDoNotMatchTheConfiguration) {
  Synthetic synthetic(separate_head(), "F32", 1);
  const auto load = [&](const Json& changes) {
    synthetic.folder().write("config.json", with(separate_head(), changes).dump());
    return [&] { Model model(synthetic.folder().path(), {}); };
  };
  expect_error(load({{"tie_word_embeddings", true}, {"num_hidden_layers", 1}}), "model.layers.1");
  expect_error(load({{"num_hidden_layers", 3}}), "'model.layers.2.input_layernorm.weight' is missing");
  expect_error(load({{"attention_bias", true}}), "q_proj.bias' is missing");
  expect_error(load({{"head_dim", 18}}), "[120, 48], and config.json asks for [108, 48]");
}

}  // namespace
