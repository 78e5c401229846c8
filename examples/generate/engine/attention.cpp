#include "engine/attention.h"

#include <algorithm>
#include <utility>

namespace generate {
namespace {

void run_on_pool(void* user, int64_t n, void (*task)(void*, int64_t), void* task_user) {
  static_cast<ThreadPool*>(user)->run(n, task, task_user);
}

adaattn::Context make_context(adaattn_device_t device, adaattn_isa_t isa, ThreadPool& pool) {
  adaattn::Config config;
  config.device = device;
  if (device != ADAATTN_DEVICE_CPU) return adaattn::Context::create(config).value();
  config.num_threads = pool.threads();
  config.isa = isa;
  config.parallel_for = run_on_pool;
  config.parallel_for_user = &pool;
  return adaattn::Context::create(config).value();
}

// Empty where the plan keeps no maps: it is exact after all, or the maps of so many tiles would take too much memory.
adaattn::TileMap tile_map(const adaattn::Plan& plan, const adaattn_head_stats_t& head) {
  adaattn::Result<adaattn::TileMap> map = plan.tile_map(head.batch, head.head);
  if (map.status().code() == ADAATTN_ERROR_NOT_SUPPORTED) return {};
  return std::move(map).value();
}

}  // namespace

const std::map<std::string, adaattn_isa_t>& isa_names() {
  static const std::map<std::string, adaattn_isa_t> names = {
      {"auto", ADAATTN_ISA_AUTO},     {"baseline", ADAATTN_ISA_BASELINE}, {"avx2", ADAATTN_ISA_AVX2},
      {"avx512", ADAATTN_ISA_AVX512}, {"amx", ADAATTN_ISA_AMX},           {"neon", ADAATTN_ISA_NEON}};
  return names;
}

const std::map<std::string, adaattn_policy_t>& policy_names() {
  static const std::map<std::string, adaattn_policy_t> names = {{"exact", ADAATTN_POLICY_EXACT},
                                                                {"quality", ADAATTN_POLICY_QUALITY},
                                                                {"balanced", ADAATTN_POLICY_BALANCED},
                                                                {"speed", ADAATTN_POLICY_SPEED}};
  return names;
}

Attention::Attention(const ModelConfig& config, DType dtype, adaattn_isa_t isa, const AttentionPolicy& policy,
                     Compute& compute, ThreadPool& pool, CacheFormat cache)
    : config_(config),
      dtype_(dtype),
      cache_(cache),
      policy_(policy),
      compute_(compute),
      context_(make_context(compute.device(), isa, pool)) {}

adaattn::Plan& Attention::plan_for(int64_t layer, const Step& step, int64_t capacity) {
  const bool adaptive = policy_.policy != ADAATTN_POLICY_EXACT;
  const std::tuple key = {adaptive ? layer : 0, step.batch, step.seqlen, capacity};
  if (const auto found = plans_.find(key); found != plans_.end()) return found->second;
  adaattn::AttnDesc desc;
  desc.max_batch = step.batch;
  desc.max_seqlen_q = step.seqlen;
  desc.max_seqlen_k = capacity;
  desc.heads_q = config_.heads;
  desc.heads_kv = config_.kv_heads;
  desc.head_dim_qk = config_.head_dim;
  desc.dtype_q = static_cast<adaattn_dtype_t>(dtype_);
  if (cache_ == CacheFormat::kE4m3) {
    desc.dtype_kv = ADAATTN_DTYPE_E4M3;
    desc.descale_block = kFactorTokens;
  }
  desc.mask = ADAATTN_MASK_CAUSAL;
  if (config_.sliding_window > 0) desc.window_left = config_.sliding_window - 1;
  adaattn::AdaptiveDesc allowed;
  allowed.policy = policy_.policy;
  allowed.tolerance = policy_.tolerance;
  adaattn::Plan plan = context_.make_plan(desc, adaptive ? &allowed : nullptr).value();
  if (const size_t bytes = plan.workspace_size().value(); bytes > workspace_bytes_) {
    workspace_ = compute_.allocate(bytes);
    workspace_bytes_ = bytes;
  }
  return plans_.emplace(key, std::move(plan)).first->second;
}

void Attention::run(int64_t layer, const Step& step, const void* q, const KvSlot& kv, void* o) {
  adaattn::Plan& plan = plan_for(layer, step, kv.capacity);
  // Rows of a sequence lie together; `room` rows separate one sequence from the next.
  const auto dtype = static_cast<adaattn_dtype_t>(dtype_);
  const adaattn_dtype_t dtype_kv = cache_ == CacheFormat::kE4m3 ? ADAATTN_DTYPE_E4M3 : dtype;
  const auto view = [&](const void* data, adaattn_dtype_t type, int64_t rows, int64_t heads, int64_t room) {
    const int64_t row = heads * config_.head_dim;
    return adaattn::tensor(data, type, {step.batch, rows, heads, config_.head_dim},
                           {room * row, row, config_.head_dim, 1}, {compute_.device(), 0});
  };
  const int64_t keys = step.start + step.seqlen;
  adaattn::Io io;
  io.q = view(q, dtype, step.seqlen, config_.heads, step.seqlen);
  io.k = view(kv.k, dtype_kv, keys, config_.kv_heads, kv.capacity);
  io.v = view(kv.v, dtype_kv, keys, config_.kv_heads, kv.capacity);
  io.o = view(o, dtype, step.seqlen, config_.heads, step.seqlen);
  if (cache_ == CacheFormat::kE4m3) {
    const auto factors = [&](const float* data) {
      const int64_t used = (keys + kFactorTokens - 1) / kFactorTokens, room = kv.blocks();
      return adaattn::tensor(data, ADAATTN_DTYPE_F32, {step.batch, config_.kv_heads, used},
                             {config_.kv_heads * room, room, 1}, {compute_.device(), 0});
    };
    io.k_descale = factors(kv.k_factors);
    io.v_descale = factors(kv.v_factors);
  }
  compute_.start_clock();
  plan.execute(io, {workspace_.get(), workspace_bytes_}, compute_.stream()).or_throw();
  compute_.stop_clock();
}

void Attention::prepare(const Step& step, int64_t capacity) {
  for (int64_t layer = 0; layer < config_.layers; ++layer) plan_for(layer, step, capacity);
}

adaattn_plan_info_t Attention::describe(const Step& step, int64_t capacity) {
  return plan_for(0, step, capacity).info().value();
}

void add_stats(const adaattn_plan_stats_t& stats, adaattn_plan_stats_t* sum) {
  sum->calls += stats.calls;
  sum->flops += stats.flops;
  sum->flops_done += stats.flops_done;
  sum->heads += stats.heads;
  sum->heads_dense += stats.heads_dense;
  sum->heads_low_rank += stats.heads_low_rank;
  sum->heads_f32 += stats.heads_f32;
  sum->heads_f16 += stats.heads_f16;
  sum->heads_bf16 += stats.heads_bf16;
  sum->heads_i8 += stats.heads_i8;
  sum->tiles += stats.tiles;
  sum->tiles_kept += stats.tiles_kept;
  sum->rank_v_sum += stats.rank_v_sum;
  sum->predicted_error_sum += stats.predicted_error_sum;
  sum->verified_heads += stats.verified_heads;
  sum->measured_error_sum += stats.measured_error_sum;
  sum->measured_error_max = std::max(sum->measured_error_max, stats.measured_error_max);
  sum->heads_over_tolerance += stats.heads_over_tolerance;
  sum->seconds_analyze += stats.seconds_analyze;
  sum->seconds_decide += stats.seconds_decide;
  sum->seconds_attend += stats.seconds_attend;
  sum->seconds_verify += stats.seconds_verify;
}

AttentionReport Attention::report() const {
  AttentionReport report;
  report.seconds = compute_.clock_seconds();
  for (const auto& [key, plan] : plans_) {
    const adaattn_plan_stats_t stats = plan.stats().value();
    add_stats(stats, &report.totals);
    const std::vector<adaattn_head_stats_t> heads = plan.head_stats().value();
    for (const adaattn_head_stats_t& head : heads) {
      const bool last = head.batch == heads.back().batch;
      report.heads.push_back({std::get<0>(key), head, last ? tile_map(plan, head) : adaattn::TileMap()});
    }
  }
  return report;
}

}  // namespace generate
