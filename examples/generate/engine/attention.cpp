#include "engine/attention.h"

namespace generate {
namespace {

void run_on_pool(void* user, int64_t n, void (*task)(void*, int64_t), void* task_user) {
  static_cast<ThreadPool*>(user)->run(n, task, task_user);
}

adaattn::Context make_context(adaattn_isa_t isa, ThreadPool& pool) {
  adaattn::Config config;
  config.num_threads = pool.threads();
  config.isa = isa;
  config.parallel_for = run_on_pool;
  config.parallel_for_user = &pool;
  return adaattn::Context::create(config).value();
}

}  // namespace

const std::map<std::string, adaattn_isa_t>& isa_names() {
  static const std::map<std::string, adaattn_isa_t> names = {
      {"auto", ADAATTN_ISA_AUTO},     {"baseline", ADAATTN_ISA_BASELINE}, {"avx2", ADAATTN_ISA_AVX2},
      {"avx512", ADAATTN_ISA_AVX512}, {"amx", ADAATTN_ISA_AMX},           {"neon", ADAATTN_ISA_NEON}};
  return names;
}

Attention::Attention(const ModelConfig& config, DType dtype, adaattn_isa_t isa, ThreadPool& pool)
    : config_(config), dtype_(dtype), context_(make_context(isa, pool)) {}

adaattn::Plan& Attention::plan_for(const Step& step, int64_t capacity) {
  const std::tuple key = {step.batch, step.seqlen, capacity};
  if (const auto found = plans_.find(key); found != plans_.end()) return found->second;
  adaattn::AttnDesc desc;
  desc.max_batch = step.batch;
  desc.max_seqlen_q = step.seqlen;
  desc.max_seqlen_k = capacity;
  desc.heads_q = config_.heads;
  desc.heads_kv = config_.kv_heads;
  desc.head_dim_qk = config_.head_dim;
  desc.dtype_q = static_cast<adaattn_dtype_t>(dtype_);
  desc.mask = ADAATTN_MASK_CAUSAL;
  if (config_.sliding_window > 0) desc.window_left = config_.sliding_window - 1;
  adaattn::Plan plan = context_.make_plan(desc).value();
  if (const size_t bytes = plan.workspace_size().value(); bytes > workspace_.size()) workspace_.resize(bytes);
  return plans_.emplace(key, std::move(plan)).first->second;
}

void Attention::run(const Step& step, const void* q, const KvSlot& kv, void* o) {
  adaattn::Plan& plan = plan_for(step, kv.capacity);
  // Rows of a sequence lie together; `room` rows separate one sequence from the next.
  const auto view = [&](const void* data, int64_t rows, int64_t heads, int64_t room) {
    const int64_t row = heads * config_.head_dim;
    return adaattn::tensor(data, static_cast<adaattn_dtype_t>(dtype_), {step.batch, rows, heads, config_.head_dim},
                           {room * row, row, config_.head_dim, 1});
  };
  const int64_t keys = step.start + step.seqlen;
  adaattn::Io io;
  io.q = view(q, step.seqlen, config_.heads, step.seqlen);
  io.k = view(kv.k, keys, config_.kv_heads, kv.capacity);
  io.v = view(kv.v, keys, config_.kv_heads, kv.capacity);
  io.o = view(o, step.seqlen, config_.heads, step.seqlen);
  plan.execute(io, {workspace_.data(), workspace_.size()}).or_throw();
}

adaattn_plan_info_t Attention::describe(const Step& step, int64_t capacity) {
  return plan_for(step, capacity).info().value();
}

}  // namespace generate
