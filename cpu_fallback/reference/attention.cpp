#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "number.h"

namespace adaattn::reference {
namespace {

bool present(const adaattn_tensor_t& t) { return t.ndim != 0; }

int64_t length(const adaattn_tensor_t& t, int64_t i) { return static_cast<int64_t>(at(t, i)); }

// A [batch, token, head, dim] reading of q, k, v or o.
double element(const adaattn_tensor_t& t, adaattn_layout_t layout, int64_t b, int64_t token, int64_t h, int64_t c) {
  switch (layout) {
    case ADAATTN_LAYOUT_BHSD:
      return at(t, b, h, token, c);
    case ADAATTN_LAYOUT_THD:
      return at(t, token, h, c);
    default:
      return at(t, b, token, h, c);
  }
}

struct Sequence {
  int64_t q_start = 0, len_q = 0, k_start = 0, len_k = 0;
};

int64_t batch_of(const adaattn_attn_desc_t& desc, const adaattn_io_t& io) {
  return desc.layout_q == ADAATTN_LAYOUT_THD ? io.cu_seqlens_q.shape[0] - 1 : io.q.shape[0];
}

Sequence sequence_of(const adaattn_attn_desc_t& desc, const adaattn_io_t& io, int64_t b) {
  Sequence s;
  if (desc.layout_q == ADAATTN_LAYOUT_THD) {
    s.q_start = length(io.cu_seqlens_q, b);
    s.len_q = length(io.cu_seqlens_q, b + 1) - s.q_start;
  } else {
    s.len_q = io.q.shape[desc.layout_q == ADAATTN_LAYOUT_BHSD ? 2 : 1];
  }
  if (desc.layout_kv == ADAATTN_LAYOUT_THD) {
    s.k_start = length(io.cu_seqlens_k, b);
    s.len_k = length(io.cu_seqlens_k, b + 1) - s.k_start;
  } else if (desc.layout_kv != ADAATTN_LAYOUT_PAGED) {
    s.len_k = io.k.shape[desc.layout_kv == ADAATTN_LAYOUT_BHSD ? 2 : 1];
  }
  if (present(io.seqused_k)) s.len_k = length(io.seqused_k, b);
  return s;
}

double key_element(const adaattn_attn_desc_t& desc, const adaattn_io_t& io, const adaattn_tensor_t& t, int64_t b,
                   int64_t token, int64_t h, int64_t c) {
  if (desc.layout_kv != ADAATTN_LAYOUT_PAGED) return element(t, desc.layout_kv, b, token, h, c);
  const int64_t page = static_cast<int64_t>(at(io.block_table, b, token / desc.page_size));
  return at(t, page, token % desc.page_size, h, c);
}

// What elements of q (block 0), k or v are multiplied by; extents of 1 broadcast.
double descale_of(const adaattn_tensor_t& t, int64_t b, int64_t kv_head, int64_t block) {
  if (!present(t)) return 1;
  const auto index = [&t](int dim, int64_t i) { return t.shape[dim] == 1 ? 0 : i; };
  return at(t, index(0, b), index(1, kv_head), t.ndim == 3 ? index(2, block) : 0);
}

// Copies what head h of sequence b needs into dense matrices.
Head gather(const adaattn_attn_desc_t& desc, const adaattn_io_t& io, const Sequence& s, int64_t b, int64_t h) {
  Head head;
  const int64_t kv_head = h / (desc.heads_q / desc.heads_kv);
  const int64_t d_v = !present(io.v) ? 0 : desc.head_dim_v ? desc.head_dim_v : desc.head_dim_qk;
  head.q = Matrix(s.len_q, desc.head_dim_qk);
  const double q_factor = descale_of(io.q_descale, b, kv_head, 0);
  for (int64_t i = 0; i < s.len_q; ++i)
    for (int64_t c = 0; c < desc.head_dim_qk; ++c)
      head.q(i, c) = q_factor * element(io.q, desc.layout_q, b, s.q_start + i, h, c);
  head.k = Matrix(s.len_k, desc.head_dim_qk);
  head.v = Matrix(s.len_k, d_v);
  for (int64_t j = 0; j < s.len_k; ++j) {
    const int64_t block = desc.descale_block != 0 ? j / desc.descale_block : 0;
    const double k_factor = descale_of(io.k_descale, b, kv_head, block);
    const double v_factor = descale_of(io.v_descale, b, kv_head, block);
    for (int64_t c = 0; c < desc.head_dim_qk; ++c)
      head.k(j, c) = k_factor * key_element(desc, io, io.k, b, s.k_start + j, kv_head, c);
    for (int64_t c = 0; c < d_v; ++c)
      head.v(j, c) = v_factor * key_element(desc, io, io.v, b, s.k_start + j, kv_head, c);
  }
  head.scale = desc.scale != 0 ? desc.scale : 1 / std::sqrt(static_cast<double>(desc.head_dim_qk));
  head.softcap = desc.softcap;
  if (desc.flags & ADAATTN_FLAG_ALIBI)
    head.alibi_slope = io.alibi_slopes.ndim == 1 ? at(io.alibi_slopes, h) : at(io.alibi_slopes, b, h);
  if (desc.flags & ADAATTN_FLAG_SINK) head.sink = at(io.sinks, h);
  if (desc.flags & ADAATTN_FLAG_BIAS) {
    head.bias = Matrix(s.len_q, s.len_k);
    const auto& shape = io.bias.shape;
    for (int64_t i = 0; i < s.len_q; ++i)
      for (int64_t j = 0; j < s.len_k; ++j)
        head.bias(i, j) =
            at(io.bias, shape[0] == 1 ? 0 : b, shape[1] == 1 ? 0 : h, shape[2] == 1 ? 0 : i, shape[3] == 1 ? 0 : j);
  }
  head.causal = desc.mask != ADAATTN_MASK_NONE;
  head.window_left = desc.window_left;
  head.window_right = desc.window_right;
  head.off = desc.mask == ADAATTN_MASK_CAUSAL_TOP_LEFT ? 0 : s.len_k - s.len_q;
  return head;
}

}  // namespace

AttentionResult attention(const adaattn_attn_desc_t& desc, const adaattn_io_t& io) {
  constexpr double kUntouched = std::numeric_limits<double>::quiet_NaN();
  const bool packed = desc.layout_q == ADAATTN_LAYOUT_THD;
  const int64_t batch = batch_of(desc, io), heads = desc.heads_q;
  const int64_t d_v = !present(io.v) ? 0 : desc.head_dim_v ? desc.head_dim_v : desc.head_dim_qk;
  const int64_t tokens = packed ? io.q.shape[0] : io.q.shape[desc.layout_q == ADAATTN_LAYOUT_BHSD ? 2 : 1];
  const size_t rows = static_cast<size_t>((packed ? 1 : batch) * heads * tokens);
  AttentionResult result;
  result.o.assign(rows * d_v, kUntouched);
  for (auto* per_row : {&result.lse, &result.entropy, &result.o_scale, &result.score_scale, &result.keys})
    per_row->assign(rows, kUntouched);

  for (int64_t b = 0; b < batch; ++b) {
    const Sequence s = sequence_of(desc, io, b);
    for (int64_t h = 0; h < heads; ++h) {
      const HeadResult head = attend(gather(desc, io, s, b, h));
      for (int64_t i = 0; i < s.len_q; ++i) {
        const int64_t token = s.q_start + i, b_row = packed ? 0 : b;
        const int64_t row = (b_row * heads + h) * tokens + token;
        const int64_t o_row = desc.layout_q == ADAATTN_LAYOUT_BHSD ? row : (b_row * tokens + token) * heads + h;
        std::copy_n(head.o.row(i), d_v, result.o.begin() + o_row * d_v);
        result.lse[row] = head.lse[i];
        result.entropy[row] = head.entropy[i];
        result.o_scale[row] = head.o_scale[i];
        result.score_scale[row] = head.score_scale[i];
        result.keys[row] = static_cast<double>(head.keys[i]);
        result.query_rows += 1;
        result.score_pairs += static_cast<uint64_t>(head.keys[i]);
      }
    }
  }
  return result;
}

std::vector<double> head_entropy(const adaattn_attn_desc_t& desc, const adaattn_io_t& io, bool normalized) {
  std::vector<double> means;
  for (int64_t b = 0; b < batch_of(desc, io); ++b) {
    const Sequence s = sequence_of(desc, io, b);
    for (int64_t h = 0; h < desc.heads_q; ++h) {
      const HeadResult head = attend(gather(desc, io, s, b, h));
      double sum = 0;
      for (int64_t i = 0; i < s.len_q; ++i) {
        const double n = static_cast<double>(head.keys[i]);
        sum += !normalized ? head.entropy[i] : n < 2 ? 0 : head.entropy[i] / std::log(n);
      }
      means.push_back(s.len_q > 0 ? sum / static_cast<double>(s.len_q) : 0);
    }
  }
  return means;
}

MergedRow merge_rows(const std::vector<double>& o_a, double lse_a, const std::vector<double>& o_b, double lse_b) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  MergedRow merged{std::vector<double>(o_a.size(), 0.0), -kInf};
  const double largest = std::max(lse_a, lse_b);
  if (largest == -kInf) return merged;
  merged.lse = largest + std::log(std::exp(lse_a - largest) + std::exp(lse_b - largest));
  for (size_t c = 0; c < o_a.size(); ++c)
    merged.o[c] = o_a[c] * std::exp(lse_a - merged.lse) + o_b[c] * std::exp(lse_b - merged.lse);
  return merged;
}

}  // namespace adaattn::reference
