#include "attention_call.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <stdexcept>

#include "reference/head.h"
#include "reference/number.h"

namespace adaattn::bench {
namespace {

std::vector<char> random_tensor(int64_t elements, adaattn_dtype_t dtype, uint64_t seed) {
  std::vector<char> data(static_cast<size_t>(elements * reference::size_of(dtype)));
  std::mt19937_64 engine(seed);
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < elements; ++i) reference::store(data.data(), dtype, i, normal(engine));
  return data;
}

}  // namespace

void check(adaattn_status_t status) {
  if (status == ADAATTN_SUCCESS) return;
  char text[512];
  adaattn_last_error(text, sizeof text);
  throw std::runtime_error(std::string(adaattn_status_name(status)) + ": " + text);
}

AttentionCall::AttentionCall(adaattn_context_t* context, const Shape& shape, adaattn_dtype_t dtype)
    : shape_(shape), dtype_(dtype) {
  adaattn_attn_desc_t desc;
  check(adaattn_attn_desc_init(&desc, sizeof desc));
  desc.max_batch = shape.batch;
  desc.max_seqlen_q = shape.seqlen_q;
  desc.max_seqlen_k = shape.seqlen_k;
  desc.heads_q = shape.heads_q;
  desc.heads_kv = shape.heads_kv;
  desc.head_dim_qk = shape.head_dim;
  desc.dtype_q = dtype;
  desc.layout_q = desc.layout_kv = ADAATTN_LAYOUT_BSHD;
  desc.mask = shape.mask;
  check(adaattn_plan_create(context, &desc, nullptr, &plan_));

  check(adaattn_io_init(&io_, sizeof io_));
  const auto tensor = [&](adaattn_tensor_t* t, std::vector<char>& data, int64_t seqlen, int64_t heads, uint64_t seed) {
    const int64_t dims[4] = {shape.batch, seqlen, heads, shape.head_dim};
    data = random_tensor(dims[0] * dims[1] * dims[2] * dims[3], dtype, seed);
    check(adaattn_tensor_init(t, data.data(), dtype, ADAATTN_DEVICE_CPU, 0, 4, dims, nullptr));
  };
  tensor(&io_.q, q_, shape.seqlen_q, shape.heads_q, 1);
  tensor(&io_.k, k_, shape.seqlen_k, shape.heads_kv, 2);
  tensor(&io_.v, v_, shape.seqlen_k, shape.heads_kv, 3);
  tensor(&io_.o, o_, shape.seqlen_q, shape.heads_q, 4);
  size_t bytes = 0;
  check(adaattn_plan_workspace_size(plan_, &bytes));
  workspace_.resize(bytes);
}

AttentionCall::~AttentionCall() { adaattn_plan_destroy(plan_); }

double AttentionCall::flops() const {
  double pairs = static_cast<double>(shape_.seqlen_q) * static_cast<double>(shape_.seqlen_k);
  // Causal with the diagonal at the bottom right: row i of n sees m - n + 1 + i keys.
  if (shape_.mask != ADAATTN_MASK_NONE)
    pairs = static_cast<double>(shape_.seqlen_q) *
            (static_cast<double>(shape_.seqlen_k) - (static_cast<double>(shape_.seqlen_q) - 1) / 2);
  return 4.0 * static_cast<double>(shape_.batch * shape_.heads_q * shape_.head_dim) * pairs;
}

double AttentionCall::kv_bytes() const { return static_cast<double>(k_.size() + v_.size()); }

double AttentionCall::sampled_error() const {
  constexpr int64_t kRows = 4;
  double wrong = 0, all = 0;
  const int64_t d = shape_.head_dim, group = shape_.heads_q / shape_.heads_kv;
  for (int64_t sample = 0; sample < kRows; ++sample) {
    const int64_t b = sample % shape_.batch, h = sample * 5 % shape_.heads_q;
    const int64_t i = std::min((2 * sample + 1) * shape_.seqlen_q / (2 * kRows), shape_.seqlen_q - 1);
    reference::Head head;
    head.q = reference::Matrix(1, d);
    head.k = head.v = reference::Matrix(shape_.seqlen_k, d);
    for (int64_t c = 0; c < d; ++c) head.q(0, c) = reference::at(io_.q, b, i, h, c);
    for (int64_t j = 0; j < shape_.seqlen_k; ++j)
      for (int64_t c = 0; c < d; ++c) {
        head.k(j, c) = reference::at(io_.k, b, j, h / group, c);
        head.v(j, c) = reference::at(io_.v, b, j, h / group, c);
      }
    head.scale = 1 / std::sqrt(static_cast<double>(d));
    head.causal = shape_.mask != ADAATTN_MASK_NONE;
    head.off = i + shape_.seqlen_k - shape_.seqlen_q;
    const reference::HeadResult expected = reference::attend(head);
    for (int64_t c = 0; c < d; ++c) {
      const double o = reference::at(io_.o, b, i, h, c), e = expected.o(0, c);
      wrong += (o - e) * (o - e);
      all += e * e;
    }
  }
  return std::sqrt(wrong / all);
}

std::string AttentionCall::kernel() const {
  adaattn_plan_info_t info;
  info.struct_size = sizeof info;
  check(adaattn_plan_get_info(plan_, &info));
  return info.kernel;
}

}  // namespace adaattn::bench
