#include "cpu_fallback/adaptive/plan.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "core/error.h"
#include "cpu_fallback/adaptive/call.h"
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

Layout lay_out(const Problem& problem, adaattn_isa_t isa, int64_t lanes) {
  const decide::Options& o = problem.adaptive;
  const KernelTable& exact = *kernels_of(isa);
  const AdaptiveKernels& kernels = *adaptive_kernels_of(isa);
  Layout layout;
  layout.shape = unit_shape(problem, kernels);
  Arena arena;
  Unit unused;
  lay_out_unit(layout.shape, o, arena, unused);
  layout.unit_bytes = arena.used();
  layout.lane_bytes =
      std::max(analyze_scratch(layout.shape, o, kernels), attend_scratch(layout.shape, o, exact, kernels));
  layout.lane_bytes = (layout.lane_bytes + Arena::kAlignment - 1) / Arena::kAlignment * Arena::kAlignment;
  const size_t fixed = static_cast<size_t>(lanes) * layout.lane_bytes + Arena::kAlignment;
  layout.units = std::min(kUnitsInFlight, problem.max_batch * problem.heads_kv);
  if (o.max_workspace_bytes != 0) {
    const size_t least = fixed + layout.unit_bytes;
    if (o.max_workspace_bytes < least)
      fail(ADAATTN_ERROR_NOT_SUPPORTED,
           "adaptive.max_workspace_bytes is %llu; one KV head of this problem takes %zu on %lld threads",
           static_cast<unsigned long long>(o.max_workspace_bytes), least, static_cast<long long>(lanes));
    const auto fit = static_cast<int64_t>((o.max_workspace_bytes - fixed) / layout.unit_bytes);
    layout.units = std::min(layout.units, fit);
  }
  layout.workspace_bytes = fixed + static_cast<size_t>(layout.units) * layout.unit_bytes;
  return layout;
}

adaattn_precision_t input_precision(Dtype dtype) {
  return dtype == Dtype::kF32   ? ADAATTN_PRECISION_F32
         : dtype == Dtype::kF16 ? ADAATTN_PRECISION_F16
                                : ADAATTN_PRECISION_BF16;
}

// State of one (sequence, KV head) that lasts from call to call.
struct UnitMemory {
  WarmBasis warm;
  int32_t dense_calls = 0;  // calls for which the unit is computed exactly without a look
  std::vector<decide::HeadChoice> frozen;
};

class AdaptivePlan final : public AttentionPlan {
 public:
  AdaptivePlan(const Problem& problem, adaattn_isa_t isa, ThreadPool& pool)
      : problem_(problem),
        pool_(pool),
        lanes_(pool.num_threads()),
        exact_(*kernels_of(isa)),
        kernels_(*adaptive_kernels_of(isa)),
        tools_(tool_kernels(isa)),
        exact_plan_(make_attention_plan(problem, isa, pool)),
        info_(select_adaptive(problem, isa, pool.num_threads())),
        whole_exact_(always_exact(problem)) {
    const int64_t units = problem.max_batch * problem.heads_kv;
    feedback_.resize(static_cast<size_t>(problem.max_batch * problem.heads_q));
    records_.reserve(feedback_.size());
    if (whole_exact_) return;
    layout_ = lay_out(problem, isa, lanes_);
    maps_ = TileMaps(problem, layout_.shape);
    unit_memory_.resize(static_cast<size_t>(units));
    units_.resize(static_cast<size_t>(layout_.units));
    const UnitShape& s = layout_.shape;
    for (UnitMemory& memory : unit_memory_) {
      memory.frozen.resize(problem.adaptive.freeze ? static_cast<size_t>(s.group) : 0);
      // A frozen plan starts its bases anew every call, so that the same input gives the same bits.
      if (units > kMaxWarmUnits || problem.adaptive.freeze) continue;
      memory.warm.v.resize(static_cast<size_t>((s.max_rank + 16) * s.d_v));
      memory.warm.probe.resize(static_cast<size_t>((s.probe_rank + 16) * s.d_qk));
    }
  }

