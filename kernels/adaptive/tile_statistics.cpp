#include "adaptive/tile_statistics.h"

#include <limits>

#include "attend/plan.h"

namespace adaattn::cuda {
namespace {

adaattn_precision_t input_precision(Dtype dtype) {
  return dtype == Dtype::kF32   ? ADAATTN_PRECISION_F32
         : dtype == Dtype::kF16 ? ADAATTN_PRECISION_F16
                                : ADAATTN_PRECISION_BF16;
}

HeadRecord exact_record(const Problem& problem, size_t index) {
  HeadRecord record;
  record.batch = static_cast<int64_t>(index) / problem.heads_q;
  record.head = static_cast<int64_t>(index) % problem.heads_q;
  record.measured_error = std::numeric_limits<double>::quiet_NaN();
  record.rank_v = problem.d_v;
  record.precision = input_precision(problem.dtype_q);
  return record;
}

}  // namespace

AdaptiveCounters counters_of(const TileTotals& t) {
  AdaptiveCounters a;
  a.heads = t.heads;
  a.heads_i8 = t.heads_bytes;
  a.heads_bf16 = t.heads - t.heads_bytes;
  a.heads_dense = t.heads_dense;
  a.heads_low_rank = t.heads_low_rank;
  a.tiles = t.tiles;
  a.tiles_kept = t.kept;
  a.tiles_probed_in = t.found;
  a.flops_done = t.flops;
  a.rank_v_sum = t.rank_v_sum;
  a.entropy_sum = t.entropy_sum;
  a.entropy_min = t.entropy_min;
  a.entropy_max = t.entropy_max;
  a.predicted_error_sum = t.predicted_sum;
  a.dropped_mass_sum = t.dropped_sum;
  a.verified_heads = t.verified_heads;
  a.verified_rows = t.verified_rows;
  a.measured_error_sum = t.measured_sum;
  a.measured_error_max = t.measured_max;
  a.measured_row_error_max = t.measured_row_max;
  a.heads_over_tolerance = t.over_tolerance;
  a.heads_recomputed = t.recomputed;
  a.seconds_analyze = 1e-9 * static_cast<double>(t.stage_ns[kAnalyzeStage]);
  a.seconds_decide = 1e-9 * static_cast<double>(t.stage_ns[kDecideStage]);
  a.seconds_attend = 1e-9 * static_cast<double>(t.stage_ns[kAttendStage]);
  a.seconds_verify = 1e-9 * static_cast<double>(t.stage_ns[kVerifyStage]);
  return a;
}

std::vector<HeadRecord> records_of(const std::vector<HeadTally>& tallies, const Problem& problem) {
  std::vector<HeadRecord> list;
  for (size_t i = 0; i < tallies.size(); ++i) {
    const HeadTally& tally = tallies[i];
    HeadRecord& record = list.emplace_back(exact_record(problem, i));
    record.entropy = static_cast<double>(tally.entropy);
    record.kept_tiles = tally.tiles > 0 ? static_cast<double>(tally.kept) / static_cast<double>(tally.tiles) : 1;
    record.dropped_mass = tally.rows > 0 ? tally.dropped_share / static_cast<double>(tally.rows) : 0;
    record.predicted_error = static_cast<double>(tally.predicted_error);
    if (tally.measured != 0 && tally.dense == 0) record.measured_error = static_cast<double>(tally.measured_error);
    record.feedback = static_cast<double>(tally.feedback);
    record.dense = tally.dense != 0;
    if (tally.bytes != 0) record.precision = ADAATTN_PRECISION_I8;
    if (tally.rank_class != 0) record.rank_v = decide::rank_of_class(tally.rank_class);
    record.rank_energy = static_cast<double>(tally.rank_energy);
  }
  return list;
}

TileMap map_of(const HeadTally& tally, const std::vector<uint64_t>& bits, const std::vector<decide::TileRow>& ranges,
               int32_t mask_words) {
  TileMap map;
  map.query_tiles = (tally.len_q + decide::kTileQ - 1) / decide::kTileQ;
  map.key_tiles = (tally.len_k + decide::kTileK - 1) / decide::kTileK;
  map.tiles.resize(static_cast<size_t>(map.query_tiles * map.key_tiles));
  for (int64_t q = 0; q < map.query_tiles; ++q) {
    const decide::TileRow& seen = ranges[static_cast<size_t>(q)];
    const uint64_t* const words = bits.data() + q * mask_words;
    for (int32_t k = seen.begin; k < seen.end; ++k)
      map.tiles[static_cast<size_t>(q * map.key_tiles + k)] = (words[k / 64] >> k % 64 & 1) != 0 ? 2 : 1;
  }
  return map;
}

void add_exact_call(const AttnParams& params, Dtype dtype, AdaptiveCounters* sum) {
  const uint64_t heads = static_cast<uint64_t>(params.batch * params.heads_q);
  sum->heads += heads;
  sum->heads_dense += heads;
  (dtype == Dtype::kF32 ? sum->heads_f32 : dtype == Dtype::kF16 ? sum->heads_f16 : sum->heads_bf16) += heads;
  sum->rank_v_sum += static_cast<double>(heads) * static_cast<double>(params.d_v);
  if (!lengths_on_device(params)) sum->tiles += tiles_of_call(params);
}

std::vector<HeadRecord> exact_records(const Problem& problem, int64_t batch) {
  std::vector<HeadRecord> list;
  for (size_t i = 0; i < static_cast<size_t>(batch * problem.heads_q); ++i) list.push_back(exact_record(problem, i));
  return list;
}

}  // namespace adaattn::cuda
