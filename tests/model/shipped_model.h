// The model in examples/generate/model and what is known of it.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "engine/model.h"
#include "engine/run.h"

namespace model_test {

inline std::string read_shipped(const std::string& name) {
  std::ifstream stream(std::string(MODEL_FOLDER "/") + name, std::ios::binary);
  EXPECT_TRUE(stream.good()) << name;
  return {std::istreambuf_iterator<char>(stream), {}};
}

inline const nlohmann::json& reference() {
  static const nlohmann::json json = nlohmann::json::parse(read_shipped("manual_reference.json"));
  return json;
}

// The first tokens of manual.txt.
inline std::vector<int32_t> manual(size_t tokens) {
  static const std::string text = read_shipped("manual.txt");
  std::vector<int32_t> result;
  for (const char byte : text.substr(0, tokens)) result.push_back(static_cast<unsigned char>(byte));
  return result;
}

inline double largest_of(const std::vector<float>& values) {
  double largest = 0;
  for (const float value : values) largest = std::max<double>(largest, std::abs(value));
  return largest;
}

// tolerance is relative to the largest expected logit.
inline void expect_close(const std::vector<float>& logits, const std::vector<float>& expected, const std::string& where,
                         double tolerance = 1e-4) {
  ASSERT_EQ(logits.size(), expected.size());
  for (size_t i = 0; i < logits.size(); ++i)
    ASSERT_NEAR(logits[i], expected[i], tolerance * largest_of(expected)) << where << ", token " << i;
}

// Of the first windows of manual.txt.
inline double loss(const generate::ModelOptions& options, size_t context, size_t windows) {
  generate::Model model(MODEL_FOLDER, options);
  return generate::evaluate_loss(model, manual(windows * context + 1), static_cast<int64_t>(context), 0,
                                 [](int64_t, int64_t) {})
      .bits_per_token;
}

// Logits after each of the first `count` tokens, in one step.
inline std::vector<std::vector<float>> all_logits(generate::Model& model, size_t count) {
  generate::KvCache cache = model.make_cache(1, static_cast<int64_t>(count), generate::KvCache::Use::kOneStep);
  model.forward(manual(count), cache);
  std::vector<std::vector<float>> logits;
  for (size_t row = 0; row < count; ++row) logits.push_back(model.logits(static_cast<int64_t>(row)));
  return logits;
}

// Reads the first `prompt` tokens of the manual at once and the others one by one, each with logits near `expected`.
// Returns the prompt's.
inline std::vector<float> expect_decoding(generate::Model& model, size_t prompt,
                                          const std::vector<std::vector<float>>& expected, const std::string& where,
                                          double tolerance = 1e-4) {
  const std::vector<int32_t> tokens = manual(expected.size());
  generate::KvCache cache =
      model.make_cache(1, static_cast<int64_t>(expected.size()) + 30, generate::KvCache::Use::kManySteps);
  const std::vector<float> last = model.prefill(std::span(tokens).first(prompt), cache);
  for (size_t i = prompt; i < expected.size(); ++i) {
    model.forward(std::span(tokens).subspan(i, 1), cache);
    expect_close(model.logits(0), expected[i], "position " + std::to_string(i) + where, tolerance);
  }
  return last;
}

}  // namespace model_test
