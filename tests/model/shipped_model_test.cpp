// The model in examples/generate/model: its known losses and logits, and the ways of running it against each other.

#include "model/shipped_model.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <iterator>
#include <set>
#include <span>
#include <sstream>
#include <string>

namespace {

using generate::KvCache;
using generate::Model;
using generate::ModelOptions;
using model_test::all_logits;
using model_test::expect_close;
using model_test::expect_decoding;
using model_test::largest_of;
using model_test::loss;
using model_test::manual;
using model_test::reference;

TEST(ShippedModel, LogitsAfter512BytesMatchTheReference) {
  const auto expected = reference().at("logits_last_of_first_512").get<std::vector<float>>();
  Model model(MODEL_FOLDER, {});
  KvCache cache = model.make_cache(1, 512, KvCache::Use::kManySteps);
  expect_close(model.prefill(manual(512), cache), expected, "prefill");
}

TEST(ShippedModel, LossOfTheManualAtContext1024MatchesTheReference) {
  constexpr size_t kWindows = 73;  // all there are
  EXPECT_EQ(reference().at("tokens").at("1024").get<size_t>(), kWindows * 1024);
  EXPECT_NEAR(loss({}, 1024, kWindows), reference().at("bits_per_byte").at("1024").get<double>(), 1e-3);
}

TEST(ShippedModel, CacheOfEightBitsCostsLittleLoss) {
  constexpr size_t kWindows = 6;
  ModelOptions narrow;
  narrow.cache = generate::CacheFormat::kE4m3;
  const double exact = loss({}, 1024, kWindows), change = loss(narrow, 1024, kWindows) / exact - 1;
  EXPECT_LT(change, 0.004);
  EXPECT_NE(change, 0) << "nothing was rounded?";
}

// Blocks of the cache get their factors from the first of their tokens here and from all of them in one step.
TEST(ShippedModel, DecodingFromACacheOfEightBitsStaysNearPrefill) {
  ModelOptions narrow;
  narrow.cache = generate::CacheFormat::kE4m3;
  Model model(MODEL_FOLDER, narrow);
  expect_decoding(model, 120, all_logits(model, 200), "", 0.15);
}

TEST(ShippedModel, DecodingTokenByTokenGivesTheLogitsOfPrefill) {
  Model model(MODEL_FOLDER, {});
  const std::vector<std::vector<float>> expected = all_logits(model, 200);
  expect_close(expect_decoding(model, 120, expected, ""), expected[119], "prefill");
}

TEST(ShippedModel, PrefillInSeveralChunksGivesTheLogitsOfOneStep) {
  constexpr size_t kTokens = 2300;  // more than a chunk
  Model model(MODEL_FOLDER, {});
  const std::vector<int32_t> tokens = manual(kTokens);
  KvCache once = model.make_cache(1, kTokens, KvCache::Use::kOneStep);
  model.forward(tokens, once);
  const std::vector<float> expected = model.logits(kTokens - 1);
  KvCache cache = model.make_cache(1, kTokens, KvCache::Use::kManySteps);
  expect_close(model.prefill(tokens, cache), expected, "prefill");
}

TEST(ShippedModel, GreedyWritingIsRepeatable) {
  generate::SamplingOptions sampling;
  sampling.greedy = true;
  std::vector<int32_t> first;
  for (int run = 0; run < 2; ++run) {
    Model model(MODEL_FOLDER, {});
    const auto result = generate::write_tokens(model, manual(100), 60, sampling, [](int32_t) {});
    EXPECT_EQ(result.tokens.size(), 60u);
    if (run == 0) first = result.tokens;
    EXPECT_EQ(result.tokens, first);
  }
}

TEST(ShippedModel, GreedyWritingFollowsTheLogitsOfPrefill) {
  generate::SamplingOptions sampling;
  sampling.greedy = true;
  Model model(MODEL_FOLDER, {});
  std::vector<int32_t> tokens = manual(100);
  const auto written = generate::write_tokens(model, tokens, 40, sampling, [](int32_t) {}).tokens;
  tokens.insert(tokens.end(), written.begin(), written.end());
  KvCache cache = model.make_cache(1, 140, KvCache::Use::kOneStep);
  model.forward(tokens, cache);
  for (size_t i = 0; i < written.size(); ++i) {
    const std::vector<float> logits = model.logits(static_cast<int64_t>(99 + i));
    // The choice may differ only where two tokens are as good as equal.
    EXPECT_NEAR(logits[written[i]], *std::max_element(logits.begin(), logits.end()), 1e-4 * largest_of(logits)) << i;
  }
}

TEST(ShippedModel, SamplingRepeatsForASeedAndDiffersForAnother) {
  Model model(MODEL_FOLDER, {});
  const auto write = [&](uint64_t seed) {
    generate::SamplingOptions sampling;
    sampling.seed = seed;
    return generate::write_tokens(model, manual(64), 60, sampling, [](int32_t) {}).tokens;
  };
  EXPECT_EQ(write(1), write(1));
  EXPECT_NE(write(1), write(2));
}

TEST(ShippedModel, NarrowAttentionTypesChangeTheLossLittle) {
  const double exact = loss({}, 1024, 4);
  ModelOptions options;
  options.dtype = generate::DType::kBf16;
  EXPECT_NEAR(loss(options, 1024, 4), exact, 5e-3);
  options.dtype = generate::DType::kF16;
  EXPECT_NEAR(loss(options, 1024, 4), exact, 1e-3);
}

TEST(ShippedModel, ThreadCountsChangeTheLossByRoundingOnly) {
  ModelOptions options;
  options.threads = 1;
  const double expected = loss(options, 512, 3);
  for (const int threads : {2, 5}) {
    options.threads = threads;
    EXPECT_NEAR(loss(options, 512, 3), expected, 1e-6) << threads << " threads";
  }
}

// Errors are counted per (layer, head, window), once other windows have made the feedback.
TEST(ShippedModel, PoliciesKeepTheirToleranceOnRealAttention) {
  constexpr size_t kContext = 2048, kWindows = 4;
  const double exact = loss({}, kContext, kWindows);
  const struct {
    const char* name;
    double change;  // of the loss, relative
  } policies[] = {{"quality", 0.005}, {"balanced", 0.01}, {"speed", 0.02}};
  for (const auto& [name, change] : policies) {
    ModelOptions options;
    options.attention.policy = generate::policy_names().at(name);
    Model model(MODEL_FOLDER, options);
    const auto evaluate = [&](size_t first_window) {
      const std::vector<int32_t> text = manual((first_window + kWindows) * kContext + 1);
      const std::span<const int32_t> windows = std::span(text).subspan(first_window * kContext);
      return generate::evaluate_loss(model, windows, kContext, 0, [](int64_t, int64_t) {}).bits_per_token;
    };
    for (const size_t first_window : {2 * kWindows, kWindows}) evaluate(first_window);
    const adaattn_plan_stats_t cold = model.attention_report().totals;
    EXPECT_NEAR(evaluate(0), exact, change * exact) << name;
    adaattn_plan_stats_t stats = model.attention_report().totals;
    stats.heads -= cold.heads;
    stats.verified_heads -= cold.verified_heads;
    stats.heads_over_tolerance -= cold.heads_over_tolerance;
    std::printf("%s: %llu of %llu (layer, head, window) errors over the tolerance, largest %.3f, tiles kept %.3f\n",
                name, static_cast<unsigned long long>(stats.heads_over_tolerance),
                static_cast<unsigned long long>(stats.verified_heads), stats.measured_error_max,
                static_cast<double>(stats.tiles_kept) / static_cast<double>(stats.tiles));
    EXPECT_GT(stats.verified_heads, stats.heads / 2) << name;
    EXPECT_LE(stats.heads_over_tolerance, stats.verified_heads / 100) << name;
    EXPECT_LT(stats.tiles_kept, stats.tiles) << name;
  }
}

class ShippedModelIsa : public testing::TestWithParam<std::string> {};

TEST_P(ShippedModelIsa, RunsWhenForcedAndAgreesWithTheOthers) {
  adaattn_device_info_t device = {};
  device.struct_size = sizeof device;
  ASSERT_EQ(adaattn_device_info(ADAATTN_DEVICE_CPU, 0, &device), ADAATTN_SUCCESS);
  std::istringstream available(device.isa);
  const std::set<std::string> names{std::istream_iterator<std::string>(available), {}};
  if (!names.contains(GetParam())) GTEST_SKIP() << "this processor has " << device.isa;
  ModelOptions options;
  options.isa = generate::isa_names().at(GetParam());
  // An AMX context runs f32 on its AVX-512 kernels.
  const std::string expected_isa = GetParam() == "amx" ? "avx512" : GetParam();
  EXPECT_EQ(Model(MODEL_FOLDER, options).attention_info({1, 1024, 0}, 1024).isa, expected_isa);
  EXPECT_NEAR(loss(options, 1024, 2), loss({}, 1024, 2), 1e-5);
}

INSTANTIATE_TEST_SUITE_P(Cpu, ShippedModelIsa, testing::Values("baseline", "avx2", "avx512", "amx", "neon"),
                         [](const testing::TestParamInfo<std::string>& info) { return info.param; });

}  // namespace
