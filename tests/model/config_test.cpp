#include "engine/config.h"

#include <gtest/gtest.h>

#include <string>

#include "model/checkpoint_writer.h"
#include "model/expect_error.h"

namespace {

using generate::ModelConfig;
using generate::read_config;
using model_test::expect_error;
using model_test::TemporaryFolder;

// The sizes every configuration needs, then `more`.
std::string config_text(const std::string& more) {
  return R"({"hidden_size":48,"intermediate_size":72,"num_hidden_layers":2,"num_attention_heads":6,"vocab_size":37)" +
         (more.empty() ? "" : "," + more) + "}";
}

ModelConfig parse(const std::string& text) {
  const TemporaryFolder folder;
  folder.write("config.json", text);
  return read_config(folder.path());
}

TEST(Config, TakesTheDefaultsOfTheArchitecture) {
  const ModelConfig config = parse(config_text(""));
  EXPECT_EQ(config.kv_heads, 6);
  EXPECT_EQ(config.head_dim, 8);
  EXPECT_EQ(config.max_positions, 2048);
  EXPECT_EQ(config.rope_theta, 10000.0);
  EXPECT_EQ(config.rms_norm_eps, 1e-6f);
  EXPECT_EQ(config.sliding_window, 0);
  EXPECT_EQ(config.eos_token, -1);
  EXPECT_FALSE(config.tied_embeddings);
  EXPECT_FALSE(config.attention_bias);
}

TEST(Config, ReadsBothSpellingsOfRopeTheta) {
  EXPECT_EQ(parse(config_text(R"("rope_theta":500000.0)")).rope_theta, 500000.0);
  EXPECT_EQ(parse(config_text(R"("rope_parameters":{"rope_type":"default","rope_theta":7000})")).rope_theta, 7000.0);
  EXPECT_EQ(parse(config_text(R"("rope_theta":1.0,"rope_parameters":{"rope_theta":7000})")).rope_theta, 7000.0);
}

TEST(Config, NullCountsAsAbsent) {
  const ModelConfig config = parse(config_text(R"("rope_scaling":null,"sliding_window":null,"head_dim":null)"));
  EXPECT_EQ(config.sliding_window, 0);
  EXPECT_EQ(config.head_dim, 8);
}

TEST(Config, ReadsAHeadDimOfItsOwnAndASlidingWindow) {
  const ModelConfig config = parse(config_text(R"("head_dim":20,"num_key_value_heads":2,"sliding_window":7)"));
  EXPECT_EQ(config.q_size(), 120);
  EXPECT_EQ(config.kv_size(), 40);
  EXPECT_EQ(config.sliding_window, 7);
}

struct Refused {
  const char* name;
  std::string text;
  const char* says;
};

void PrintTo(const Refused& refused, std::ostream* out) { *out << refused.name; }

class RefusedConfig : public testing::TestWithParam<Refused> {};

TEST_P(RefusedConfig, NamesTheField) {
  expect_error([] { parse(GetParam().text); }, GetParam().says);
}

INSTANTIATE_TEST_SUITE_P(
    Config, RefusedConfig,
    testing::Values(Refused{"NotJson", "{", "not valid JSON"}, Refused{"NotAnObject", "[]", "not a JSON object"},
                    Refused{"MissingSize", R"({"hidden_size":48})", "intermediate_size is missing"},
                    Refused{"ZeroHeads", config_text(R"("num_key_value_heads":0)"), "num_key_value_heads is 0"},
                    Refused{"NegativeHeadDim", config_text(R"("head_dim":-8)"), "head_dim is -8"},
                    Refused{"FractionalHeadDim", config_text(R"("head_dim":8.5)"), "head_dim is 8.5"},
                    Refused{"HugeHeadDim", config_text(R"("head_dim":18446744073709551615)"), "head_dim is 1844"},
                    Refused{"OddHeadDim", config_text(R"("head_dim":7)"), "head_dim 7 is odd"},
                    Refused{"TextAsSize", config_text(R"("head_dim":"8")"), "head_dim is \"8\""},
                    Refused{"UnevenGroups", config_text(R"("num_key_value_heads":4)"), "no multiple"},
                    Refused{"OtherArchitecture", config_text(R"("architectures":["GPT2LMHeadModel"])"), "GPT2"},
                    Refused{"OtherActivation", config_text(R"("hidden_act":"gelu")"), "gelu"},
                    Refused{"ScaledRope", config_text(R"("rope_scaling":{"rope_type":"llama3","factor":8})"), "llama3"},
                    Refused{"OldScaledRope", config_text(R"("rope_scaling":{"type":"linear","factor":2})"), "linear"},
                    Refused{"ScaledRopeParameters", config_text(R"("rope_parameters":{"rope_type":"yarn"})"), "yarn"},
                    Refused{"PartialRope", config_text(R"("partial_rotary_factor":0.5)"), "partial_rotary_factor"},
                    Refused{"NegativeTheta", config_text(R"("rope_theta":-1)"), "rope_theta is -1"},
                    Refused{"FlagANumber", config_text(R"("attention_bias":1)"), "attention_bias is 1"},
                    Refused{"Quantized", config_text(R"("quantization_config":{"bits":4})"), "quantization_config"}),
    [](const testing::TestParamInfo<Refused>& info) { return info.param.name; });

}  // namespace
