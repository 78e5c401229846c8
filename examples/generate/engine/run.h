// The loss of a text, and continuing one: what the engine is for.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "engine/model.h"
#include "engine/sampler.h"

namespace generate {

struct LossResult {
  int64_t context = 0;
  int64_t windows = 0;
  int64_t tokens = 0;         // predicted
  double bits_per_token = 0;  // mean of -log2 p
  double seconds = 0;
  double tokens_per_second() const { return static_cast<double>(tokens) / seconds; }
};

// Called with tokens done and tokens in all.
using ProgressFunction = std::function<void(int64_t done, int64_t total)>;

// Window w predicts tokens w * context + 1 ... w * context + context from the `context` tokens before each window's
// end, starting with nothing before it; only whole windows with one token to spare count. max_windows 0: all.
LossResult evaluate_loss(Model& model, std::span<const int32_t> tokens, int64_t context, int64_t max_windows,
                         const ProgressFunction& progress);

struct WriteResult {
  std::vector<int32_t> tokens;
  int64_t prompt_tokens = 0;
  double prefill_seconds = 0;
  double decode_seconds = 0;
  double prefill_tokens_per_second() const { return static_cast<double>(prompt_tokens) / prefill_seconds; }
  // The first token comes out of the prefill.
  double decode_tokens_per_second() const {
    return decode_seconds > 0 ? static_cast<double>(tokens.size() - 1) / decode_seconds : 0;
  }
};

// Continues the prompt by up to max_tokens tokens, or until the model's end-of-text token, which is not returned.
WriteResult write_tokens(Model& model, std::span<const int32_t> prompt, int64_t max_tokens,
                         const SamplingOptions& sampling, const std::function<void(int32_t)>& on_token);

}  // namespace generate