  const PlanInfo& info() const override { return info_; }

  void execute(const AttnParams& params, void* workspace, size_t workspace_bytes, adaattn_stream_t stream) override {
    if (workspace_bytes < info_.workspace_bytes)
      fail(ADAATTN_ERROR_WORKSPACE_TOO_SMALL, "workspace_bytes is %zu; the plan needs %zu", workspace_bytes,
           info_.workspace_bytes);
    records_.clear();
    if (whole_exact_) {
      exact_plan_->execute(params, workspace, workspace_bytes, stream);
      for (int64_t b = 0; b < params.batch; ++b) {
        for (int64_t h = 0; h < params.heads_q; ++h) record_exact(params, b, h);
      }
    } else {
      maps_.begin_call(params);
      run(params, workspace);
      count_calls(params);
    }
    ++calls_;
  }

  PlanCounters counters(bool wait, bool reset) override {
    PlanCounters result = whole_exact_ ? exact_plan_->counters(wait, reset) : counters_;
    result.adaptive = counters_.adaptive;
    if (reset) counters_ = {};
    return result;
  }

  std::vector<HeadRecord> head_records() override { return records_; }

  TileMap tile_map(int64_t batch, int64_t head) override {
    if (whole_exact_) return AttentionPlan::tile_map(batch, head);
    const auto index = static_cast<size_t>(batch * problem_.heads_q + head);
    return maps_.read(batch, head, index < records_.size() && records_[index].dense);
  }

 private:
  using Clock = std::chrono::steady_clock;

  void run(const AttnParams& params, void* workspace);
  void run_wave(const AdaptiveCall& call, int64_t count, char* lanes);
  void attend(const AdaptiveCall& call, int64_t count, char* lanes);
  void conclude(const AdaptiveCall& call, Unit& unit);
  void record_exact(const AttnParams& params, int64_t b, int64_t head);
  void add(const HeadRecord& record, double tiles, double kept, double probed_in);
  void count_calls(const AttnParams& params);

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
  std::vector<HeadRecord> records_;  // [batch][heads_q] of the newest call
  TileMaps maps_;
  PlanCounters counters_;
  uint64_t calls_ = 0;
  bool frozen_ = false;
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
      const UnitShape& s = layout_.shape;
      unit.keys = {};
      unit.keys.len = unit.seq.len_k;
      unit.keys.tiles = ceil_div(unit.seq.len_k, decide::kTileK);
      unit.keys.groups = ceil_div(unit.seq.len_k, decide::kGroupK);
      unit.keys.d_qk = s.d_qk;
      unit.keys.d_v = s.d_v;
      unit.keys.k = unit.k;
      unit.keys.k_stride = s.k_stride;
      unit.keys.v = unit.v;
      unit.keys.v_stride = s.v_stride;
      unit.keys.v_low = unit.v_low;
      unit.keys.v_low_stride = s.low_stride;
      unit.keys.basis = unit.basis;
      unit.keys.v_mean = unit.v_mean;
      unit.keys.group_k = unit.group_k;
      unit.keys.group_k_stride = s.group_k_stride;
      unit.keys.group_v = unit.group_v;
      unit.keys.group_v_low = unit.group_v_low;
      unit.keys.probe_tile_bytes = s.probe_tile_bytes;
      unit.keys.probe_basis = unit.probe_basis;
    }
    run_wave(call, count, lanes);
  }
  frozen_ = problem_.adaptive.freeze;
}

