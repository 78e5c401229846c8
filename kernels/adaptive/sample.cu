// The sample: about a thousand strided rows per KV head give the means and the Gram matrix behind the basis of V.
#include <algorithm>

#include "adaptive/analyze.h"
#include "adaptive/rows.cuh"
#include "adaptive/sample.h"
#include "adaptive/stage_clock.cuh"
#include "attend/launch.h"
#include "common/ptx.cuh"
#include "lowrank/gram.cuh"
#include "lowrank/subspace.h"
#include "runtime.h"

namespace adaattn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPartRows = kSampleRows / kSampleParts;
constexpr int kMaxPairs = 128;  // of columns: head_dim 256

struct Sampling {
  int64_t step, count;
};

__device__ __forceinline__ Sampling sampling_of(int64_t length) {
  Sampling s;
  s.step = (length + kSampleRows - 1) / kSampleRows;
  s.count = s.step > 0 ? (length + s.step - 1) / s.step : 0;
  return s;
}

// Sums of one part's rows; with `copy` the rows too, widened.
template <typename T>
__device__ void gather(const TokenRows<T>& rows, const Sampling& sampling, int part, int d, float* copy, double* sums) {
  __shared__ double2 partial[kThreads];
  const int pairs = d / 2, lanes = kThreads / pairs;  // rows taken at a time
  const int thread = static_cast<int>(threadIdx.x), c = thread % pairs, first = thread / pairs;
  double2 sum{0, 0};
  if (first < lanes) {
#pragma unroll 8
    for (int i = first; i < kPartRows; i += lanes) {
      const int64_t sample = part * kPartRows + i;
      float2 x{0, 0};
      if (sample < sampling.count) x = widen2<T>(pair_at(rows.row(sample * sampling.step), c));
      sum.x += x.x;
      sum.y += x.y;
      if (copy != nullptr) *reinterpret_cast<float2*>(copy + sample * d + 2 * c) = x;
    }
  }
  __syncthreads();
  partial[thread] = sum;
  __syncthreads();
  if (thread < pairs) {
    for (int i = 1; i < lanes; ++i) {
      sum.x += partial[thread + i * pairs].x;
      sum.y += partial[thread + i * pairs].y;
    }
    sums[2 * c] = sum.x;
    sums[2 * c + 1] = sum.y;
  }
}

template <typename T>
__global__ __launch_bounds__(kThreads) void gather_kernel(const __grid_constant__ AnalyzeArgs args) {
  begin_stage(args.state, kAnalyzeStage);
  const TableShape& s = args.shape;
  const int unit = blockIdx.x, part = blockIdx.y, b = unit / s.heads_kv, head = unit % s.heads_kv;
  const Sequence seq = sequence_of(args.p, b);
  const Sampling sampling = sampling_of(seq.len_k);
  double* sums = args.tables.sample_sums + (int64_t{unit} * kSampleParts + part) * (s.d_qk + s.d_v);
  if (blockIdx.z == 0) {
    gather(key_rows<T>(args.p, args.p.k, seq, b, head), sampling, part, s.d_qk, nullptr, sums);
    return;
  }
  gather(key_rows<T>(args.p, args.p.v, seq, b, head), sampling, part, s.d_v,
         args.tables.sample + int64_t{unit} * kSampleRows * s.d_v, sums + s.d_qk);
}

// Means alone, of 32 columns of K or V: all rows of the sample are on their way at once.
constexpr int kMeanColumns = 32;
template <typename T>
__global__ __launch_bounds__(kThreads) void means_kernel(const __grid_constant__ AnalyzeArgs args) {
  begin_stage(args.state, kAnalyzeStage);
  launch_dependents();
  constexpr int kWide = 8, kLanes = kMeanColumns / kWide, kRows = kThreads / kLanes, kEach = kSampleRows / kRows;
  __shared__ float partial[kRows][kMeanColumns + 4], parts[kThreads / 32][kMeanColumns];
  const TableShape& s = args.shape;
  const bool of_v = blockIdx.z != 0;
  const int d = of_v ? s.d_v : s.d_qk, unit = blockIdx.x, b = unit / s.heads_kv;
  const int thread = static_cast<int>(threadIdx.x), row = thread / kLanes, lane = thread % kLanes;
  const int first = static_cast<int>(blockIdx.y) * kMeanColumns;
  if (first >= d) return;
  const Sequence seq = sequence_of(args.p, b);
  const Sampling sampling = sampling_of(seq.len_k);
  const TokenRows<T> rows = key_rows<T>(args.p, of_v ? args.p.v : args.p.k, seq, b, unit % s.heads_kv);
  uint4 raw[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t sample = row + i * kRows;
    raw[i] = make_uint4(0, 0, 0, 0);
    if (sample < sampling.count && first + kWide * lane < d)
      raw[i] = *reinterpret_cast<const uint4*>(rows.row(sample * sampling.step) + first + kWide * lane);
  }
  float sum[kWide] = {};
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const uint32_t words[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float2 x = widen2<T>(words[c]);
      sum[2 * c] += x.x;
      sum[2 * c + 1] += x.y;
    }
  }
#pragma unroll
  for (int c = 0; c < kWide; ++c) partial[row][kWide * lane + c] = sum[c];
  __syncthreads();
  const int column = thread % 32, part = thread / 32;
  float total = 0;
  for (int r = part; r < kRows; r += kThreads / 32) total += partial[r][column];
  parts[part][column] = total;
  __syncthreads();
  if (part != 0 || first + column >= d) return;
  total = 0;
  for (int i = 0; i < kThreads / 32; ++i) total += parts[i][column];
  float* means = (of_v ? args.tables.v_mean : args.tables.k_mean) + int64_t{unit} * d + first;
  means[column] = sampling.count > 0 ? total / static_cast<float>(sampling.count) : 0.0f;
}

