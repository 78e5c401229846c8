#include "attention_call.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <stdexcept>

#include "reference/head.h"
#include "reference/number.h"

namespace adaattn::bench {
namespace {

std::vector<char> random_tensor(size_t bytes, adaattn_dtype_t dtype, uint64_t seed) {
  std::vector<char> data(bytes);
  std::mt19937_64 engine(seed);
  std::normal_distribution<double> normal;
  const int64_t elements = static_cast<int64_t>(bytes) / reference::size_of(dtype);
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

adaattn_attn_desc_t desc_of(const Shape& shape, adaattn_dtype_t dtype) {
  adaattn_attn_desc_t desc;
  check(adaattn_attn_desc_init(&desc, sizeof desc));
  desc.max_batch = shape.batch;
  desc.max_seqlen_q = shape.seqlen_q;
  desc.max_seqlen_k = shape.seqlen_k;
  desc.heads_q = shape.heads_q;
  desc.heads_kv = shape.heads_kv;
  desc.head_dim_qk = shape.head_dim;
  desc.dtype_q = dtype;
  desc.mask = shape.mask;
  if (shape.window > 0) desc.window_left = shape.window - 1;
  return desc;
}

AttentionCall::AttentionCall(adaattn_context_t* context, const Shape& shape, const NamedDtype& dtype,
                             adaattn_math_t math, const adaattn_adaptive_desc_t* adaptive)
    : shape_(shape),
      dtype_(dtype.dtype),
      dtype_kv_(dtype.dtype_kv == ADAATTN_DTYPE_NONE ? dtype.dtype : dtype.dtype_kv),
      dtype_o_(dtype_ == ADAATTN_DTYPE_E4M3 ? ADAATTN_DTYPE_BF16 : dtype_),
      descale_block_(dtype.descale_block) {
  adaattn_attn_desc_t desc = desc_of(shape, dtype_);
  desc.dtype_kv = dtype_kv_;
  desc.descale_block = descale_block_;
  if (shape.page_size > 0) {
    desc.layout_kv = ADAATTN_LAYOUT_PAGED;
    desc.page_size = shape.page_size;
  }
  desc.math = math;
  check(adaattn_plan_create(context, &desc, adaptive, &plan_));
  check(adaattn_io_init(&io_, sizeof io_));
}

size_t AttentionCall::query_bytes() const {
  return static_cast<size_t>(shape_.batch * shape_.seqlen_q * shape_.heads_q * shape_.head_dim *
                             reference::size_of(dtype_));
}

size_t AttentionCall::output_bytes() const {
  return query_bytes() / static_cast<size_t>(reference::size_of(dtype_)) *
         static_cast<size_t>(reference::size_of(dtype_o_));
}

size_t AttentionCall::key_bytes() const {
  return static_cast<size_t>(shape_.batch * shape_.seqlen_k * shape_.heads_kv * shape_.head_dim *
                             reference::size_of(dtype_kv_));
}

size_t AttentionCall::factors() const {
  if (descale_block_ == 0) return 1;
  return static_cast<size_t>(shape_.batch * shape_.heads_kv * ((shape_.seqlen_k - 1) / descale_block_ + 1));
}

size_t AttentionCall::workspace_bytes() const {
  size_t bytes = 0;
  check(adaattn_plan_workspace_size(plan_, &bytes));
  return bytes;
}

int64_t AttentionCall::page(int64_t batch, int64_t index) const {
  constexpr int64_t kStep = 4099;  // prime: every page once
  return batch * pages() + index * kStep % pages();
}

std::vector<int32_t> AttentionCall::page_tables() const {
  if (shape_.page_size == 0) return {};
  std::vector<int32_t> tables(static_cast<size_t>(shape_.batch), static_cast<int32_t>(shape_.seqlen_k));
  for (int64_t b = 0; b < shape_.batch; ++b)
    for (int64_t i = 0; i < pages(); ++i) tables.push_back(static_cast<int32_t>(page(b, i)));
  return tables;
}

void AttentionCall::place(void* q, void* k, void* v, void* o, void* ones, void* tables, adaattn_device_t device) {
  const auto tensor = [&](adaattn_tensor_t* t, adaattn_dtype_t dtype, void* data, int64_t seqlen, int64_t heads) {
    const int64_t dims[4] = {shape_.batch, seqlen, heads, shape_.head_dim};
    check(adaattn_tensor_init(t, data, dtype, device, 0, 4, dims, nullptr));
  };
  tensor(&io_.q, dtype_, q, shape_.seqlen_q, shape_.heads_q);
  if (shape_.page_size > 0) {
    const int64_t dims[4] = {shape_.batch * pages(), shape_.page_size, shape_.heads_kv, shape_.head_dim};
    const int64_t table[2] = {shape_.batch, pages()};
    check(adaattn_tensor_init(&io_.k, k, dtype_kv_, device, 0, 4, dims, nullptr));
    check(adaattn_tensor_init(&io_.v, v, dtype_kv_, device, 0, 4, dims, nullptr));
    auto* lengths = static_cast<int32_t*>(tables);
    check(adaattn_tensor_init(&io_.seqused_k, lengths, ADAATTN_DTYPE_I32, device, 0, 1, table, nullptr));
    check(
        adaattn_tensor_init(&io_.block_table, lengths + shape_.batch, ADAATTN_DTYPE_I32, device, 0, 2, table, nullptr));
  } else {
    tensor(&io_.k, dtype_kv_, k, shape_.seqlen_k, shape_.heads_kv);
    tensor(&io_.v, dtype_kv_, v, shape_.seqlen_k, shape_.heads_kv);
  }
  tensor(&io_.o, dtype_o_, o, shape_.seqlen_q, shape_.heads_q);
  constexpr int64_t kWhole[2] = {1, 1};
  if (dtype_ == ADAATTN_DTYPE_E4M3)
    check(adaattn_tensor_init(&io_.q_descale, ones, ADAATTN_DTYPE_F32, device, 0, 2, kWhole, nullptr));
  if (dtype_kv_ != ADAATTN_DTYPE_E4M3) return;
  const int64_t heads = shape_.batch * shape_.heads_kv, blocks = static_cast<int64_t>(factors()) / heads;
  const int64_t in_blocks[3] = {shape_.batch, shape_.heads_kv, blocks};
  for (adaattn_tensor_t* factor : {&io_.k_descale, &io_.v_descale})
    check(descale_block_ == 0 ? adaattn_tensor_init(factor, ones, ADAATTN_DTYPE_F32, device, 0, 2, kWhole, nullptr)
                              : adaattn_tensor_init(factor, ones, ADAATTN_DTYPE_F32, device, 0, 3, in_blocks, nullptr));
}

double AttentionCall::flops() const {
  double pairs = static_cast<double>(shape_.seqlen_q) * static_cast<double>(shape_.seqlen_k);
  // Causal with the diagonal at the bottom right: row i of n sees m - n + 1 + i keys.
  if (shape_.mask != ADAATTN_MASK_NONE)
    pairs = static_cast<double>(shape_.seqlen_q) *
            (static_cast<double>(shape_.seqlen_k) - (static_cast<double>(shape_.seqlen_q) - 1) / 2);
  return 4.0 * static_cast<double>(shape_.batch * shape_.heads_q * shape_.head_dim) * pairs;
}

double AttentionCall::kv_bytes() const {
  const int64_t seen =
      shape_.window > 0 ? std::min(shape_.window + shape_.seqlen_q - 1, shape_.seqlen_k) : shape_.seqlen_k;
  return 2.0 * static_cast<double>(key_bytes()) * static_cast<double>(seen) / static_cast<double>(shape_.seqlen_k);
}

double AttentionCall::sampled_error() const {
  // A row's relative error varies by a tenth, and rows of few keys are large: each row counts alike.
  constexpr int64_t kHeads = 4, kRows = 16;
  const int64_t d = shape_.head_dim, group = shape_.heads_q / shape_.heads_kv;
  // `count` rows of one head from `first` on.
  const auto rows_of = [&](const adaattn_tensor_t& t, int64_t b, int64_t h, int64_t first, int64_t count) {
    const auto size = static_cast<size_t>(reference::size_of(t.dtype)), row_bytes = static_cast<size_t>(d) * size;
    std::vector<char> raw(static_cast<size_t>(count) * row_bytes);
    const auto copy = [&](char* to, int64_t sequence, int64_t token, int64_t tokens) {
      const auto from = static_cast<size_t>(sequence * t.stride[0] + token * t.stride[1] + h * t.stride[2]) * size;
      fetch(to, static_cast<const char*>(t.data) + from, row_bytes, static_cast<size_t>(t.stride[1]) * size,
            static_cast<size_t>(tokens));
    };
    if (shape_.page_size > 0 && (&t == &io_.k || &t == &io_.v)) {
      for (int64_t i = 0; i * shape_.page_size < count; ++i)
        copy(raw.data() + static_cast<size_t>(i * shape_.page_size) * row_bytes, page(b, i), 0,
             std::min(shape_.page_size, count - i * shape_.page_size));
    } else {
      copy(raw.data(), b, first, count);
    }
    reference::Matrix m(count, d);
    for (int64_t i = 0; i < count * d; ++i) m.data[static_cast<size_t>(i)] = reference::load(raw.data(), t.dtype, i);
    return m;
  };
  double sum = 0, count = 0;
  const int64_t rows = std::min(kRows, shape_.seqlen_q);
  for (int64_t sample = 0; sample < kHeads; ++sample) {
    const int64_t b = sample % shape_.batch, h = sample * 5 % shape_.heads_q;
    reference::Head head;
    head.k = rows_of(io_.k, b, h / group, 0, shape_.seqlen_k);
    head.v = rows_of(io_.v, b, h / group, 0, shape_.seqlen_k);
    head.scale = 1 / std::sqrt(static_cast<double>(d));
    head.causal = shape_.mask != ADAATTN_MASK_NONE;
    if (shape_.window > 0) head.window_left = shape_.window - 1;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t place = 2 * (sample + kHeads * row) + 1;
      const int64_t i = std::min(place * shape_.seqlen_q / (2 * kHeads * rows), shape_.seqlen_q - 1);
      head.q = rows_of(io_.q, b, h, i, 1);
      head.off = i + shape_.seqlen_k - shape_.seqlen_q;
      const reference::Matrix o = rows_of(io_.o, b, h, i, 1);
      const reference::HeadResult expected = reference::attend(head);
      double wrong = 0, all = 0;
      for (int64_t c = 0; c < d; ++c) {
        const double e = expected.o(0, c);
        wrong += (o(0, c) - e) * (o(0, c) - e);
        all += e * e;
      }
      sum += wrong / all;
      count += 1;
    }
  }
  return std::sqrt(sum / count);
}

std::string AttentionCall::kernel() const {
  adaattn_plan_info_t info;
  info.struct_size = sizeof info;
  check(adaattn_plan_get_info(plan_, &info));
  return info.kernel;
}

CpuCall::CpuCall(adaattn_context_t* context, const Shape& shape, adaattn_dtype_t dtype)
    : AttentionCall(context, shape, {"", dtype}, ADAATTN_MATH_EXACT, nullptr),
      q_(random_tensor(query_bytes(), dtype, 1)),
      k_(random_tensor(key_bytes(), dtype, 2)),
      v_(random_tensor(key_bytes(), dtype, 3)),
      o_(output_bytes()),
      workspace_(workspace_bytes()) {
  place(q_.data(), k_.data(), v_.data(), o_.data(), nullptr, nullptr, ADAATTN_DEVICE_CPU);
}

void CpuCall::fetch(char* to, const char* from, size_t row_bytes, size_t pitch, size_t rows) const {
  for (size_t row = 0; row < rows; ++row) std::memcpy(to + row * row_bytes, from + row * pitch, row_bytes);
}

}  // namespace adaattn::bench
