#include "engine/config.h"

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "engine/error.h"

namespace generate {
namespace {

using Json = nlohmann::json;

// Far above any model, far below where a product of three sizes would overflow.
constexpr int64_t kMaxExtent = int64_t{1} << 20;

// A value that is absent or null.
bool absent(const Json& config, const char* key) { return !config.contains(key) || config[key].is_null(); }

int64_t extent(const Json& config, const char* key) {
  if (absent(config, key)) fail("config.json: %s is missing", key);
  const Json& value = config[key];
  if (!value.is_number_integer() || value.get<double>() < 1 || value.get<double>() > static_cast<double>(kMaxExtent))
    fail("config.json: %s is %s; a whole number from 1 to %lld is accepted", key, value.dump().c_str(),
         static_cast<long long>(kMaxExtent));
  return value.get<int64_t>();
}

int64_t extent_or(const Json& config, const char* key, int64_t otherwise) {
  return absent(config, key) ? otherwise : extent(config, key);
}

bool flag(const Json& config, const char* key) {
  if (absent(config, key)) return false;
  if (!config[key].is_boolean())
    fail("config.json: %s is %s; true or false is accepted", key, config[key].dump().c_str());
  return config[key].get<bool>();
}

double positive(const Json& config, const char* key, double otherwise) {
  if (absent(config, key)) return otherwise;
  const Json& value = config[key];
  if (!value.is_number() || !std::isfinite(value.get<double>()) || value.get<double>() <= 0)
    fail("config.json: %s is %s; a positive number is accepted", key, value.dump().c_str());
  return value.get<double>();
}

void require_default_rope(const Json& rope, const char* key) {
  if (!rope.is_object()) fail("config.json: %s is not an object", key);
  for (const char* kind : {"rope_type", "type"})
    if (!absent(rope, kind) && rope[kind] != "default")
      fail("config.json: %s.%s is %s; only \"default\" (no scaling) is served", key, kind, rope[kind].dump().c_str());
}

void require_served(const Json& config) {
  if (!absent(config, "architectures")) {
    const Json& names = config["architectures"];
    if (!names.is_array() || names.size() != 1 || (names[0] != "LlamaForCausalLM" && names[0] != "MistralForCausalLM"))
      fail("config.json: architectures is %s; LlamaForCausalLM and MistralForCausalLM are served",
           names.dump().c_str());
  }
  if (!absent(config, "hidden_act") && config["hidden_act"] != "silu")
    fail("config.json: hidden_act is %s; \"silu\" is served", config["hidden_act"].dump().c_str());
  if (!absent(config, "rope_scaling")) require_default_rope(config["rope_scaling"], "rope_scaling");
  if (!absent(config, "rope_parameters")) require_default_rope(config["rope_parameters"], "rope_parameters");
  for (const Json* where : {&config, absent(config, "rope_parameters") ? nullptr : &config["rope_parameters"]})
    if (where != nullptr && !absent(*where, "partial_rotary_factor") && (*where)["partial_rotary_factor"] != 1.0)
      fail("config.json: partial_rotary_factor is %s; 1 is served", (*where)["partial_rotary_factor"].dump().c_str());
  if (!absent(config, "quantization_config"))
    fail("config.json: quantization_config is set; F32, F16 and BF16 weights are served");
}

}  // namespace

ModelConfig read_config(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / "config.json";
  std::ifstream stream(path);
  if (!stream) fail("%s: cannot be read", path.c_str());
  Json config;
  try {
    config = Json::parse(stream);
  } catch (const Json::exception& e) {
    fail("%s: not valid JSON (%s)", path.c_str(), e.what());
  }
  if (!config.is_object()) fail("%s: not a JSON object", path.c_str());
  require_served(config);

  ModelConfig result;
  result.hidden_size = extent(config, "hidden_size");
  result.intermediate_size = extent(config, "intermediate_size");
  result.layers = extent(config, "num_hidden_layers");
  result.heads = extent(config, "num_attention_heads");
  result.kv_heads = extent_or(config, "num_key_value_heads", result.heads);
  result.vocab_size = extent(config, "vocab_size");
  result.max_positions = extent_or(config, "max_position_embeddings", 2048);
  result.sliding_window = extent_or(config, "sliding_window", 0);
  if (result.heads % result.kv_heads != 0)
    fail("config.json: num_attention_heads %lld is no multiple of num_key_value_heads %lld",
         static_cast<long long>(result.heads), static_cast<long long>(result.kv_heads));
  if (absent(config, "head_dim") && result.hidden_size % result.heads != 0)
    fail("config.json: without head_dim, hidden_size %lld must be a multiple of num_attention_heads %lld",
         static_cast<long long>(result.hidden_size), static_cast<long long>(result.heads));
  result.head_dim = extent_or(config, "head_dim", result.hidden_size / result.heads);
  if (result.head_dim % 2 != 0)
    fail("config.json: head_dim %lld is odd; rotary embeddings need pairs", static_cast<long long>(result.head_dim));

  // Newer configurations keep theta in rope_parameters, older ones beside the other sizes.
  result.rope_theta = positive(config, "rope_theta", 10000.0);
  if (!absent(config, "rope_parameters"))
    result.rope_theta = positive(config["rope_parameters"], "rope_theta", result.rope_theta);
  result.rms_norm_eps = static_cast<float>(positive(config, "rms_norm_eps", 1e-6));
  result.tied_embeddings = flag(config, "tie_word_embeddings");
  result.attention_bias = flag(config, "attention_bias");
  result.mlp_bias = flag(config, "mlp_bias");
  if (!absent(config, "eos_token_id") && config["eos_token_id"].is_number_integer())
    result.eos_token = config["eos_token_id"].get<int64_t>();
  return result;
}

}  // namespace generate
