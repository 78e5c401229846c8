// The shipped model on a GPU: the losses and logits that it has everywhere.

#include <gtest/gtest.h>

#include <span>
#include <string>

#include "model/gpu.h"
#include "model/shipped_model.h"

namespace {

using generate::DType;
using generate::KvCache;
using generate::Model;
using model_test::all_logits;
using model_test::expect_close;
using model_test::expect_decoding;
using model_test::largest_of;
using model_test::loss;
using model_test::manual;
using model_test::on_cuda;
using model_test::reference;

// Relative to the largest logit. Half an ulp is 2^-9 in bf16 and 2^-12 in f16; some roundings in each of six layers add
// up.
constexpr struct {
  DType dtype;
  double logits, bits_per_byte;
} kTypes[] = {{DType::kF32, 1e-4, 2e-5}, {DType::kF16, 5e-3, 5e-4}, {DType::kBf16, 4e-2, 2e-3}};

class ShippedModelOnTheGpu : public model_test::OnTheGpu {};

TEST_F(ShippedModelOnTheGpu, LogitsAfter512BytesMatchTheReference) {
  const auto expected = reference().at("logits_last_of_first_512").get<std::vector<float>>();
  for (const auto& type : kTypes) {
    Model model(MODEL_FOLDER, on_cuda(type.dtype));
    KvCache cache = model.make_cache(1, 512, KvCache::Use::kManySteps);
    expect_close(model.prefill(manual(512), cache), expected, dtype_name(type.dtype), type.logits);
  }
}

TEST_F(ShippedModelOnTheGpu, LossOfTheManualMatchesTheReferenceAtEveryContext) {
  for (const size_t context : {1024, 4096, 8192, 16384}) {
    const std::string key = std::to_string(context);
    const size_t windows = reference().at("tokens").at(key).get<size_t>() / context;
    for (const auto& type : kTypes)
      EXPECT_NEAR(loss(on_cuda(type.dtype), context, windows), reference().at("bits_per_byte").at(key).get<double>(),
                  type.bits_per_byte)
          << "context " << context << ", " << dtype_name(type.dtype);
  }
}

// The cache is quantized and read as on the CPU: the same losses, short of bf16.
TEST_F(ShippedModelOnTheGpu, CacheOfEightBitsHasTheLossOfTheCpu) {
  constexpr size_t kContext = 1024, kWindows = 6;
  generate::ModelOptions cpu, cuda = on_cuda(DType::kBf16);
  cpu.cache = cuda.cache = generate::CacheFormat::kE4m3;
  EXPECT_NEAR(loss(cuda, kContext, kWindows), loss(cpu, kContext, kWindows), 3e-3);
}

TEST_F(ShippedModelOnTheGpu, DecodingFromACacheOfEightBitsStaysNearPrefill) {
  generate::ModelOptions options = on_cuda(DType::kBf16);
  options.cache = generate::CacheFormat::kE4m3;
  Model model(MODEL_FOLDER, options);
  expect_decoding(model, 120, all_logits(model, 200), "", 0.15);
}

TEST_F(ShippedModelOnTheGpu, Bf16IsTheDefault) {
  generate::ModelOptions options;
  options.device = ADAATTN_DEVICE_CUDA;
  EXPECT_EQ(Model(MODEL_FOLDER, options).dtype(), DType::kBf16);
}

TEST_F(ShippedModelOnTheGpu, DecodingTokenByTokenGivesTheLogitsOfPrefill) {
  for (const auto& type : kTypes) {
    Model model(MODEL_FOLDER, on_cuda(type.dtype));
    const std::vector<std::vector<float>> expected = all_logits(model, 200);
    const std::vector<float> prompt =
        expect_decoding(model, 120, expected, std::string(", ") + dtype_name(type.dtype), type.logits);
    expect_close(prompt, expected[119], "prefill", type.logits);
  }
}

TEST_F(ShippedModelOnTheGpu, DecodingBehindALongPromptGivesTheLogitsOfPrefill) {
  constexpr size_t kTokens = 9000, kDecoded = 8;  // enough keys for decoding to split them
  const std::vector<int32_t> tokens = manual(kTokens + kDecoded);
  for (const auto& type : kTypes) {
    Model model(MODEL_FOLDER, on_cuda(type.dtype));
    KvCache once = model.make_cache(1, kTokens + kDecoded, KvCache::Use::kOneStep);
    model.forward(tokens, once);
    std::vector<std::vector<float>> expected;
    for (size_t i = 0; i < kDecoded; ++i) expected.push_back(model.logits(static_cast<int64_t>(kTokens + i)));
    KvCache cache = model.make_cache(1, kTokens + kDecoded, KvCache::Use::kManySteps);
    model.prefill(std::span(tokens).first(kTokens), cache);
    for (size_t i = 0; i < kDecoded; ++i) {
      model.forward(std::span(tokens).subspan(kTokens + i, 1), cache);
      expect_close(model.logits(0), expected[i], std::string("decoding, ") + dtype_name(type.dtype), type.logits);
    }
  }
}

TEST_F(ShippedModelOnTheGpu, GreedyWritingIsRepeatable) {
  generate::SamplingOptions sampling;
  sampling.greedy = true;
  for (const auto& type : kTypes) {
    std::vector<int32_t> first;
    for (int run = 0; run < 2; ++run) {
      Model model(MODEL_FOLDER, on_cuda(type.dtype));
      const auto result = generate::write_tokens(model, manual(100), 60, sampling, [](int32_t) {});
      EXPECT_EQ(result.tokens.size(), 60u);
      if (run == 0) first = result.tokens;
      EXPECT_EQ(result.tokens, first) << dtype_name(type.dtype);
    }
  }
}

TEST_F(ShippedModelOnTheGpu, ReportsTheTimeOfAttentionAlone) {
  Model model(MODEL_FOLDER, on_cuda(DType::kBf16));
  const auto evaluate = [&] {
    return generate::evaluate_loss(model, manual(2 * 4096 + 1), 4096, 0, [](int64_t, int64_t) {}).seconds;
  };
  const double seconds = evaluate(), attention = model.attention_report().seconds;
  EXPECT_GT(attention, 0);
  EXPECT_LT(attention, seconds);
  evaluate();
  EXPECT_GT(model.attention_report().seconds, attention);
}

}  // namespace
