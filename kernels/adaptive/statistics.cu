// One read of Q, K and V: statistics of every tile, its centroid, and V in the basis.
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
static_assert(kFarKeys == kRows, "the centroid of a tile");
static_assert(decide::kTileQ == kRows);
constexpr int kWide = 8;  // columns of a load
constexpr int kMaxDim = 128;
constexpr int kCells = decide::kCellsOfTile;
constexpr float kHalfLn2 = 0.34657359027997264f;

struct Shared {
  float partial[kWarps][kCells][kMaxDim];  // sums of a warp's rows
  float mean[kMaxDim];
  float part[kWarps][64];
  float sums[kWarps][1 + decide::kRankClasses];
};

// The rows of a tile, 8 columns of every at_a_time-th one in each thread.
template <typename T>
class TileRows {
 public:
  __device__ __forceinline__ TileRows(const TokenRows<T>& rows, int64_t first, int count, int d)
      : count_(count), chunks_(d / kWide), at_a_time_(kThreads / chunks_) {
    first_row_ = static_cast<int>(threadIdx.x) / chunks_;
    chunk_ = static_cast<int>(threadIdx.x) % chunks_;
    load(rows, [&](const auto& row) {
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        raw_[i] = holds(i) ? *reinterpret_cast<const uint4*>(row(first + row_of(i)) + kWide * chunk_)
                           : make_uint4(0, 0, 0, 0);
    });
  }
  template <typename Take>
  static __device__ __forceinline__ void load(const TokenRows<T>& rows, const Take& take) {
    if (rows.pages == nullptr) {
      take([&](int64_t j) { return rows.base + j * rows.stride; });
    } else {
      take([&](int64_t j) { return rows.row(j); });
    }
  }

  static constexpr int kEach = kRows / 16;  // for 128 columns; of 64 half of them are empty
  __device__ __forceinline__ int chunk() const { return chunk_; }
  __device__ __forceinline__ int row_of(int i) const { return first_row_ + i * at_a_time_; }
  __device__ __forceinline__ bool holds(int i) const { return row_of(i) < count_; }
  __device__ __forceinline__ void widen(int i, float (&x)[kWide]) const { widen_words(raw_[i], x); }
  static __device__ __forceinline__ void widen_words(const uint4& raw, float (&x)[kWide]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float2 pair = widen2<T>(words[c]);
      x[2 * c] = pair.x;
      x[2 * c + 1] = pair.y;
    }
  }

  // Column sums of every 32 rows by warp, to shared.partial.
  __device__ __forceinline__ void sum_cells(Shared& shared) const {
    float sum[kWide] = {};
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      float x[kWide];
      widen(i, x);
#pragma unroll
      for (int c = 0; c < kWide; ++c) sum[c] += x[c];
      const int rows = (i + 1) * at_a_time_;
      if (rows % decide::kCell != 0 || rows > kRows) continue;
      put(shared.partial[threadIdx.x / 32][rows / decide::kCell - 1], sum);
#pragma unroll
      for (int c = 0; c < kWide; ++c) sum[c] = 0;
    }
    __syncthreads();
  }
  // Variance of the thread's column, if it is under d, around shared.mean.
  __device__ __forceinline__ float variance(Shared& shared, int d) const {
    float mean[kWide], sum[kWide];
#pragma unroll
    for (int c = 0; c < kWide; ++c) {
      mean[c] = shared.mean[kWide * chunk_ + c];
      sum[c] = 0;
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (!holds(i)) continue;
      float x[kWide];
      widen(i, x);
#pragma unroll
      for (int c = 0; c < kWide; ++c) sum[c] = fmaf(x[c] - mean[c], x[c] - mean[c], sum[c]);
    }
    put(shared.partial[threadIdx.x / 32][0], sum);
    __syncthreads();
    const int column = static_cast<int>(threadIdx.x);
    float total = 0;
    if (column < d)
      for (int w = 0; w < kWarps; ++w) total += shared.partial[w][0][column];
    return total / static_cast<float>(count_);
  }
  // Over the rows of the warp, to columns of `to`.
  __device__ __forceinline__ void put(float* to, const float (&sum)[kWide]) const {
    float all[kWide];
#pragma unroll
    for (int c = 0; c < kWide; ++c) all[c] = sum[c];
    for (int step = chunks_; step < 32; step *= 2) {
#pragma unroll
      for (int c = 0; c < kWide; ++c) all[c] += __shfl_xor_sync(0xffffffffu, all[c], step);
    }
    if (static_cast<int>(threadIdx.x) % 32 >= chunks_) return;
    auto* const wide = reinterpret_cast<float4*>(to + kWide * chunk_);
    wide[0] = make_float4(all[0], all[1], all[2], all[3]);
    wide[1] = make_float4(all[4], all[5], all[6], all[7]);
  }

 private:
  int count_, chunks_, at_a_time_, first_row_, chunk_;
  uint4 raw_[kEach];
};