// Means from the parts, and the Gram matrix of V around its mean.
__global__ __launch_bounds__(kThreads) void center_kernel(const __grid_constant__ AnalyzeArgs args, double* grams,
                                                          int ld) {
  __shared__ double sum[4 * kMaxPairs];
  const TableShape& s = args.shape;
  const int unit = blockIdx.x, width = s.d_qk + s.d_v;
  const double n = static_cast<double>(sampling_of(sequence_of(args.p, unit / s.heads_kv).len_k).count);
  const double inverse = n > 0 ? 1 / n : 0.0;
  for (int i = threadIdx.x; i < width; i += kThreads) {
    double total = 0;
    for (int part = 0; part < kSampleParts; ++part)
      total += args.tables.sample_sums[(int64_t{unit} * kSampleParts + part) * width + i];
    sum[i] = total;
    if (blockIdx.y > 0) continue;
    if (i < s.d_qk)
      args.tables.k_mean[int64_t{unit} * s.d_qk + i] = static_cast<float>(total * inverse);
    else
      args.tables.v_mean[int64_t{unit} * s.d_v + i - s.d_qk] = static_cast<float>(total * inverse);
  }
  __syncthreads();
  double* gram = grams + int64_t{unit} * ld * ld;
  for (int i = blockIdx.y * kThreads + threadIdx.x; i < s.d_v * s.d_v; i += kThreads * gridDim.y) {
    const int r = i / s.d_v, c = i % s.d_v;
    const double sum_r = sum[s.d_qk + r], sum_c = sum[s.d_qk + c];
    const double mean_r = static_cast<float>(sum_r * inverse), mean_c = static_cast<float>(sum_c * inverse);
    gram[r * ld + c] += n * mean_r * mean_c - sum_r * mean_c - mean_r * sum_c;
  }
}

// The basis as attend reads it, and the least rank class that keeps enough of the sample's energy.
__global__ __launch_bounds__(kThreads) void basis_kernel(const __grid_constant__ AnalyzeArgs args, int columns) {
  const TableShape& s = args.shape;
  const decide::Options& o = args.options;
  const int unit = blockIdx.x;
  const double trace = args.tables.trace[unit];
  const bool finite = isfinite(trace) && trace > 0;
  const double* basis = args.tables.vectors + int64_t{unit} * columns * s.d_v;
  __nv_bfloat16* out = args.tables.basis + int64_t{unit} * s.d_v * s.max_rank;
  for (int i = threadIdx.x; i < s.d_v * s.max_rank; i += kThreads) {
    const int c = i / s.max_rank, j = i % s.max_rank;
    out[i] = __double2bfloat16(finite ? basis[j * s.d_v + c] : 0.0);
  }
  if (threadIdx.x >= 32) return;
  const int lane = threadIdx.x;
  const double* values = args.tables.values + int64_t{unit} * columns;
  const double cap = static_cast<double>(o.rank_ratio) * s.d_v;
  int chosen = 0;
  for (int rank_class = decide::kRankClasses - 1; rank_class > 0 && finite; --rank_class) {
    const int rank = decide::rank_of_class(rank_class);
    if (rank > s.max_rank || rank < o.min_rank) continue;
    double kept = 0;
    for (int i = lane; i < rank; i += 32) kept += values[i];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) kept += __shfl_xor_sync(0xffffffffu, kept, step);
    const bool enough = o.rank_mode == decide::RankMode::kFixed ? rank >= cap : kept >= o.rank_threshold * trace;
    if (!enough) continue;
    if (!(o.rank_mode == decide::RankMode::kEnergy && rank > cap)) chosen = rank_class;
    break;
  }
  if (lane == 0) args.tables.units[unit].rank_class = chosen;
}

}  // namespace

void sample(const AnalyzeArgs& args, cudaStream_t stream) {
  const TableShape& s = args.shape;
  const auto units = static_cast<unsigned>(args.p.batch * s.heads_kv);
  const bool bf16 = args.p.k.dtype == Dtype::kBF16;
  if (s.max_rank == 0) {
    const auto pieces = static_cast<unsigned>((std::max(s.d_qk, s.d_v) + kMeanColumns - 1) / kMeanColumns);
    check(launch_grid(bf16 ? means_kernel<__nv_bfloat16> : means_kernel<__half>, dim3(units, pieces, 2), kThreads, 0,
                      stream, args),
          "analyze");
    return;
  }
  check(launch_grid(bf16 ? gather_kernel<__nv_bfloat16> : gather_kernel<__half>, dim3(units, kSampleParts, 2), kThreads,
                    0, stream, args),
        "analyze");
  double* const gram = gram_of(sample_view(args.tables.sample, units, s.d_v), args.tables.gram_space, stream);
  SubspaceArgs basis;
  basis.batch = units;
  basis.dim = s.d_v;
  basis.ld = static_cast<int32_t>(subspace_ld(s.d_v));
  basis.columns = sample_columns(s);
  basis.gram = gram;
  basis.basis = args.tables.vectors;
  basis.state = args.state.basis;
  basis.values = args.tables.values;
  basis.trace = args.tables.trace;
  basis.warm = args.state.warm;
  basis.fast = true;
  // A rank class is a prefix of the vectors: those near its end must not be left in the previous call's order.
  basis.rotate_warm = true;
  basis.seed = args.options.seed;
  basis.scratch = args.tables.scratch;
  check(launch_grid(center_kernel, dim3(units, 8), kThreads, 0, stream, args, gram, basis.ld), "analyze");
  subspace_iteration(basis, stream);
  check(launch_grid(basis_kernel, dim3(units), kThreads, 0, stream, args, basis.columns), "analyze");
}

}  // namespace adaattn::cuda
