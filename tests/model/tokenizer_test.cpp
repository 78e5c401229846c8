#include "engine/tokenizer.h"

#include <gtest/gtest.h>

#include "model/expect_error.h"

namespace {

using generate::ModelConfig;
using model_test::expect_error;

ModelConfig with_vocabulary(int64_t size) {
  ModelConfig config;
  config.vocab_size = size;
  return config;
}

TEST(Tokenizer, BytesAreTokensAndBack) {
  const ModelConfig config = with_vocabulary(256);
  EXPECT_EQ(generate::tokenize(config, "a\xff\n"), (std::vector<int32_t>{97, 255, 10}));
  EXPECT_EQ(generate::detokenize(config, 255), "\xff");
}

TEST(Tokenizer, OtherVocabulariesAskForTokenIds) {
  const ModelConfig config = with_vocabulary(32000);
  expect_error([&] { generate::tokenize(config, "a"); }, "give token ids");
  EXPECT_EQ(generate::detokenize(config, 31999), "31999 ");
}

TEST(Tokenizer, ParsesIdsAndRefusesWhatIsNone) {
  const ModelConfig config = with_vocabulary(300);
  EXPECT_EQ(generate::parse_token_ids(config, "1, 299\n0"), (std::vector<int32_t>{1, 299, 0}));
  EXPECT_TRUE(generate::parse_token_ids(config, " ,").empty());
  for (const char* text : {"300", "-1", "1x", "x", "99999999999", "1.5"})
    expect_error([&] { generate::parse_token_ids(config, text); }, "whole numbers from 0 to 299");
}

}  // namespace
