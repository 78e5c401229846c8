#include "engine/run.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numbers>

#include "engine/error.h"

namespace generate {
namespace {

// Windows go through the layers together up to this many tokens, which bounds the activations' memory.
constexpr int64_t kBatchTokens = 8192;

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

LossResult evaluate_loss(Model& model, std::span<const int32_t> tokens, int64_t context, int64_t max_windows,
                         const ProgressFunction& progress) {
  if (context < 1) fail("the context is %lld tokens; 1 or more is accepted", static_cast<long long>(context));
  LossResult result;
  result.context = context;
  result.windows = tokens.empty() ? 0 : (static_cast<int64_t>(tokens.size()) - 1) / context;
  if (max_windows > 0) result.windows = std::min(result.windows, max_windows);
  if (result.windows == 0)
    fail("%zu tokens are too few for a window of %lld and the token after it", tokens.size(),
         static_cast<long long>(context));
  result.tokens = result.windows * context;

  const int64_t together = std::clamp<int64_t>(kBatchTokens / context, 1, result.windows);
  model.prepare({together, context, 0}, context);
  const auto start = std::chrono::steady_clock::now();
  double nats = 0;
  for (int64_t window = 0; window < result.windows; window += together) {
    const int64_t batch = std::min(together, result.windows - window);
    const size_t first = static_cast<size_t>(window * context), count = static_cast<size_t>(batch * context);
    KvCache cache = model.make_cache(batch, context, KvCache::Use::kOneStep);
    model.forward(tokens.subspan(first, count), cache);
    for (const double loss : model.losses(tokens.subspan(first + 1, count))) nats += loss;
    progress((window + batch) * context, result.tokens);
  }
  result.seconds = seconds_since(start);
  result.bits_per_token = nats / std::numbers::ln2 / static_cast<double>(result.tokens);
  return result;
}

WriteResult write_tokens(Model& model, std::span<const int32_t> prompt, int64_t max_tokens,
                         const SamplingOptions& sampling, const std::function<void(int32_t)>& on_token) {
  if (prompt.empty()) fail("the prompt is empty; at least one token is needed to start from");
  if (max_tokens < 1) fail("max-tokens is %lld; 1 or more is accepted", static_cast<long long>(max_tokens));
  Sampler sampler(sampling);
  WriteResult result;
  result.prompt_tokens = static_cast<int64_t>(prompt.size());
  KvCache cache = model.make_cache(1, result.prompt_tokens + max_tokens, KvCache::Use::kManySteps);

  for (const int64_t step :
       {std::min(result.prompt_tokens, Model::kPrefillChunk), result.prompt_tokens % Model::kPrefillChunk, int64_t{1}})
    if (step > 0) model.prepare({1, step, 0}, cache.capacity());
  auto start = std::chrono::steady_clock::now();
  std::vector<float> logits = model.prefill(prompt, cache);
  result.prefill_seconds = seconds_since(start);

  start = std::chrono::steady_clock::now();
  while (true) {
    const int32_t token = sampler.next(logits);
    if (token == model.config().eos_token) break;
    result.tokens.push_back(token);
    on_token(token);
    if (static_cast<int64_t>(result.tokens.size()) == max_tokens) break;
    model.forward(std::array{token}, cache);
    logits = model.logits(0);
  }
  result.decode_seconds = seconds_since(start);
  return result;
}

}  // namespace generate
