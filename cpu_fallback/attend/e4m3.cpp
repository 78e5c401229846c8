#include "cpu_fallback/attend/e4m3.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>

#include "core/error.h"
#include "cpu_fallback/attend/layout.h"
#include "cpu_fallback/attend/operands.h"

namespace adaattn::cpu {
namespace {

constexpr int64_t kAlignment = 64;

std::array<float, 256> make_values() {
  std::array<float, 256> values;
  for (int bits = 0; bits < 256; ++bits) {
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    const float magnitude = exponent == 15 && mantissa == 7 ? std::numeric_limits<float>::quiet_NaN()
                            : exponent == 0                 ? std::ldexp(static_cast<float>(mantissa), -9)
                                            : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
    values[static_cast<size_t>(bits)] = bits & 0x80 ? -magnitude : magnitude;
  }
  return values;
}

void widen(const void* from, float factor, int64_t n, float* to) {
  static const std::array<float, 256> values = make_values();
  const auto* bytes = static_cast<const uint8_t*>(from);
  for (int64_t i = 0; i < n; ++i) to[i] = values[bytes[i]] * factor;
}

float factor_of(const Descale& descale, int64_t b, int64_t head, int64_t block) {
  return descale.data[b * descale.stride_b + head * descale.stride_h + block * descale.stride_block];
}

struct Floats {
  int64_t q = 0, k = 0, v = 0;
  int64_t bytes() const { return (q + k + v) * static_cast<int64_t>(sizeof(float)); }
};

// Of the copies at the problem's maxima.
Floats floats_of(const Problem& p) {
  const int64_t keys = p.max_batch * p.max_seqlen_k * p.heads_kv;
  return {p.dtype_q == Dtype::kE4M3 ? p.max_total_q * p.heads_q * p.d_qk : 0, keys * p.d_qk, keys * p.d_v};
}

int64_t lengths_bytes(const Problem& p) {
  return ceil_div(p.max_batch * static_cast<int64_t>(sizeof(int32_t)), kAlignment) * kAlignment;
}

// The caller's memory may have any alignment.
int64_t own_bytes(const Problem& p) { return kAlignment + lengths_bytes(p) + floats_of(p).bytes(); }

Operand contiguous(float* data, int64_t batch_tokens, int64_t heads, int64_t d) {
  return {data, batch_tokens * heads * d, heads * d, d, Dtype::kF32};
}

class E4m3Plan final : public AttentionPlan {
 public:
  E4m3Plan(const Problem& problem, std::unique_ptr<AttentionPlan> inner, ThreadPool& pool)
      : problem_(problem), inner_(std::move(inner)), pool_(pool), info_(e4m3_info(problem, inner_->info())) {}

  const PlanInfo& info() const override { return info_; }

  void execute(const AttnParams& p, void* workspace, size_t workspace_bytes, adaattn_stream_t stream) override {
    if (workspace_bytes < info_.workspace_bytes)
      fail(ADAATTN_ERROR_WORKSPACE_TOO_SMALL, "workspace_bytes is %zu; accepted: %zu or more", workspace_bytes,
           info_.workspace_bytes);
    const auto start = (reinterpret_cast<uintptr_t>(workspace) + kAlignment - 1) / kAlignment * kAlignment;
    auto* lengths = reinterpret_cast<int32_t*>(start);
    auto* q = reinterpret_cast<float*>(start + static_cast<uintptr_t>(lengths_bytes(problem_)));
    const Floats size = floats_of(problem_);
    float* k = q + size.q;
    float* v = k + size.k;

    AttnParams call = p;
    for (int64_t b = 0; b < p.batch; ++b) lengths[b] = static_cast<int32_t>(sequence_of(p, b).len_k);
    call.seqused_k = lengths;
    call.cu_seqlens_k = nullptr;
    call.block_table = nullptr;
    call.q_descale = call.k_descale = call.v_descale = {};
    call.k = contiguous(k, p.seqlen_k, p.heads_kv, p.d_qk);
    call.v = contiguous(v, p.seqlen_k, p.heads_kv, p.d_v);
    if (p.q_descale.data != nullptr) {
      call.q = contiguous(q, p.cu_seqlens_q != nullptr ? 0 : p.seqlen_q, p.heads_q, p.d_qk);
      widen_queries(p, call.q);
    }
    widen_keys(p, call);
    inner_->execute(call, v + size.v, inner_->info().workspace_bytes, stream);
    // The lengths and tables that were given; those of the inner call are in order.
    for (int64_t b = 0; b < p.batch && violation_.field == Field::kNone; ++b) violation_ = check_sequence(p, b);
  }

