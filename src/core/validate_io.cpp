#include <algorithm>
#include <cinttypes>

#include "core/check_tensor.h"
#include "core/error.h"
#include "core/validate.h"

namespace adaattn {
namespace {

// Where a layout keeps its dimensions; batch is the page for PAGED and absent (-1) for THD.
struct Axes {
  int batch, token, head, dim, count;
};

Axes axes_of(Layout layout) {
  switch (layout) {
    case Layout::kBHSD:
      return {0, 2, 1, 3, 4};
    case Layout::kTHD:
      return {-1, 0, 1, 2, 3};
    case Layout::kBSHD:
    case Layout::kPaged:
      break;
  }
  return {0, 1, 2, 3, 4};
}

// Reads the tensors of one call in the order in which later ones depend on earlier ones.
class IoReader {
 public:
  IoReader(const Problem& problem, const adaattn_io_t& io, const DeviceScope& scope, Use use)
      : problem_(problem),
        io_(io),
        scope_(scope),
        use_(use),
        q_axes_(axes_of(problem.layout_q)),
        kv_axes_(axes_of(problem.layout_kv)),
        packed_(problem.layout_q == Layout::kTHD),
        paged_(problem.layout_kv == Layout::kPaged) {}

  AttnParams read(CallMemory& memory) {
    copy_problem();
    read_q();
    read_lengths();
    read_kv();
    read_bias();
    read_vectors();
    read_descales();
    if (use_ == Use::kAttention)
      read_o();
    else
      expect_absent(io_.o, "io.o");
    read_rows();
    for (int i = 0; i < present_count_; ++i) memory.add(*present_[i].tensor, present_[i].name, present_[i].output);
    return p_;
  }

 private:
  void copy_problem() {
    p_.heads_q = problem_.heads_q;
    p_.heads_kv = problem_.heads_kv;
    p_.d_qk = problem_.d_qk;
    p_.d_v = problem_.d_v;
    p_.page_size = problem_.page_size;
    p_.window_left = problem_.window_left;
    p_.window_right = problem_.window_right;
    p_.off_top_left = problem_.off_top_left;
    p_.scale = problem_.scale;
    p_.softcap = problem_.softcap;
    p_.fast_f32 = problem_.fast_f32;
    p_.descale_block = problem_.descale_block;
  }

  void check(const adaattn_tensor_t& t, const char* name, Access access, int min_ndim, int max_ndim,
             std::initializer_list<Dtype> dtypes) {
    if (is_absent(&t, name))
      fail(ADAATTN_ERROR_NULL_POINTER, "%s is absent; accepted: a tensor, as the descriptor calls for it", name);
    check_tensor(t, name, access, min_ndim, max_ndim, dtypes, scope_);
    present_[present_count_++] = {&t, name, is_output(access)};
  }

  void expect_absent(const adaattn_tensor_t& t, const char* name) {
    if (!is_absent(&t, name))
      fail(ADAATTN_ERROR_INVALID_ARGUMENT,
           "%s is present (ndim %" PRId32
           "); accepted: zeros, as the descriptor does "
           "not call for it",
           name, t.ndim);
  }

  static Operand operand(const adaattn_tensor_t& t, const Axes& axes) {
    Operand x;
    x.data = t.data;
    x.stride_b = axes.batch >= 0 ? effective_stride(t, axes.batch) : 0;
    x.stride_s = effective_stride(t, axes.token);
    x.stride_h = effective_stride(t, axes.head);
    x.dtype = static_cast<Dtype>(t.dtype);
    return x;
  }

