#include <algorithm>
#include <cfloat>
#include <cinttypes>
#include <cmath>

#include "core/check_tensor.h"
#include "core/error.h"
#include "core/validate.h"

namespace adaattn {
namespace {

constexpr int64_t kMaxExtent = INT32_MAX;  // lengths and indices in device memory are int32
constexpr int64_t kMaxHeads = 65535;       // a CUDA grid's second and third dimension
constexpr int64_t kMaxHeadDim = 512;

// Carries the name the caller knows the descriptor by, so that each message has the field in full.
class DescReader {
 public:
  DescReader(const adaattn_attn_desc_t& desc, Use use)
      : d_(desc), name_(use == Use::kEntropy ? "attn" : "desc"), use_(use) {}

  Problem read() const {
    Problem p;
    read_sizes(p);
    read_types(p);
    read_layouts(p);
    read_mask(p);
    read_arithmetic(p);
    read_features(p);
    check_total_size(p);
    return p;
  }

 private:
  void range(const char* field, int64_t value, int64_t low, int64_t high) const {
    if (value < low || value > high)
      fail(ADAATTN_ERROR_INVALID_ARGUMENT, "%s.%s is %" PRId64 "; accepted: %" PRId64 " to %" PRId64, name_, field,
           value, low, high);
  }

  void choice(const char* field, int32_t value, int32_t last, const char* accepted) const {
    if (value < 0 || value > last)
      fail(ADAATTN_ERROR_INVALID_ARGUMENT, "%s.%s is %" PRId32 "; accepted: %s", name_, field, value, accepted);
  }

  void read_sizes(Problem& p) const {
    range("max_batch", d_.max_batch, 1, kMaxExtent);
    range("max_seqlen_q", d_.max_seqlen_q, 0, kMaxExtent);
    range("max_seqlen_k", d_.max_seqlen_k, 0, kMaxExtent);
    range("heads_kv", d_.heads_kv, 1, kMaxHeads);
    range("heads_q", d_.heads_q, 1, kMaxHeads);
    if (d_.heads_q % d_.heads_kv != 0)
      fail(ADAATTN_ERROR_INVALID_ARGUMENT, "%s.heads_q is %" PRId64 "; accepted: a multiple of %s.heads_kv, %" PRId64,
           name_, d_.heads_q, name_, d_.heads_kv);
    range("head_dim_qk", d_.head_dim_qk, 1, kMaxHeadDim);
    p.max_batch = d_.max_batch;
    p.max_seqlen_q = d_.max_seqlen_q;
    p.max_seqlen_k = d_.max_seqlen_k;
    p.heads_q = d_.heads_q;
    p.heads_kv = d_.heads_kv;
    p.d_qk = p.d_v = d_.head_dim_qk;
    if (use_ == Use::kAttention) {
      range("head_dim_v", d_.head_dim_v, 0, kMaxHeadDim);
      if (d_.head_dim_v != 0) p.d_v = d_.head_dim_v;
    }
  }

  Dtype dtype(const char* field, adaattn_dtype_t value, Dtype default_dtype, bool e4m3) const {
    if (value == ADAATTN_DTYPE_NONE && default_dtype != Dtype::kNone) return default_dtype;
    if (value != ADAATTN_DTYPE_F32 && value != ADAATTN_DTYPE_F16 && value != ADAATTN_DTYPE_BF16 &&
        !(e4m3 && value == ADAATTN_DTYPE_E4M3))
      fail(ADAATTN_ERROR_INVALID_DTYPE, "%s.%s is %" PRId32 " (%s); accepted: F32, F16, BF16%s%s", name_, field, value,
           dtype_name(value), e4m3 ? ", E4M3" : "",
           default_dtype == Dtype::kNone ? "" : " or NONE, which stands for the default");
    return static_cast<Dtype>(value);
  }

