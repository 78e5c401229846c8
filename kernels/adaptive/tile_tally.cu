#include "adaptive/judge.cuh"
#include "adaptive/stage_clock.cuh"
#include "adaptive/tile_tally.h"
#include "attend/launch.h"
#include "attend/sm90/walk.h"
#include "common/pairs.h"
#include "common/ptx.cuh"
#include "runtime.h"

namespace adaattn::cuda {
namespace {

// By how many threads a wave is tallied, and by how many where heads are judged too.
constexpr int kFewThreads = 128, kThreads = 32 * kJudges;

// Of kCount numbers of each thread at a time, in a fixed order; the first thread has the sums.
template <int kCount, typename T>
__device__ void block_sum(T (&x)[kCount]) {
  __shared__ T part[kJudges][kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i)
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x[i] += __shfl_xor_sync(0xffffffffu, x[i], step);
  if (threadIdx.x % 32 == 0)
#pragma unroll
    for (int i = 0; i < kCount; ++i) part[threadIdx.x / 32][i] = x[i];
  __syncthreads();
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i)
#pragma unroll
    for (int w = 1; w < static_cast<int>(blockDim.x) / 32; ++w) x[i] += part[w][i];
}

// A wave of query tiles ends, and with the last one what verify follows.
__device__ __forceinline__ void end_attend(const AnalyzeArgs& args, int first_tile, bool verified, TileTotals* totals) {
  StageClock& clock = *args.state.clock;
  if (!verified) clock.start[kVerifyStage] = device_nanoseconds();
  unsigned long long* const ns = totals->stage_ns;
  // A later wave begins with decide.
  if (first_tile == 0) ns[kAnalyzeStage] += clock.start[kDecideStage] - clock.start[kAnalyzeStage];
  ns[kDecideStage] += clock.start[kAttendStage] - clock.start[kDecideStage];
  ns[kAttendStage] += clock.start[kVerifyStage] - clock.start[kAttendStage];
}

__device__ __forceinline__ void end_verify(StageClock& clock, TileTotals* totals) {
  const unsigned long long now = device_nanoseconds();
  totals->stage_ns[kVerifyStage] += now - clock.start[kVerifyStage];
  clock.start[kVerifyStage] = now;
}

__device__ __forceinline__ void copy_map(const AnalyzeArgs& args, int first_tile, int head,
                                         const TallyTargets& targets) {
  const TableShape& s = args.shape;
  const int tiles = min(s.wave_tiles, s.query_tiles - first_tile);
  const uint64_t* const masks = args.tables.mask + int64_t{head} * s.wave_tiles * s.mask_words;
  uint64_t* const map = targets.map + (int64_t{head} * s.query_tiles + first_tile) * s.mask_words;
  for (int i = static_cast<int>(threadIdx.x); i < tiles * s.mask_words; i += static_cast<int>(blockDim.x))
    map[i] = masks[i];
  const int64_t first = int64_t{head} * s.query_tiles + first_tile;
  for (int i = static_cast<int>(threadIdx.x); i < tiles; i += static_cast<int>(blockDim.x))
    targets.map_ranges[first + i] = args.tables.tile_range[first + i];
}

// What is known of a head before its tiles are counted; what was measured before stays.
__device__ __forceinline__ void start_tally(const AnalyzeArgs& args, int head, const Sequence& seq, bool far_field,
                                            HeadTally* tally) {
  const TableShape& s = args.shape;
  const decide::HeadChoice choice = args.tables.choice[head];
  const HeadTally before = *tally;
  *tally = {};
  tally->measured = before.measured;
  tally->measured_error = before.measured_error;
  tally->measured_row_error = before.measured_row_error;
  tally->len_q = seq.len_q;
  tally->len_k = seq.len_k;
  tally->feedback = args.state.feedback != nullptr ? args.state.feedback[head].multiplier[choice.rank_class] : 1.0f;
  tally->entropy = args.tables.head_entropy[head];
  // Without the far field, what decide thought of the tiles: attend never looks at them.
  if (!far_field) tally->dropped_share = args.tables.head_dropped[head];
  tally->predicted_error = choice.predicted_error;
  tally->rank_class = choice.rank_class;
  tally->dense = choice.dense;
  tally->bytes = choice.bytes;
  tally->rank_energy = choice.rank_class == 0
                           ? 1.0f
                           : args.tables.units[head / s.heads_q * s.heads_kv + head % s.heads_q / s.group].rank_energy;
}

// Of a head without a far field whose query tiles decide has added up; what was measured before stays.
__device__ __forceinline__ void take_counts(const AnalyzeArgs& args, int head, int64_t len_q, HeadTally* tally) {
  const TableShape& s = args.shape;
  const decide::HeadLevels& levels = args.tables.head_levels[head];
  const decide::HeadChoice choice = args.tables.choice[head];
  tally->tiles = levels.tiles;
  tally->kept = choice.dense ? levels.tiles : levels.kept[choice.level];
  tally->rows = static_cast<uint64_t>(len_q);
  tally->rows_kept = decide::kTileQ * tally->kept;
  if (len_q % decide::kTileQ == 0) return;
  const auto missing = static_cast<uint64_t>(decide::kTileQ - len_q % decide::kTileQ);
  tally->rows_kept -=
      missing * static_cast<uint64_t>(args.tables.kept[int64_t{head} * s.wave_tiles + len_q / decide::kTileQ]);
}

// A wave of one query head; the first thread has the result, with what was measured before.
__device__ __forceinline__ HeadTally tally_head(const AnalyzeArgs& args, int first_tile, int head,
                                                const WalkLeaves& leaves, const TallyTargets& targets) {
  const TableShape& s = args.shape;
  const int b = head / s.heads_q;
  const Sequence seq = sequence_of(args.p, b);
  const int64_t len_q = seq.len_q;
  HeadTally tally{};
  if (threadIdx.x == 0) {
    tally = targets.heads[head];
    if (first_tile == 0) start_tally(args, head, seq, leaves.far_share != nullptr, &tally);
  }
  if (s.wave_tiles == s.query_tiles && !leaves.any()) {
    if (threadIdx.x == 0) take_counts(args, head, len_q, &tally);
    return tally;
  }
  unsigned long long tiles = 0, kept = 0, rows = 0, rows_kept = 0, rows_far = 0, found = 0, rows_swept = 0;
  double far = 0;
  for (int t = first_tile + static_cast<int>(threadIdx.x); t < min(first_tile + s.wave_tiles, s.query_tiles);
       t += static_cast<int>(blockDim.x)) {
    const int64_t in_tile = min(len_q - int64_t{t} * decide::kTileQ, int64_t{decide::kTileQ});
    if (in_tile <= 0) break;
    const decide::TileRow range = args.tables.tile_range[int64_t{head} * s.query_tiles + t];
    const int64_t item = int64_t{head} * s.wave_tiles + t - first_tile;
    const int seen = range.end - range.begin;
    int exact = args.tables.kept[item];
    if (leaves.found != nullptr && exact < seen) {
      rows_swept += static_cast<unsigned long long>(in_tile) * (seen - exact);
      found += leaves.found[item];
      exact += leaves.found[item];
    }
    tiles += seen;
    kept += exact;
    rows += in_tile;
    rows_kept += static_cast<unsigned long long>(in_tile) * exact;
    if (leaves.far_share == nullptr || exact == seen) continue;
    rows_far += static_cast<unsigned long long>(in_tile) * (seen - exact);
    for (int w = 0; w < sm90::kWalkShares; ++w) far += leaves.far_share[item * sm90::kWalkShares + w];
  }
  unsigned long long counts[] = {tiles, kept, rows, rows_kept, rows_far, found, rows_swept};
  double shares[] = {far};
  block_sum(counts);
  if (leaves.far_share != nullptr) block_sum(shares);
  tally.tiles += counts[0];
  tally.kept += counts[1];
  tally.rows += counts[2];
  tally.rows_kept += counts[3];
  tally.rows_far += counts[4];
  tally.found += counts[5];
  tally.rows_swept += counts[6];
  tally.dropped_share += shares[0];
  return tally;
}

// What a head adds to a call's sums.
__device__ __forceinline__ void add_head(const AnalyzeArgs& args, int head, const HeadTally& x, TileTotals* sum) {
  const TableShape& s = args.shape;
  const double rank = x.rank_class == 0 ? s.d_v : decide::rank_of_class(x.rank_class);
  sum->heads += 1;
  sum->heads_dense += x.dense != 0;
  sum->heads_low_rank += x.rank_class != 0;
  sum->heads_bytes += x.bytes != 0;
  sum->tiles += x.tiles;
  sum->kept += x.kept;
  sum->found += x.found;
  sum->rank_v_sum += rank;
  sum->entropy_sum += x.entropy;
  sum->entropy_min = fmin(sum->entropy_min, static_cast<double>(x.entropy));
  sum->entropy_max = fmax(sum->entropy_max, static_cast<double>(x.entropy));
  sum->predicted_sum += x.predicted_error;
  sum->dropped_sum += x.rows > 0 ? x.dropped_share / static_cast<double>(x.rows) : 0;
  if (x.verified_rows > 0) {
    const auto error = static_cast<double>(x.measured_error);
    sum->verified_heads += 1;
    sum->verified_rows += x.verified_rows;
    sum->over_tolerance += x.measured_error > args.options.tolerance;
    sum->recomputed += x.recomputed != 0;
    sum->measured_sum += error;
    sum->measured_max = fmax(sum->measured_max, error);
    sum->measured_row_max = fmax(sum->measured_row_max, static_cast<double>(x.measured_row_error));
  }
  if (x.dense != 0) {
    sum->flops += 2.0 * static_cast<double>(s.d_qk + s.d_v) *
                  static_cast<double>(visible_pairs(args.p, sequence_of(args.p, head / s.heads_q)));
    return;
  }
  constexpr double kGroups = decide::kTileK / kFarKeys;
  sum->flops += 2.0 * (static_cast<double>(x.rows_kept) * decide::kTileK * (s.d_qk + rank) +
                       static_cast<double>(x.rows_far) * kGroups * (2 * s.d_qk + 1 + rank) +
                       static_cast<double>(x.rows_swept) * decide::kTileK *
                           (s.probe_columns > 0 ? args.options.probe_rank + 1 : s.d_qk) +
                       (x.rank_class == 0 ? 0.0 : static_cast<double>(x.rows) * s.d_v * rank));
}

__device__ __forceinline__ TileTotals no_heads() {
  TileTotals sum{};
  sum.entropy_min = INFINITY;
  sum.entropy_max = -INFINITY;
  return sum;
}

// The sums of several threads, of which each then takes one quantity over all: code that runs but once costs more than
// its arithmetic. sync(): of these threads.
template <int kThreads, typename Sync>
__device__ __forceinline__ TileTotals sum_threads(TileTotals sum, int thread, int threads, const Sync& sync) {
  constexpr int kCounts = 11, kSums = kCounts + 6, kQuantities = kSums + 4;
  __shared__ double part[kQuantities][kThreads], whole[kQuantities];
  const auto count = [](unsigned long long x) { return static_cast<double>(x); };  // exact up to 2^53
  const double own[kQuantities] = {
      count(sum.heads),         count(sum.heads_dense),    count(sum.heads_low_rank), count(sum.heads_bytes),
      count(sum.tiles),         count(sum.kept),           count(sum.found),          count(sum.verified_heads),
      count(sum.verified_rows), count(sum.over_tolerance), count(sum.recomputed),     sum.flops,
      sum.rank_v_sum,           sum.entropy_sum,           sum.predicted_sum,         sum.dropped_sum,
      sum.measured_sum,         -sum.entropy_min,          sum.entropy_max,           sum.measured_max,
      sum.measured_row_max};
#pragma unroll
  for (int i = 0; i < kQuantities; ++i) part[i][thread] = own[i];
  sync();
  if (thread < kQuantities) {
    double total = part[thread][0];
#pragma unroll 4
    for (int i = 1; i < threads; ++i) total = thread < kSums ? total + part[thread][i] : fmax(total, part[thread][i]);
    whole[thread] = total;
  }
  sync();
  unsigned long long* const counts[kCounts] = {
      &sum.heads, &sum.heads_dense,    &sum.heads_low_rank, &sum.heads_bytes,    &sum.tiles,     &sum.kept,
      &sum.found, &sum.verified_heads, &sum.verified_rows,  &sum.over_tolerance, &sum.recomputed};
  double* const sums[] = {&sum.flops,         &sum.rank_v_sum,  &sum.entropy_sum,
                          &sum.predicted_sum, &sum.dropped_sum, &sum.measured_sum};
#pragma unroll
  for (int i = 0; i < kCounts; ++i) *counts[i] = static_cast<unsigned long long>(whole[i]);
#pragma unroll
  for (int i = 0; i < 6; ++i) *sums[i] = whole[kCounts + i];
  sum.entropy_min = -whole[kSums];
  sum.entropy_max = whole[kSums + 1];
  sum.measured_max = whole[kSums + 2];
  sum.measured_row_max = whole[kSums + 3];
  return sum;
}

// The sums over the heads of a call by one warp.
__device__ __forceinline__ TileTotals sum_heads(const AnalyzeArgs& args, const TallyTargets& targets) {
  const int heads = static_cast<int>(args.p.batch) * args.shape.heads_q, lane = static_cast<int>(threadIdx.x) % 32;
  TileTotals sum = no_heads();
  for (int h = lane; h < heads; h += 32) add_head(args, h, targets.heads[h], &sum);
  return sum_threads<32>(sum, lane, 32, [] { __syncwarp(); });
}

__device__ __forceinline__ void add(const TileTotals& x, TileTotals* to) {
  const bool first = to->heads == 0;
  to->heads += x.heads;
  to->heads_dense += x.heads_dense;
  to->heads_low_rank += x.heads_low_rank;
  to->heads_bytes += x.heads_bytes;
  to->tiles += x.tiles;
  to->kept += x.kept;
  to->found += x.found;
  to->verified_heads += x.verified_heads;
  to->verified_rows += x.verified_rows;
  to->over_tolerance += x.over_tolerance;
  to->recomputed += x.recomputed;
  to->flops += x.flops;
  to->rank_v_sum += x.rank_v_sum;
  to->entropy_sum += x.entropy_sum;
  to->predicted_sum += x.predicted_sum;
  to->dropped_sum += x.dropped_sum;
  to->measured_sum += x.measured_sum;
  to->entropy_min = first ? x.entropy_min : fmin(to->entropy_min, x.entropy_min);
  to->entropy_max = first ? x.entropy_max : fmax(to->entropy_max, x.entropy_max);
  to->measured_max = fmax(to->measured_max, x.measured_max);
  to->measured_row_max = fmax(to->measured_row_max, x.measured_row_max);
}

// For how many more calls all units will be computed exactly, by one warp, which leaves the units' own numbers to the
// next call.
__device__ __forceinline__ int exact_ahead(const AnalyzeArgs& args) {
  int ahead = args.state.dense_calls == nullptr ? 0 : kDenseCalls;
  const int units = ahead > 0 ? static_cast<int>(args.p.batch) * args.shape.heads_kv : 0;
  for (int u = static_cast<int>(threadIdx.x) % 32; u < units; u += 32) {
    const int32_t calls = args.state.dense_calls[u];
    args.state.dense_left[u] = calls;
    ahead = min(ahead, calls);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) ahead = min(ahead, __shfl_xor_sync(0xffffffffu, ahead, step));
  return ahead;
}

__device__ __forceinline__ void tell(const AnalyzeArgs& args, int ahead, const TallyTargets& targets) {
  const unsigned long long calls = ++*args.state.calls;
  *static_cast<volatile unsigned long long*>(targets.outlook) = calls << kOutlookBits | static_cast<unsigned>(ahead);
}

// One CTA per (sequence, query head). ends: this is the call's last wave; its heads are judged, and the last CTA adds
// them to the totals. Where nothing is verified all of that happens beside the walk's end.
__global__ __launch_bounds__(kThreads) void tally_kernel(const __grid_constant__ AnalyzeArgs args, int first_tile,
                                                         const WalkLeaves leaves, TallyTargets targets,
                                                         VerifyShape verify, const VerifyPart* parts, bool ends) {
  __shared__ bool last;
  const int head = static_cast<int>(blockIdx.x);
  const bool verified = ends && parts != nullptr && *args.state.calls % verify.every == 0;
  const bool first = head == 0 && threadIdx.x == 0;
  // The schedule is there since before the grids that walk it let this one start, but a probe adds to it.
  if (leaves.any()) wait_for_previous_grid();
  if (targets.map != nullptr) copy_map(args, first_tile, head, targets);
  HeadTally tally = tally_head(args, first_tile, head, leaves, targets);
  if (verified || !ends) {
    wait_for_previous_grid();
    if (args.state.clock != nullptr && first) end_attend(args, first_tile, verified, targets.totals);
  }
  if (verified) judge_head(args, verify, parts, head, &tally);
  if (threadIdx.x == 0) {
    targets.heads[head] = tally;
    __threadfence();
    last = ends && atomicAdd(targets.ctas, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last || threadIdx.x >= 32) return;
  __threadfence();
  const TileTotals sum = sum_heads(args, targets);
  const int ahead = exact_ahead(args);
  if (threadIdx.x == 0) {
    *targets.ctas = 0;
    add(sum, targets.totals);
    *targets.newest = sum;
  }
  wait_for_previous_grid();
  if (threadIdx.x != 0) return;
  if (args.state.clock != nullptr) {
    if (!verified) end_attend(args, first_tile, false, targets.totals);
    end_verify(*args.state.clock, targets.totals);
  }
  tell(args, ahead, targets);
}

// The same where nothing is verified and one wave was all: decide has added up what a head counts, and one CTA takes
// all heads. The others copy their maps.
__global__ __launch_bounds__(kFewThreads) void count_kernel(const __grid_constant__ AnalyzeArgs args,
                                                            TallyTargets targets) {
  if (blockIdx.x > 0) return copy_map(args, 0, static_cast<int>(blockIdx.x) - 1, targets);
  const int heads = static_cast<int>(args.p.batch) * args.shape.heads_q, thread = static_cast<int>(threadIdx.x);
  TileTotals sum = no_heads();
  for (int head = thread; head < heads; head += kFewThreads) {
    HeadTally tally = targets.heads[head];
    const Sequence seq = sequence_of(args.p, head / args.shape.heads_q);
    start_tally(args, head, seq, false, &tally);
    take_counts(args, head, seq.len_q, &tally);
    targets.heads[head] = tally;
    add_head(args, head, tally, &sum);
  }
  sum = sum_threads<kFewThreads>(sum, thread, min(heads, kFewThreads), [] { __syncthreads(); });
  const int ahead = exact_ahead(args);
  if (thread == 0) {
    add(sum, targets.totals);
    *targets.newest = sum;
  }
  wait_for_previous_grid();
  if (thread != 0) return;
  if (args.state.clock != nullptr) {
    end_attend(args, 0, false, targets.totals);
    end_verify(*args.state.clock, targets.totals);
  }
  tell(args, ahead, targets);
}

__global__ void recompute_end_kernel(const __grid_constant__ AdaptiveState state, TileTotals* totals) {
  end_verify(*state.clock, totals);
}

// Ends a call of the exact kernel, which gave what the newest call of tallies did. looked: after analyze and decide;
// otherwise the host knows already for how many calls the units are computed exactly.
__global__ __launch_bounds__(32) void exact_end_kernel(const __grid_constant__ AnalyzeArgs args, TallyTargets targets,
                                                       bool looked) {
  // Beside the end of the exact kernel, which touches none of this.
  TileTotals sum = *targets.newest, totals = *targets.totals;
  sum.verified_heads = sum.verified_rows = sum.over_tolerance = sum.recomputed = 0;
  sum.measured_sum = sum.measured_max = sum.measured_row_max = 0;
  add(sum, &totals);
  const int units = static_cast<int>(args.p.batch) * args.shape.heads_kv;
  for (int u = static_cast<int>(threadIdx.x); u < units && !looked; u += 32)
    args.state.dense_left[u] = --args.state.dense_calls[u];
  const StageClock* const clock = args.state.clock;
  if (clock != nullptr && looked) {
    totals.stage_ns[kAnalyzeStage] += clock->start[kDecideStage] - clock->start[kAnalyzeStage];
    totals.stage_ns[kDecideStage] += clock->start[kAttendStage] - clock->start[kDecideStage];
  }
  const int ahead = looked ? exact_ahead(args) : 0;
  // The look has let the multipliers of refused heads rest.
  const int heads = static_cast<int>(args.p.batch) * args.shape.heads_q;
  for (int h = static_cast<int>(threadIdx.x); h < heads && looked && args.state.feedback != nullptr; h += 32)
    targets.heads[h].feedback = args.state.feedback[h].multiplier[targets.heads[h].rank_class];
  wait_for_previous_grid();
  if (threadIdx.x != 0) return;
  if (clock != nullptr) totals.stage_ns[kAttendStage] += device_nanoseconds() - clock->start[kAttendStage];
  *targets.totals = totals;
  if (looked)
    tell(args, ahead, targets);
  else
    ++*args.state.calls;
}

__global__ void exact_begin_kernel(const __grid_constant__ AdaptiveState state) {
  launch_dependents();
  begin_stage(state, kAttendStage);
}

}  // namespace

void prepare_tally() {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, tally_kernel), "statistics");
  check(cudaFuncGetAttributes(&attributes, count_kernel), "statistics");
  check(cudaFuncGetAttributes(&attributes, exact_end_kernel), "statistics");
  check(cudaFuncGetAttributes(&attributes, exact_begin_kernel), "statistics");
  check(cudaFuncGetAttributes(&attributes, recompute_end_kernel), "statistics");
}

