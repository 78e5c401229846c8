// The choice for a unit's query heads by one CTA: decide::choose_group, a lane for each mass level at the exact rank
// and at the candidate. Included by units that are built without contraction.
#pragma once

#include "adaptive/cells.cuh"
#include "common/warp.cuh"
#include "decide/choose.h"

namespace adaattn::cuda {

constexpr int kPiece = 64;  // heads that choose together; the host's groups are as long

// The sums of a unit's query heads as the choice reads them; leaves zeros, but for what is dropped.
__device__ __forceinline__ void take_sums(const AnalyzeArgs& args, int64_t first_head) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int64_t head = first_head + threadIdx.x / 32; head < first_head + args.shape.group; head += kDecideWarps) {
    HeadSums& sums = args.tables.head_sums[head];
    decide::HeadLevels& levels = args.tables.head_levels[head];
    if (lane < decide::kLevels) {
      levels.kept[lane] = __ldcg(&sums.kept[lane]);
      levels.dropped_sq[lane] = __ldcg(&sums.dropped_sq[lane]);
      sums.kept[lane] = sums.dropped_sq[lane] = 0;
    }
    if (lane != 0) continue;
    const unsigned long long query_tiles = __ldcg(&sums.query_tiles);
    levels.query_tiles = query_tiles;
    levels.tiles = __ldcg(&sums.tiles);
    const float entropy = static_cast<float>(__ldcg(&sums.entropy)) * static_cast<float>(1 / kEntropyUnit);
    args.tables.head_entropy[head] = query_tiles > 0 ? entropy / static_cast<float>(query_tiles) : 0.0f;
    sums.query_tiles = sums.tiles = sums.entropy = 0;
  }
}

// The errors that analyze measured of a unit, by one warp; all lanes have them.
__device__ __forceinline__ UnitStats unit_stats(const AnalyzeArgs& args, int unit, int64_t len_k, bool usable) {
  const AnalyzeTables& t = args.tables;
  const int tiles = static_cast<int>((len_k + decide::kTileK - 1) / decide::kTileK);
  double within = 0, between = 0, captured = 0;
  bool finite = true;
  const int rank_class = args.shape.max_rank > 0 ? t.units[unit].rank_class : 0;
#pragma unroll 4
  for (int i = threadIdx.x % 32; i < tiles; i += 32) {
    const TileEnergy& e = t.energy[int64_t{unit} * args.shape.key_tiles + i];
    within += e.within;
    between += e.between;
    captured += e.captured[rank_class];
    finite = finite && e.finite != 0;
  }
  within = warp_sum(within);
  between = warp_sum(between);
  captured = warp_sum(captured);
  finite = __all_sync(kAll, finite);
  // Sums in double, quotients of them in single precision: those in double are code that runs but once.
  UnitStats u;
  const auto total = static_cast<float>(within + between);
  u.v_spread = len_k > 0 ? sqrtf(total / static_cast<float>(len_k)) : 0.0f;
  u.usable = usable && finite && u.v_spread > 0 && isfinite(total);
  u.rank_class = u.usable ? rank_class : 0;
  if (u.usable) {
    u.errors.far_spread = sqrtf(static_cast<float>(within) / total);
    u.errors.drop_spread = sqrtf(static_cast<float>(between) / total);
  }
  if (u.rank_class > 0) {
    u.rank_energy = fminf(1.0f, static_cast<float>(captured) / total);
    u.errors.rank_allowed[u.rank_class] = true;
    u.errors.rank_error[u.rank_class] = sqrtf(1.0f - u.rank_energy);
  }
  return u;
}

