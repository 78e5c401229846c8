// Choosing the next token from logits.
#pragma once

#include <cstdint>
#include <random>
#include <span>

namespace generate {

struct SamplingOptions {
  bool greedy = false;       // take the largest logit and ignore what follows
  double temperature = 0.8;  // > 0
  int64_t top_k = 0;         // keep the k likeliest tokens; 0: all
  double top_p = 0.95;       // then the fewest that hold this share of the probability; 1: all
  uint64_t seed = 0;
};

class Sampler {
 public:
  explicit Sampler(const SamplingOptions& options);

  // The same seed draws the same tokens from the same logits on every machine. Ties go to the lower id.
  int32_t next(std::span<const float> logits);

 private:
  SamplingOptions options_;
  std::mt19937_64 random_;
};

}  // namespace generate
