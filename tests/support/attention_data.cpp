#include "support/attention_data.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "reference/number.h"

namespace adaattn::test {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

int64_t head_dimension(adaattn_layout_t layout) {
  return layout == ADAATTN_LAYOUT_BHSD || layout == ADAATTN_LAYOUT_THD ? 1 : 2;
}

int64_t token_dimension(adaattn_layout_t layout) {
  return layout == ADAATTN_LAYOUT_BHSD ? 2 : layout == ADAATTN_LAYOUT_THD ? 0 : 1;
}

// Strides that lay the dimensions out in the given order (outermost first), the innermost followed by padding.
Tensor place(adaattn_dtype_t dtype, const std::vector<int64_t>& shape, const std::vector<int64_t>& order,
             int64_t row_padding, int64_t offset, int64_t broadcast_dimension = -1) {
  std::vector<int64_t> stride(shape.size());
  int64_t step = 1;
  for (size_t i = order.size(); i-- > 0;) {
    const int64_t dimension = order[i];
    if (dimension == broadcast_dimension) continue;
    stride[dimension] = step;
    step *= shape[dimension];
    if (i == order.size() - 1) step += row_padding;
  }
  const auto bytes = static_cast<size_t>((offset + step) * reference::size_of(dtype));
  return Tensor(std::make_shared<Buffer>(bytes), dtype, shape, stride, offset);
}

Tensor place(Storage storage, adaattn_layout_t layout, bool is_kv, adaattn_dtype_t dtype,
             const std::vector<int64_t>& shape) {
  std::vector<int64_t> order(shape.size());
  std::iota(order.begin(), order.end(), 0);
  switch (storage) {
    case Storage::kPadded:
      return place(dtype, shape, order, 5, 1);
    case Storage::kHeadsFirst: {
      const int64_t head = layout == 0 ? 0 : head_dimension(layout);
      order.erase(order.begin() + head);
      order.insert(order.begin(), head);
      return place(dtype, shape, order, 0, 0);
    }
    case Storage::kBroadcastBatch:
      return place(dtype, shape, order, 0, 0, is_kv ? 0 : -1);
    case Storage::kBroadcastHeads:
      return place(dtype, shape, order, 0, 0, is_kv ? head_dimension(layout) : -1);
    case Storage::kBroadcastTokens:
      return place(dtype, shape, order, 0, 0, is_kv ? token_dimension(layout) : -1);
    default:
      return place(dtype, shape, order, 0, 0);
  }
}

std::vector<int32_t> prefix_sums(const std::vector<int32_t>& lens) {
  std::vector<int32_t> sums = {0};
  for (int32_t n : lens) sums.push_back(sums.back() + n);
  return sums;
}

std::vector<int64_t> operand_shape(adaattn_layout_t layout, int64_t batch, int64_t tokens, int64_t heads, int64_t d) {
  if (layout == ADAATTN_LAYOUT_THD) return {tokens, heads, d};
  if (layout == ADAATTN_LAYOUT_BHSD) return {batch, heads, tokens, d};
  return {batch, tokens, heads, d};
}

Tensor make_bias(const AttentionCase& c, const adaattn_attn_desc_t& desc, Random& random) {
  const int64_t b = desc.max_batch, h = desc.heads_q, q = desc.max_seqlen_q, k = desc.max_seqlen_k;
  const std::vector<int64_t> full = {b, h, q, k};
  const auto bytes = [](int64_t n, adaattn_dtype_t dtype) {
    return static_cast<size_t>(n * reference::size_of(dtype));
  };
  const auto buffer = [&](int64_t n, adaattn_dtype_t dtype) { return std::make_shared<Buffer>(bytes(n, dtype)); };
  constexpr auto kF32 = ADAATTN_DTYPE_F32;
  const adaattn_dtype_t as_q = desc.dtype_q == ADAATTN_DTYPE_E4M3 ? kF32 : desc.dtype_q;
  Tensor bias;
  switch (c.bias) {
    case Bias::kNone:
      return bias;
    case Bias::kFull:
      bias = Tensor(as_q, full);
      break;
    case Bias::kPerHead:
      bias = Tensor(as_q, {1, h, q, k});
      break;
    case Bias::kPerKey:
      bias = Tensor(buffer(b * k, kF32), kF32, full, {k, 0, 0, 1});
      break;  // an expanded view
    case Bias::kPerQuery:
      bias = Tensor(kF32, {1, 1, q, 1});
      break;
    case Bias::kKeyMajor:
      bias = Tensor(buffer(b * h * q * k, kF32), kF32, full, {h * q * k, q * k, 1, q});
      break;
    case Bias::kPadding:
      bias = Tensor(kF32, {b, 1, 1, k});
      for (int64_t i = 0; i < b; ++i) {
        const int64_t valid = i % 3 == 1 ? 0 : random.between(0, k);  // the second sequence has no key at all
        for (int64_t j = 0; j < k; ++j) bias.set({i, 0, 0, j}, j < valid ? 0 : -kInf);
      }
      return bias;
  }
  bias.fill([&] { return random.normal(); });
  return bias;
}

}  // namespace