// Of a tile's column from the sums of its cells; a thread a column, those under d.
__device__ __forceinline__ float tile_mean(Shared& shared, int rows, int d) {
  const int c = static_cast<int>(threadIdx.x);
  float total = 0;
  if (c < d) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w)
#pragma unroll
      for (int g = 0; g < kCells; ++g) total += shared.partial[w][g][c];
    total /= static_cast<float>(rows);
    shared.mean[c] = total;
  }
  __syncthreads();
  return total;
}

// One warp: 4 columns of a mean in each lane as bytes, and what they are to be multiplied with; not finite if some
// column is not. Returns whether all are.
__device__ __forceinline__ bool put_cell(const float4& mean, int d, float factor, int8_t* cell, float* scale) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float top = fmaxf(fmaxf(fabsf(mean.x), fabsf(mean.y)), fmaxf(fabsf(mean.z), fabsf(mean.w)));
  const bool finite = __all_sync(0xffffffffu, isfinite(mean.x + mean.y + mean.z + mean.w));
#pragma unroll
  for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
  const float inverse = finite && top > 0 ? 127.0f / top : 0.0f;
  const auto byte = [&](float x) { return static_cast<uint32_t>(__float2int_rn(x * inverse)) & 0xffu; };
  if (4 * lane < d)
    reinterpret_cast<uint32_t*>(cell)[lane] =
        byte(mean.x) | byte(mean.y) << 8 | byte(mean.z) << 16 | byte(mean.w) << 24;
  if (lane == 0) *scale = finite ? factor * top * (1.0f / 127.0f) : NAN;
  return finite;
}

// Every fourth row: a warp half of a block of 32, by loads of 16 bytes.
template <typename T>
__device__ __forceinline__ void query_tile(const AnalyzeArgs& args, Shared& shared, int index) {
  constexpr int kSamples = decide::kCell / kQueryStep / 2;  // of a warp
  const TableShape& s = args.shape;
  const int tile = index % s.query_tiles, head = index / s.query_tiles % s.heads_q,
            b = index / s.query_tiles / s.heads_q;
  const Sequence seq = sequence_of(args.p, b);
  const int64_t rows = seq.len_q - int64_t{tile} * kRows;
  if (rows <= 0) return;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int d = s.d_qk, chunks = d / kWide, at_a_time = 32 / chunks, cell = warp % kCells, half = warp / kCells;
  const int chunk = lane % chunks,
            exist = static_cast<int>(max(int64_t{0}, min(rows - cell * decide::kCell, int64_t{decide::kCell})));
  uint4 raw[2];
  TileRows<T>::load(query_rows<T>(args.p, seq, b, head), [&](const auto& row) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int sample = lane / chunks + i * at_a_time, at = (half * kSamples + sample) * kQueryStep;
      raw[i] =
          sample < kSamples && at < exist
              ? *reinterpret_cast<const uint4*>(row(int64_t{tile} * kRows + cell * decide::kCell + at) + kWide * chunk)
              : make_uint4(0, 0, 0, 0);
    }
  });
  float sum[kWide], other[kWide];
  TileRows<T>::widen_words(raw[0], sum);
  TileRows<T>::widen_words(raw[1], other);