  void read_q() {
    const Axes& x = q_axes_;
    check(io_.q, "io.q", Access::kDistinctInput, x.count, x.count, {problem_.dtype_q});
    expect_extent(io_.q, "io.q", x.head, problem_.heads_q, "heads_q of the descriptor");
    expect_extent(io_.q, "io.q", x.dim, problem_.d_qk, "head_dim_qk of the descriptor");
    const int64_t tokens = io_.q.shape[x.token];
    if (packed_) {
      expect_at_most(io_.q, "io.q", x.token, problem_.max_total_q, "max_total_q of the descriptor");
      p_.seqlen_q = std::min(tokens, problem_.max_seqlen_q);
      p_.total_q = tokens;
    } else {
      expect_at_most(io_.q, "io.q", x.batch, problem_.max_batch, "max_batch of the descriptor");
      expect_at_most(io_.q, "io.q", x.token, problem_.max_seqlen_q, "max_seqlen_q of the descriptor");
      p_.batch = io_.q.shape[x.batch];
      p_.seqlen_q = tokens;
      p_.total_q = p_.batch * tokens;
    }
    p_.q = operand(io_.q, x);
  }

  const int32_t* read_index(const adaattn_tensor_t& t, const char* name, int64_t extent, const char* why) {
    check(t, name, Access::kContiguousInput, 1, 1, {Dtype::kI32});
    expect_extent(t, name, 0, extent, why);
    return static_cast<const int32_t*>(t.data);
  }

  void read_lengths() {
    if (packed_) {
      check(io_.cu_seqlens_q, "io.cu_seqlens_q", Access::kContiguousInput, 1, 1, {Dtype::kI32});
      const int64_t extent = io_.cu_seqlens_q.shape[0];
      if (extent < 1 || extent - 1 > problem_.max_batch)
        fail(ADAATTN_ERROR_INVALID_SHAPE,
             "io.cu_seqlens_q.shape[0] is %" PRId64 "; accepted: 1 to %" PRId64
             " (one more than the sequences, max_batch of the descriptor)",
             extent, problem_.max_batch + 1);
      p_.batch = extent - 1;
      p_.cu_seqlens_q = static_cast<const int32_t*>(io_.cu_seqlens_q.data);
    } else {
      expect_absent(io_.cu_seqlens_q, "io.cu_seqlens_q");
    }
    if (problem_.layout_kv == Layout::kTHD)
      p_.cu_seqlens_k = read_index(io_.cu_seqlens_k, "io.cu_seqlens_k", p_.batch + 1, "that of io.cu_seqlens_q");
    else
      expect_absent(io_.cu_seqlens_k, "io.cu_seqlens_k");
    if (paged_ || !is_absent(&io_.seqused_k, "io.seqused_k"))
      p_.seqused_k = read_index(io_.seqused_k, "io.seqused_k", p_.batch, "the number of sequences");
    if (!paged_) {
      expect_absent(io_.block_table, "io.block_table");
      return;
    }
    check(io_.block_table, "io.block_table", Access::kUnitInput, 2, 2, {Dtype::kI32});
    expect_extent(io_.block_table, "io.block_table", 0, p_.batch, "the number of sequences");
    p_.block_table = static_cast<const int32_t*>(io_.block_table.data);
    p_.block_table_stride = effective_stride(io_.block_table, 0);
    p_.pages_per_seq = io_.block_table.shape[1];
  }

