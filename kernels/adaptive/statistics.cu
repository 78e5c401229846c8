// One read of Q, K and V: statistics of every tile, the centroids of every 32 keys, and V in the basis.
#include "adaptive/analyze.h"
#include "adaptive/rows.cuh"
#include "adaptive/sample.h"
#include "attend/launch.h"
#include "common/ptx.cuh"
#include "runtime.h"

namespace adaattn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = decide::kTileK;
constexpr int kGroupRows = decide::kGroupK;
constexpr int kGroups = kRows / kGroupRows;
constexpr int kMaxDim = 256;
constexpr float kHalfLn2 = 0.34657359027997264f;

struct Shared {
  float mean[kGroups][kMaxDim], variance[kGroups][kMaxDim];
  float part[kWarps][96];
  double sums[kWarps][2 + decide::kRankClasses];
};

// 32 rows of two columns, the rows from `count` on 0.
template <typename T>
__device__ __forceinline__ void load_group(const TokenRows<T>& rows, int64_t first, int count, int column,
                                           uint32_t (&raw)[kGroupRows]) {
#pragma unroll
  for (int i = 0; i < kGroupRows; ++i) raw[i] = i < count ? pair_at(rows.row(first + i), column) : 0u;
}

struct Moments {
  float2 mean, variance;
};

template <typename T>
__device__ __forceinline__ Moments moments_of(const uint32_t (&raw)[kGroupRows], int count) {
  Moments m{{0, 0}, {0, 0}};
  if (count <= 0) return m;
  const float inverse = 1.0f / static_cast<float>(count);
#pragma unroll
  for (int i = 0; i < kGroupRows; ++i) {
    const float2 x = widen2<T>(raw[i]);
    m.mean.x += x.x;
    m.mean.y += x.y;
  }
  m.mean.x *= inverse;
  m.mean.y *= inverse;
#pragma unroll
  for (int i = 0; i < kGroupRows; ++i) {
    if (i >= count) break;
    const float2 x = widen2<T>(raw[i]);
    m.variance.x = fmaf(x.x - m.mean.x, x.x - m.mean.x, m.variance.x);
    m.variance.y = fmaf(x.y - m.mean.y, x.y - m.mean.y, m.variance.y);
  }
  m.variance.x *= inverse;
  m.variance.y *= inverse;
  return m;
}

__device__ __forceinline__ int rows_of_group(int rows, int group) {
  return max(0, min(kGroupRows, rows - group * kGroupRows));
}

// Mean and variance of a tile's column from those of its groups.
struct TileMoments {
  float mean = 0, variance = 0;
};
__device__ __forceinline__ TileMoments combine(const Shared& shared, int rows, int column) {
  TileMoments m;
  const float inverse = 1.0f / static_cast<float>(rows);
  for (int g = 0; g < kGroups; ++g)
    m.mean += static_cast<float>(rows_of_group(rows, g)) * inverse * shared.mean[g][column];
  for (int g = 0; g < kGroups; ++g) {
    const float shift = shared.mean[g][column] - m.mean;
    m.variance += static_cast<float>(rows_of_group(rows, g)) * inverse * (shared.variance[g][column] + shift * shift);
  }
  return m;
}

