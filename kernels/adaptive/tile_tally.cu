#include "adaptive/stage_clock.cuh"
#include "adaptive/tile_tally.h"
#include "attend/launch.h"
#include "attend/sm90/walk.h"
#include "common/pairs.h"

namespace adaattn::cuda {
namespace {

constexpr int kThreads = 128;

template <typename T>
__device__ T block_sum(T x, T* shared) {
  shared[threadIdx.x] = x;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  const T sum = shared[0];
  __syncthreads();
  return sum;
}

// One CTA per (sequence, query head).
__global__ __launch_bounds__(kThreads) void tally_kernel(const __grid_constant__ AnalyzeArgs args, int first_tile,
                                                         const float* far_share, TallyTargets targets) {
  __shared__ unsigned long long integers[kThreads];
  __shared__ double reals[kThreads];
  const TableShape& s = args.shape;
  const int head = static_cast<int>(blockIdx.x), b = head / s.heads_q;
  const Sequence seq = sequence_of(args.p, b);
  const int64_t len_q = seq.len_q;
  if (args.state.clock != nullptr && head == 0 && threadIdx.x == 0) {
    StageClock& clock = *args.state.clock;
    const unsigned long long now = device_nanoseconds();
    unsigned long long* const ns = targets.totals->stage_ns;
    // A later wave begins with decide.
    if (first_tile == 0) ns[kAnalyzeStage] += clock.start[kDecideStage] - clock.start[kAnalyzeStage];
    ns[kDecideStage] += clock.start[kAttendStage] - clock.start[kDecideStage];
    ns[kAttendStage] += now - clock.start[kAttendStage];
    clock.start[kVerifyStage] = now;
  }
  if (targets.map != nullptr) {
    const int tiles = min(s.wave_tiles, s.query_tiles - first_tile);
    const uint64_t* const masks = args.tables.mask + int64_t{head} * s.wave_tiles * s.mask_words;
    uint64_t* const map = targets.map + (int64_t{head} * s.query_tiles + first_tile) * s.mask_words;
    for (int i = static_cast<int>(threadIdx.x); i < tiles * s.mask_words; i += kThreads) map[i] = masks[i];
    const int64_t first = int64_t{head} * s.query_tiles + first_tile;
    for (int i = static_cast<int>(threadIdx.x); i < tiles; i += kThreads)
      targets.map_ranges[first + i] = args.tables.tile_range[first + i];
  }
  unsigned long long tiles = 0, kept = 0, rows = 0, rows_kept = 0, rows_far = 0;
  double far = 0;
  for (int t = first_tile + static_cast<int>(threadIdx.x); t < min(first_tile + s.wave_tiles, s.query_tiles);
       t += kThreads) {
    const int64_t in_tile = min(len_q - int64_t{t} * decide::kTileQ, int64_t{decide::kTileQ});
    if (in_tile <= 0) break;
    const decide::TileRow range = args.tables.tile_range[int64_t{head} * s.query_tiles + t];
    const int64_t item = int64_t{head} * s.wave_tiles + t - first_tile;
    const int seen = range.end - range.begin, exact = args.tables.kept[item];
    tiles += seen;
    kept += exact;
    rows += in_tile;
    rows_kept += static_cast<unsigned long long>(in_tile) * exact;
    if (far_share == nullptr || exact == seen) continue;
    rows_far += static_cast<unsigned long long>(in_tile) * (seen - exact);
    for (int w = 0; w < sm90::kWalkShares; ++w) far += far_share[item * sm90::kWalkShares + w];
  }
  tiles = block_sum(tiles, integers);
  kept = block_sum(kept, integers);
  rows = block_sum(rows, integers);
  rows_kept = block_sum(rows_kept, integers);
  rows_far = block_sum(rows_far, integers);
  far = block_sum(far, reals);
  if (threadIdx.x != 0) return;
  HeadTally tally = targets.heads[head];
  if (first_tile == 0) {
    const decide::HeadChoice& choice = args.tables.choice[head];
    tally = {};
    tally.len_q = len_q;
    tally.len_k = seq.len_k;
    tally.feedback = args.state.feedback != nullptr ? args.state.feedback[head].multiplier[choice.rank_class] : 1.0f;
    tally.entropy = args.tables.head_entropy[head];
    tally.predicted_error = choice.predicted_error;
    tally.rank_class = choice.rank_class;
    tally.dense = choice.dense;
    tally.rank_energy =
        choice.rank_class == 0 ? 1.0f : args.tables.units[b * s.heads_kv + head % s.heads_q / s.group].rank_energy;
  }
  tally.tiles += tiles;
  tally.kept += kept;
  tally.rows += rows;
  tally.rows_kept += rows_kept;
  tally.rows_far += rows_far;
  tally.far_share += far;
  targets.heads[head] = tally;
}

// In one CTA and a fixed order.
__global__ __launch_bounds__(kThreads) void total_kernel(const __grid_constant__ AnalyzeArgs args, TallyTargets targets,
                                                         bool unseen_call) {
  __shared__ unsigned long long integers[kThreads];
  __shared__ double reals[kThreads];
  const TableShape& s = args.shape;
  const int count = static_cast<int>(args.p.batch) * s.heads_q;
  TileTotals* const totals = targets.totals;
  TileTotals sum{};
  sum.entropy_min = INFINITY;
  sum.entropy_max = -INFINITY;
  for (int h = static_cast<int>(threadIdx.x); h < count; h += kThreads) {
    const HeadTally& x = targets.heads[h];
    const double rank = x.rank_class == 0 ? s.d_v : decide::rank_of_class(x.rank_class);
    sum.heads += 1;
    sum.heads_dense += x.dense != 0;
    sum.heads_low_rank += x.rank_class != 0;
    sum.tiles += x.tiles;
    sum.kept += x.kept;
    sum.rank_v_sum += rank;
    sum.entropy_sum += x.entropy;
    sum.entropy_min = fmin(sum.entropy_min, static_cast<double>(x.entropy));
    sum.entropy_max = fmax(sum.entropy_max, static_cast<double>(x.entropy));
    sum.predicted_sum += x.predicted_error;
    sum.far_sum += x.rows > 0 ? x.far_share / static_cast<double>(x.rows) : 0;
    if (x.verified_rows > 0) {
      const auto error = static_cast<double>(x.measured_error);
      sum.verified_heads += 1;
      sum.verified_rows += x.verified_rows;
      sum.over_tolerance += x.measured_error > args.options.tolerance;
      sum.measured_sum += error;
      sum.measured_max = fmax(sum.measured_max, error);
      sum.measured_row_max = fmax(sum.measured_row_max, static_cast<double>(x.measured_row_error));
    }
    if (x.dense != 0) {
      sum.flops += 2.0 * static_cast<double>(s.d_qk + s.d_v) *
                   static_cast<double>(visible_pairs(args.p, sequence_of(args.p, h / s.heads_q)));
      continue;
    }
    constexpr double kGroups = decide::kTileK / decide::kGroupK;
    sum.flops += 2.0 * (static_cast<double>(x.rows_kept) * decide::kTileK * (s.d_qk + rank) +
                        static_cast<double>(x.rows_far) * kGroups * (2 * s.d_qk + 1 + rank) +
                        (x.rank_class == 0 ? 0.0 : static_cast<double>(x.rows) * s.d_v * rank));
  }
  const auto block_max = [&](double x) {
    reals[threadIdx.x] = x;
    __syncthreads();
    for (int i = 0; i < kThreads; ++i) x = fmax(x, reals[i]);
    __syncthreads();
    return x;
  };
  for (unsigned long long* x : {&sum.heads, &sum.heads_dense, &sum.heads_low_rank, &sum.tiles, &sum.kept,
                                &sum.verified_heads, &sum.verified_rows, &sum.over_tolerance})
    *x = block_sum(*x, integers);
  for (double* x : {&sum.flops, &sum.rank_v_sum, &sum.entropy_sum, &sum.predicted_sum, &sum.far_sum, &sum.measured_sum})
    *x = block_sum(*x, reals);
  sum.entropy_min = -block_max(-sum.entropy_min);
  sum.entropy_max = block_max(sum.entropy_max);
  sum.measured_max = block_max(sum.measured_max);
  sum.measured_row_max = block_max(sum.measured_row_max);
  int unseen = kDenseCalls;
  for (int u = static_cast<int>(threadIdx.x); u < static_cast<int>(args.p.batch) * s.heads_kv; u += kThreads)
    unseen = args.state.dense_calls == nullptr ? 0 : min(unseen, args.state.dense_calls[u] -= unseen_call ? 1 : 0);
  unseen = -static_cast<int>(block_max(-unseen));
  if (threadIdx.x != 0) return;
  const bool first = totals->heads == 0;
  totals->heads += sum.heads;
  totals->heads_dense += sum.heads_dense;
  totals->heads_low_rank += sum.heads_low_rank;
  totals->tiles += sum.tiles;
  totals->kept += sum.kept;
  totals->flops += sum.flops;
  totals->rank_v_sum += sum.rank_v_sum;
  totals->entropy_sum += sum.entropy_sum;
  totals->entropy_min = first ? sum.entropy_min : fmin(totals->entropy_min, sum.entropy_min);
  totals->entropy_max = first ? sum.entropy_max : fmax(totals->entropy_max, sum.entropy_max);
  totals->predicted_sum += sum.predicted_sum;
  totals->far_sum += sum.far_sum;
  totals->verified_heads += sum.verified_heads;
  totals->verified_rows += sum.verified_rows;
  totals->over_tolerance += sum.over_tolerance;
  totals->measured_sum += sum.measured_sum;
  totals->measured_max = fmax(totals->measured_max, sum.measured_max);
  totals->measured_row_max = fmax(totals->measured_row_max, sum.measured_row_max);
  if (args.state.clock != nullptr) {
    const Stage last = unseen_call ? kAttendStage : kVerifyStage;
    totals->stage_ns[last] += device_nanoseconds() - args.state.clock->start[last];
  }
  const unsigned long long calls = ++*args.state.calls;
  *static_cast<volatile unsigned long long*>(targets.outlook) = calls << kOutlookBits | static_cast<unsigned>(unseen);
}

__global__ void unseen_begin_kernel(const __grid_constant__ AnalyzeArgs args) { begin_stage(args.state, kAttendStage); }

}  // namespace

cudaError_t launch_tally(const AnalyzeArgs& args, int32_t first_tile, const float* far_share,
                         const TallyTargets& targets, cudaStream_t stream) {
  return launch_grid(tally_kernel, dim3(static_cast<unsigned>(args.p.batch * args.shape.heads_q)), kThreads, 0, stream,
                     args, first_tile, far_share, targets);
}

cudaError_t launch_total(const AnalyzeArgs& args, const TallyTargets& targets, cudaStream_t stream) {
  return launch_grid(total_kernel, dim3(1), kThreads, 0, stream, args, targets, false);
}

cudaError_t launch_unseen_begin(const AnalyzeArgs& args, cudaStream_t stream) {
  return launch_grid(unseen_begin_kernel, dim3(1), 1, 0, stream, args);
}

cudaError_t launch_unseen_end(const AnalyzeArgs& args, const TallyTargets& targets, cudaStream_t stream) {
  return launch_grid(total_kernel, dim3(1), kThreads, 0, stream, args, targets, true);
}

}  // namespace adaattn::cuda
