#include "cpu_fallback/adaptive/plan.h"

#include <algorithm>
#include <chrono>
#include <new>
#include <vector>

#include "core/error.h"
#include "cpu_fallback/adaptive/call.h"
#include "cpu_fallback/adaptive/own_options.h"
#include "cpu_fallback/adaptive/schedule.h"
#include "cpu_fallback/adaptive/statistics.h"
#include "cpu_fallback/adaptive/tile_map.h"
#include "cpu_fallback/attend/layout.h"
#include "cpu_fallback/attend/plan.h"
#include "cpu_fallback/isa/registry.h"
#include "decide/feedback.h"

namespace adaattn::cpu {
namespace {

// Units in flight: enough to fill the pool between two stages, few enough to stay small.
constexpr int64_t kUnitsInFlight = 4;
// Bases are kept from call to call up to this many units.
constexpr int64_t kMaxWarmUnits = 256;
// A unit that was judged dense is looked at again after this many calls.
constexpr int32_t kDenseCalls = 8;

struct Layout {
  UnitShape shape;
  int64_t units = 0;  // in flight
  size_t unit_bytes = 0, lane_bytes = 0, workspace_bytes = 0;
};

// What block statistics cannot see, or too short to be worth looking at: computed by the exact plan.
bool always_exact(const Problem& p) {
  return p.softcap > 0 || p.alibi || p.bias || is_decode(p.max_seqlen_q, p.heads_q / p.heads_kv) ||
         p.max_seqlen_k < 4 * decide::kTileK;
}

// Whether tiles are computed with bf16 products where there are any: for inputs of that type, and for wider ones that
// may be rounded to it.
bool takes_bf16(const Problem& p) {
  return p.dtype_q == p.dtype_kv && (p.dtype_kv == Dtype::kBF16 || p.dtype_kv == Dtype::kF32) &&
         p.adaptive.min_precision <= decide::Precision::kBF16;
}

Problem with_options(const Problem& given, adaattn_isa_t isa) {
  return isa == ADAATTN_ISA_AMX && takes_bf16(given) ? with_tile_options(given) : given;
}

const AdaptiveKernels& kernels_for(const Problem& problem, adaattn_isa_t isa) {
  return *adaptive_kernels_of(isa, takes_bf16(problem));
}

Layout lay_out(const Problem& problem, adaattn_isa_t isa, int64_t lanes) {
  const decide::Options& o = problem.adaptive;
  const KernelTable& exact = *kernels_of(isa);
  const AdaptiveKernels& kernels = kernels_for(problem, isa);
  Layout layout;
  layout.shape = unit_shape(problem, kernels, lay_out_work(problem, exact, lanes).tiles);
  Arena arena;
  Unit unused;
  lay_out_unit(layout.shape, o, arena, unused);
  layout.unit_bytes = arena.used();
  layout.lane_bytes = std::max(analyze_scratch(layout.shape, kernels), attend_scratch(layout.shape, o, exact, kernels));
  layout.lane_bytes = (layout.lane_bytes + Arena::kAlignment - 1) / Arena::kAlignment * Arena::kAlignment;
  const size_t fixed = static_cast<size_t>(lanes) * layout.lane_bytes + Arena::kAlignment;
  layout.units = std::min(kUnitsInFlight, problem.max_batch * problem.heads_kv);
  if (o.max_workspace_bytes != 0) {
    const size_t least = fixed + layout.unit_bytes;
    if (o.max_workspace_bytes < least)
      fail(ADAATTN_ERROR_NOT_SUPPORTED,
           "adaptive.max_workspace_bytes is %llu; accepted: 0 (no limit), or at least %zu for one key head on %lld "
           "threads",
           static_cast<unsigned long long>(o.max_workspace_bytes), least, static_cast<long long>(lanes));
    const auto fit = static_cast<int64_t>((o.max_workspace_bytes - fixed) / layout.unit_bytes);
    layout.units = std::min(layout.units, fit);
  }
  layout.workspace_bytes = fixed + static_cast<size_t>(layout.units) * layout.unit_bytes;
  return layout;
}

// State of one (sequence, KV head) that lasts from call to call.
struct UnitMemory {
  WarmBasis value_basis, probe_basis;
  int32_t dense_calls = 0;                 // calls for which the unit is computed exactly without a look
  std::vector<decide::HeadChoice> frozen;  // as the first call that brought the unit decided
  bool chosen = false;
  std::vector<double> entropy;  // of the query heads, when the unit was last looked at
};

class AdaptivePlan final : public AttentionPlan {
 public:
  AdaptivePlan(const Problem& problem, adaattn_isa_t isa, ThreadPool& pool)
      : problem_(problem),
        pool_(pool),
        lanes_(pool.num_threads()),
        exact_(*kernels_of(isa)),
        kernels_(kernels_for(problem, isa)),
        tools_(tool_kernels(isa)),
        exact_plan_(make_attention_plan(problem, isa, pool)),
        info_(select_adaptive(problem, isa, pool.num_threads())),
        whole_exact_(always_exact(problem)),
        statistics_(problem) {
    if (whole_exact_) return;
    const int64_t units = problem.max_batch * problem.heads_kv;
    feedback_.resize(static_cast<size_t>(problem.max_batch * problem.heads_q));
    layout_ = lay_out(problem, isa, lanes_);
    maps_ = TileMaps(problem, layout_.shape);
    unit_memory_.resize(static_cast<size_t>(units));
    units_.resize(static_cast<size_t>(layout_.units));
    schedule_ = AttendSchedule(layout_.shape, layout_.units, lanes_);
    const UnitShape& s = layout_.shape;
    for (UnitMemory& memory : unit_memory_) {
      memory.entropy.resize(static_cast<size_t>(s.group));
      memory.frozen.resize(problem.adaptive.freeze ? static_cast<size_t>(s.group) : 0);
      // A frozen plan starts its bases anew every call, so that the same input gives the same bits.
      if (units > kMaxWarmUnits || problem.adaptive.freeze) continue;
      memory.value_basis = room_for_basis(s.d_v, s.max_rank);
      memory.probe_basis = room_for_basis(s.d_qk, s.probe_rank);
    }
  }