  void read_kv() {
    const Axes& x = kv_axes_;
    check(io_.k, "io.k", Access::kUnitInput, x.count, x.count, {problem_.dtype_kv});
    expect_extent(io_.k, "io.k", x.head, problem_.heads_kv, "heads_kv of the descriptor");
    expect_extent(io_.k, "io.k", x.dim, problem_.d_qk, "head_dim_qk of the descriptor");
    const int64_t tokens = io_.k.shape[x.token];
    if (paged_) {
      expect_extent(io_.k, "io.k", x.token, problem_.page_size, "page_size of the descriptor");
      expect_at_most(io_.k, "io.k", x.batch, INT32_MAX, "pages an int32 can number");
      p_.num_pages = io_.k.shape[x.batch];
      // Compared by division: the product may exceed 64 bits, the smaller of the two does not.
      p_.seqlen_k = p_.pages_per_seq > problem_.max_seqlen_k / problem_.page_size
                        ? problem_.max_seqlen_k
                        : p_.pages_per_seq * problem_.page_size;
      p_.total_k = p_.num_pages * problem_.page_size;
      // With no page at all there is nothing a table entry could be clamped to.
      if (p_.num_pages == 0) p_.seqlen_k = 0;
    } else if (packed_) {
      expect_at_most(io_.k, "io.k", x.token, INT32_MAX, "tokens an int32 can number");
      p_.seqlen_k = std::min(tokens, problem_.max_seqlen_k);
      p_.total_k = tokens;
    } else {
      expect_extent(io_.k, "io.k", x.batch, p_.batch, "the batch of io.q");
      expect_at_most(io_.k, "io.k", x.token, problem_.max_seqlen_k, "max_seqlen_k of the descriptor");
      p_.seqlen_k = tokens;
      p_.total_k = p_.batch * tokens;
    }
    p_.k = operand(io_.k, x);
    if (use_ == Use::kEntropy) {
      expect_absent(io_.v, "io.v");
      return;
    }
    check(io_.v, "io.v", Access::kUnitInput, x.count, x.count, {problem_.dtype_kv});
    if (x.batch >= 0) expect_extent(io_.v, "io.v", x.batch, io_.k.shape[x.batch], "that of io.k");
    expect_extent(io_.v, "io.v", x.token, tokens, "that of io.k");
    expect_extent(io_.v, "io.v", x.head, problem_.heads_kv, "heads_kv of the descriptor");
    expect_extent(io_.v, "io.v", x.dim, problem_.d_v, "head_dim_v of the descriptor");
    p_.v = operand(io_.v, x);
  }

  // Extents of 1 broadcast. Where the actual lengths are in device memory, the bias bounds them: a length beyond its
  // extent is clamped like any other violation.
  void read_bias() {
    if (!problem_.bias) {
      expect_absent(io_.bias, "io.bias");
      return;
    }
    const adaattn_tensor_t& t = io_.bias;
    const Dtype narrow = problem_.dtype_q == Dtype::kE4M3 ? Dtype::kF32 : problem_.dtype_q;
    check(t, "io.bias", Access::kInput, 4, 4, {Dtype::kF32, narrow});
    if (t.shape[0] != 1) expect_extent(t, "io.bias", 0, p_.batch, "the number of sequences, or 1");
    if (t.shape[1] != 1) expect_extent(t, "io.bias", 1, problem_.heads_q, "heads_q of the descriptor, or 1");
    p_.seqlen_q = bias_length(2, p_.seqlen_q, packed_, "the query length of the call, or 1");
    p_.seqlen_k = bias_length(3, p_.seqlen_k, packed_ || paged_, "the key length of the call, or 1");
    p_.bias.data = t.data;
    p_.bias.stride_b = effective_stride(t, 0);
    p_.bias.stride_h = effective_stride(t, 1);
    p_.bias.stride_q = effective_stride(t, 2);
    p_.bias.stride_k = effective_stride(t, 3);
    p_.bias.dtype = static_cast<Dtype>(t.dtype);
  }

  int64_t bias_length(int dim, int64_t length, bool is_bound, const char* why) const {
    const int64_t extent = io_.bias.shape[dim];
    if (extent == 1) return length;
    if (!is_bound) {
      expect_extent(io_.bias, "io.bias", dim, length, why);
      return length;
    }
    const int64_t limit = dim == 2 ? problem_.max_seqlen_q : problem_.max_seqlen_k;
    expect_at_most(io_.bias, "io.bias", dim, limit,
                   dim == 2 ? "max_seqlen_q of the descriptor" : "max_seqlen_k of the descriptor");
    return std::min(extent, length);
  }

