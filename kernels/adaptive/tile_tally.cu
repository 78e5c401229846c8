#include "adaptive/stage_clock.cuh"
#include "adaptive/tile_tally.h"
#include "attend/launch.h"
#include "attend/sm90/walk.h"
#include "common/pairs.h"
#include "runtime.h"

namespace adaattn::cuda {
namespace {

constexpr int kThreads = 128;

constexpr int kWarps = kThreads / 32;

template <typename T>
__device__ T shuffled(T x, int step) {
  return __shfl_xor_sync(0xffffffffu, x, step);
}

// Of kCount numbers of each thread at a time, in a fixed order; the first warp's lanes have the results.
template <int kCount, typename T, typename Combine>
__device__ void block_reduce(T (&x)[kCount], const Combine& combine) {
  __shared__ T part[kWarps][kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i)
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x[i] = combine(x[i], shuffled(x[i], step));
  if (threadIdx.x % 32 == 0)
#pragma unroll
    for (int i = 0; i < kCount; ++i) part[threadIdx.x / 32][i] = x[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    x[i] = part[0][i];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) x[i] = combine(x[i], part[w][i]);
  }
}

struct Sum {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Largest {
  __device__ double operator()(double a, double b) const { return fmax(a, b); }
};

// One CTA per (sequence, query head).
__global__ __launch_bounds__(kThreads) void tally_kernel(const __grid_constant__ AnalyzeArgs args, int first_tile,
                                                         const float* far_share, TallyTargets targets) {
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
  unsigned long long counts[] = {tiles, kept, rows, rows_kept, rows_far};
  double shares[] = {far};
  block_reduce(counts, Sum());
  block_reduce(shares, Sum());
  if (threadIdx.x != 0) return;
  HeadTally tally = targets.heads[head];
  if (first_tile == 0) {
    const decide::HeadChoice& choice = args.tables.choice[head];
    const HeadTally before = tally;
    tally = {};
    tally.measured = before.measured;
    tally.measured_error = before.measured_error;
    tally.measured_row_error = before.measured_row_error;
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
  tally.tiles += counts[0];
  tally.kept += counts[1];
  tally.rows += counts[2];
  tally.rows_kept += counts[3];
  tally.rows_far += counts[4];
  tally.far_share += shares[0];
  targets.heads[head] = tally;
}

// In one CTA and a fixed order.
__global__ __launch_bounds__(kThreads) void total_kernel(const __grid_constant__ AnalyzeArgs args, TallyTargets targets,
                                                         bool unseen_call) {
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
    constexpr double kGroups = decide::kTileK / kFarKeys;
    sum.flops += 2.0 * (static_cast<double>(x.rows_kept) * decide::kTileK * (s.d_qk + rank) +
                        static_cast<double>(x.rows_far) * kGroups * (2 * s.d_qk + 1 + rank) +
                        (x.rank_class == 0 ? 0.0 : static_cast<double>(x.rows) * s.d_v * rank));
  }
  int unseen = kDenseCalls;
  for (int u = static_cast<int>(threadIdx.x); u < static_cast<int>(args.p.batch) * s.heads_kv; u += kThreads)
    unseen = args.state.dense_calls == nullptr ? 0 : min(unseen, args.state.dense_calls[u] -= unseen_call ? 1 : 0);
  unsigned long long counts[] = {sum.heads, sum.heads_dense,    sum.heads_low_rank, sum.tiles,
                                 sum.kept,  sum.verified_heads, sum.verified_rows,  sum.over_tolerance};
  double sums[] = {sum.flops, sum.rank_v_sum, sum.entropy_sum, sum.predicted_sum, sum.far_sum, sum.measured_sum};
  double largest[] = {-sum.entropy_min, sum.entropy_max, sum.measured_max, sum.measured_row_max,
                      -static_cast<double>(unseen)};
  block_reduce(counts, Sum());
  block_reduce(sums, Sum());
  block_reduce(largest, Largest());
  if (threadIdx.x != 0) return;
  const bool first = totals->heads == 0;
  totals->heads += counts[0];
  totals->heads_dense += counts[1];
  totals->heads_low_rank += counts[2];
  totals->tiles += counts[3];
  totals->kept += counts[4];
  totals->verified_heads += counts[5];
  totals->verified_rows += counts[6];
  totals->over_tolerance += counts[7];
  totals->flops += sums[0];
  totals->rank_v_sum += sums[1];
  totals->entropy_sum += sums[2];
  totals->predicted_sum += sums[3];
  totals->far_sum += sums[4];
  totals->measured_sum += sums[5];
  totals->entropy_min = first ? -largest[0] : fmin(totals->entropy_min, -largest[0]);
  totals->entropy_max = first ? largest[1] : fmax(totals->entropy_max, largest[1]);
  totals->measured_max = fmax(totals->measured_max, largest[2]);
  totals->measured_row_max = fmax(totals->measured_row_max, largest[3]);
  if (args.state.clock != nullptr) {
    const Stage last = unseen_call ? kAttendStage : kVerifyStage;
    totals->stage_ns[last] += device_nanoseconds() - args.state.clock->start[last];
  }
  const unsigned long long calls = ++*args.state.calls;
  *static_cast<volatile unsigned long long*>(targets.outlook) =
      calls << kOutlookBits | static_cast<unsigned>(-largest[4]);
}

__global__ void unseen_begin_kernel(const __grid_constant__ AnalyzeArgs args) { begin_stage(args.state, kAttendStage); }

}  // namespace

void prepare_tally() {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, tally_kernel), "statistics");
  check(cudaFuncGetAttributes(&attributes, total_kernel), "statistics");
  check(cudaFuncGetAttributes(&attributes, unseen_begin_kernel), "statistics");
}

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