template <typename T>
__device__ __forceinline__ void query_tile(const AnalyzeArgs& args, Shared& shared, int index) {
  const TableShape& s = args.shape;
  const int tile = index % s.query_tiles, head = index / s.query_tiles % s.heads_q,
            b = index / s.query_tiles / s.heads_q;
  const Sequence seq = sequence_of(args.p, b);
  const int rows = static_cast<int>(min(static_cast<int64_t>(kRows), seq.len_q - int64_t{tile} * kRows));
  if (rows <= 0) return;
  const TokenRows<T> q = query_rows<T>(args.p, seq, b, head);
  for (int item = threadIdx.x; item < kGroups * s.d_qk / 2; item += kThreads) {
    const int g = item / (s.d_qk / 2), c = item % (s.d_qk / 2), count = rows_of_group(rows, g);
    uint32_t raw[kGroupRows];
    load_group(q, int64_t{tile} * kRows + g * kGroupRows, count, c, raw);
    const Moments m = moments_of<T>(raw, count);
    *reinterpret_cast<float2*>(&shared.mean[g][2 * c]) = m.mean;
    *reinterpret_cast<float2*>(&shared.variance[g][2 * c]) = m.variance;
  }
  __syncthreads();
  float* terms = args.tables.query_terms + int64_t{index} * 3 * s.d_qk;
  for (int c = threadIdx.x; c < s.d_qk; c += kThreads) {
    const TileMoments m = combine(shared, rows, c);
    const float mean = args.scale_log2 * m.mean, variance = args.scale_log2 * args.scale_log2 * m.variance;
    terms[c] = mean;
    terms[s.d_qk + c] = mean * mean + variance;
    terms[2 * s.d_qk + c] = variance;
  }
}

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// K of a tile: terms and centroids. Returns a sum that is not finite if some element is not.
template <typename T>
__device__ __forceinline__ float key_moments(const AnalyzeArgs& args, Shared& shared, const TokenRows<T>& k, int unit,
                                             int tile, int rows) {
  const TableShape& s = args.shape;
  const int d = s.d_qk;
  __nv_bfloat16* centroids = args.tables.group_k + (int64_t{unit} * s.key_groups() + tile * kGroups) * 2 * d;
  const float factor = args.scale_log2 * kHalfLn2;
  float check = 0;
  for (int item = threadIdx.x; item < kGroups * d / 2; item += kThreads) {
    const int g = item / (d / 2), c = item % (d / 2), count = rows_of_group(rows, g);
    uint32_t raw[kGroupRows];
    load_group(k, int64_t{tile} * kRows + g * kGroupRows, count, c, raw);
    const Moments m = moments_of<T>(raw, count);
    *reinterpret_cast<float2*>(&shared.mean[g][2 * c]) = m.mean;
    *reinterpret_cast<float2*>(&shared.variance[g][2 * c]) = m.variance;
    auto* out = reinterpret_cast<uint32_t*>(centroids + int64_t{g} * 2 * d);
    out[c] = pack2<__nv_bfloat16>(m.mean.x, m.mean.y);
    out[d / 2 + c] = pack2<__nv_bfloat16>(factor * m.variance.x, factor * m.variance.y);
    check += m.variance.x + m.variance.y;
  }
  __syncthreads();
  float* terms = args.tables.key_terms + (int64_t{unit} * s.key_tiles + tile) * 3 * d;
  const float* mean = args.tables.k_mean + int64_t{unit} * d;
  for (int c = threadIdx.x; c < d; c += kThreads) {
    const TileMoments m = combine(shared, rows, c);
    const float centred = m.mean - mean[c];
    terms[c] = centred;
    terms[d + c] = kHalfLn2 * m.variance;
    terms[2 * d + c] = kHalfLn2 * centred * centred;
  }
  __syncthreads();
  return check;
}

// V of a tile: energies and centroids, and the rows less the mean to shared memory [128][ld] in bf16.
template <typename T>
__device__ __forceinline__ void value_moments(const AnalyzeArgs& args, Shared& shared, const TokenRows<T>& v, int unit,
                                              int tile, int rows, __nv_bfloat16* centred, int ld, float* within,
                                              float* between_groups, float* between_tiles) {
  const TableShape& s = args.shape;
  const int d = s.d_v;
  __nv_bfloat16* centroids = args.tables.group_v + (int64_t{unit} * s.key_groups() + tile * kGroups) * d;
  const float* means = args.tables.v_mean + int64_t{unit} * d;
  for (int item = threadIdx.x; item < kGroups * d / 2; item += kThreads) {
    const int g = item / (d / 2), c = item % (d / 2), count = rows_of_group(rows, g);
    uint32_t raw[kGroupRows];
    load_group(v, int64_t{tile} * kRows + g * kGroupRows, count, c, raw);
    const Moments m = moments_of<T>(raw, count);
    const float2 mu{means[2 * c], means[2 * c + 1]};
    *reinterpret_cast<float2*>(&shared.mean[g][2 * c]) = m.mean;
    reinterpret_cast<uint32_t*>(centroids + int64_t{g} * d)[c] = pack2<__nv_bfloat16>(m.mean.x, m.mean.y);
    const float2 shift{m.mean.x - mu.x, m.mean.y - mu.y};
    *within += static_cast<float>(count) * (m.variance.x + m.variance.y);
    if (count > 0) *between_groups += static_cast<float>(count) * (shift.x * shift.x + shift.y * shift.y);
    if (centred == nullptr) continue;
#pragma unroll
    for (int i = 0; i < kGroupRows; ++i) {
      const float2 x = widen2<T>(raw[i]);
      reinterpret_cast<uint32_t*>(centred + (g * kGroupRows + i) * ld)[c] =
          i < count ? pack2<__nv_bfloat16>(x.x - mu.x, x.y - mu.y) : 0u;
    }
  }
  __syncthreads();
  for (int c = threadIdx.x; c < d; c += kThreads) {
    const float shift = combine(shared, rows, c).mean - means[c];
    *between_tiles += static_cast<float>(rows) * shift * shift;
  }
}

