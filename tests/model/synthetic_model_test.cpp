// Small random checkpoints of every shape the engine serves, against the float64 model.

#include "model/synthetic_model.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "engine/model.h"
#include "engine/run.h"
#include "model/expect_error.h"

namespace {

using generate::KvCache;
using generate::Model;
using generate::ModelOptions;
using model_test::expect_close;
using model_test::expect_error;
using model_test::largest_of;
using model_test::reference_logits;
using model_test::separate_head;
using model_test::Shape;
using model_test::Synthetic;
using model_test::with;

class SyntheticModel : public testing::TestWithParam<Shape> {};

TEST_P(SyntheticModel, MatchesTheFloat64ModelInOneStepAndInMany) {
  Synthetic synthetic(GetParam().config, GetParam().dtype, GetParam().shards);
  const std::vector<int32_t> tokens = synthetic.tokens(61);
  const std::vector<double> expected = reference_logits(synthetic.config(), synthetic.weights(), tokens);
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

INSTANTIATE_TEST_SUITE_P(Engine, SyntheticModel, testing::ValuesIn(model_test::shapes()),
                         [](const testing::TestParamInfo<Shape>& info) { return info.param.name; });

TEST(SyntheticModel, SequencesOfABatchDoNotSeeEachOther) {
  Synthetic synthetic(separate_head(), "F32", 1);
  const std::vector<int32_t> tokens = synthetic.tokens(3 * 20);
  Model model(synthetic.folder().path(), {});
  KvCache cache = model.make_cache(3, 24, KvCache::Use::kOneStep);
  model.forward(tokens, cache);
  for (int64_t sequence = 0; sequence < 3; ++sequence) {
    const std::vector<int32_t> alone(tokens.begin() + sequence * 20, tokens.begin() + sequence * 20 + 20);
    const std::vector<double> expected = reference_logits(synthetic.config(), synthetic.weights(), alone);
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
    const std::vector<double> logits = reference_logits(synthetic.config(), synthetic.weights(), inputs);
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
  const std::vector<double> expected = reference_logits(synthetic.config(), synthetic.weights(), tokens);
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
  const auto load = [&](const nlohmann::json& changes) {
    synthetic.folder().write("config.json", with(separate_head(), changes).dump());
    return [&] { Model model(synthetic.folder().path(), {}); };
  };
  expect_error(load({{"tie_word_embeddings", true}, {"num_hidden_layers", 1}}), "model.layers.1");
  expect_error(load({{"num_hidden_layers", 3}}), "'model.layers.2.input_layernorm.weight' is missing");
  expect_error(load({{"attention_bias", true}}), "q_proj.bias' is missing");
  expect_error(load({{"head_dim", 18}}), "[120, 48], and config.json asks for [108, 48]");
}

}  // namespace