void AdaptivePlan::run_wave(const AdaptiveCall& call, int64_t count, char* lanes) {
  const UnitShape& s = layout_.shape;
  AdaptiveCounters& sum = counters_.adaptive;
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
          Unit& unit = units_[static_cast<size_t>(item / s.key_tiles)];
          const int64_t tile = item % s.key_tiles;
          if (unit.analyzed && tile < unit.keys.tiles) body(unit, tile, lane_memory(lanes, lane));
        },
        lanes_);
  };
  for_key_tiles([&](Unit& unit, int64_t tile, char* scratch) { load_key_tile(call, unit, tile, scratch); });
  pool_.for_each(
      count,
      [&](int64_t lane, int64_t i) {
        Unit& unit = units_[static_cast<size_t>(i)];
        WarmBasis& warm = memory_of(unit).warm;
        if (unit.analyzed) analyze_unit(call, unit, warm.v.empty() ? nullptr : &warm, lane_memory(lanes, lane));
      },
      lanes_);
  for_key_tiles([&](Unit& unit, int64_t tile, char* scratch) {
    if (unit.finite) project_key_tile(call, unit, tile, scratch);
  });
  const int64_t per_unit = s.group * s.query_tiles;
  pool_.for_each(
      count * per_unit,
      [&](int64_t lane, int64_t item) {
        Unit& unit = units_[static_cast<size_t>(item / per_unit)];
        const int64_t member = item % per_unit / s.query_tiles, tile = item % s.query_tiles;
        if (unit.analyzed && unit.finite && tile * decide::kTileQ < unit.seq.len_q)
          analyze_query_tile(call, unit, member, tile, lane_memory(lanes, lane));
      },
      lanes_);
  sum.seconds_analyze += seconds_since(time);

  for (int64_t i = 0; i < count; ++i) {
    Unit& unit = units_[static_cast<size_t>(i)];
    for (int64_t g = 0; g < s.group; ++g) new (unit.heads + g) HeadState();
    if (!unit.analyzed) continue;
    UnitMemory& memory = memory_of(unit);
    decide_unit(call, unit, feedback_of(unit), frozen_ ? memory.frozen.data() : nullptr);
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
          [&](int64_t lane, int64_t tile) { attend_exact_tile(call, unit, g, tile, lane_memory(lanes, lane)); },
          lanes_);
    }
    conclude(call, unit);
  }
  sum.seconds_verify += seconds_since(time);
}

// The exact rows to compare with, and every query tile, the last ones first: under a causal mask they are the longest.
void AdaptivePlan::attend(const AdaptiveCall& call, int64_t count, char* lanes) {
  const UnitShape& s = layout_.shape;
  const int64_t checks = problem_.adaptive.verify_rows > 0 ? count : 0;
  pool_.for_each(
      checks + count * s.group * s.query_tiles,
      [&](int64_t lane, int64_t item) {
        char* scratch = lane_memory(lanes, lane);
        if (item < checks) {
          Unit& unit = units_[static_cast<size_t>(item)];
          const auto approximate = [](const HeadState& head) { return !head.choice.dense; };
          if (std::any_of(unit.heads, unit.heads + s.group, approximate)) compute_exact_rows(call, unit, scratch);
          return;
        }
        const int64_t rest = item - checks;
        const int64_t tile = s.query_tiles - 1 - rest / (count * s.group);
        Unit& unit = units_[static_cast<size_t>(rest % count)];
        const int64_t member = rest / count % s.group;
        if (tile * decide::kTileQ >= unit.seq.len_q) return;
        if (unit.heads[member].choice.dense) {
          attend_exact_tile(call, unit, member, tile, scratch);
        } else {
          attend_query_tile(call, unit, member, tile, scratch);
        }
      },
      lanes_);
}

