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
                                                         const float* far_share, HeadTally* heads) {
  __shared__ unsigned long long integers[kThreads];
  __shared__ double reals[kThreads];
  const TableShape& s = args.shape;
  const int head = static_cast<int>(blockIdx.x), b = head / s.heads_q;
  const int64_t len_q = sequence_of(args.p, b).len_q;
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
  HeadTally tally = heads[head];
  if (first_tile == 0) {
    const decide::HeadChoice& choice = args.tables.choice[head];
    tally = {};
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
  heads[head] = tally;
}

// In one CTA and a fixed order.
__global__ __launch_bounds__(kThreads) void total_kernel(const __grid_constant__ AnalyzeArgs args,
                                                         const HeadTally* heads, TileTotals* totals) {
  __shared__ unsigned long long integers[kThreads];
  __shared__ double reals[kThreads];
  const TableShape& s = args.shape;
  const int count = static_cast<int>(args.p.batch) * s.heads_q;
  TileTotals sum{};
  sum.entropy_min = INFINITY;
  sum.entropy_max = -INFINITY;
  for (int h = static_cast<int>(threadIdx.x); h < count; h += kThreads) {
    const HeadTally& x = heads[h];
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
  const double low = sum.entropy_min, high = sum.entropy_max;
  sum.heads = block_sum(sum.heads, integers);
  sum.heads_dense = block_sum(sum.heads_dense, integers);
  sum.heads_low_rank = block_sum(sum.heads_low_rank, integers);
  sum.tiles = block_sum(sum.tiles, integers);
  sum.kept = block_sum(sum.kept, integers);
  for (double* x : {&sum.flops, &sum.rank_v_sum, &sum.entropy_sum, &sum.predicted_sum, &sum.far_sum})
    *x = block_sum(*x, reals);
  reals[threadIdx.x] = low;
  __syncthreads();
  for (int i = 0; i < kThreads; ++i) sum.entropy_min = fmin(sum.entropy_min, reals[i]);
  __syncthreads();
  reals[threadIdx.x] = high;
  __syncthreads();
  for (int i = 0; i < kThreads; ++i) sum.entropy_max = fmax(sum.entropy_max, reals[i]);
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
}

}  // namespace

cudaError_t launch_tally(const AnalyzeArgs& args, int32_t first_tile, const float* far_share, HeadTally* heads,
                         cudaStream_t stream) {
  return launch_grid(tally_kernel, dim3(static_cast<unsigned>(args.p.batch * args.shape.heads_q)), kThreads, 0, stream,
                     args, first_tile, far_share, heads);
}

cudaError_t launch_total(const AnalyzeArgs& args, const HeadTally* heads, TileTotals* totals, cudaStream_t stream) {
  return launch_grid(total_kernel, dim3(1), kThreads, 0, stream, args, heads, totals);
}

}  // namespace adaattn::cuda
