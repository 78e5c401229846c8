#include <algorithm>
#include <cinttypes>
#include <cstring>

#include "capi/context.h"
#include "capi/guard.h"
#include "capi/structs.h"
#include "core/adaptive_options.h"
#include "core/log.h"

namespace adaattn::capi {
namespace {

Problem read_problem(const adaattn_attn_desc_t* desc, const adaattn_adaptive_desc_t* adaptive) {
  Problem problem = problem_from(read_struct(desc), Use::kAttention);
  if (adaptive != nullptr) problem.adaptive = resolve_options(read_struct(adaptive), problem);
  return problem;
}

// Calls on one plan must not overlap. The flag turns a caller's race into a status.
class PlanUse {
 public:
  explicit PlanUse(adaattn_plan& plan) : plan_(plan) {
    if (plan_.busy.exchange(true, std::memory_order_acquire))
      fail(ADAATTN_ERROR_IN_USE, "plan is in use by another call; accepted: one call at a time");
  }
  ~PlanUse() { plan_.busy.store(false, std::memory_order_release); }
  PlanUse(const PlanUse&) = delete;
  PlanUse& operator=(const PlanUse&) = delete;

 private:
  adaattn_plan& plan_;
};

void run(adaattn_context& context, const Problem& problem, AttentionPlan& plan, const adaattn_io_t* io, void* workspace,
         size_t workspace_bytes, adaattn_stream_t stream) {
  const adaattn_io_t tensors = read_struct(io);
  const DeviceScope scope = context.scope();
  const AttnParams params = attention_from(problem, tensors, scope, {workspace, workspace_bytes});
  CallWorkspace memory(context, workspace, workspace_bytes, plan.info().workspace_bytes, stream);
  plan.execute(params, memory.acquire(), memory.bytes(), stream);
}

template <size_t N>
void copy_text(char (&out)[N], const std::string& text) {
  const size_t length = std::min(text.size(), N - 1);
  std::memcpy(out, text.data(), length);
  std::memset(out + length, 0, N - length);
}

adaattn_plan_info_t info_of(const PlanInfo& from) {
  adaattn_plan_info_t info = {};
  copy_text(info.kernel, from.kernel);
  copy_text(info.isa, from.isa);
  info.tile_q = from.tile_q;
  info.tile_k = from.tile_k;
  info.splits = from.splits;
  info.capture_safe = from.capture_safe ? 1 : 0;
  info.deterministic = from.deterministic ? 1 : 0;
  info.exact = from.exact ? 1 : 0;
  info.workspace_bytes = from.workspace_bytes;
  return info;
}

adaattn_plan_stats_t stats_of(const PlanCounters& from, const Problem& problem) {
  adaattn_plan_stats_t stats = {};
  stats.calls = from.calls;
  stats.query_rows = from.query_rows;
  stats.score_pairs = from.score_pairs;
  stats.flops = 2.0 * static_cast<double>(problem.d_qk + problem.d_v) * static_cast<double>(from.score_pairs);
  stats.violation_field = static_cast<adaattn_field_t>(from.violation.field);
  stats.violation_index = from.violation.index;
  stats.violation_value = from.violation.value;
  const AdaptiveCounters& a = from.adaptive;
  stats.heads = a.heads;
  stats.heads_dense = a.heads_dense;
  stats.heads_low_rank = a.heads_low_rank;
  stats.heads_f32 = a.heads_f32;
  stats.heads_f16 = a.heads_f16;
  stats.heads_bf16 = a.heads_bf16;
  stats.heads_i8 = a.heads_i8;
  stats.tiles = a.tiles;
  stats.tiles_kept = a.tiles_kept;
  stats.tiles_probed_in = a.tiles_probed_in;
  stats.flops_done = a.flops_done;
  stats.rank_v_sum = a.rank_v_sum;
  stats.entropy_sum = a.entropy_sum;
  stats.entropy_min = a.entropy_min;
  stats.entropy_max = a.entropy_max;
  stats.predicted_error_sum = a.predicted_error_sum;
  stats.dropped_mass_sum = a.dropped_mass_sum;
  stats.verified_heads = a.verified_heads;
  stats.verified_rows = a.verified_rows;
  stats.measured_error_sum = a.measured_error_sum;
  stats.measured_error_max = a.measured_error_max;
  stats.measured_row_error_max = a.measured_row_error_max;
  stats.heads_over_tolerance = a.heads_over_tolerance;
  stats.heads_recomputed = a.heads_recomputed;
  stats.seconds_analyze = a.seconds_analyze;
  stats.seconds_decide = a.seconds_decide;
  stats.seconds_attend = a.seconds_attend;
  stats.seconds_verify = a.seconds_verify;
  return stats;
}

adaattn_head_stats_t head_stats_of(const HeadRecord& from) {
  adaattn_head_stats_t stats = {};
  stats.batch = from.batch;
  stats.head = from.head;
  stats.entropy = from.entropy;
  stats.kept_tiles = from.kept_tiles;
  stats.dropped_mass = from.dropped_mass;
  stats.predicted_error = from.predicted_error;
  stats.measured_error = from.measured_error;
  stats.feedback = from.feedback;
  stats.rank_v = from.rank_v;
  stats.rank_energy = from.rank_energy;
  stats.precision = from.precision;
  stats.dense = from.dense ? 1 : 0;
  return stats;
}

}  // namespace
}  // namespace adaattn::capi