  void read_types(Problem& p) const {
    const bool attends = use_ == Use::kAttention;
    p.dtype_q = dtype("dtype_q", d_.dtype_q, Dtype::kNone, attends);
    p.dtype_kv = dtype("dtype_kv", d_.dtype_kv, p.dtype_q, attends);
    if (p.dtype_q == Dtype::kE4M3 && p.dtype_kv != Dtype::kE4M3)
      fail(ADAATTN_ERROR_INVALID_DTYPE, "%s.dtype_kv is %" PRId32 " (%s); accepted: E4M3 with %s.dtype_q E4M3", name_,
           d_.dtype_kv, dtype_name(d_.dtype_kv), name_);
    const Dtype as_q = p.dtype_q == Dtype::kE4M3 ? Dtype::kBF16 : p.dtype_q;
    p.dtype_o = attends ? dtype("dtype_o", d_.dtype_o, as_q, false) : p.dtype_q;
    const int64_t block = d_.descale_block;
    if (p.dtype_kv != Dtype::kE4M3 && block != 0)
      fail(ADAATTN_ERROR_INVALID_ARGUMENT, "%s.descale_block is %" PRId64 "; accepted: 0 unless %s.dtype_kv is E4M3",
           name_, block, name_);
    if (block < 0 || block > kMaxExtent || block % 64 != 0)
      fail(ADAATTN_ERROR_INVALID_ARGUMENT,
           "%s.descale_block is %" PRId64 "; accepted: 0 (one factor per head) or a multiple of 64 keys", name_, block);
    p.descale_block = block;
    choice("math", d_.math, ADAATTN_MATH_FAST_F32, "0 (EXACT), 1 (FAST_F32)");
    p.fast_f32 = d_.math == ADAATTN_MATH_FAST_F32 && p.dtype_q == Dtype::kF32;
  }

  void read_layouts(Problem& p) const {
    if (d_.layout_q != ADAATTN_LAYOUT_BSHD && d_.layout_q != ADAATTN_LAYOUT_BHSD && d_.layout_q != ADAATTN_LAYOUT_THD)
      fail(ADAATTN_ERROR_INVALID_ARGUMENT, "%s.layout_q is %" PRId32 "; accepted: 1 (BSHD), 2 (BHSD), 3 (THD)", name_,
           d_.layout_q);
    const bool packed = d_.layout_q == ADAATTN_LAYOUT_THD, paged = d_.layout_kv == ADAATTN_LAYOUT_PAGED;
    const bool kv_packed = d_.layout_kv == ADAATTN_LAYOUT_THD;
    const bool kv_plain = d_.layout_kv == ADAATTN_LAYOUT_BSHD || d_.layout_kv == ADAATTN_LAYOUT_BHSD;
    if (!paged && !(packed ? kv_packed : kv_plain))
      fail(ADAATTN_ERROR_INVALID_ARGUMENT, "%s.layout_kv is %" PRId32 "; accepted: %s, as %s.layout_q is %" PRId32,
           name_, d_.layout_kv, packed ? "3 (THD), 4 (PAGED)" : "1 (BSHD), 2 (BHSD), 4 (PAGED)", name_, d_.layout_q);
    if (paged)
      range("page_size", d_.page_size, 1, kMaxExtent);
    else if (d_.page_size != 0)
      fail(ADAATTN_ERROR_INVALID_ARGUMENT, "%s.page_size is %" PRId64 "; accepted: 0 unless %s.layout_kv is 4 (PAGED)",
           name_, d_.page_size, name_);
    if (packed)
      range("max_total_q", d_.max_total_q, 0, kMaxExtent);
    else if (d_.max_total_q != 0)
      fail(ADAATTN_ERROR_INVALID_ARGUMENT, "%s.max_total_q is %" PRId64 "; accepted: 0 unless %s.layout_q is 3 (THD)",
           name_, d_.max_total_q, name_);
    p.layout_q = static_cast<Layout>(d_.layout_q);
    p.layout_kv = static_cast<Layout>(d_.layout_kv);
    p.page_size = d_.page_size;
    p.max_total_q = p.max_batch * p.max_seqlen_q;  // both below 2^31
    if (packed) p.max_total_q = d_.max_total_q != 0 ? d_.max_total_q : std::min(p.max_total_q, kMaxExtent);
  }

  void read_mask(Problem& p) const {
    choice("mask", d_.mask, ADAATTN_MASK_CAUSAL_TOP_LEFT, "0 (NONE), 1 (CAUSAL_BOTTOM_RIGHT), 2 (CAUSAL_TOP_LEFT)");
    if (d_.window_left < -1)
      fail(ADAATTN_ERROR_INVALID_ARGUMENT, "%s.window_left is %" PRId64 "; accepted: -1 (open) or more", name_,
           d_.window_left);
    if (d_.window_right < -1)
      fail(ADAATTN_ERROR_INVALID_ARGUMENT, "%s.window_right is %" PRId64 "; accepted: -1 (open) or more", name_,
           d_.window_right);
    p.off_top_left = d_.mask == ADAATTN_MASK_CAUSAL_TOP_LEFT;
    // No key is farther from i + off than the longer of the two sequences.
    const int64_t longest = std::max(p.max_seqlen_q, p.max_seqlen_k);
    p.window_left = d_.window_left >= longest ? -1 : d_.window_left;
    p.window_right = d_.mask != ADAATTN_MASK_NONE ? 0 : d_.window_right >= longest ? -1 : d_.window_right;
  }

