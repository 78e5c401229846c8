// Small random checkpoints of every shape the engine serves.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "engine/config.h"
#include "model/checkpoint_writer.h"
#include "model/reference_model.h"

namespace model_test {

constexpr uint32_t kSeed = 20;

// A configuration, and one with some fields changed.
nlohmann::json separate_head();
nlohmann::json with(nlohmann::json config, const nlohmann::json& changes);

struct Shape {
  const char* name;
  nlohmann::json config;
  const char* dtype;  // of the checkpoint
  int shards;
};

inline void PrintTo(const Shape& shape, std::ostream* out) { *out << shape.name; }

std::vector<Shape> shapes();

// A checkpoint with random weights, in as many shards as asked for.
class Synthetic {
 public:
  Synthetic(const nlohmann::json& config, const std::string& dtype, int shards);

  const TemporaryFolder& folder() const { return folder_; }
  const generate::ModelConfig& config() const { return config_; }
  const TensorMap& weights() const { return weights_; }

  std::vector<int32_t> tokens(size_t count);

 private:
  void vector(const std::string& name, int64_t size, float mean);
  void matrix(const std::string& name, int64_t out, int64_t in, bool bias);
  void fill(const std::string& name, const std::vector<int64_t>& shape, float mean, float deviation);
  void write(const std::string& dtype, int shards);

  std::mt19937 random_;
  TemporaryFolder folder_;
  generate::ModelConfig config_;
  TensorMap weights_;
};

// tolerance is relative to `largest`.
void expect_close(const std::vector<float>& logits, const double* expected, double largest, double tolerance,
                  size_t row);

double largest_of(const std::vector<double>& values);

}  // namespace model_test