cudaError_t launch_tally(const AnalyzeArgs& args, int32_t first_tile, const WalkLeaves& leaves,
                         const TallyTargets& targets, const VerifyShape& verify, const VerifyPart* parts, bool ends,
                         cudaStream_t stream) {
  const auto heads = static_cast<unsigned>(args.p.batch * args.shape.heads_q);
  if (ends && parts == nullptr && !leaves.any() && args.shape.wave_tiles == args.shape.query_tiles)
    return launch_grid_overlapped(count_kernel, dim3(1 + (targets.map != nullptr ? heads : 0)), kFewThreads, 0, stream,
                                  true, args, targets);
  const int threads = ends && parts != nullptr ? kThreads : kFewThreads;
  return launch_grid_overlapped(tally_kernel, dim3(heads), threads, 0, stream, true, args, first_tile, leaves, targets,
                                verify, parts, ends);
}

cudaError_t launch_recompute_end(const AnalyzeArgs& args, const TallyTargets& targets, cudaStream_t stream) {
  return launch_grid(recompute_end_kernel, dim3(1), 1, 0, stream, args.state, targets.totals);
}

cudaError_t launch_exact_begin(const AnalyzeArgs& args, cudaStream_t stream) {
  return launch_grid(exact_begin_kernel, dim3(1), 1, 0, stream, args.state);
}

cudaError_t launch_exact_end(const AnalyzeArgs& args, const TallyTargets& targets, bool looked, cudaStream_t stream) {
  return launch_grid_overlapped(exact_end_kernel, dim3(1), 32, 0, stream, true, args, targets, looked);
}

}  // namespace adaattn::cuda
