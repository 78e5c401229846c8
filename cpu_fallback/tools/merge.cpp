#include <algorithm>
#include <cmath>

#include "cpu_fallback/tools/tools.h"

namespace adaattn::cpu {
namespace {

constexpr int64_t kRowsPerTask = 64;

template <typename T = uint8_t>
T* element(const Operand& x, int64_t b, int64_t s, int64_t h) {
  const int64_t index = b * x.stride_b + s * x.stride_s + h * x.stride_h;
  return reinterpret_cast<T*>(static_cast<uint8_t*>(x.data) + index * dtype_size(x.dtype));
}

}  // namespace

void merge(const ToolContext& context, const MergeParams& p) {
  const int64_t rows = p.batch * p.tokens * p.heads;
  context.pool.for_each((rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t, int64_t task) {
    const int64_t end = std::min(rows, (task + 1) * kRowsPerTask);
    for (int64_t row = task * kRowsPerTask; row < end; ++row) {
      const int64_t h = row % p.heads, s = row / p.heads % p.tokens, b = row / p.heads / p.tokens;
      const double lse_a = *element<float>(p.lse_a, b, s, h), lse_b = *element<float>(p.lse_b, b, s, h);
      const double high = lse_a > lse_b ? lse_a : lse_b, low = lse_a > lse_b ? lse_b : lse_a;
      double weight_high = 0, weight_low = 0, lse = high;  // of -inf on both sides
      if (high != -INFINITY) {
        const double ratio = std::exp(low - high);
        weight_high = 1 / (1 + ratio);
        weight_low = ratio / (1 + ratio);
        lse = high + std::log1p(ratio);
      }
      MergeRow merged{.a = element(p.o_a, b, s, h), .b = element(p.o_b, b, s, h), .o = element(p.o, b, s, h)};
      merged.weight_a = static_cast<float>(lse_a > lse_b ? weight_high : weight_low);
      merged.weight_b = static_cast<float>(lse_a > lse_b ? weight_low : weight_high);
      merged.n = p.d_v;
      merged.dtype_a = p.o_a.dtype;
      merged.dtype_b = p.o_b.dtype;
      merged.dtype_o = p.o.dtype;
      context.kernels.merge_row(merged);
      if (p.lse.data != nullptr) *element<float>(p.lse, b, s, h) = static_cast<float>(lse);
    }
  });
}

}  // namespace adaattn::cpu