AttentionData::AttentionData(const AttentionCase& c, const Dtypes& dtypes, uint64_t seed, uint32_t outputs)
    : desc(make_desc(c, dtypes, outputs)) {
  Random random(seed ^ std::hash<std::string>()(c.name));
  const bool packed_q = c.layout_q == ADAATTN_LAYOUT_THD, packed_k = c.layout_kv == ADAATTN_LAYOUT_THD;
  const bool paged = c.layout_kv == ADAATTN_LAYOUT_PAGED;
  const int64_t sequences = desc.max_batch;
  int64_t tokens_q = c.seqlen_q, tokens_k = c.seqlen_k, batch_k = c.batch;
  if (packed_q) {
    cu_seqlens_q = Tensor(prefix_sums(c.lens_q));
    tokens_q = prefix_sums(c.lens_q).back() + c.slack_tokens;
  }
  if (packed_k) {
    cu_seqlens_k = Tensor(prefix_sums(c.lens_k));
    tokens_k = prefix_sums(c.lens_k).back() + c.slack_tokens;
  }
  if (!c.used_k.empty()) seqused_k = Tensor(c.used_k);

  std::vector<int32_t> pages_in_use;
  if (paged) {
    // Pages in random order with a few that nobody uses; table entries behind the last page in use are garbage.
    const int64_t per_sequence = desc.max_seqlen_k / c.page_size;
    std::vector<int32_t> free_pages(static_cast<size_t>(sequences * per_sequence + 3));
    std::iota(free_pages.begin(), free_pages.end(), 0);
    std::shuffle(free_pages.begin(), free_pages.end(), random.engine());
    batch_k = static_cast<int64_t>(free_pages.size());
    tokens_k = c.page_size;
    block_table = Tensor(ADAATTN_DTYPE_I32, {sequences, per_sequence});
    block_table.fill(std::numeric_limits<int32_t>::max());
    for (int64_t b = 0; b < sequences; ++b) {
      for (int64_t i = 0; i * c.page_size < c.used_k[b]; ++i) {
        block_table.set({b, i}, free_pages.back());
        pages_in_use.push_back(free_pages.back());
        free_pages.pop_back();
      }
    }
  }

  const auto shape_q = operand_shape(c.layout_q, c.batch, tokens_q, c.heads_q, c.d_qk);
  const auto shape_o = operand_shape(c.layout_q, c.batch, tokens_q, c.heads_q, d_v());
  const auto shape_k = operand_shape(c.layout_kv, batch_k, tokens_k, c.heads_kv, c.d_qk);
  const auto shape_v = operand_shape(c.layout_kv, batch_k, tokens_k, c.heads_kv, d_v());
  if (c.storage == Storage::kFused && dtypes.q == dtypes.kv) {
    auto shape = shape_q;
    const int64_t head = head_dimension(c.layout_q);
    shape[head] += 2 * c.heads_kv;
    const Tensor whole(dtypes.q, shape);
    const std::vector<int64_t> stride(whole.host().stride, whole.host().stride + shape.size());
    q = Tensor(whole.buffer(), dtypes.q, shape_q, stride);
    k = Tensor(whole.buffer(), dtypes.q, shape_k, stride, c.heads_q * stride[head]);
    v = Tensor(whole.buffer(), dtypes.q, shape_v, stride, (c.heads_q + c.heads_kv) * stride[head]);
  } else {
    q = place(c.storage, c.layout_q, false, dtypes.q, shape_q);
    k = place(c.storage, c.layout_kv, true, dtypes.kv, shape_k);
    v = place(c.storage, c.layout_kv, true, dtypes.kv, shape_v);
  }
  q.fill([&] { return c.input_scale * random.normal(); });
  k.fill([&] { return c.input_scale * random.normal(); });
  v.fill([&] { return random.normal(); });
  if (paged) {
    std::vector<bool> used(static_cast<size_t>(batch_k), false);
    for (int32_t page : pages_in_use) used[page] = true;
    for (const Tensor* pool : {&k, &v})
      pool->for_each([&](const auto& index, int64_t) {
        if (!used[index[0]]) const_cast<Tensor*>(pool)->set(index, kNaN);
      });
  }

  const Storage output_storage =
      c.storage == Storage::kPadded || c.storage == Storage::kHeadsFirst ? c.storage : Storage::kContiguous;
  o = place(output_storage, c.layout_q, false, dtypes.o, shape_o);
  const std::vector<int64_t> shape_rows =
      packed_q ? std::vector<int64_t>{c.heads_q, tokens_q} : std::vector<int64_t>{c.batch, c.heads_q, tokens_q};
  if (outputs & ADAATTN_OUTPUT_LSE) lse = place(output_storage, 0, false, ADAATTN_DTYPE_F32, shape_rows);
  if (outputs & ADAATTN_OUTPUT_ENTROPY) entropy = place(output_storage, 0, false, ADAATTN_DTYPE_F32, shape_rows);
  poison_outputs();

  bias = make_bias(c, desc, random);
  if (c.flags & ADAATTN_FLAG_ALIBI) {
    alibi_slopes =
        c.alibi_per_batch ? Tensor(ADAATTN_DTYPE_F32, {sequences, c.heads_q}) : Tensor(ADAATTN_DTYPE_F32, {c.heads_q});
    alibi_slopes.for_each([&](const auto& index, int64_t flat) {
      const double h = static_cast<double>(flat % c.heads_q), b = static_cast<double>(flat / c.heads_q);
      alibi_slopes.set(index, std::exp2(-8 * (h + 1) / static_cast<double>(c.heads_q)) * (1 + b / 8));
    });
  }
  if (c.flags & ADAATTN_FLAG_SINK) {
    sinks = Tensor(ADAATTN_DTYPE_F32, {c.heads_q});
    sinks.fill([&] { return random.normal(); });
  }
  add_descales(random);
}