// Statistics and feedback of one unit.
void AdaptivePlan::conclude(const AdaptiveCall& call, Unit& unit) {
  const UnitShape& s = layout_.shape;
  const decide::Options& o = problem_.adaptive;
  AdaptiveCounters& sum = counters_.adaptive;
  const int64_t tiles_q = ceil_div(unit.seq.len_q, decide::kTileQ);
  bool all_dense = true;
  for (int64_t g = 0; g < s.group; ++g) {
    HeadState& head = unit.heads[g];
    const int64_t head_index = unit.kv_head * s.group + g;
    float& feedback = feedback_of(unit)[g].multiplier[head.choice.rank_class];
    if (head.choice.dense) {
      record_exact(call.params, unit.b, head_index);
      HeadRecord& record = records_.back();
      record.entropy = head.entropy;
      record.feedback = feedback;
      if (unit.analyzed) sum.entropy_sum += head.entropy;
      continue;
    }
    all_dense = false;
    const int64_t rank = head.choice.rank_class == 0 ? s.d_v : decide::rank_of_class(head.choice.rank_class);
    int64_t kept = 0, probed_in = 0;
    double far_mass = 0, flops = 0;
    for (int64_t t = 0; t < tiles_q; ++t) {
      const AdaptiveTileResult& result = unit.results[g * s.query_tiles + t];
      const decide::TileRow& row = unit.tile_levels[g * s.query_tiles + t].row;
      const auto rows = static_cast<double>(std::min<int64_t>(decide::kTileQ, unit.seq.len_q - t * decide::kTileQ));
      const int64_t skipped = row.end - row.begin - result.kept;
      kept += result.kept;
      probed_in += result.probed_in;
      far_mass += result.far_mass;
      double per_row = static_cast<double>(result.kept * decide::kTileK * (s.d_qk + rank));
      if (o.far_field)
        per_row += static_cast<double>(skipped * (decide::kTileK / decide::kGroupK) * (2 * s.d_qk + 1 + rank));
      if (o.probe != decide::Probe::kOff)
        per_row += static_cast<double>((skipped + result.probed_in) * decide::kTileK) *
                   static_cast<double>(unit.keys.probe_rank > 0 ? unit.keys.probe_rank + 1 : s.d_qk);
      if (head.choice.rank_class != 0) per_row += static_cast<double>(s.d_v * rank);
      flops += 2 * rows * per_row;
    }
    HeadRecord record;
    record.batch = unit.b;
    record.head = head_index;
    record.entropy = head.entropy;
    record.kept_tiles = head.tiles > 0 ? static_cast<double>(kept) / static_cast<double>(head.tiles) : 1;
    record.dropped_mass = unit.seq.len_q > 0 ? far_mass / static_cast<double>(unit.seq.len_q) : 0;
    record.predicted_error = head.choice.predicted_error;
    record.measured_error = std::numeric_limits<double>::quiet_NaN();
    record.rank_v = rank;
    record.rank_energy = head.choice.rank_class == 0 ? 1 : unit.rank_energy;
    record.precision = input_precision(problem_.dtype_kv);
    record.dense = false;
    if (o.verify_rows > 0 && unit.seq.len_q > 0) {
      record.measured_error = head.measured_error;
      if (o.feedback) {
        feedback =
            decide::next_feedback(feedback, head.choice.predicted_error, static_cast<float>(head.measured_error));
      }
      ++sum.verified_heads;
      sum.verified_rows += static_cast<uint64_t>(sampled_rows(call, unit).count);
      sum.measured_error_sum += head.measured_error;
      sum.measured_error_max = std::max(sum.measured_error_max, head.measured_error);
      sum.measured_row_error_max = std::max(sum.measured_row_error_max, head.measured_row_max);
      if (head.measured_error > o.tolerance) ++sum.heads_over_tolerance;
      if (head.recomputed) ++sum.heads_recomputed;
    }
    record.feedback = feedback;
    sum.flops_done += flops;
    sum.entropy_sum += head.entropy;
    sum.heads_low_rank += head.choice.rank_class != 0 ? 1 : 0;
    add(record, static_cast<double>(head.tiles), static_cast<double>(kept), static_cast<double>(probed_in));
  }
  UnitMemory& memory = memory_of(unit);
  if (memory.dense_calls > 0) {
    --memory.dense_calls;
  } else if (all_dense && !o.freeze) {
    memory.dense_calls = kDenseCalls - 1;
  }
}