  void read_vectors() {
    if (problem_.alibi) {
      const adaattn_tensor_t& t = io_.alibi_slopes;
      check(t, "io.alibi_slopes", Access::kInput, 1, 2, {Dtype::kF32});
      const int head = t.ndim - 1;
      expect_extent(t, "io.alibi_slopes", head, problem_.heads_q, "heads_q of the descriptor");
      if (head == 1) expect_extent(t, "io.alibi_slopes", 0, p_.batch, "the number of sequences");
      p_.alibi_slopes = static_cast<const float*>(t.data);
      p_.alibi_stride_b = head == 1 ? effective_stride(t, 0) : 0;
      p_.alibi_stride_h = effective_stride(t, head);
    } else {
      expect_absent(io_.alibi_slopes, "io.alibi_slopes");
    }
    if (problem_.sink) {
      check(io_.sinks, "io.sinks", Access::kInput, 1, 1, {Dtype::kF32});
      expect_extent(io_.sinks, "io.sinks", 0, problem_.heads_q, "heads_q of the descriptor");
      p_.sinks = static_cast<const float*>(io_.sinks.data);
      p_.sinks_stride = effective_stride(io_.sinks, 0);
    } else {
      expect_absent(io_.sinks, "io.sinks");
    }
  }

  // Extents of 1 broadcast.
  Descale read_descale(const adaattn_tensor_t& t, const char* name, bool wanted, bool in_blocks) {
    if (!wanted) {
      expect_absent(t, name);
      return {};
    }
    const int ndim = in_blocks ? 3 : 2;
    check(t, name, Access::kInput, ndim, ndim, {Dtype::kF32});
    if (t.shape[0] != 1) expect_extent(t, name, 0, p_.batch, "the number of sequences, or 1");
    if (t.shape[1] != 1) expect_extent(t, name, 1, problem_.heads_kv, "heads_kv of the descriptor, or 1");
    if (in_blocks && t.shape[2] != 1) {
      const int64_t blocks = p_.seqlen_k / problem_.descale_block + (p_.seqlen_k % problem_.descale_block != 0);
      if (t.shape[2] < blocks)
        fail(ADAATTN_ERROR_INVALID_SHAPE,
             "%s.shape[2] is %" PRId64 "; accepted: 1, or at least %" PRId64 ", the blocks of %" PRId64 " keys", name,
             t.shape[2], blocks, p_.seqlen_k);
    }
    return {static_cast<const float*>(t.data), effective_stride(t, 0), effective_stride(t, 1),
            in_blocks ? effective_stride(t, 2) : 0};
  }

  void read_descales() {
    const bool q = problem_.dtype_q == Dtype::kE4M3, kv = problem_.dtype_kv == Dtype::kE4M3;
    p_.q_descale = read_descale(io_.q_descale, "io.q_descale", q, false);
    p_.k_descale = read_descale(io_.k_descale, "io.k_descale", kv, problem_.descale_block != 0);
    p_.v_descale = read_descale(io_.v_descale, "io.v_descale", kv, problem_.descale_block != 0);
  }

  void read_o() {
    const Axes& x = q_axes_;
    check(io_.o, "io.o", Access::kUnitOutput, x.count, x.count, {problem_.dtype_o});
    if (x.batch >= 0) expect_extent(io_.o, "io.o", x.batch, p_.batch, "that of io.q");
    expect_extent(io_.o, "io.o", x.token, io_.q.shape[x.token], "that of io.q");
    expect_extent(io_.o, "io.o", x.head, problem_.heads_q, "heads_q of the descriptor");
    expect_extent(io_.o, "io.o", x.dim, problem_.d_v, "head_dim_v of the descriptor");
    p_.o = operand(io_.o, x);
  }

  // lse and entropy: [batch, heads_q, seqlen_q], packed [heads_q, total_q].
  Operand read_row_output(const adaattn_tensor_t& t, const char* name) {
    const int ndim = packed_ ? 2 : 3, head = ndim - 2, token = ndim - 1;
    check(t, name, Access::kOutput, ndim, ndim, {Dtype::kF32});
    if (!packed_) expect_extent(t, name, 0, p_.batch, "that of io.q");
    expect_extent(t, name, head, problem_.heads_q, "heads_q of the descriptor");
    expect_extent(t, name, token, io_.q.shape[q_axes_.token], "the query tokens of io.q");
    return operand(t, {packed_ ? -1 : 0, token, head, -1, ndim});
  }

