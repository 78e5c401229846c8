// What 8-bit arithmetic costs on a real text: the shipped model's Q, K and V of all layers, against their exact
// attention.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "engine/elementwise.h"
#include "engine/float_types.h"
#include "gpu/eight_bits.h"
#include "model/device_copy.h"
#include "model/gpu.h"
#include "model_attention.h"

namespace {

using adaattn::bench::LayerOperands;
using adaattn::bench::ModelAttention;
using model_test::DeviceCopy;

constexpr adaattn::Device kCuda = {ADAATTN_DEVICE_CUDA, 0};

std::vector<float> widened(const std::vector<char>& bf16) {
  std::vector<float> out(bf16.size() / 2);
  generate::convert_to_f32(bf16.data(), static_cast<int64_t>(out.size()), generate::DType::kBf16, out.data());
  return out;
}

// [seqlen, heads, head_dim] in e4m3, a factor for each of `factors` equal groups of heads.
struct Quantised {
  std::vector<uint8_t> values;
  std::vector<float> factors;
  Quantised(const std::vector<float>& x, int64_t heads, int64_t head_dim, int64_t groups)
      : values(x.size()), factors(static_cast<size_t>(groups), 0.0f) {
    const auto group_of = [&](size_t i) {
      return static_cast<size_t>(static_cast<int64_t>(i) / head_dim % heads / (heads / groups));
    };
    for (size_t i = 0; i < x.size(); ++i) factors[group_of(i)] = std::max(factors[group_of(i)], std::fabs(x[i]));
    for (float& factor : factors) factor /= 448.0f;
    for (size_t i = 0; i < x.size(); ++i) values[i] = generate::f32_to_e4m3(x[i] / factors[group_of(i)]);
  }
};

adaattn::Context cuda_context() {
  adaattn::Config config;
  config.device = ADAATTN_DEVICE_CUDA;
  return adaattn::Context::create(config).value();
}

class LayerOnTheGpu {
 public:
  LayerOnTheGpu(const ModelAttention& model, const LayerOperands& layer)
      : model_(model),
        layer_(layer),
        q_(widened(layer.q)),
        k_(widened(layer.k)),
        v_(widened(layer.v)),
        context_(cuda_context()) {}

  std::vector<float> exact() {
    adaattn::AttnDesc desc = model_.desc();
    desc.dtype_q = ADAATTN_DTYPE_F32;
    const DeviceCopy q(q_), k(k_), v(v_), o(q_);
    adaattn::Io io = io_of(ADAATTN_DTYPE_F32, q, k, v);
    io.o = view(o, ADAATTN_DTYPE_F32, model_.heads_q);
    run(desc, nullptr, io);
    return o.read<float>(q_.size());
  }
  std::vector<float> int8() {
    const adaattn::AttnDesc desc = model_.desc();
    const adaattn_adaptive_desc_t eight = adaattn::test::eight_bits();
    const DeviceCopy q(layer_.q), k(layer_.k), v(layer_.v);
    return run_bf16(desc, &eight, io_of(ADAATTN_DTYPE_BF16, q, k, v));
  }
  std::vector<float> e4m3() {
    adaattn::AttnDesc desc = model_.desc();
    desc.dtype_q = desc.dtype_kv = ADAATTN_DTYPE_E4M3;
    desc.dtype_o = ADAATTN_DTYPE_BF16;
    const Quantised q(q_, model_.heads_q, model_.head_dim, model_.heads_kv),
        k(k_, model_.heads_kv, model_.head_dim, model_.heads_kv),
        v(v_, model_.heads_kv, model_.head_dim, model_.heads_kv);
    const DeviceCopy q8(q.values), k8(k.values), v8(v.values), fq(q.factors), fk(k.factors), fv(v.factors);
    adaattn::Io io = io_of(ADAATTN_DTYPE_E4M3, q8, k8, v8);
    const auto factor = [&](const DeviceCopy& x) {
      return adaattn::tensor(x.data(), ADAATTN_DTYPE_F32, {1, model_.heads_kv}, {}, kCuda);
    };
    io.q_descale = factor(fq);
    io.k_descale = factor(fk);
    io.v_descale = factor(fv);
    return run_bf16(desc, nullptr, io);
  }

 private:
  adaattn_tensor_t view(const DeviceCopy& x, adaattn_dtype_t dtype, int64_t heads) const {
    return adaattn::tensor(x.data(), dtype, {1, model_.seqlen, heads, model_.head_dim}, {}, kCuda);
  }
  adaattn::Io io_of(adaattn_dtype_t dtype, const DeviceCopy& q, const DeviceCopy& k, const DeviceCopy& v) const {
    adaattn::Io io;
    io.q = view(q, dtype, model_.heads_q);
    io.k = view(k, dtype, model_.heads_kv);
    io.v = view(v, dtype, model_.heads_kv);
    return io;
  }
  void run(const adaattn::AttnDesc& desc, const adaattn_adaptive_desc_t* adaptive, const adaattn::Io& io) {
    adaattn::Plan plan = context_.make_plan(desc, adaptive).value();
    plan.execute(io).or_throw();
    plan.stats().value();  // waits
  }
  std::vector<float> run_bf16(const adaattn::AttnDesc& desc, const adaattn_adaptive_desc_t* adaptive, adaattn::Io io) {
    const DeviceCopy o(layer_.q);
    io.o = view(o, ADAATTN_DTYPE_BF16, model_.heads_q);
    run(desc, adaptive, io);
    return widened(o.read<char>(layer_.q.size()));
  }

  const ModelAttention& model_;
  const LayerOperands& layer_;
  std::vector<float> q_, k_, v_;
  adaattn::Context context_;
};

// Of each head, |o - exact| / |exact|.
std::vector<double> errors(const ModelAttention& model, const std::vector<float>& o, const std::vector<float>& exact) {
  const auto heads = static_cast<size_t>(model.heads_q), d = static_cast<size_t>(model.head_dim);
  std::vector<double> wrong(heads), all(heads);
  for (size_t i = 0; i < o.size(); ++i) {
    const double e = exact[i], x = static_cast<double>(o[i]) - e;
    wrong[i / d % heads] += x * x;
    all[i / d % heads] += e * e;
  }
  for (size_t h = 0; h < heads; ++h) wrong[h] = std::sqrt(wrong[h] / all[h]);
  return wrong;
}

double root_mean_square(const std::vector<double>& x) {
  double sum = 0;
  for (const double value : x) sum += value * value;
  return std::sqrt(sum / static_cast<double>(x.size()));
}

class ShippedModelInEightBits : public model_test::OnTheGpu {};

TEST_F(ShippedModelInEightBits, Int8IsAtMostSevenTenthsAsFarOffAsE4m3) {
  const ModelAttention model = adaattn::bench::capture_attention(MODEL_FOLDER, 2048, 1, ADAATTN_DTYPE_BF16, 8);
  std::vector<double> int8, e4m3;
  for (const LayerOperands& operands : model.windows[0]) {
    LayerOnTheGpu layer(model, operands);
    const std::vector<float> exact = layer.exact();
    for (const double error : errors(model, layer.int8(), exact)) int8.push_back(error);
    for (const double error : errors(model, layer.e4m3(), exact)) e4m3.push_back(error);
  }
  const double ours = root_mean_square(int8), plain = root_mean_square(e4m3);
  std::printf("int8 %.4f, e4m3 %.4f: %.3f\n", ours, plain, ours / plain);
  EXPECT_LE(ours, 0.7 * plain);
  EXPECT_LT(plain, 0.1);
}

}  // namespace
