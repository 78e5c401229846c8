#include "capi/fake_backend.h"

#include <cstdlib>
#include <initializer_list>

#include "core/error.h"

namespace adaattn::test {
namespace {

volatile unsigned char touched;

void touch(const void* data, int64_t element, Dtype dtype) {
  const auto* bytes = static_cast<const volatile unsigned char*>(data) + element * dtype_size(dtype);
  touched = bytes[0];
  touched = bytes[dtype_size(dtype) - 1];
}

void touch_operand(const Operand& x, int64_t batch, int64_t tokens, int64_t heads, int64_t dim) {
  if (x.data == nullptr || batch == 0 || tokens == 0 || heads == 0 || dim == 0) return;
  touch(x.data, 0, x.dtype);
  touch(x.data, (batch - 1) * x.stride_b + (tokens - 1) * x.stride_s + (heads - 1) * x.stride_h + dim - 1, x.dtype);
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
    if (p.o.dtype == Dtype::kF32) fill_rows(p.o, batch, tokens, p.heads_q, p.d_v, 1);
    fill_rows(p.lse, batch, tokens, p.heads_q, 1, 2);
    fill_rows(p.entropy, batch, tokens, p.heads_q, 1, 3);
    ++counters_.calls;
    counters_.query_rows += static_cast<uint64_t>(batch * tokens * p.heads_q);
    counters_.score_pairs += static_cast<uint64_t>(batch * tokens * p.heads_q * p.seqlen_k);
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
    if (stream != nullptr) fail(ADAATTN_ERROR_INVALID_ARGUMENT, "stream must be NULL");
  }
  void check_pointer(const void* pointer, const char* field) const override {
    if (pointer == state_->foreign_pointer) fail(ADAATTN_ERROR_WRONG_DEVICE, "%s belongs elsewhere", field);
  }
  void set_option(adaattn_option_t option, int64_t value) override { options_[option] = value; }
  int64_t get_option(adaattn_option_t option) const override { return options_[option]; }

  PlanInfo select(const Problem& problem) const override {
    if (state_->on_select) state_->on_select();
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

void touch_corners(const AttnParams& p) {
  const bool packed_q = p.cu_seqlens_q != nullptr, packed_k = p.cu_seqlens_k != nullptr;
  const int64_t batch_q = packed_q ? 1 : p.batch, tokens_q = packed_q ? p.total_q : p.seqlen_q;
  const int64_t batch_k = p.block_table != nullptr ? p.num_pages : packed_k ? 1 : p.batch;
  const int64_t tokens_k = p.block_table != nullptr ? p.page_size : packed_k ? p.total_k : p.seqlen_k;
  touch_operand(p.q, batch_q, tokens_q, p.heads_q, p.d_qk);
  touch_operand(p.o, batch_q, tokens_q, p.heads_q, p.d_v);
  touch_operand(p.lse, batch_q, tokens_q, p.heads_q, 1);
  touch_operand(p.entropy, batch_q, tokens_q, p.heads_q, 1);
  touch_operand(p.k, batch_k, tokens_k, p.heads_kv, p.d_qk);
  touch_operand(p.v, batch_k, tokens_k, p.heads_kv, p.d_v);
  if (p.bias.data != nullptr && p.batch > 0 && p.seqlen_q > 0 && p.seqlen_k > 0)
    touch(p.bias.data,
          (p.batch - 1) * p.bias.stride_b + (p.heads_q - 1) * p.bias.stride_h + (p.seqlen_q - 1) * p.bias.stride_q +
              (p.seqlen_k - 1) * p.bias.stride_k,
          p.bias.dtype);
  if (p.alibi_slopes != nullptr && p.batch > 0)
    touch(p.alibi_slopes, (p.batch - 1) * p.alibi_stride_b + (p.heads_q - 1) * p.alibi_stride_h, Dtype::kF32);
  if (p.sinks != nullptr) touch(p.sinks, (p.heads_q - 1) * p.sinks_stride, Dtype::kF32);
  if (packed_q) touch(p.cu_seqlens_q, p.batch, Dtype::kI32);
  if (packed_k) touch(p.cu_seqlens_k, p.batch, Dtype::kI32);
  if (p.seqused_k != nullptr && p.batch > 0) touch(p.seqused_k, p.batch - 1, Dtype::kI32);
  if (p.block_table != nullptr && p.batch > 0 && p.pages_per_seq > 0)
    touch(p.block_table, (p.batch - 1) * p.block_table_stride + p.pages_per_seq - 1, Dtype::kI32);
}

}  // namespace adaattn::test
