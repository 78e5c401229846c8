#include "model/reference_model.h"

#include <algorithm>
#include <cmath>

namespace model_test {
namespace {

using Vector = std::vector<double>;

// weight x + bias, where there is one.
Vector apply(const TensorMap& weights, const std::string& name, const Vector& x) {
  const Tensor& weight = weights.at(name + ".weight");
  Vector y(weight.shape[0]);
  for (size_t row = 0; row < y.size(); ++row)
    for (size_t i = 0; i < x.size(); ++i) y[row] += static_cast<double>(weight.values[row * x.size() + i]) * x[i];
  if (const auto bias = weights.find(name + ".bias"); bias != weights.end())
    for (size_t row = 0; row < y.size(); ++row) y[row] += bias->second.values[row];
  return y;
}

Vector rms_norm(const TensorMap& weights, const std::string& name, double eps, const Vector& x) {
  double mean = 0;
  for (const double value : x) mean += value * value / static_cast<double>(x.size());
  Vector y(x.size());
  for (size_t i = 0; i < x.size(); ++i) y[i] = x[i] / std::sqrt(mean + eps) * weights.at(name).values[i];
  return y;
}

void rotate(Vector& heads, int64_t head_dim, double theta, int64_t position) {
  const int64_t half = head_dim / 2;
  for (size_t head = 0; head < heads.size(); head += head_dim)
    for (int64_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(position) *
                           std::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim));
      const double a = heads[head + i], b = heads[head + i + half];
      heads[head + i] = a * std::cos(angle) - b * std::sin(angle);
      heads[head + i + half] = a * std::sin(angle) + b * std::cos(angle);
    }
}

// Attention of the query at `position` over keys and values [position + 1][kv_heads * head_dim].
Vector attend(const generate::ModelConfig& config, const Vector& q, const std::vector<Vector>& k,
              const std::vector<Vector>& v) {
  const int64_t d = config.head_dim, keys = static_cast<int64_t>(k.size());
  const int64_t first = config.sliding_window > 0 ? std::max<int64_t>(0, keys - config.sliding_window) : 0;
  Vector o(q.size());
  for (int64_t head = 0; head < config.heads; ++head) {
    const int64_t kv = head / (config.heads / config.kv_heads) * d;
    Vector weight(keys);
    double sum = 0;
    for (int64_t j = first; j < keys; ++j) {
      double score = 0;
      for (int64_t i = 0; i < d; ++i) score += q[head * d + i] * k[j][kv + i];
      weight[j] = std::exp(score / std::sqrt(static_cast<double>(d)));
      sum += weight[j];
    }
    for (int64_t j = first; j < keys; ++j)
      for (int64_t i = 0; i < d; ++i) o[head * d + i] += weight[j] / sum * v[j][kv + i];
  }
  return o;
}

void add(Vector& x, const Vector& y) {
  for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
}

}  // namespace

std::vector<double> reference_logits(const generate::ModelConfig& config, const TensorMap& weights,
                                     const std::vector<int32_t>& tokens) {
  const double eps = config.rms_norm_eps;
  std::vector<std::vector<Vector>> k(config.layers), v(config.layers);
  Vector logits;
  for (size_t position = 0; position < tokens.size(); ++position) {
    const float* embedding =
        weights.at("model.embed_tokens.weight").values.data() + tokens[position] * config.hidden_size;
    Vector x(embedding, embedding + config.hidden_size);
    for (int64_t layer = 0; layer < config.layers; ++layer) {
      const std::string prefix = "model.layers." + std::to_string(layer) + ".";
      const Vector normed = rms_norm(weights, prefix + "input_layernorm.weight", eps, x);
      Vector q = apply(weights, prefix + "self_attn.q_proj", normed);
      Vector key = apply(weights, prefix + "self_attn.k_proj", normed);
      rotate(q, config.head_dim, config.rope_theta, static_cast<int64_t>(position));
      rotate(key, config.head_dim, config.rope_theta, static_cast<int64_t>(position));
      k[layer].push_back(key);
      v[layer].push_back(apply(weights, prefix + "self_attn.v_proj", normed));
      add(x, apply(weights, prefix + "self_attn.o_proj", attend(config, q, k[layer], v[layer])));

      const Vector mlp_in = rms_norm(weights, prefix + "post_attention_layernorm.weight", eps, x);
      const Vector gate = apply(weights, prefix + "mlp.gate_proj", mlp_in);
      Vector activated = apply(weights, prefix + "mlp.up_proj", mlp_in);
      for (size_t i = 0; i < gate.size(); ++i) activated[i] *= gate[i] / (1 + std::exp(-gate[i]));
      add(x, apply(weights, prefix + "mlp.down_proj", activated));
    }
    const Vector last = rms_norm(weights, "model.norm.weight", eps, x);
    const Vector row = apply(weights, config.tied_embeddings ? "model.embed_tokens" : "lm_head", last);
    logits.insert(logits.end(), row.begin(), row.end());
  }
  return logits;
}

}  // namespace model_test
