#include "engine/attention.h"

#include <array>

#include "engine/error.h"

namespace generate {
namespace {

void check(adaattn_status_t status, const char* call) {
  if (status == ADAATTN_SUCCESS) return;
  std::string text(adaattn_last_error(nullptr, 0) + 1, '\0');
  adaattn_last_error(text.data(), text.size());
  fail("%s: %s: %s", call, adaattn_status_name(status), text.c_str());
}

void run_on_pool(void* user, int64_t n, void (*task)(void*, int64_t), void* task_user) {
  static_cast<ThreadPool*>(user)->run(n, task, task_user);
}

}  // namespace

const std::map<std::string, adaattn_isa_t>& isa_names() {
  static const std::map<std::string, adaattn_isa_t> names = {
      {"auto", ADAATTN_ISA_AUTO},     {"baseline", ADAATTN_ISA_BASELINE}, {"avx2", ADAATTN_ISA_AVX2},
      {"avx512", ADAATTN_ISA_AVX512}, {"amx", ADAATTN_ISA_AMX},           {"neon", ADAATTN_ISA_NEON}};
  return names;
}

void Attention::ContextDeleter::operator()(adaattn_context_t* context) const { adaattn_destroy(context); }
void Attention::PlanDeleter::operator()(adaattn_plan_t* plan) const { adaattn_plan_destroy(plan); }

Attention::Attention(const ModelConfig& config, DType dtype, adaattn_isa_t isa, ThreadPool& pool)
    : config_(config), dtype_(dtype) {
  adaattn_config_t settings;
  check(adaattn_config_init(&settings, sizeof settings), "adaattn_config_init");
  settings.num_threads = pool.threads();
  settings.isa = isa;
  settings.parallel_for = run_on_pool;
  settings.parallel_for_user = &pool;
  adaattn_context_t* context = nullptr;
  check(adaattn_create(&settings, &context), "adaattn_create");
  context_.reset(context);
}

Attention::~Attention() = default;

adaattn_plan_t* Attention::plan_for(const Step& step, int64_t capacity) {
  Plan& plan = plans_[{step.batch, step.seqlen, capacity}];
  if (plan) return plan.get();
  adaattn_attn_desc_t desc;
  check(adaattn_attn_desc_init(&desc, sizeof desc), "adaattn_attn_desc_init");
  desc.max_batch = step.batch;
  desc.max_seqlen_q = step.seqlen;
  desc.max_seqlen_k = capacity;
  desc.heads_q = config_.heads;
  desc.heads_kv = config_.kv_heads;
  desc.head_dim_qk = config_.head_dim;
  desc.dtype_q = static_cast<adaattn_dtype_t>(dtype_);
  desc.mask = ADAATTN_MASK_CAUSAL;
  if (config_.sliding_window > 0) desc.window_left = config_.sliding_window - 1;
  adaattn_plan_t* created = nullptr;
  check(adaattn_plan_create(context_.get(), &desc, nullptr, &created), "adaattn_plan_create");
  plan.reset(created);
  size_t bytes = 0;
  check(adaattn_plan_workspace_size(created, &bytes), "adaattn_plan_workspace_size");
  if (bytes > workspace_.size()) workspace_.resize(bytes);
  return created;
}

void Attention::run(const Step& step, const void* q, const KvSlot& kv, void* o) {
  adaattn_plan_t* plan = plan_for(step, kv.capacity);
  adaattn_io_t io;
  check(adaattn_io_init(&io, sizeof io), "adaattn_io_init");
  const auto view = [&](adaattn_tensor_t& tensor, const void* data, int64_t seqlen, int64_t rows, int64_t heads) {
    const std::array<int64_t, 4> shape = {step.batch, seqlen, heads, config_.head_dim};
    const int64_t row = heads * config_.head_dim;
    const std::array<int64_t, 4> stride = {rows * row, row, config_.head_dim, 1};
    check(adaattn_tensor_init(&tensor, const_cast<void*>(data), static_cast<adaattn_dtype_t>(dtype_),
                              ADAATTN_DEVICE_CPU, 0, 4, shape.data(), stride.data()),
          "adaattn_tensor_init");
  };
  const int64_t keys = step.start + step.seqlen;
  view(io.q, q, step.seqlen, step.seqlen, config_.heads);
  view(io.k, kv.k, keys, kv.capacity, config_.kv_heads);
  view(io.v, kv.v, keys, kv.capacity, config_.kv_heads);
  view(io.o, o, step.seqlen, step.seqlen, config_.heads);
  check(adaattn_plan_execute(plan, &io, workspace_.data(), workspace_.size(), nullptr), "adaattn_plan_execute");
}

adaattn_plan_info_t Attention::describe(const Step& step, int64_t capacity) {
  adaattn_plan_info_t info = {};
  info.struct_size = sizeof info;
  check(adaattn_plan_get_info(plan_for(step, capacity), &info), "adaattn_plan_get_info");
  return info;
}

}  // namespace generate
