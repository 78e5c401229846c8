#include "cpu_fallback/attend/operands.h"

#include <algorithm>
#include <type_traits>

namespace adaattn::cpu {
namespace {

template <typename T>
T* advance(T* data, int64_t elements, Dtype dtype) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return data == nullptr ? nullptr : static_cast<Byte*>(data) + elements * dtype_size(dtype);
}

}  // namespace

KeyOperand key_operand(const AttnParams& p, const Operand& x, int64_t b, const Sequence& s, int64_t head) {
  KeyOperand k;
  k.dtype = x.dtype;
  k.stride = x.stride_s * dtype_size(x.dtype);
  if (p.block_table != nullptr) {
    k.data = static_cast<const char*>(advance(x.data, head * x.stride_h, x.dtype));
    k.block_table = p.block_table + b * p.block_table_stride;
    k.page_size = p.page_size;
    k.page_stride = x.stride_b * dtype_size(x.dtype);
    k.num_pages = p.num_pages;
  } else {
    k.data =
        static_cast<const char*>(advance(x.data, b * x.stride_b + s.k_start * x.stride_s + head * x.stride_h, x.dtype));
  }
  return k;
}

RowOperands row_operands(const AttnParams& p, int64_t b, const Sequence& s, int64_t head, int64_t group) {
  RowOperands r;
  r.group = group;
  const auto at = [&](const Operand& x) {
    Operand moved = x;
    moved.data = advance(x.data, b * x.stride_b + s.q_start * x.stride_s + head * x.stride_h, x.dtype);
    return moved;
  };
  r.q = at(p.q);
  r.o = at(p.o);
  r.lse = at(p.lse);
  r.entropy = at(p.entropy);
  r.bias = p.bias;
  r.bias.data = advance(p.bias.data, b * p.bias.stride_b + head * p.bias.stride_h, p.bias.dtype);
  if (p.alibi_slopes != nullptr) r.alibi = p.alibi_slopes + b * p.alibi_stride_b + head * p.alibi_stride_h;
  r.alibi_stride = p.alibi_stride_h;
  if (p.sinks != nullptr) r.sinks = p.sinks + head * p.sinks_stride;
  r.sinks_stride = p.sinks_stride;
  r.d_qk = p.d_qk;
  r.d_v = p.d_v;
  r.off = s.off;
  r.scale = p.scale;
  r.softcap = p.softcap;
  r.fast_f32 = p.fast_f32;
  return r;
}

void fill_ranges(const AttnParams& p, const Sequence& s, int64_t group, int64_t row, int64_t count, int32_t* begin,
                 int32_t* end) {
  for (int64_t i = 0; i < count; ++i) {
    const KeyRange range = visible_keys(p, s, (row + i) / group);
    begin[i] = static_cast<int32_t>(range.begin);
    end[i] = static_cast<int32_t>(range.end);
  }
}

int64_t visible_pairs(const AttnParams& p, const Sequence& s) {
  if (p.window_left < 0 && p.window_right < 0) return s.len_q * s.len_k;
  int64_t pairs = 0;
  for (int64_t i = 0; i < s.len_q; ++i) {
    const KeyRange range = visible_keys(p, s, i);
    pairs += std::max<int64_t>(range.end - range.begin, 0);
  }
  return pairs;
}

}  // namespace adaattn::cpu
