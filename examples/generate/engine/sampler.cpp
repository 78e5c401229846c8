#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "engine/error.h"

namespace generate {

Sampler::Sampler(const SamplingOptions& options) : options_(options), random_(options.seed) {
  if (!(options.temperature > 0) || !std::isfinite(options.temperature))
    fail("temperature is %g; a positive number is accepted, and greedy choice is an option of its own",
         options.temperature);
  if (options.top_k < 0) fail("top-k is %lld; 0 (all) or more is accepted", static_cast<long long>(options.top_k));
  if (!(options.top_p > 0 && options.top_p <= 1)) fail("top-p is %g; above 0 and up to 1 is accepted", options.top_p);
}

int32_t Sampler::next(std::span<const float> logits) {
  if (!std::all_of(logits.begin(), logits.end(), [](float x) { return std::isfinite(x); }))
    fail("the model produced logits that are not finite");
  if (options_.greedy) return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());

  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const auto keep = options_.top_k > 0 ? std::min<size_t>(options_.top_k, order.size()) : order.size();
  std::partial_sort(order.begin(), order.begin() + keep, order.end(),
                    [&](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; });
  order.resize(keep);

  std::vector<double> weights;
  for (const int32_t token : order)
    weights.push_back(std::exp((static_cast<double>(logits[token]) - logits[order[0]]) / options_.temperature));
  const double wanted = options_.top_p * std::accumulate(weights.begin(), weights.end(), 0.0);
  double kept = 0;
  size_t count = 0;
  while (count < weights.size() && (count == 0 || kept < wanted)) kept += weights[count++];

  // 53 random bits as a number in [0, 1): the standard's distributions differ between libraries.
  double remaining = static_cast<double>(random_() >> 11) * 0x1p-53 * kept;
  for (size_t i = 0; i < count; ++i) {
    if (remaining < weights[i]) return order[i];
    remaining -= weights[i];
  }
  return order[count - 1];
}

}  // namespace generate