namespace capi = adaattn::capi;
using adaattn::fail;
using capi::guarded;

extern "C" {

adaattn_status_t adaattn_check_support(adaattn_context_t* context, const adaattn_attn_desc_t* desc,
                                       const adaattn_adaptive_desc_t* adaptive, char* reason, size_t reason_cap) {
  const adaattn_status_t status = guarded([&] {
    capi::Running call(context);
    call.backend().select(capi::read_problem(desc, adaptive));
  });
  if (reason != nullptr && reason_cap > 0) {
    if (status == ADAATTN_SUCCESS)
      reason[0] = '\0';
    else
      adaattn_last_error(reason, reason_cap);
  }
  return status;
}

adaattn_status_t adaattn_plan_create(adaattn_context_t* context, const adaattn_attn_desc_t* desc,
                                     const adaattn_adaptive_desc_t* adaptive, adaattn_plan_t** plan) {
  return guarded([&] {
    capi::Running call(context);
    adaattn_plan_t*& out = capi::require(plan, "plan");
    const adaattn::Problem problem = capi::read_problem(desc, adaptive);
    out = new adaattn_plan(call.context(), problem);
    const adaattn::PlanInfo& info = out->impl->info();
    adaattn::log_message(ADAATTN_LOG_DEBUG, "plan: kernel %s, %s, workspace %zu bytes", info.kernel.c_str(),
                         info.isa.c_str(), info.workspace_bytes);
  });
}

adaattn_status_t adaattn_plan_workspace_size(adaattn_plan_t* plan, size_t* bytes) {
  return guarded([&] {
    const adaattn_plan& from = capi::require(plan, "plan");
    capi::require(bytes, "bytes") = from.impl->info().workspace_bytes;
  });
}

adaattn_status_t adaattn_plan_execute(adaattn_plan_t* plan, const adaattn_io_t* io, void* workspace,
                                      size_t workspace_bytes, adaattn_stream_t stream) {
  return guarded([&] {
    adaattn_plan& chosen = capi::require(plan, "plan");
    capi::Running call(&chosen.context);
    capi::PlanUse use(chosen);
    capi::run(call.context(), chosen.problem, *chosen.impl, io, workspace, workspace_bytes, stream);
  });
}

adaattn_status_t adaattn_plan_get_info(adaattn_plan_t* plan, adaattn_plan_info_t* info) {
  return guarded([&] {
    const adaattn_plan& from = capi::require(plan, "plan");
    const size_t size = capi::struct_size_of(info, "info");
    capi::write_bytes(info, size, capi::info_of(from.impl->info()));
  });
}

adaattn_status_t adaattn_plan_get_stats(adaattn_plan_t* plan, uint32_t flags, adaattn_plan_stats_t* stats) {
  return guarded([&] {
    adaattn_plan& from = capi::require(plan, "plan");
    const size_t size = capi::struct_size_of(stats, "stats");
    if ((flags & ~(ADAATTN_STATS_WAIT | ADAATTN_STATS_RESET)) != 0)
      fail(ADAATTN_ERROR_INVALID_ARGUMENT, "flags is 0x%" PRIx32 "; accepted: combinations of 1 (WAIT) and 2 (RESET)",
           flags);
    capi::PlanUse use(from);
    const adaattn::PlanCounters counters =
        from.impl->counters((flags & ADAATTN_STATS_WAIT) != 0, (flags & ADAATTN_STATS_RESET) != 0);
    capi::write_bytes(stats, size, capi::stats_of(counters, from.problem));
  });
}

adaattn_status_t adaattn_plan_get_head_stats(adaattn_plan_t* plan, adaattn_head_stats_t* array, size_t element_size,
                                             size_t cap, size_t* count) {
  return guarded([&] {
    adaattn_plan& from = capi::require(plan, "plan");
    capi::require(count, "count");
    if (cap > 0) capi::require(array, "array");
    constexpr size_t kWhole = sizeof(adaattn_head_stats_t);
    if (element_size == 0 || element_size % 8 != 0 || element_size > capi::kLargestStruct)
      fail(ADAATTN_ERROR_INVALID_ARGUMENT,
           "element_size is %zu; accepted: sizeof(adaattn_head_stats_t), %zu in this version", element_size, kWhole);
    capi::PlanUse use(from);
    const std::vector<adaattn::HeadRecord> records = from.impl->head_records();
    auto* bytes = reinterpret_cast<unsigned char*>(array);
    for (size_t i = 0; i < std::min(cap, records.size()); ++i) {
      const adaattn_head_stats_t stats = capi::head_stats_of(records[i]);
      std::memcpy(bytes + i * element_size, &stats, std::min(element_size, kWhole));
      if (element_size > kWhole) std::memset(bytes + i * element_size + kWhole, 0, element_size - kWhole);
    }
    *count = records.size();
  });
}

adaattn_status_t adaattn_plan_get_tile_map(adaattn_plan_t* plan, int64_t batch, int64_t head, uint8_t* map, size_t cap,
                                           int64_t* query_tiles, int64_t* key_tiles) {
  return guarded([&] {
    adaattn_plan& from = capi::require(plan, "plan");
    int64_t& rows = capi::require(query_tiles, "query_tiles");
    int64_t& columns = capi::require(key_tiles, "key_tiles");
    if (cap > 0) capi::require(map, "map");
    const adaattn::Problem& problem = from.problem;
    if (batch < 0 || batch >= problem.max_batch)
      fail(ADAATTN_ERROR_INVALID_ARGUMENT, "batch is %" PRId64 "; accepted: 0 to %" PRId64, batch,
           problem.max_batch - 1);
    if (head < 0 || head >= problem.heads_q)
      fail(ADAATTN_ERROR_INVALID_ARGUMENT, "head is %" PRId64 "; accepted: 0 to %" PRId64, head, problem.heads_q - 1);
    capi::PlanUse use(from);
    const adaattn::TileMap tiles = from.impl->tile_map(batch, head);
    if (cap > 0 && cap < tiles.tiles.size())
      fail(ADAATTN_ERROR_INVALID_ARGUMENT, "cap is %zu; accepted: 0, or at least %" PRId64 " x %" PRId64 " bytes", cap,
           tiles.query_tiles, tiles.key_tiles);
    if (cap > 0) std::copy(tiles.tiles.begin(), tiles.tiles.end(), map);
    rows = tiles.query_tiles;
    columns = tiles.key_tiles;
  });
}

adaattn_status_t adaattn_plan_destroy(adaattn_plan_t* plan) {
  return guarded([&] {
    if (plan == nullptr) return;
    { capi::PlanUse use(*plan); }
    delete plan;
  });
}

adaattn_status_t adaattn_attention(adaattn_context_t* context, const adaattn_attn_desc_t* desc,
                                   const adaattn_adaptive_desc_t* adaptive, const adaattn_io_t* io,
                                   adaattn_stream_t stream) {
  return guarded([&] {
    capi::Running call(context);
    const adaattn::Problem problem = capi::read_problem(desc, adaptive);
    capi::PlanCache::Node node = call->plan_cache.take(problem);
    if (node.empty()) {
      call.backend().check_stream(stream, true);  // a new plan may allocate, which would break a capture
      node.push_back({problem, call.backend().make_plan(problem)});
    }
    // The plan goes back after a failure too: a refused io says nothing about it.
    struct Return {
      capi::PlanCache& cache;
      capi::PlanCache::Node& node;
      ~Return() { cache.put(std::move(node)); }
    } give_back{call->plan_cache, node};
    capi::run(call.context(), problem, *node.front().plan, io, nullptr, 0, stream);
  });
}

}  // extern "C"
