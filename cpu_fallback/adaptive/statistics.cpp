#include "cpu_fallback/adaptive/statistics.h"

#include <algorithm>
#include <limits>

#include "cpu_fallback/adaptive/tile_map.h"
#include "cpu_fallback/attend/layout.h"

namespace adaattn::cpu {
namespace {

// Multiply-adds of one query row over `tiles` key tiles of `width` columns, 1 for each group of `group` keys.
double row_work(int64_t tiles, int64_t group, int64_t width) {
  return static_cast<double>(tiles * (decide::kTileK / group) * width);
}

struct HeadWork {
  int64_t kept = 0, probed_in = 0;
  double dropped_mass = 0;  // summed over rows
  double flops = 0;
};

// What attend did for one head, over its query tiles.
HeadWork count_work(const AdaptiveCall& call, const Unit& unit, int64_t member, int64_t rank) {
  const UnitShape& s = call.shape;
  const decide::Options& o = call.problem.adaptive;
  const decide::HeadChoice& choice = unit.heads[member].choice;
  HeadWork work;
  for (int64_t t = 0; t * decide::kTileQ < unit.seq.len_q; ++t) {
    const int64_t index = member * s.query_tiles + t;
    const AdaptiveTileResult& result = unit.results[index];
    const decide::TileLevels& levels = unit.tile_levels[index];
    const int64_t rows = std::min<int64_t>(decide::kTileQ, unit.seq.len_q - t * decide::kTileQ);
    const int64_t skipped = levels.row.end - levels.row.begin - result.kept;
    work.kept += result.kept;
    work.probed_in += result.probed_in;
    // Without the far field, what decide thought of the tiles: attend never looks at them.
    work.dropped_mass +=
        o.far_field ? result.far_mass : static_cast<double>(rows) * levels.dropped[choice.level] / 65536.0;
    double per_row = row_work(result.kept, 1, s.d_qk + rank);
    if (o.far_field) per_row += row_work(skipped, decide::kGroupK, 2 * s.d_qk + 1 + rank);
    if (o.probe != decide::Probe::kOff)
      per_row += row_work(skipped + result.probed_in, 1, unit.keys.probe_rank > 0 ? unit.keys.probe_rank + 1 : s.d_qk);
    if (choice.rank_class != 0) per_row += static_cast<double>(s.d_v * rank);
    work.flops += 2 * static_cast<double>(rows) * per_row;
  }
  return work;
}

}  // namespace

adaattn_precision_t input_precision(Dtype dtype) {
  return dtype == Dtype::kF32   ? ADAATTN_PRECISION_F32
         : dtype == Dtype::kF16 ? ADAATTN_PRECISION_F16
                                : ADAATTN_PRECISION_BF16;
}

Statistics::Statistics(const Problem& problem) : dtype_(problem.dtype_kv) {
  records_.reserve(static_cast<size_t>(problem.max_batch * problem.heads_q));
}

PlanCounters Statistics::read(bool reset) {
  const PlanCounters result = counters_;
  if (reset) counters_ = {};
  return result;
}

void Statistics::add_exact(const AttnParams& params, int64_t b, int64_t head, double entropy, float feedback) {
  const Sequence seq = sequence_of(params, b);
  int64_t tiles = 0;
  for (int64_t t = 0; t * decide::kTileQ < seq.len_q; ++t) {
    const TileRange seen = visible_tiles(params, seq, t);
    tiles += seen.end - seen.begin;
  }
  HeadRecord record;
  record.batch = b;
  record.head = head;
  record.entropy = entropy;
  record.rank_v = params.d_v;
  record.precision = input_precision(dtype_);
  record.measured_error = std::numeric_limits<double>::quiet_NaN();
  record.feedback = feedback;
  counters_.adaptive.flops_done +=
      2 * static_cast<double>(visible_pairs(params, seq)) * static_cast<double>(params.d_qk + params.d_v);
  add(record, tiles, tiles, 0);
}

void Statistics::add_head(const AdaptiveCall& call, const Unit& unit, int64_t member, float feedback) {
  const UnitShape& s = call.shape;
  const decide::Options& o = call.problem.adaptive;
  const HeadState& head = unit.heads[member];
  const int64_t head_index = unit.kv_head * s.group + member;
  if (head.choice.dense) {
    add_exact(call.params, unit.b, head_index, head.entropy, feedback);
    return;
  }
  const int rank_class = head.choice.rank_class;
  const int64_t rank = rank_class == 0 ? s.d_v : decide::rank_of_class(rank_class);
  const HeadWork work = count_work(call, unit, member, rank);
  HeadRecord record;
  record.batch = unit.b;
  record.head = head_index;
  record.entropy = head.entropy;
  record.kept_tiles = head.tiles > 0 ? static_cast<double>(work.kept) / static_cast<double>(head.tiles) : 1;
  record.dropped_mass = unit.seq.len_q > 0 ? work.dropped_mass / static_cast<double>(unit.seq.len_q) : 0;
  record.predicted_error = head.choice.predicted_error;
  record.measured_error = std::numeric_limits<double>::quiet_NaN();
  record.rank_v = rank;
  record.rank_energy = rank_class == 0 ? 1 : unit.rank_energy;
  record.precision =
      head.choice.bytes ? ADAATTN_PRECISION_I8 : static_cast<adaattn_precision_t>(static_cast<int32_t>(s.precision));
  record.dense = false;
  record.feedback = feedback;
  AdaptiveCounters& sum = counters_.adaptive;
  if (o.verify_rows > 0 && unit.seq.len_q > 0) {
    record.measured_error = head.measured_error;
    ++sum.verified_heads;
    sum.verified_rows += static_cast<uint64_t>(sampled_rows(call, unit).count);
    sum.measured_error_sum += head.measured_error;
    sum.measured_error_max = std::max(sum.measured_error_max, head.measured_error);
    sum.measured_row_error_max = std::max(sum.measured_row_error_max, head.measured_row_max);
    if (head.measured_error > o.tolerance) ++sum.heads_over_tolerance;
    if (head.recomputed) ++sum.heads_recomputed;
  }
  sum.flops_done += work.flops;
  sum.heads_low_rank += rank_class != 0 ? 1 : 0;
  add(record, head.tiles, work.kept, work.probed_in);
}

void Statistics::add(const HeadRecord& record, int64_t tiles, int64_t kept, int64_t probed_in) {
  AdaptiveCounters& sum = counters_.adaptive;
  sum.entropy_min = sum.heads == 0 ? record.entropy : std::min(sum.entropy_min, record.entropy);
  sum.entropy_max = sum.heads == 0 ? record.entropy : std::max(sum.entropy_max, record.entropy);
  sum.entropy_sum += record.entropy;
  ++sum.heads;
  sum.heads_dense += record.dense ? 1 : 0;
  sum.heads_f32 += record.precision == ADAATTN_PRECISION_F32 ? 1 : 0;
  sum.heads_f16 += record.precision == ADAATTN_PRECISION_F16 ? 1 : 0;
  sum.heads_bf16 += record.precision == ADAATTN_PRECISION_BF16 ? 1 : 0;
  sum.heads_i8 += record.precision == ADAATTN_PRECISION_I8 ? 1 : 0;
  sum.tiles += static_cast<uint64_t>(tiles);
  sum.tiles_kept += static_cast<uint64_t>(kept);
  sum.tiles_probed_in += static_cast<uint64_t>(probed_in);
  sum.rank_v_sum += static_cast<double>(record.rank_v);
  sum.predicted_error_sum += record.predicted_error;
  sum.dropped_mass_sum += record.dropped_mass;
  records_.push_back(record);
}

void Statistics::end_call(const AttnParams& params) {
  ++counters_.calls;
  for (int64_t b = 0; b < params.batch; ++b) {
    counters_.query_rows += static_cast<uint64_t>(sequence_of(params, b).len_q * params.heads_q);
    counters_.score_pairs += static_cast<uint64_t>(visible_pairs(params, sequence_of(params, b)) * params.heads_q);
    if (counters_.violation.field == Field::kNone) counters_.violation = check_sequence(params, b);
  }
}

}  // namespace adaattn::cpu