void AdaptivePlan::add(const HeadRecord& record, double tiles, double kept, double probed_in) {
  AdaptiveCounters& sum = counters_.adaptive;
  sum.entropy_min = sum.heads == 0 ? record.entropy : std::min(sum.entropy_min, record.entropy);
  sum.entropy_max = sum.heads == 0 ? record.entropy : std::max(sum.entropy_max, record.entropy);
  ++sum.heads;
  sum.heads_dense += record.dense ? 1 : 0;
  sum.heads_f32 += record.precision == ADAATTN_PRECISION_F32 ? 1 : 0;
  sum.heads_f16 += record.precision == ADAATTN_PRECISION_F16 ? 1 : 0;
  sum.heads_bf16 += record.precision == ADAATTN_PRECISION_BF16 ? 1 : 0;
  sum.tiles += static_cast<uint64_t>(tiles);
  sum.tiles_kept += static_cast<uint64_t>(kept);
  sum.tiles_probed_in += static_cast<uint64_t>(probed_in);
  sum.rank_v_sum += static_cast<double>(record.rank_v);
  sum.predicted_error_sum += record.predicted_error;
  sum.dropped_mass_sum += record.dropped_mass;
  records_.push_back(record);
}

void AdaptivePlan::record_exact(const AttnParams& params, int64_t b, int64_t head) {
  const Sequence seq = sequence_of(params, b);
  int64_t tiles = 0;
  for (int64_t t = 0; t * decide::kTileQ < seq.len_q; ++t) {
    const TileRange seen = visible_tiles(params, seq, t);
    tiles += seen.end - seen.begin;
  }
  const auto pairs = static_cast<double>(visible_pairs(params, seq));
  HeadRecord record;
  record.batch = b;
  record.head = head;
  record.rank_v = params.d_v;
  record.precision = input_precision(problem_.dtype_kv);
  record.measured_error = std::numeric_limits<double>::quiet_NaN();
  counters_.adaptive.flops_done += 2 * pairs * static_cast<double>(params.d_qk + params.d_v);
  add(record, static_cast<double>(tiles), static_cast<double>(tiles), 0);
}

void AdaptivePlan::count_calls(const AttnParams& params) {
  ++counters_.calls;
  for (int64_t b = 0; b < params.batch; ++b) {
    counters_.query_rows += static_cast<uint64_t>(sequence_of(params, b).len_q * params.heads_q);
    counters_.score_pairs += static_cast<uint64_t>(visible_pairs(params, sequence_of(params, b)) * params.heads_q);
    if (counters_.violation.field == Field::kNone) counters_.violation = check_sequence(params, b);
  }
}

}  // namespace

PlanInfo select_adaptive(const Problem& problem, adaattn_isa_t isa, int32_t num_threads) {
  PlanInfo info = select_attention(problem, isa, num_threads);
  if (always_exact(problem)) return info;
  const decide::Options& o = problem.adaptive;
  const auto own = static_cast<int32_t>(input_precision(problem.dtype_kv));
  if (static_cast<int32_t>(o.max_precision) < own)
    fail(ADAATTN_ERROR_NOT_SUPPORTED,
         "adaptive.max_precision is %d; the CPU computes with the input's own precision, %d",
         static_cast<int>(o.max_precision), own);
  info.kernel = "adaptive_f32_" + info.isa;
  info.tile_q = decide::kTileQ;
  info.tile_k = decide::kTileK;
  info.exact = false;
  info.workspace_bytes = lay_out(problem, isa, num_threads).workspace_bytes;
  return info;
}

std::unique_ptr<AttentionPlan> make_adaptive_plan(const Problem& problem, adaattn_isa_t isa, ThreadPool& pool) {
  return std::make_unique<AdaptivePlan>(problem, isa, pool);
}

}  // namespace adaattn::cpu