// One factor for all of k, one per head of q and, in blocks, one for each block of v.
void AttentionData::add_descales(Random& random) {
  const auto factors = [&random](const std::vector<int64_t>& shape) {
    Tensor t(ADAATTN_DTYPE_F32, shape);
    t.fill([&] { return std::exp2(0.5 * random.normal()); });
    return t;
  };
  const int64_t block = desc.descale_block, b = desc.max_batch, h = desc.heads_kv;
  const int64_t blocks = block != 0 ? (desc.max_seqlen_k + block - 1) / block : 0;
  if (desc.dtype_q == ADAATTN_DTYPE_E4M3) q_descale = factors({b, h});
  if (desc.dtype_kv != ADAATTN_DTYPE_E4M3) return;
  k_descale = block != 0 ? factors({1, h, blocks}) : factors({1, 1});
  v_descale = block != 0 ? factors({b, h, blocks}) : factors({b, h});
}

const std::vector<const Tensor*> AttentionData::all() const {
  return {&q,
          &k,
          &v,
          &o,
          &lse,
          &entropy,
          &bias,
          &alibi_slopes,
          &sinks,
          &cu_seqlens_q,
          &cu_seqlens_k,
          &seqused_k,
          &block_table,
          &q_descale,
          &k_descale,
          &v_descale};
}