  const PlanInfo& info() const override { return info_; }

  void execute(const AttnParams& params, void* workspace, size_t workspace_bytes, adaattn_stream_t stream) override {
    if (workspace_bytes < info_.workspace_bytes)
      fail(ADAATTN_ERROR_WORKSPACE_TOO_SMALL, "workspace_bytes is %zu; accepted: %zu or more", workspace_bytes,
           info_.workspace_bytes);
    statistics_.begin_call();
    if (whole_exact_) {
      exact_plan_->execute(params, workspace, workspace_bytes, stream);
      for (int64_t b = 0; b < params.batch; ++b) {
        for (int64_t h = 0; h < params.heads_q; ++h) statistics_.add_exact(params, b, h, 0, 1);
      }
    } else {
      maps_.begin_call(params);
      run(params, workspace);
    }
    statistics_.end_call(params);
    ++calls_;
  }

  PlanCounters counters(bool, bool reset) override { return statistics_.read(reset); }

  std::vector<HeadRecord> head_records() override { return statistics_.records(); }

  TileMap tile_map(int64_t batch, int64_t head) override {
    if (whole_exact_) return AttentionPlan::tile_map(batch, head);
    const auto index = static_cast<size_t>(batch * problem_.heads_q + head);
    const std::vector<HeadRecord>& records = statistics_.records();
    return maps_.read(batch, head, index < records.size() && records[index].dense);
  }

 private:
  using Clock = std::chrono::steady_clock;

  void run(const AttnParams& params, void* workspace);
  void run_wave(const AdaptiveCall& call, int64_t count, char* lanes);
  void attend(const AdaptiveCall& call, int64_t count, char* lanes);
  void conclude(const AdaptiveCall& call, Unit& unit);

  UnitMemory& memory_of(const Unit& unit) {
    return unit_memory_[static_cast<size_t>(unit.b * problem_.heads_kv + unit.kv_head)];
  }
  decide::HeadFeedback* feedback_of(const Unit& unit) {
    return &feedback_[static_cast<size_t>(unit.b * problem_.heads_q + unit.kv_head * layout_.shape.group)];
  }
  char* lane_memory(char* lanes, int64_t lane) const { return lanes + static_cast<size_t>(lane) * layout_.lane_bytes; }

