#include "capi/fake_backend.h"

#include <cstdlib>
#include <initializer_list>

#include "core/error.h"

namespace adaattn::test {
namespace {

Reach operand_reach(const Operand& x, const char* field, int64_t batch, int64_t tokens, int64_t heads, int64_t dim) {
  if (x.data == nullptr || batch == 0 || tokens == 0 || heads == 0 || dim == 0) return {field, x.data, 0};
  const int64_t last = (batch - 1) * x.stride_b + (tokens - 1) * x.stride_s + (heads - 1) * x.stride_h + dim - 1;
  return {field, x.data, (last + 1) * dtype_size(x.dtype)};
}

void* fake_alloc(void*, size_t bytes, size_t, adaattn_stream_t) { return std::malloc(bytes); }
void fake_free(void*, void* data, size_t, adaattn_stream_t) { std::free(data); }

class FakePlan final : public AttentionPlan {
 public:
  FakePlan(std::shared_ptr<FakeState> state, const Problem& problem) : state_(std::move(state)) {
    info_.kernel = "fake_" + std::to_string(problem.d_qk);
    info_.isa = "none";
    info_.tile_q = 16;
    info_.tile_k = 32;
    info_.workspace_bytes = state_->workspace_needed;
    ++state_->plans_made;
    ++state_->plans_alive;
  }
  ~FakePlan() override { --state_->plans_alive; }

  const PlanInfo& info() const override { return info_; }

  void execute(const AttnParams& p, void* workspace, size_t bytes, adaattn_stream_t) override {
    if (const std::function<void()> hook = state_->on_execute) hook();  // a copy: the hook may replace itself
    state_->attention = p;
    state_->workspace = workspace;
    state_->workspace_bytes = bytes;
    ++state_->executed;
    const int64_t batch = p.cu_seqlens_q != nullptr ? 1 : p.batch;
    const int64_t tokens = p.cu_seqlens_q != nullptr ? p.total_q : p.seqlen_q;
    if (state_->write_outputs) {
      fill_rows(p.o, batch, tokens, p.heads_q, p.d_v, 1);
      fill_rows(p.lse, batch, tokens, p.heads_q, 1, 2);
      fill_rows(p.entropy, batch, tokens, p.heads_q, 1, 3);
    }
    ++counters_.calls;
    const uint64_t rows = static_cast<uint64_t>(batch * tokens * p.heads_q);
    counters_.query_rows += rows;
    counters_.score_pairs += rows * static_cast<uint64_t>(p.seqlen_k);
    counters_.violation = {Field::kBlockTable, 7, -9};
  }

  PlanCounters counters(bool, bool reset) override {
    const PlanCounters now = counters_;
    if (reset) counters_ = {};
    return now;
  }

 private:
  std::shared_ptr<FakeState> state_;
  PlanInfo info_;
  PlanCounters counters_;
};

class FakeBackend final : public Backend {
 public:
  FakeBackend(std::shared_ptr<FakeState> state, Allocator allocator)
      : state_(std::move(state)),
        allocator_(allocator.alloc != nullptr ? allocator : Allocator{fake_alloc, fake_free, nullptr}) {}

  adaattn_device_t device() const override { return state_->device; }
  int32_t device_id() const override { return 0; }
  const Allocator& allocator() const override { return allocator_; }
  void check_stream(adaattn_stream_t stream, bool) const override {
    if (stream != nullptr) fail(ADAATTN_ERROR_INVALID_ARGUMENT, "stream is set; accepted: NULL");
  }
  void check_pointer(const void* pointer, const char* field) const override {
    if (pointer == state_->foreign_pointer)
      fail(ADAATTN_ERROR_WRONG_DEVICE, "%s belongs elsewhere; accepted: memory of the fake", field);
  }
  void set_option(adaattn_option_t option, int64_t value) override { options_[option] = value; }
  int64_t get_option(adaattn_option_t option) const override { return options_[option]; }

  PlanInfo select(const Problem& problem) const override {
    if (state_->on_select) state_->on_select();
    state_->problem = problem;
    return {};
  }
  std::unique_ptr<AttentionPlan> make_plan(const Problem& problem) override {
    select(problem);
    return std::make_unique<FakePlan>(state_, problem);
  }

  void merge(const MergeParams& params, adaattn_stream_t) override {
    state_->merge = params;
    ++state_->tools_run;
  }
  size_t entropy_workspace(const Problem&, const EntropyParams&) const override { return state_->workspace_needed; }
  void entropy(const EntropyParams& params, void* workspace, size_t bytes, adaattn_stream_t) override {
    state_->entropy = params;
    remember(workspace, bytes);
  }
  size_t low_rank_workspace(const LowRankParams&) const override { return state_->workspace_needed; }
  void low_rank(const LowRankParams& params, void* workspace, size_t bytes, adaattn_stream_t) override {
    state_->low_rank = params;
    remember(workspace, bytes);
  }
  void low_rank_project(const ProjectParams& params, adaattn_stream_t) override {
    state_->project = params;
    ++state_->tools_run;
  }
  size_t effective_rank_workspace(const EffectiveRankParams&) const override { return state_->workspace_needed; }
  void effective_rank(const EffectiveRankParams& params, void* workspace, size_t bytes, adaattn_stream_t) override {
    state_->effective_rank = params;
    remember(workspace, bytes);
  }
  size_t spectral_norm_workspace(const SpectralNormParams&) const override { return state_->workspace_needed; }
  void spectral_norm(const SpectralNormParams& params, void* workspace, size_t bytes, adaattn_stream_t) override {
    state_->spectral_norm = params;
    remember(workspace, bytes);
  }

