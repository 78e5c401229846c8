#include "capi/call.h"

#include <algorithm>
#include <cstring>

namespace adaattn::test {
namespace {

constexpr uint32_t kPoison = 0xffc0dead;  // a NaN that no computation makes

float poison_value() {
  float value;
  std::memcpy(&value, &kPoison, sizeof value);
  return value;
}

bool is_poison(float value) { return std::memcmp(&value, &kPoison, sizeof value) == 0; }

std::vector<float> ramp(int64_t count, float step) {
  std::vector<float> values(static_cast<size_t>(count));
  for (size_t i = 0; i < values.size(); ++i) values[i] = step * static_cast<float>(i % 17) - 0.5f;
  return values;
}

}  // namespace

std::string last_error() {
  std::string text(adaattn_last_error(nullptr, 0), '\0');
  adaattn_last_error(text.data(), text.size() + 1);
  return text;
}

adaattn_tensor_t tensor(void* data, adaattn_dtype_t dtype, std::vector<int64_t> shape, std::vector<int64_t> stride) {
  adaattn_tensor_t t = {};
  t.data = data;
  t.ndim = static_cast<int32_t>(shape.size());
  t.dtype = dtype;
  t.device = ADAATTN_DEVICE_CPU;
  int64_t step = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    t.shape[i] = shape[i];
    t.stride[i] = stride.empty() ? step : stride[i];
    step *= shape[i];
  }
  return t;
}

Call::Call(Form form) {
  const bool packed = form == Form::kPacked || form == Form::kPackedPaged;
  const bool paged = form == Form::kPaged || form == Form::kPackedPaged;
  constexpr auto kF32 = ADAATTN_DTYPE_F32;
  constexpr auto kI32 = ADAATTN_DTYPE_I32;
  adaattn_attn_desc_init(&desc, sizeof desc);
  adaattn_io_init(&io, sizeof io);
  desc.max_batch = kBatch;
  desc.max_seqlen_q = kSeqlenQ;
  desc.max_seqlen_k = kSeqlenK;
  desc.heads_q = kHeadsQ;
  desc.heads_kv = kHeadsKv;
  desc.head_dim_qk = kDimQk;
  desc.head_dim_v = kDimV;
  desc.dtype_q = kF32;
  desc.mask = ADAATTN_MASK_CAUSAL;
  desc.flags = ADAATTN_FLAG_ALL;
  desc.outputs = ADAATTN_OUTPUT_ALL;

  const int64_t total_q = kBatch * kSeqlenQ, total_k = kBatch * kSeqlenK, slots = kPages * kPageSize;
  q = ramp(total_q * kHeadsQ * kDimQk, 0.06f);
  k = ramp((paged ? slots : total_k) * kHeadsKv * kDimQk, 0.07f);
  v = ramp((paged ? slots : total_k) * kHeadsKv * kDimV, 0.05f);
  o.resize(static_cast<size_t>(total_q * kHeadsQ * kDimV));
  lse.resize(static_cast<size_t>(total_q * kHeadsQ));
  entropy.resize(lse.size());
  bias = ramp(kBatch * kHeadsQ * kSeqlenQ * kSeqlenK, 0.02f);
  slopes = ramp(kHeadsQ, 0.1f);
  sinks = ramp(kHeadsQ, 0.2f);
  cu_q = {0, kSeqlenQ, 2 * kSeqlenQ};
  cu_k = {0, kSeqlenK, 2 * kSeqlenK};
  used_k = {5, 8};
  table = {3, 0, 1, 4};

  if (packed) {
    desc.layout_q = desc.layout_kv = ADAATTN_LAYOUT_THD;
    io.q = tensor(q.data(), kF32, {total_q, kHeadsQ, kDimQk});
    io.o = tensor(o.data(), kF32, {total_q, kHeadsQ, kDimV});
    io.k = tensor(k.data(), kF32, {total_k, kHeadsKv, kDimQk});
    io.v = tensor(v.data(), kF32, {total_k, kHeadsKv, kDimV});
    io.lse = tensor(lse.data(), kF32, {kHeadsQ, total_q});
    io.entropy = tensor(entropy.data(), kF32, {kHeadsQ, total_q});
    io.cu_seqlens_q = tensor(cu_q.data(), kI32, {kBatch + 1});
    if (!paged) io.cu_seqlens_k = tensor(cu_k.data(), kI32, {kBatch + 1});
  } else if (form == Form::kBHSD) {
    desc.layout_q = desc.layout_kv = ADAATTN_LAYOUT_BHSD;
    io.q = tensor(q.data(), kF32, {kBatch, kHeadsQ, kSeqlenQ, kDimQk});
    io.o = tensor(o.data(), kF32, {kBatch, kHeadsQ, kSeqlenQ, kDimV});
    io.k = tensor(k.data(), kF32, {kBatch, kHeadsKv, kSeqlenK, kDimQk});
    io.v = tensor(v.data(), kF32, {kBatch, kHeadsKv, kSeqlenK, kDimV});
  } else {
    io.q = tensor(q.data(), kF32, {kBatch, kSeqlenQ, kHeadsQ, kDimQk});
    io.o = tensor(o.data(), kF32, {kBatch, kSeqlenQ, kHeadsQ, kDimV});
    io.k = tensor(k.data(), kF32, {kBatch, kSeqlenK, kHeadsKv, kDimQk});
    io.v = tensor(v.data(), kF32, {kBatch, kSeqlenK, kHeadsKv, kDimV});
  }
  if (!packed) {
    io.lse = tensor(lse.data(), kF32, {kBatch, kHeadsQ, kSeqlenQ});
    io.entropy = tensor(entropy.data(), kF32, {kBatch, kHeadsQ, kSeqlenQ});
  }
  if (paged) {
    desc.layout_kv = ADAATTN_LAYOUT_PAGED;
    desc.page_size = kPageSize;
    io.k = tensor(k.data(), kF32, {kPages, kPageSize, kHeadsKv, kDimQk});
    io.v = tensor(v.data(), kF32, {kPages, kPageSize, kHeadsKv, kDimV});
    io.block_table = tensor(table.data(), kI32, {kBatch, 2});
  }
  io.seqused_k = tensor(used_k.data(), kI32, {kBatch});
  io.bias = tensor(bias.data(), kF32, {kBatch, kHeadsQ, kSeqlenQ, kSeqlenK});
  io.alibi_slopes = tensor(slopes.data(), kF32, {kHeadsQ});
  io.sinks = tensor(sinks.data(), kF32, {kHeadsQ});
  poison();
}

void Call::poison() {
  for (std::vector<float>* output : {&o, &lse, &entropy}) std::fill(output->begin(), output->end(), poison_value());
}

bool Call::outputs_untouched() const {
  for (const std::vector<float>* output : {&o, &lse, &entropy})
    if (!std::all_of(output->begin(), output->end(), is_poison)) return false;
  return true;
}

bool Call::outputs_written() const {
  for (const std::vector<float>* output : {&o, &lse, &entropy})
    if (std::any_of(output->begin(), output->end(), is_poison)) return false;
  return true;
}

}  // namespace adaattn::test