  PlanCounters counters(bool wait, bool reset) override {
    PlanCounters result = inner_->counters(wait, reset);
    result.violation = violation_;
    if (reset) violation_ = {};
    return result;
  }

 private:
  void widen_queries(const AttnParams& p, const Operand& to) {
    const int64_t group = p.heads_q / p.heads_kv;
    pool_.for_each(p.batch * p.heads_q, [&](int64_t, int64_t item) {
      const int64_t b = item / p.heads_q, head = item % p.heads_q;
      const Sequence s = sequence_of(p, b);
      const RowOperands rows = row_operands(p, b, s, head, 1);
      const float factor = factor_of(p.q_descale, b, head / group, 0);
      float* out = static_cast<float*>(to.data) + b * to.stride_b + s.q_start * to.stride_s + head * to.stride_h;
      for (int64_t i = 0; i < s.len_q; ++i)
        widen(static_cast<const uint8_t*>(rows.q.data) + i * rows.q.stride_s, factor, p.d_qk, out + i * to.stride_s);
    });
  }

  void widen_keys(const AttnParams& p, const AttnParams& call) {
    const int64_t step = p.descale_block != 0 ? p.descale_block : kKeyBlock;
    const int64_t blocks = ceil_div(p.seqlen_k, step);
    pool_.for_each(p.batch * blocks, [&](int64_t, int64_t item) {
      const int64_t b = item / blocks, first = item % blocks * step;
      const Sequence s = sequence_of(p, b);
      const int64_t last = std::min(s.len_k, first + step), block = p.descale_block != 0 ? item % blocks : 0;
      for (int64_t head = 0; head < p.heads_kv; ++head) {
        widen_block(key_operand(p, p.k, b, s, head), factor_of(p.k_descale, b, head, block), first, last, p.d_qk,
                    call.k, b, head);
        widen_block(key_operand(p, p.v, b, s, head), factor_of(p.v_descale, b, head, block), first, last, p.d_v, call.v,
                    b, head);
      }
    });
  }

  static void widen_block(const KeyOperand& from, float factor, int64_t first, int64_t last, int64_t d,
                          const Operand& to, int64_t b, int64_t head) {
    float* out = static_cast<float*>(to.data) + b * to.stride_b + head * to.stride_h;
    for (int64_t j = first; j < last; ++j) {
      const char* key = from.data;
      if (from.block_table != nullptr) {
        const int64_t page = clamp_to(from.block_table[j / from.page_size], 0, from.num_pages - 1);
        key += page * from.page_stride + j % from.page_size * from.stride;
      } else {
        key += j * from.stride;
      }
      widen(key, factor, d, out + j * to.stride_s);
    }
  }

  Problem problem_;
  std::unique_ptr<AttentionPlan> inner_;
  ThreadPool& pool_;
  PlanInfo info_;
  Violation violation_;
};

}  // namespace

Problem widened(const Problem& problem) {
  Problem inner = problem;
  if (inner.dtype_q == Dtype::kE4M3) inner.dtype_q = Dtype::kF32;
  inner.dtype_kv = Dtype::kF32;
  inner.layout_kv = Layout::kBSHD;
  inner.page_size = 0;
  inner.descale_block = 0;
  return inner;
}

PlanInfo e4m3_info(const Problem& problem, PlanInfo inner) {
  inner.kernel += " after widening E4M3";
  inner.workspace_bytes += static_cast<size_t>(own_bytes(problem));
  return inner;
}

std::unique_ptr<AttentionPlan> make_e4m3_plan(const Problem& problem, std::unique_ptr<AttentionPlan> inner,
                                              ThreadPool& pool) {
  return std::make_unique<E4m3Plan>(problem, std::move(inner), pool);
}

}  // namespace adaattn::cpu