  void read_rows() {
    if (problem_.want_lse)
      p_.lse = read_row_output(io_.lse, "io.lse");
    else
      expect_absent(io_.lse, "io.lse");
    const bool optional = use_ == Use::kEntropy;
    if (problem_.want_entropy && !(optional && is_absent(&io_.entropy, "io.entropy")))
      p_.entropy = read_row_output(io_.entropy, "io.entropy");
    else
      expect_absent(io_.entropy, "io.entropy");
  }

  struct Present {
    const adaattn_tensor_t* tensor;
    const char* name;
    bool output;
  };

  const Problem& problem_;
  const adaattn_io_t& io_;
  const DeviceScope& scope_;
  Use use_;
  Axes q_axes_, kv_axes_;
  bool packed_, paged_;
  AttnParams p_;
  Present present_[16];
  int present_count_ = 0;
};

}  // namespace

AttnParams attention_from(const Problem& problem, const adaattn_io_t& io, const DeviceScope& scope,
                          const Workspace& workspace) {
  CallMemory memory;
  const AttnParams params = IoReader(problem, io, scope, Use::kAttention).read(memory);
  memory.add(workspace);
  memory.check();
  return params;
}

EntropyParams entropy_from(const adaattn_entropy_desc_t& desc) {
  if (desc.mode != ADAATTN_ENTROPY_EXACT && desc.mode != ADAATTN_ENTROPY_SAMPLED)
    fail(ADAATTN_ERROR_INVALID_ARGUMENT, "desc.mode is %" PRId32 "; accepted: 0 (EXACT), 1 (SAMPLED)", desc.mode);
  if (desc.normalized != 0 && desc.normalized != 1)
    fail(ADAATTN_ERROR_INVALID_ARGUMENT, "desc.normalized is %" PRId32 "; accepted: 0, 1", desc.normalized);
  EntropyParams p;
  p.sampled = desc.mode == ADAATTN_ENTROPY_SAMPLED;
  p.normalized = desc.normalized != 0;
  if (!p.sampled) return p;
  if (desc.sample_rows < 1 || desc.sample_rows > INT32_MAX)
    fail(ADAATTN_ERROR_INVALID_ARGUMENT, "desc.sample_rows is %" PRId64 "; accepted: 1 to %" PRId32, desc.sample_rows,
         INT32_MAX);
  p.sample_rows = desc.sample_rows;
  p.seed = desc.seed;
  return p;
}

EntropyParams entropy_from(const Problem& problem, const adaattn_entropy_desc_t& desc, const adaattn_io_t& io,
                           const adaattn_tensor_t* head_entropy, const DeviceScope& scope, const Workspace& workspace) {
  EntropyParams p = entropy_from(desc);
  CallMemory memory;
  p.attn = IoReader(problem, io, scope, Use::kEntropy).read(memory);
  const bool rows = !is_absent(&io.entropy, "io.entropy");
  if (rows && p.sampled)
    fail(ADAATTN_ERROR_INVALID_ARGUMENT,
         "io.entropy is present; accepted: zeros when desc.mode is 1 (SAMPLED), which "
         "computes some rows only");
  if (!is_absent(head_entropy, "head_entropy")) {
    check_tensor(*head_entropy, "head_entropy", Access::kOutput, 2, 2, {Dtype::kF32}, scope);
    expect_extent(*head_entropy, "head_entropy", 0, p.attn.batch, "the number of sequences");
    expect_extent(*head_entropy, "head_entropy", 1, problem.heads_q, "attn.heads_q");
    p.head_entropy = static_cast<float*>(head_entropy->data);
    p.head_stride_b = effective_stride(*head_entropy, 0);
    p.head_stride_h = effective_stride(*head_entropy, 1);
    memory.add(*head_entropy, "head_entropy", true);
  } else if (!rows) {
    fail(ADAATTN_ERROR_NULL_POINTER, "io.entropy and head_entropy are both absent; accepted: one of them or both");
  }
  memory.add(workspace);
  memory.check();
  return p;
}

}  // namespace adaattn