  void read_arithmetic(Problem& p) const {
    range("deterministic", d_.deterministic, 0, 1);
    p.deterministic = d_.deterministic != 0;
    if (!(std::abs(d_.scale) <= FLT_MAX))
      fail(ADAATTN_ERROR_INVALID_ARGUMENT, "%s.scale is %g; accepted: 0 (1/sqrt(head_dim_qk)) or a finite f32 value",
           name_, d_.scale);
    p.scale = static_cast<float>(d_.scale != 0 ? d_.scale : 1 / std::sqrt(static_cast<double>(p.d_qk)));
    if (!(d_.softcap == 0 || (d_.softcap >= FLT_MIN && d_.softcap <= FLT_MAX)))
      fail(ADAATTN_ERROR_INVALID_ARGUMENT, "%s.softcap is %g; accepted: 0 (off) or %g to %g", name_, d_.softcap,
           static_cast<double>(FLT_MIN), static_cast<double>(FLT_MAX));
    p.softcap = static_cast<float>(d_.softcap);
  }

  void bits(const char* field, uint32_t value, uint32_t known, const char* names) const {
    if ((value & ~known) != 0)
      fail(ADAATTN_ERROR_INVALID_ARGUMENT, "%s.%s is 0x%" PRIx32 "; accepted: %s", name_, field, value, names);
  }

  void read_features(Problem& p) const {
    bits("flags", d_.flags, ADAATTN_FLAG_ALL, "sums of 1 (ALIBI), 2 (SINK), 4 (BIAS)");
    // The entropy tool takes its own outputs from io; the bit that asks for what it makes anyway does no harm.
    if (use_ == Use::kEntropy)
      bits("outputs", d_.outputs, ADAATTN_OUTPUT_ENTROPY, "0, or 2 (ENTROPY)");
    else
      bits("outputs", d_.outputs, ADAATTN_OUTPUT_ALL, "sums of 1 (LSE), 2 (ENTROPY)");
    p.alibi = (d_.flags & ADAATTN_FLAG_ALIBI) != 0;
    p.sink = (d_.flags & ADAATTN_FLAG_SINK) != 0;
    p.bias = (d_.flags & ADAATTN_FLAG_BIAS) != 0;
    p.want_lse = (d_.outputs & ADAATTN_OUTPUT_LSE) != 0;
    p.want_entropy = use_ == Use::kEntropy || (d_.outputs & ADAATTN_OUTPUT_ENTROPY) != 0;
  }

  // The back-ends add up rows and bytes of the maxima in 64 bits.
  void check_total_size(const Problem& p) const {
    int64_t elements_q, elements_k;
    if (__builtin_mul_overflow(p.max_total_q, p.heads_q * kMaxHeadDim * 16, &elements_q))
      fail(ADAATTN_ERROR_SIZE_OVERFLOW,
           "%s.max_batch is %" PRId64 ", %s.max_seqlen_q %" PRId64 ", %s.heads_q %" PRId64
           "; accepted: products whose size in bytes fits 64 bits",
           name_, p.max_batch, name_, p.max_seqlen_q, name_, p.heads_q);
    if (__builtin_mul_overflow(p.max_batch * p.max_seqlen_k, p.heads_kv * kMaxHeadDim * 16, &elements_k))
      fail(ADAATTN_ERROR_SIZE_OVERFLOW,
           "%s.max_batch is %" PRId64 ", %s.max_seqlen_k %" PRId64 ", %s.heads_kv %" PRId64
           "; accepted: products whose size in bytes fits 64 bits",
           name_, p.max_batch, name_, p.max_seqlen_k, name_, p.heads_kv);
  }

  const adaattn_attn_desc_t& d_;
  const char* name_;
  Use use_;
};

}  // namespace

Problem problem_from(const adaattn_attn_desc_t& desc, Use use) { return DescReader(desc, use).read(); }

}  // namespace adaattn