 private:
  void remember(void* workspace, size_t bytes) {
    state_->workspace = workspace;
    state_->workspace_bytes = bytes;
    ++state_->tools_run;
  }

  std::shared_ptr<FakeState> state_;
  Allocator allocator_;
  int64_t options_[8] = {};
};

}  // namespace

std::unique_ptr<Backend> make_fake_backend(std::shared_ptr<FakeState> state, Allocator allocator) {
  return std::make_unique<FakeBackend>(std::move(state), allocator);
}

void fill_rows(const Operand& x, int64_t batch, int64_t tokens, int64_t heads, int64_t dim, float value) {
  if (x.data == nullptr) return;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t s = 0; s < tokens; ++s)
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t d = 0; d < dim; ++d)
          static_cast<float*>(x.data)[b * x.stride_b + s * x.stride_s + h * x.stride_h + d] = value;
}

std::vector<Reach> reach_of(const AttnParams& p) {
  const bool packed_q = p.cu_seqlens_q != nullptr, packed_k = p.cu_seqlens_k != nullptr;
  const int64_t batch_q = packed_q ? 1 : p.batch, tokens_q = packed_q ? p.total_q : p.seqlen_q;
  const int64_t batch_k = p.page_size != 0 ? p.num_pages : packed_k ? 1 : p.batch;
  const int64_t tokens_k = p.page_size != 0 ? p.page_size : packed_k ? p.total_k : p.seqlen_k;
  std::vector<Reach> all = {operand_reach(p.q, "q", batch_q, tokens_q, p.heads_q, p.d_qk),
                            operand_reach(p.o, "o", batch_q, tokens_q, p.heads_q, p.d_v),
                            operand_reach(p.lse, "lse", batch_q, tokens_q, p.heads_q, 1),
                            operand_reach(p.entropy, "entropy", batch_q, tokens_q, p.heads_q, 1),
                            operand_reach(p.k, "k", batch_k, tokens_k, p.heads_kv, p.d_qk),
                            operand_reach(p.v, "v", batch_k, tokens_k, p.heads_kv, p.d_v)};
  const bool rows = p.batch > 0 && p.seqlen_q > 0 && p.seqlen_k > 0;
  const auto add = [&](const char* field, const void* data, bool any, int64_t last, int64_t size) {
    all.push_back({field, data, data != nullptr && any ? (last + 1) * size : 0});
  };
  add("bias", p.bias.data, rows,
      (p.batch - 1) * p.bias.stride_b + (p.heads_q - 1) * p.bias.stride_h + (p.seqlen_q - 1) * p.bias.stride_q +
          (p.seqlen_k - 1) * p.bias.stride_k,
      dtype_size(p.bias.dtype));
  add("alibi_slopes", p.alibi_slopes, p.batch > 0,
      (p.batch - 1) * p.alibi_stride_b + (p.heads_q - 1) * p.alibi_stride_h, 4);
  add("sinks", p.sinks, true, (p.heads_q - 1) * p.sinks_stride, 4);
  add("cu_seqlens_q", p.cu_seqlens_q, true, p.batch, 4);
  add("cu_seqlens_k", p.cu_seqlens_k, true, p.batch, 4);
  add("seqused_k", p.seqused_k, p.batch > 0, p.batch - 1, 4);
  add("block_table", p.block_table, p.batch > 0 && p.pages_per_seq > 0,
      (p.batch - 1) * p.block_table_stride + p.pages_per_seq - 1, 4);
  const int64_t blocks = p.descale_block != 0 ? (p.seqlen_k + p.descale_block - 1) / p.descale_block : 1;
  const auto add_descale = [&](const char* field, const Descale& x, int64_t count) {
    add(field, x.data, p.batch > 0 && count > 0,
        (p.batch - 1) * x.stride_b + (p.heads_kv - 1) * x.stride_h + (count - 1) * x.stride_block, 4);
  };
  add_descale("q_descale", p.q_descale, 1);
  add_descale("k_descale", p.k_descale, blocks);
  add_descale("v_descale", p.v_descale, blocks);
  return all;
}

Reach reach_of(const MatrixBatch& m, const char* field) {
  if (m.data == nullptr) return {field, nullptr, 0};
  const int64_t last = (m.batch0 - 1) * m.stride0 + (m.batch1 - 1) * m.stride1 + (m.rows - 1) * m.stride_row +
                       (m.cols - 1) * m.stride_col;
  return {field, m.data, (last + 1) * dtype_size(m.dtype)};
}

}  // namespace adaattn::test