// V' = centred basis, a warp 16 rows; basis in shared memory [width][kRank + 8].
template <int kRank>
__device__ __forceinline__ void project(const AnalyzeArgs& args, Shared& shared, const __nv_bfloat16* centred, int ld,
                                        const __nv_bfloat16* basis, int width, int unit, int tile, int rows,
                                        float (&captured)[decide::kRankClasses]) {
  constexpr int kTiles = kRank / 8, kLdBasis = kRank + 8;
  const TableShape& s = args.shape;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float y[kTiles][4] = {};
  const uint32_t a_at = shared_address(centred + (16 * warp + lane % 16) * ld + lane / 16 * 8);
  const uint32_t b_at = shared_address(basis + lane % 16 * kLdBasis + lane / 16 * 8);
  for (int k = 0; k < width; k += 16) {
    uint32_t a[4];
    ldmatrix_x4(a, a_at + 2 * k);
#pragma unroll
    for (int t = 0; t < kTiles; t += 2) {
      uint32_t x[4];
      ldmatrix_x4_trans(x, b_at + 2 * (k * kLdBasis + 8 * t));
      mma_m16n8k16<__nv_bfloat16>(y[t], a, x[0], x[1]);
      mma_m16n8k16<__nv_bfloat16>(y[t + 1], a, x[2], x[3]);
    }
  }
  __nv_bfloat16* out =
      args.tables.v_low + (int64_t{unit} * s.key_rows() + int64_t{tile} * kRows + 16 * warp + lane / 4) * kRank;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const int column = 8 * t + 2 * (lane % 4);
    *reinterpret_cast<uint32_t*>(out + column) = pack2<__nv_bfloat16>(y[t][0], y[t][1]);
    *reinterpret_cast<uint32_t*>(out + 8 * kRank + column) = pack2<__nv_bfloat16>(y[t][2], y[t][3]);
    const float square = y[t][0] * y[t][0] + y[t][1] * y[t][1] + y[t][2] * y[t][2] + y[t][3] * y[t][3];
#pragma unroll
    for (int rank_class = 1; rank_class < decide::kRankClasses; ++rank_class)
      if (8 * t < decide::rank_of_class(rank_class)) captured[rank_class] += square;
    float left = y[t][0] + y[t][2], right = y[t][1] + y[t][3];
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
      left += __shfl_xor_sync(0xffffffffu, left, step);
      right += __shfl_xor_sync(0xffffffffu, right, step);
    }
    if (lane < 4) {
      shared.part[warp][column] = left;
      shared.part[warp][column + 1] = right;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kGroups * kRank; i += kThreads) {
    const int g = i / kRank, c = i % kRank, count = rows_of_group(rows, g);
    const float mean =
        count > 0 ? (shared.part[2 * g][c] + shared.part[2 * g + 1][c]) / static_cast<float>(count) : 0.0f;
    args.tables.group_v_low[(int64_t{unit} * s.key_groups() + tile * kGroups + g) * kRank + c] =
        __float2bfloat16_rn(mean);
  }
}

// A tile of one unit, with its rows.
struct KeyTile {
  int unit, tile, rows, b, head;
  Sequence seq;
  __device__ KeyTile(const AnalyzeArgs& args, int index) {
    const TableShape& s = args.shape;
    tile = index % s.key_tiles;
    unit = index / s.key_tiles;
    b = unit / s.heads_kv;
    head = unit % s.heads_kv;
    seq = sequence_of(args.p, b);
    rows = static_cast<int>(min(static_cast<int64_t>(kRows), seq.len_k - int64_t{tile} * kRows));
  }
};

// Sums over the CTA in a fixed order; the first thread has them.
template <int kCount>
__device__ __forceinline__ void block_sum(Shared& shared, const float (&x)[kCount], double (&total)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const double sum = warp_sum(x[i]);
    if (threadIdx.x % 32 == 0) shared.sums[threadIdx.x / 32][i] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    total[i] = 0;
    for (int w = 0; w < kWarps; ++w) total[i] += shared.sums[w][i];
  }
}

// Centroids of a tile beyond the sequence: attend reads them in blocks, and 0 times NaN would be NaN.
__device__ __forceinline__ void clear_groups(__nv_bfloat16* groups, int index, int width) {
  auto* out = reinterpret_cast<uint32_t*>(groups + int64_t{index} * kGroups * width);
  for (int i = threadIdx.x; i < kGroups * width / 2; i += kThreads) out[i] = 0;
}

template <typename T>
__device__ __forceinline__ void key_tile(const AnalyzeArgs& args, Shared& shared, int index) {
  const KeyTile at(args, index);
  if (at.rows <= 0) return clear_groups(args.tables.group_k, index, 2 * args.shape.d_qk);
  const TokenRows<T> k = key_rows<T>(args.p, args.p.k, at.seq, at.b, at.head);
  const float check[1] = {key_moments(args, shared, k, at.unit, at.tile, at.rows)};
  double total[1];
  block_sum(shared, check, total);
  if (threadIdx.x == 0) args.tables.energy[index].k_finite = isfinite(total[0]);
}