#pragma unroll
  for (int c = 0; c < kWide; ++c) sum[c] += other[c];
  for (int step = chunks; step < 32; step *= 2) {
#pragma unroll
    for (int c = 0; c < kWide; ++c) sum[c] += __shfl_xor_sync(0xffffffffu, sum[c], step);
  }
  if (lane < chunks) {
    auto* const to = reinterpret_cast<float4*>(&shared.partial[half][cell][kWide * chunk]);
    to[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
    to[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
  }
  __syncthreads();
  if (half != 0) return;
  const float inverse = exist > 0 ? 1.0f / static_cast<float>((exist + kQueryStep - 1) / kQueryStep) : 0.0f;
  float4 mean{0, 0, 0, 0};
  if (4 * lane < d) {
    const float4 x = *reinterpret_cast<const float4*>(&shared.partial[0][cell][4 * lane]),
                 y = *reinterpret_cast<const float4*>(&shared.partial[1][cell][4 * lane]);
    mean = {(x.x + y.x) * inverse, (x.y + y.y) * inverse, (x.z + y.z) * inverse, (x.w + y.w) * inverse};
  }
  const int64_t at = int64_t{index} * kCells + cell;
  put_cell(mean, d, args.scale_log2, args.tables.query_cells + at * d, args.tables.query_scales + at);
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
  for (int c = threadIdx.x; c < kRank; c += kThreads) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared.part[w][c];
    args.tables.group_v_low[(int64_t{unit} * s.key_tiles + tile) * kRank + c] =
        __float2bfloat16_rn(sum / static_cast<float>(rows));
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
__device__ __forceinline__ void block_sum(Shared& shared, float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x[i] += __shfl_xor_sync(0xffffffffu, x[i], step);
    if (threadIdx.x % 32 == 0) shared.sums[threadIdx.x / 32][i] = x[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    x[i] = 0;
    for (int w = 0; w < kWarps; ++w) x[i] += shared.sums[w][i];
  }
}

// The centroid of a tile beyond the sequence: attend reads them in blocks, and 0 times NaN would be NaN.
__device__ __forceinline__ void clear_group(__nv_bfloat16* groups, int index, int width) {
  auto* out = reinterpret_cast<uint32_t*>(groups + int64_t{index} * width);
  for (int i = threadIdx.x; i < width / 2; i += kThreads) out[i] = 0;
}

// Cells and the centroid of a tile's keys.
template <typename T>
__device__ __forceinline__ void key_tile(const AnalyzeArgs& args, Shared& shared, int index) {
  const TableShape& s = args.shape;
  const int d = s.d_qk, c = static_cast<int>(threadIdx.x), warp = c / 32, lane = c % 32;
  const KeyTile at(args, index);
  const int64_t cell = int64_t{at.unit} * key_cells_of_unit(s) + at.tile * kCells + warp;
  if (at.rows <= 0) {
    if (warp < kCells && lane == 0) args.tables.key_scales[cell] = 0;
    return clear_group(args.tables.group_k, index, 2 * d);
  }
  const TileRows<T> k(key_rows<T>(args.p, args.p.k, at.seq, at.b, at.head), int64_t{at.tile} * kRows, at.rows, d);
  wait_for_previous_grid();
  k.sum_cells(shared);
  bool finite = true;
  if (warp < kCells) {
    const int exist = max(0, min(at.rows - warp * decide::kCell, decide::kCell));
    float4 mean{0, 0, 0, 0};
    if (4 * lane < d && exist > 0) {
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float4 x = *reinterpret_cast<const float4*>(&shared.partial[w][warp][4 * lane]);
        mean = {mean.x + x.x, mean.y + x.y, mean.z + x.z, mean.w + x.w};
      }
      const float inverse = 1.0f / static_cast<float>(exist);
      const float4 of_all = *reinterpret_cast<const float4*>(args.tables.k_mean + int64_t{at.unit} * d + 4 * lane);
      mean = {fmaf(mean.x, inverse, -of_all.x), fmaf(mean.y, inverse, -of_all.y), fmaf(mean.z, inverse, -of_all.z),
              fmaf(mean.w, inverse, -of_all.w)};
    }
    finite = put_cell(mean, d, 1.0f, args.tables.key_cells + cell * d, args.tables.key_scales + cell);
  }
  if (args.options.far_field) {
    const float mean = tile_mean(shared, at.rows, d), variance = k.variance(shared, d);
    if (c < d) {
      __nv_bfloat16* centroid = args.tables.group_k + int64_t{index} * 2 * d;
      centroid[c] = __float2bfloat16_rn(mean);
      centroid[d + c] = __float2bfloat16_rn(args.scale_log2 * kHalfLn2 * variance);
    }
  }
  finite = __syncthreads_and(finite) != 0;
  if (threadIdx.x == 0) args.tables.energy[index].k_finite = finite;
}

// Energies and the centroid of a tile's values, and the values in the basis.
template <typename T, int kRank>
__device__ __forceinline__ void value_tile(const AnalyzeArgs& args, Shared& shared, int index) {
  extern __shared__ __align__(16) unsigned char dynamic[];
  const TableShape& s = args.shape;
  const int d = s.d_v, c = static_cast<int>(threadIdx.x);
  const KeyTile at(args, index);
  if (at.rows <= 0) {
    clear_group(args.tables.group_v, index, d);
    return clear_group(args.tables.group_v_low, index, kRank);
  }
  const TileRows<T> v(key_rows<T>(args.p, args.p.v, at.seq, at.b, at.head), int64_t{at.tile} * kRows, at.rows, d);
  wait_for_previous_grid();  // means and bases
  const int width = (d + 15) / 16 * 16, ld = width + 8;
  auto* centred = reinterpret_cast<__nv_bfloat16*>(dynamic);
  __nv_bfloat16* basis = centred + kRows * ld;
  const float* means = args.tables.v_mean + int64_t{at.unit} * d;
  if constexpr (kRank > 0) {
    const auto* from = args.tables.basis + int64_t{at.unit} * d * kRank;
    for (int i = threadIdx.x; i < width * (kRank / 8); i += kThreads) {
      const int r = i / (kRank / 8), column = i % (kRank / 8);
      const uint32_t to = shared_address(basis + r * (kRank + 8) + 8 * column);
      cp_async16(to, r < d ? from + 8 * i : from, r < d ? 16 : 0);
    }
    cp_async_commit();
    for (int i = threadIdx.x; i < kRows * (width - d); i += kThreads)
      centred[i / (width - d) * ld + d + i % (width - d)] = __float2bfloat16_rn(0.0f);
    float mu[kWide];
#pragma unroll
    for (int i = 0; i < kWide; ++i) mu[i] = means[kWide * v.chunk() + i];
#pragma unroll
    for (int i = 0; i < TileRows<T>::kEach; ++i) {
      if (v.row_of(i) >= kRows) continue;
      float x[kWide];
      v.widen(i, x);
      uint32_t w[4] = {};
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (v.holds(i)) w[e] = pack2<__nv_bfloat16>(x[2 * e] - mu[2 * e], x[2 * e + 1] - mu[2 * e + 1]);
      *reinterpret_cast<uint4*>(centred + v.row_of(i) * ld + kWide * v.chunk()) = make_uint4(w[0], w[1], w[2], w[3]);
    }
  }
  v.sum_cells(shared);
  const float mean = tile_mean(shared, at.rows, d), variance = v.variance(shared, d);
  float sums[1 + decide::kRankClasses] = {};  // within and between, then what each class captures
  if (c < d) {
    args.tables.group_v[int64_t{index} * d + c] = __float2bfloat16_rn(mean);
    const float shift = mean - means[c];
    sums[0] = static_cast<float>(at.rows) * variance;
    sums[1] = static_cast<float>(at.rows) * shift * shift;
  }
  if constexpr (kRank > 0) {
    cp_async_wait<0>();
    __syncthreads();
    float captured[decide::kRankClasses] = {};
    project<kRank>(args, shared, centred, ld, basis, width, at.unit, at.tile, at.rows, captured);
#pragma unroll
    for (int rank_class = 1; rank_class < decide::kRankClasses; ++rank_class)
      sums[1 + rank_class] = captured[rank_class];
  }
  block_sum(shared, sums);
  if (threadIdx.x != 0) return;
  TileEnergy& out = args.tables.energy[index];
  out.within = sums[0];
  out.between = sums[1];
  out.captured[0] = 0;
#pragma unroll
  for (int rank_class = 1; rank_class < decide::kRankClasses; ++rank_class)
    out.captured[rank_class] = sums[1 + rank_class];
  out.v_finite = isfinite(sums[0] + sums[1]);
}

// Values first: their tiles take longest.
template <typename T, int kRank>
__global__ __launch_bounds__(kThreads,
                             kRank > 0 ? 3 : 4) void statistics_kernel(const __grid_constant__ AnalyzeArgs args) {
  __shared__ Shared shared;
  launch_dependents();
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
  const auto kernel = &statistics_kernel<T, kRank>;
  if (bytes > 0)
    check(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "analyze");
  const auto items = static_cast<unsigned>(
      args.p.batch * (2 * int64_t{s.heads_kv} * s.key_tiles + int64_t{s.heads_q} * s.query_tiles));
  check(launch_grid_overlapped(kernel, dim3(items), kThreads, static_cast<size_t>(bytes), stream, true, args),
        "analyze");
}

template <typename T>
void launch_statistics(const AnalyzeArgs& args, cudaStream_t stream) {
  switch (args.shape.max_rank) {
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