  Problem problem_;
  ThreadPool& pool_;
  int64_t lanes_;
  const KernelTable& exact_;
  const AdaptiveKernels& kernels_;
  const ToolKernels& tools_;
  std::unique_ptr<AttentionPlan> exact_plan_;
  PlanInfo info_;
  bool whole_exact_;
  Layout layout_;
  std::vector<Unit> units_;
  std::vector<UnitMemory> unit_memory_;
  std::vector<decide::HeadFeedback> feedback_;
  AttendSchedule schedule_;
  Statistics statistics_;
  TileMaps maps_;
  uint64_t calls_ = 0;
};

void AdaptivePlan::run(const AttnParams& params, void* workspace) {
  Arena arena(workspace);
  char* lanes = arena.take<char>(lanes_ * static_cast<int64_t>(layout_.lane_bytes));
  for (Unit& unit : units_) {
    unit = {};
    lay_out_unit(layout_.shape, problem_.adaptive, arena, unit);
  }
  const AdaptiveCall call{problem_, params, layout_.shape, exact_, kernels_, tools_, calls_};
  const int64_t total = params.batch * params.heads_kv;
  for (int64_t first = 0; first < total; first += layout_.units) {
    const int64_t count = std::min(layout_.units, total - first);
    for (int64_t i = 0; i < count; ++i) {
      Unit& unit = units_[static_cast<size_t>(i)];
      unit.b = (first + i) / params.heads_kv;
      unit.kv_head = (first + i) % params.heads_kv;
      unit.seq = sequence_of(params, unit.b);
      unit.map = maps_.bits_of_unit(unit.b, unit.kv_head);
      unit.analyzed = memory_of(unit).dense_calls == 0;
      unit.finite = true;
      unit.rank_class = 0;
      unit.rank_energy = 1;
      unit.v_spread = 0;
      unit.keys.len = unit.seq.len_k;
      unit.keys.tiles = ceil_div(unit.seq.len_k, decide::kTileK);
      unit.keys.groups = ceil_div(unit.seq.len_k, decide::kGroupK);
    }
    run_wave(call, count, lanes);
  }
}

void AdaptivePlan::run_wave(const AdaptiveCall& call, int64_t count, char* lanes) {
  const UnitShape& s = layout_.shape;
  AdaptiveCounters& sum = statistics_.sums();
  const auto seconds_since = [](Clock::time_point& from) {
    const Clock::time_point now = Clock::now();
    const double seconds = std::chrono::duration<double>(now - from).count();
    from = now;
    return seconds;
  };
  Clock::time_point time = Clock::now();
  const auto for_key_tiles = [&](auto&& body) {
    pool_.for_each(
        count * s.key_tiles,
        [&](int64_t lane, int64_t item) {
          Unit& unit = units_[static_cast<size_t>(item % count)];
          const int64_t tile = item / count;
          if (unit.analyzed && tile < unit.keys.tiles) body(unit, tile, lane_memory(lanes, lane));
        },
        lanes_);
  };
  for_key_tiles([&](Unit& unit, int64_t tile, char* scratch) { load_key_tile(call, unit, tile, scratch); });
  pool_.for_each(
      count,
      [&](int64_t lane, int64_t i) {
        Unit& unit = units_[static_cast<size_t>(i)];
        if (unit.analyzed) measure_keys(call, unit, lane_memory(lanes, lane));
      },
      lanes_);
  const bool bases = s.probe_rank > 0 || s.max_rank > 0;
  if (bases) {
    pool_.for_each(
        2 * count,
        [&](int64_t lane, int64_t item) {
          Unit& unit = units_[static_cast<size_t>(item / 2)];
          if (!unit.analyzed || !unit.finite || !(unit.v_spread > 0)) return;
          UnitMemory& memory = memory_of(unit);
          char* scratch = lane_memory(lanes, lane);
          if (item % 2 == 0 && s.probe_rank > 0) make_probe_basis(call, unit, memory.probe_basis, scratch);
          if (item % 2 == 1 && s.max_rank > 0) make_value_basis(call, unit, memory.value_basis, scratch);
        },
        lanes_);
  }
  if (bases || s.needles || s.bytes || s.rounds || (s.packs && problem_.adaptive.far_field)) {
    for_key_tiles([&](Unit& unit, int64_t tile, char* scratch) {
      if (unit.finite) project_key_tile(call, unit, tile, scratch);
    });
  }
  // Heads of a query lie side by side: they are read together, unless that leaves lanes without work.
  const int64_t heads = count * s.group, together = s.query_tiles < 4 * lanes_ ? 1 : std::min(heads, kQueryHeads);
  const int64_t pieces = ceil_div(heads, together);
  pool_.for_each(
      s.query_tiles * pieces,
      [&](int64_t lane, int64_t item) {
        const int64_t first = item % pieces * together;
        analyze_query_tile(call, units_.data(), first, std::min(together, heads - first), item / pieces,
                           lane_memory(lanes, lane));
      },
      lanes_);
  sum.seconds_analyze += seconds_since(time);

  for (int64_t i = 0; i < count; ++i) {
    Unit& unit = units_[static_cast<size_t>(i)];
    for (int64_t g = 0; g < s.group; ++g) new (unit.heads + g) HeadState();
    if (!unit.analyzed) continue;
    UnitMemory& memory = memory_of(unit);
    decide_unit(call, unit, feedback_of(unit), memory.chosen ? memory.frozen.data() : nullptr);
    if (!problem_.adaptive.freeze || memory.chosen) continue;
    memory.chosen = true;
    for (size_t g = 0; g < memory.frozen.size(); ++g) memory.frozen[g] = unit.heads[g].choice;
  }
  sum.seconds_decide += seconds_since(time);
  attend(call, count, lanes);
  sum.seconds_attend += seconds_since(time);

  if (problem_.adaptive.verify_rows > 0) {
    for (int64_t i = 0; i < count; ++i) measure_error(call, units_[static_cast<size_t>(i)], lane_memory(lanes, 0));
  }
  for (int64_t i = 0; i < count; ++i) {
    Unit& unit = units_[static_cast<size_t>(i)];
    for (int64_t g = 0; g < s.group; ++g) {
      HeadState& head = unit.heads[g];
      if (!problem_.adaptive.recompute || head.choice.dense || !(head.measured_error > problem_.adaptive.tolerance))
        continue;
      head.recomputed = true;
      pool_.for_each(
          ceil_div(unit.seq.len_q, decide::kTileQ),
          [&](int64_t lane, int64_t tile) {
            const int64_t begin = tile * decide::kTileQ, end = std::min(begin + decide::kTileQ, unit.seq.len_q);
            attend_exact_rows(call, unit, {0, static_cast<int32_t>(g), 1, true, false, begin, end - begin},
                              lane_memory(lanes, lane));
          },
          lanes_);
    }
    conclude(call, unit);
  }
  sum.seconds_verify += seconds_since(time);
}

// The exact rows to compare with, and every query.
void AdaptivePlan::attend(const AdaptiveCall& call, int64_t count, char* lanes) {
  const UnitShape& s = layout_.shape;
  const int64_t items = schedule_.build(units_, count, s, lanes_, problem_.adaptive.verify_rows > 0);
  pool_.for_each(
      items,
      [&](int64_t lane, int64_t) {
        char* scratch = lane_memory(lanes, lane);
        const AttendItem* next = nullptr;
        const AttendItem& item = schedule_.take(lane, &next);
        Unit& unit = units_[static_cast<size_t>(item.unit)];
        if (item.check) {
          compute_exact_rows(call, unit, scratch);
        } else if (item.exact) {
          attend_exact_rows(call, unit, item, scratch);
        } else {
          attend_query_tile(call, unit, item, next != nullptr && !next->exact ? next : nullptr, scratch);
        }
      },
      lanes_);
}

// Feedback and statistics of one unit.
void AdaptivePlan::conclude(const AdaptiveCall& call, Unit& unit) {
  const UnitShape& s = layout_.shape;
  const decide::Options& o = problem_.adaptive;
  UnitMemory& memory = memory_of(unit);
  bool all_dense = true;
  for (int64_t g = 0; g < s.group; ++g) {
    HeadState& head = unit.heads[g];
    double& entropy = memory.entropy[static_cast<size_t>(g)];
    if (unit.analyzed) entropy = head.entropy;
    head.entropy = entropy;
    float& feedback = feedback_of(unit)[g].multiplier[head.choice.rank_class];
    if (!head.choice.dense && o.feedback && o.verify_rows > 0 && unit.seq.len_q > 0)
      // The multiplier is of what tiles and ranks leave out; rounding is predicted by a bound.
      feedback = decide::next_feedback(feedback, head.choice.predicted_error - head.round_error,
                                       static_cast<float>(head.measured_error));
    if (head.refused && o.feedback && o.verify_rows > 0) decide::rest_refused(&feedback_of(unit)[g]);
    statistics_.add_head(call, unit, g, feedback);
    all_dense = all_dense && head.choice.dense;
  }
  if (memory.dense_calls > 0) {
    --memory.dense_calls;
  } else if (all_dense && !o.freeze) {
    memory.dense_calls = kDenseCalls - 1;
  }
}

}  // namespace

PlanInfo select_adaptive(const Problem& given, adaattn_isa_t isa, int32_t num_threads) {
  const Problem problem = with_options(given, isa);
  PlanInfo info = select_attention(problem, isa, num_threads);
  if (always_exact(problem)) return info;
  const decide::Options& o = problem.adaptive;
  const auto own = static_cast<int32_t>(input_precision(problem.dtype_kv));
  if (static_cast<int32_t>(o.max_precision) < own)
    fail(ADAATTN_ERROR_NOT_SUPPORTED,
         "adaptive.max_precision is %d; accepted on the CPU: 0 (the input's own), or %d and above",
         static_cast<int>(o.max_precision), own);
  const bool bf16 = kernels_for(problem, isa).pack_keys != nullptr;
  info.kernel = (bf16 ? "adaptive_bf16_" : "adaptive_f32_") + info.isa;
  info.tile_q = decide::kTileQ;
  info.tile_k = decide::kTileK;
  info.exact = false;
  info.workspace_bytes = lay_out(problem, isa, num_threads).workspace_bytes;
  return info;
}

std::unique_ptr<AttentionPlan> make_adaptive_plan(const Problem& problem, adaattn_isa_t isa, ThreadPool& pool) {
  return std::make_unique<AdaptivePlan>(with_options(problem, isa), isa, pool);
}

}  // namespace adaattn::cpu