template <typename T, int kRank>
__device__ __forceinline__ void value_tile(const AnalyzeArgs& args, Shared& shared, int index) {
  extern __shared__ __align__(16) unsigned char dynamic[];
  const TableShape& s = args.shape;
  const KeyTile at(args, index);
  if (at.rows <= 0) {
    clear_groups(args.tables.group_v, index, s.d_v);
    return clear_groups(args.tables.group_v_low, index, kRank);
  }
  const int width = (s.d_v + 15) / 16 * 16, ld = width + 8;
  auto* centred = reinterpret_cast<__nv_bfloat16*>(dynamic);
  __nv_bfloat16* basis = centred + kRows * ld;
  if constexpr (kRank > 0) {
    const auto* from = args.tables.basis + int64_t{at.unit} * s.d_v * kRank;
    for (int i = threadIdx.x; i < width * (kRank / 8); i += kThreads) {
      const int r = i / (kRank / 8), c = i % (kRank / 8);
      const uint32_t to = shared_address(basis + r * (kRank + 8) + 8 * c);
      cp_async16(to, r < s.d_v ? from + 8 * i : from, r < s.d_v ? 16 : 0);
    }
    cp_async_commit();
    for (int i = threadIdx.x; i < kRows * (width - s.d_v); i += kThreads)
      centred[i / (width - s.d_v) * ld + s.d_v + i % (width - s.d_v)] = __float2bfloat16_rn(0.0f);
  }
  float sums[2 + decide::kRankClasses] = {};
  value_moments(args, shared, key_rows<T>(args.p, args.p.v, at.seq, at.b, at.head), at.unit, at.tile, at.rows,
                kRank > 0 ? centred : nullptr, ld, &sums[0], &sums[1], &sums[2]);
  if constexpr (kRank > 0) {
    cp_async_wait<0>();
    __syncthreads();
    float captured[decide::kRankClasses] = {};
    project<kRank>(args, shared, centred, ld, basis, width, at.unit, at.tile, at.rows, captured);
#pragma unroll
    for (int c = 1; c < decide::kRankClasses; ++c) sums[2 + c] = captured[c];
  }
  double total[2 + decide::kRankClasses];
  block_sum(shared, sums, total);
  if (threadIdx.x != 0) return;
  TileEnergy& out = args.tables.energy[index];
  out.within = static_cast<float>(total[0]);
  out.between_groups = static_cast<float>(total[1]);
  out.between_tiles = static_cast<float>(total[2]);
  out.captured[0] = 0;
#pragma unroll
  for (int c = 1; c < decide::kRankClasses; ++c) out.captured[c] = static_cast<float>(total[2 + c]);
  out.v_finite = isfinite(total[0] + total[1]);
}

// Values first: their tiles take longest.
template <typename T, int kRank>
__global__ __launch_bounds__(kThreads, 3) void statistics_kernel(const __grid_constant__ AnalyzeArgs args) {
  __shared__ Shared shared;
  const int key_items = static_cast<int>(args.p.batch) * args.shape.heads_kv * args.shape.key_tiles;
  const int item = static_cast<int>(blockIdx.x);
  if (item < key_items)
    value_tile<T, kRank>(args, shared, item);
  else if (item < 2 * key_items)
    key_tile<T>(args, shared, item - key_items);
  else
    query_tile<T>(args, shared, item - 2 * key_items);
}

template <typename T, int kRank>
void launch_statistics(const AnalyzeArgs& args, cudaStream_t stream) {
  const TableShape& s = args.shape;
  const int width = (s.d_v + 15) / 16 * 16;
  const int bytes = kRank > 0 ? 2 * (kRows * (width + 8) + width * (kRank + 8)) : 0;
  if (bytes > 0)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(&statistics_kernel<T, kRank>),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
          "analyze");
  const auto items = static_cast<unsigned>(
      args.p.batch * (2 * int64_t{s.heads_kv} * s.key_tiles + int64_t{s.heads_q} * s.query_tiles));
  check(launch_grid(statistics_kernel<T, kRank>, dim3(items), kThreads, static_cast<size_t>(bytes), stream, args),
        "analyze");
}

template <typename T>
void launch_statistics(const AnalyzeArgs& args, cudaStream_t stream) {
  switch (args.shape.max_rank) {
    case 96:
      return launch_statistics<T, 96>(args, stream);
    case 64:
      return launch_statistics<T, 64>(args, stream);
    case 32:
      return launch_statistics<T, 32>(args, stream);
    default:
      return launch_statistics<T, 0>(args, stream);
  }
}

}  // namespace

void tile_statistics(const AnalyzeArgs& args, cudaStream_t stream) {
  if (args.p.k.dtype == Dtype::kBF16)
    launch_statistics<__nv_bfloat16>(args, stream);
  else
    launch_statistics<__half>(args, stream);
}

}  // namespace adaattn::cuda