// What a head's choice becomes where 8 bits are allowed.
__device__ __forceinline__ void choose_bytes(const AnalyzeArgs& args, const decide::Options& options,
                                             const decide::GroupErrors& errors, int64_t head, int tiles_k,
                                             const decide::HeadFeedback& feedback, decide::HeadChoice* choice) {
  decide::ByteScores bytes = args.bytes;
  bytes.per_head = bytes.per_head * static_cast<float>(tiles_k) / static_cast<float>(args.shape.group);
  const decide::HeadLevels& levels = args.tables.head_levels[head];
  if (decide::only_bytes(options))
    decide::put_in_bytes(levels, bytes, choice);
  else
    decide::take_bytes(options, args.costs, errors, levels, bytes, feedback, choice);
}

// When all query tiles of the unit have been measured: its errors, and the choice for its query heads, which share the
// rank. kBytes: the kernels of some of them may be those of 8 bits.
template <bool kBytes>
__device__ __forceinline__ void choose_unit(const AnalyzeArgs& args, int unit) {
  using namespace decide;
  __shared__ UnitStats stats;
  __shared__ HeadChoice best[2][kPiece];  // at the exact rank, and at the candidate
  __shared__ bool found_any[2][kPiece], take_rank, judged_dense, in_bytes;
  const TableShape& s = args.shape;
  const AnalyzeTables& t = args.tables;
  const int b = unit / s.heads_kv, first_head = unit % s.heads_kv * s.group;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Sequence seq = sequence_of(args.p, b);
  const int tiles_k = static_cast<int>((seq.len_k + kTileK - 1) / kTileK);
  const int64_t heads = int64_t{b} * s.heads_q + first_head;
  if (warp == kDecideWarps - 1) {
    UnitSums& sums = t.unit_sums[unit];
    UnitStats u = unit_stats(args, unit, seq.len_k, __ldcg(&sums.unusable) == 0);
    if (kBytes && s.bytes && only_bytes(args.options) && u.usable != 0) u.errors.round_error = args.bytes.round_error;
    __syncwarp();
    if (lane == 0) {
      t.units[unit] = stats = u;
      sums = {0, 0};
      in_bytes = kBytes && s.bytes && only_bytes(args.options);
    }
  }
  take_sums(args, heads);
  __syncthreads();

  Options options = args.options;
  options.tiles = options.tiles && stats.usable != 0;
  const HeadFeedback none;
  HeadFeedback* const feedback = args.state.feedback != nullptr ? args.state.feedback + heads : nullptr;
  const int half = lane / 16, rank = half == 0 ? 0 : stats.rank_class, level = lane % 16;
  const bool taken =
      level < kLevels && (half == 0 || rank > 0) && (options.tiles ? level >= options.min_level : level == kDenseLevel);
  // The best of a half-warp: the least cost, of equal ones the lowest level.
  const auto best_of = [&](int member, HeadChoice* choice) {
    const HeadLevels& levels = t.head_levels[heads + member];
    const float multiplier = (feedback != nullptr ? feedback[member] : none).multiplier[rank];
    bool found = false;
    float error = 0, cost = 0;
    if (taken && (level == kDenseLevel || is_selective(levels, level))) {
      error = level_error(options, stats.errors, levels, level, rank, multiplier);
      found = !(error > options.tolerance) || (level == kDenseLevel && rank == 0);
      cost = level_cost(options, args.costs, levels, level, rank);
    }
    int at = level;
#pragma unroll
    for (int step = 8; step > 0; step /= 2) {
      const bool other_found = __shfl_xor_sync(kAll, found, step);
      const float other_cost = __shfl_xor_sync(kAll, cost, step), other_error = __shfl_xor_sync(kAll, error, step);
      const int other_at = __shfl_xor_sync(kAll, at, step);
      const bool better = other_found && (!found || other_cost < cost || (other_cost == cost && other_at < at));
      found = found || other_found;
      cost = better ? other_cost : cost;
      error = better ? other_error : error;
      at = better ? other_at : at;
    }
    *choice = {at, rank, false, false, error, cost};
    return found;
  };
  int32_t* const dense_calls = args.state.dense_calls != nullptr ? args.state.dense_calls + unit : nullptr;
  const int32_t exact_calls = dense_calls != nullptr ? *dense_calls : 0;
  // Which call is the first is for the device to say: one that is captured runs later, once for every replay.
  HeadChoice* const frozen = args.state.frozen != nullptr ? args.state.frozen + heads : nullptr;
  const bool chosen_before = frozen != nullptr && args.state.chosen[unit] != 0;
  bool all_dense = true;
  // Code that runs once takes as long to fetch as to run: loops stay short.
#pragma unroll 1
  for (int first = 0; first < s.group; first += kPiece) {
    const int members = min(kPiece, s.group - first);
#pragma unroll 1
    for (int i = warp; i < members; i += kDecideWarps) {
      HeadChoice choice;
      const bool found = best_of(first + i, &choice);
      if (lane % 16 != 0) continue;
      best[half][i] = choice;
      found_any[half][i] = found;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      float dense_cost = 0, cost[2] = {0.0f, static_cast<float>(tiles_k) * args.costs.rank_setup};
      bool feasible[2] = {true, stats.rank_class > 0};
#pragma unroll 1
      for (int i = 0; i < members; ++i) {
        dense_cost += static_cast<float>(t.head_levels[heads + first + i].tiles);
        for (int h = 0; h < 2; ++h) {
          feasible[h] = found_any[h][i] && feasible[h];
          cost[h] += best[h][i].predicted_cost;
        }
      }
      // choose_group() goes through the classes in order, and the exact one is the first.
      take_rank = feasible[1] && (!feasible[0] || cost[1] < cost[0]);
      judged_dense = (!feasible[0] && !feasible[1]) || (take_rank ? cost[1] : cost[0]) * kMinGain > dense_cost;
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < members) {
      const int member = first + static_cast<int>(threadIdx.x);
      const int64_t head = heads + member;
      HeadChoice chosen = chosen_before  ? frozen[member]
                          : judged_dense ? HeadChoice{}
                                         : best[take_rank ? 1 : 0][threadIdx.x];
      // Only where the unit is looked at: captured calls decide in all of the exact ones.
      if (feedback != nullptr && exact_calls <= 1 &&
          is_refused(options, stats.errors, t.head_levels[head], chosen, feedback[member]))
        rest_refused(&feedback[member]);
      if (!chosen_before && (judged_dense || exact_calls > 0)) {
        chosen = {};
        chosen.predicted_cost = static_cast<float>(t.head_levels[head].tiles);
        chosen.predicted_error = stats.errors.round_error;
      }
      if (kBytes && s.bytes && !chosen_before && stats.usable != 0 && exact_calls == 0) {
        choose_bytes(args, options, stats.errors, head, tiles_k, feedback != nullptr ? feedback[member] : none,
                     &chosen);
        if (chosen.bytes) in_bytes = true;
      }
      // Input that the tables or the rank cannot hold is computed exactly, whatever was chosen.
      if (stats.usable == 0 || (chosen.rank_class != 0 && chosen.rank_class != stats.rank_class)) chosen = {};
      if (frozen != nullptr && !chosen_before) frozen[member] = chosen;
      t.choice[head] = chosen;
      HeadSums& sums = t.head_sums[head];
      t.head_dropped[head] = chosen.dense ? 0.0 : static_cast<double>(__ldcg(&sums.dropped[chosen.level])) / 65536.0;
      for (int i = 0; i < kLevels; ++i) sums.dropped[i] = 0;
    }
    all_dense = all_dense && (judged_dense || stats.usable == 0);
    __syncthreads();
  }
  if (frozen != nullptr && threadIdx.x == 0) args.state.chosen[unit] = 1;
  if (threadIdx.x != 0 || dense_calls == nullptr) return;
  // The last of the exact calls is the one that looks again.
  *dense_calls = exact_calls > 1 ? exact_calls - 1 : all_dense && !in_bytes ? kDenseCalls : 0;
}

}  // namespace adaattn::cuda