adaattn_io_t AttentionData::io(adaattn_device_t device, int32_t id) const {
  adaattn_io_t io;
  adaattn_io_init(&io, sizeof io);
  adaattn_tensor_t* slots[] = {&io.q,
                               &io.k,
                               &io.v,
                               &io.o,
                               &io.lse,
                               &io.entropy,
                               &io.bias,
                               &io.alibi_slopes,
                               &io.sinks,
                               &io.cu_seqlens_q,
                               &io.cu_seqlens_k,
                               &io.seqused_k,
                               &io.block_table,
                               &io.q_descale,
                               &io.k_descale,
                               &io.v_descale};
  const auto tensors = all();
  for (size_t i = 0; i < tensors.size(); ++i)
    if (tensors[i]->present()) *slots[i] = tensors[i]->on(device, id);
  return io;
}

void AttentionData::upload(adaattn_device_t device, int32_t id) const {
  for (const Tensor* tensor : all()) tensor->upload(device, id);
}

void AttentionData::download(adaattn_device_t device, int32_t id) const {
  for (const Tensor* tensor : {&o, &lse, &entropy}) tensor->download(device, id);
}

void AttentionData::poison_outputs() {
  for (Tensor* tensor : {&o, &lse, &entropy})
    if (tensor->present()) tensor->fill(kNaN);
}

void AttentionData::drop_optional_outputs() {
  desc.outputs = 0;
  lse = entropy = Tensor();
}

int64_t AttentionData::batch() const { return desc.max_batch; }

int64_t AttentionData::len_q(int64_t b) const {
  if (cu_seqlens_q.present()) return static_cast<int64_t>(cu_seqlens_q.get({b + 1}) - cu_seqlens_q.get({b}));
  return q.shape()[token_dimension(desc.layout_q)];
}

int64_t AttentionData::len_k(int64_t b) const {
  if (seqused_k.present()) return static_cast<int64_t>(seqused_k.get({b}));
  if (cu_seqlens_k.present()) return static_cast<int64_t>(cu_seqlens_k.get({b + 1}) - cu_seqlens_k.get({b}));
  return k.shape()[token_dimension(desc.layout_kv)];
}

std::vector<int64_t> AttentionData::query_index(int64_t b, int64_t i, int64_t h, int64_t c) const {
  if (desc.layout_q == ADAATTN_LAYOUT_THD) return {static_cast<int64_t>(cu_seqlens_q.get({b})) + i, h, c};
  if (desc.layout_q == ADAATTN_LAYOUT_BHSD) return {b, h, i, c};
  return {b, i, h, c};
}

std::vector<int64_t> AttentionData::key_index(int64_t b, int64_t j, int64_t h, int64_t c) const {
  switch (desc.layout_kv) {
    case ADAATTN_LAYOUT_THD:
      return {static_cast<int64_t>(cu_seqlens_k.get({b})) + j, h, c};
    case ADAATTN_LAYOUT_BHSD:
      return {b, h, j, c};
    case ADAATTN_LAYOUT_PAGED:
      return {static_cast<int64_t>(block_table.get({b, j / desc.page_size})), j % desc.page_size, h, c};
    default:
      return {b, j, h, c};
  }
}

std::vector<int64_t> AttentionData::row_index(int64_t b, int64_t i, int64_t h) const {
  if (desc.layout_q == ADAATTN_LAYOUT_THD) return {h, static_cast<int64_t>(cu_seqlens_q.get({b})) + i};
  return {b, h, i};
}

}  // namespace adaattn::test
