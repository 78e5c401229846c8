// One read of Q, K and V: statistics of every tile, its centroid, and V in the basis.
#include "adaptive/analyze.h"
#include "adaptive/rows.cuh"
#include "adaptive/sample.h"
#include "attend/launch.h"
#include "common/ptx.cuh"
#include "runtime.h"

namespace adaattn::cuda {
namespace {

constexpr int kWarps = decide::kCellsOfTile;  // each takes 32 rows, a cell
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = decide::kTileK;
static_assert(kFarKeys == kRows, "the centroid of a tile");
static_assert(decide::kTileQ == kRows && kThreads == kRows);
constexpr int kWide = 8;  // columns of a load
constexpr int kMaxDim = 128;
constexpr int kCells = decide::kCellsOfTile;
constexpr float kHalfLn2 = 0.34657359027997264f;
constexpr int kQueryTiles = 4;  // of a CTA: as many bytes on their way as for a tile of keys

struct Shared {
  float sum[kWarps][kMaxDim], square[kWarps][kMaxDim];
  float part[kWarps][64];
  float sums[kWarps][1 + decide::kRankClasses];
};

// Where a lane stands in a warp's loads of 16 bytes.
struct LaneRows {
  int chunks, at_a_time, chunk, first;
  __device__ __forceinline__ explicit LaneRows(int d) : chunks(d / kWide), at_a_time(32 / chunks) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    chunk = lane % chunks;
    first = lane / chunks;
  }
  // Over the rows that are read together.
  __device__ __forceinline__ void add_rows(float (&x)[kWide]) const {
    for (int step = chunks; step < 32; step *= 2) {
#pragma unroll
      for (int c = 0; c < kWide; ++c) x[c] += __shfl_xor_sync(0xffffffffu, x[c], step);
    }
  }
};

template <typename T>
__device__ __forceinline__ void widen_words(const uint4& raw, float (&x)[kWide]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const float2 pair = widen2<T>(words[c]);
    x[2 * c] = pair.x;
    x[2 * c + 1] = pair.y;
  }
}

// take(row), where row(j) is the address of token j: the test for pages stays out of the loop over rows.
template <typename T, typename Take>
__device__ __forceinline__ void with_rows(const TokenRows<T>& rows, const Take& take) {
  if (rows.pages == nullptr) {
    take([&](int64_t j) { return rows.base + j * rows.stride; });
  } else {
    take([&](int64_t j) { return rows.row(j); });
  }
}

__device__ __forceinline__ void read_columns(const float* from, float (&x)[kWide]) {
  const float4 low = *reinterpret_cast<const float4*>(from), high = *reinterpret_cast<const float4*>(from + 4);
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}
__device__ __forceinline__ void write_columns(float* to, const float (&x)[kWide]) {
  *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
  *reinterpret_cast<float4*>(to + 4) = make_float4(x[4], x[5], x[6], x[7]);
}

// The rows of a tile, 32 of them in each warp, on their way from the first line on.
template <typename T>
class TileRows {
 public:
  static constexpr int kEach = kRows / 8;  // for 128 columns; of 64 half of them are empty
  __device__ __forceinline__ TileRows(const TokenRows<T>& rows, int64_t first, int count, int d)
      : lane_(d), count_(count) {
    if (rows.pages == nullptr && count_ >= kRows) {
      const T* row = rows.base + (first + row_of(0)) * rows.stride + kWide * lane_.chunk;
      const int64_t step = lane_.at_a_time * rows.stride;
#pragma unroll
      for (int i = 0; i < kEach; ++i, row += step)
        raw_[i] = within(i) ? *reinterpret_cast<const uint4*>(row) : make_uint4(0, 0, 0, 0);
      return;
    }
    with_rows(rows, [&](const auto& row) {
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        raw_[i] = holds(i) ? *reinterpret_cast<const uint4*>(row(first + row_of(i)) + kWide * lane_.chunk)
                           : make_uint4(0, 0, 0, 0);
    });
  }

  __device__ __forceinline__ const LaneRows& lane() const { return lane_; }
  __device__ __forceinline__ int row_of(int i) const {
    return static_cast<int>(threadIdx.x) / 32 * decide::kCell + i * lane_.at_a_time + lane_.first;
  }
  __device__ __forceinline__ bool within(int i) const { return i * lane_.at_a_time < decide::kCell; }
  __device__ __forceinline__ bool holds(int i) const { return within(i) && row_of(i) < count_; }
  __device__ __forceinline__ void widen(int i, float (&x)[kWide]) const { widen_words<T>(raw_[i], x); }

  // Sums of the warp's rows less `shift`, and with kSquares of their squares, by column.
  template <bool kSquares>
  __device__ __forceinline__ void add_up(const float (&shift)[kWide], float (&sum)[kWide],
                                         float (&square)[kWide]) const {
#pragma unroll
    for (int c = 0; c < kWide; ++c) sum[c] = square[c] = 0;
    const auto add = [&](int i) {
      float x[kWide];
      widen(i, x);
#pragma unroll
      for (int c = 0; c < kWide; ++c) {
        const float y = x[c] - shift[c];
        sum[c] += y;
        if (kSquares) square[c] = fmaf(y, y, square[c]);
      }
    };
    if (count_ >= kRows && within(kEach - 1)) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) add(i);
    } else {
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        if (holds(i)) add(i);
    }
  }

 private:
  LaneRows lane_;
  int count_;
  uint4 raw_[kEach];
};

// One warp: the mean of a cell's rows as bytes, 8 columns in each of the first lanes, and what they are to be
// multiplied with; not finite if some column is not.
__device__ __forceinline__ void put_cell(const LaneRows& lane, const float (&mean)[kWide], float factor, int8_t* cell,
                                         float* scale) {
  float top = 0, sum = 0;
#pragma unroll
  for (int c = 0; c < kWide; ++c) {
    top = fmaxf(top, fabsf(mean[c]));
    sum += mean[c];
  }
  const bool finite = __all_sync(0xffffffffu, isfinite(sum));
#pragma unroll
  for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
  const float inverse = finite && top > 0 ? 127.0f / top : 0.0f;
  if (lane.first == 0) {
#pragma unroll
    for (int c = 0; c < kWide; c += 2) {
      static_assert(table_column(kMaxDim / 4, kMaxDim) == 2 && table_column(2, kMaxDim) == kWide);
      const int at = c / 2 * (lane.chunks * kWide / 4) + 2 * lane.chunk;
      *reinterpret_cast<char2*>(cell + at) =
          make_char2(static_cast<signed char>(__float2int_rn(mean[c] * inverse)),
                     static_cast<signed char>(__float2int_rn(mean[c + 1] * inverse)));
    }
  }
  if (threadIdx.x % 32 == 0) *scale = finite ? factor * top * (1.0f / 127.0f) : NAN;
}

// Every fourth row of some query tiles of a head, a cell of each in every warp.
template <typename T>
__device__ __forceinline__ void query_tiles(const AnalyzeArgs& args, int index) {
  constexpr int kSamples = decide::kCell / kQueryStep, kEach = kSamples / 2;
  const TableShape& s = args.shape;
  const int groups = (s.query_tiles + kQueryTiles - 1) / kQueryTiles;
  const int head = index % s.heads_q, first = index / s.heads_q % groups * kQueryTiles;
  const int b = index / s.heads_q / groups, head_index = b * s.heads_q + head, d = s.d_qk;
  const Sequence seq = sequence_of(args.p, b);
  const int cell = static_cast<int>(threadIdx.x) / 32;
  const LaneRows lane(d);
  const auto exist_of = [&](int t) {
    const int64_t rows = seq.len_q - int64_t{first + t} * kRows - cell * decide::kCell;
    return static_cast<int>(max(int64_t{0}, min(rows, int64_t{decide::kCell})));
  };
  uint4 raw[kQueryTiles][kEach];
  const TokenRows<T> rows = query_rows<T>(args.p, seq, b, head);
  const int64_t first_token = int64_t{first} * kRows + cell * decide::kCell + lane.first * kQueryStep;
  const T* const from = rows.base + first_token * rows.stride + kWide * lane.chunk;
  const bool whole = int64_t{first + kQueryTiles} * kRows <= seq.len_q;
#pragma unroll
  for (int t = 0; t < kQueryTiles; ++t)
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int next = i * lane.at_a_time, sample = lane.first + next;
      raw[t][i] = sample < kSamples && (whole || sample * kQueryStep < exist_of(t))
                      ? *reinterpret_cast<const uint4*>(from + (t * kRows + next * kQueryStep) * rows.stride)
                      : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
  for (int t = 0; t < kQueryTiles; ++t) {
    if (int64_t{first + t} * kRows >= seq.len_q) break;
    float sum[kWide] = {};
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      float x[kWide];
      widen_words<T>(raw[t][i], x);
#pragma unroll
      for (int c = 0; c < kWide; ++c) sum[c] += x[c];
    }
    const int exist = exist_of(t);
    const int64_t at = (int64_t{head_index} * s.query_tiles + first + t) * kCells + cell;
    lane.add_rows(sum);
    const float inverse = exist > 0 ? 1.0f / static_cast<float>((exist + kQueryStep - 1) / kQueryStep) : 0.0f;
#pragma unroll
    for (int c = 0; c < kWide; ++c) sum[c] *= inverse;
    put_cell(lane, sum, args.scale_log2, args.tables.query_cells + at * d, args.tables.query_scales + at);
  }
}

// V' = centred basis, a warp two blocks of 16 rows; basis in shared memory [width][kRank + 8].
template <int kRank>
__device__ __forceinline__ void project(const AnalyzeArgs& args, Shared& shared, const __nv_bfloat16* centred, int ld,
                                        const __nv_bfloat16* basis, int width, int unit, int tile, int rows,
                                        float (&captured)[decide::kRankClasses]) {
  constexpr int kTiles = kRank / 8, kLdBasis = kRank + 8;
  const TableShape& s = args.shape;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float sums[kTiles][2] = {};
#pragma unroll 1
  for (int first = decide::kCell * warp; first < decide::kCell * (warp + 1); first += 16) {
    float y[kTiles][4] = {};
    const uint32_t a_at = shared_address(centred + (first + lane % 16) * ld + lane / 16 * 8);
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
        args.tables.v_low + (int64_t{unit} * s.key_rows() + int64_t{tile} * kRows + first + lane / 4) * kRank;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int column = 8 * t + 2 * (lane % 4);
      *reinterpret_cast<uint32_t*>(out + column) = pack2<__nv_bfloat16>(y[t][0], y[t][1]);
      *reinterpret_cast<uint32_t*>(out + 8 * kRank + column) = pack2<__nv_bfloat16>(y[t][2], y[t][3]);
      const float square = y[t][0] * y[t][0] + y[t][1] * y[t][1] + y[t][2] * y[t][2] + y[t][3] * y[t][3];
#pragma unroll
      for (int rank_class = 1; rank_class < decide::kRankClasses; ++rank_class)
        if (8 * t < decide::rank_of_class(rank_class)) captured[rank_class] += square;
      sums[t][0] += y[t][0] + y[t][2];
      sums[t][1] += y[t][1] + y[t][3];
    }
  }
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
      sums[t][0] += __shfl_xor_sync(0xffffffffu, sums[t][0], step);
      sums[t][1] += __shfl_xor_sync(0xffffffffu, sums[t][1], step);
    }
    if (lane < 4) {
      shared.part[warp][8 * t + 2 * lane] = sums[t][0];
      shared.part[warp][8 * t + 2 * lane + 1] = sums[t][1];
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
  int unit, tile, rows, b, head, table;  // table: its place in the tables
  Sequence seq;
  __device__ KeyTile(const AnalyzeArgs& args, int index) {
    const TableShape& s = args.shape;
    // Heads side by side: their rows stand beside each other in memory.
    head = index % s.heads_kv;
    tile = index / s.heads_kv % s.key_tiles;
    b = index / s.heads_kv / s.key_tiles;
    unit = b * s.heads_kv + head;
    table = unit * s.key_tiles + tile;
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
  const int d = s.d_qk, thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const KeyTile at(args, index);
  const int64_t cell = int64_t{at.unit} * key_cells_of_unit(s) + at.tile * kCells + warp;
  if (at.rows <= 0) {
    if (thread % 32 == 0) args.tables.key_scales[cell] = 0;
    if (args.options.far_field) clear_group(args.tables.group_k, at.table, 2 * d);
    return;
  }
  const TileRows<T> k(key_rows<T>(args.p, args.p.k, at.seq, at.b, at.head), int64_t{at.tile} * kRows, at.rows, d);
  wait_for_previous_grid();
  const LaneRows& lane = k.lane();
  const float* const of_all = args.tables.k_mean + int64_t{at.unit} * d;
  float shift[kWide], sum[kWide], square[kWide];
  read_columns(of_all + kWide * lane.chunk, shift);
  if (args.options.far_field)
    k.template add_up<true>(shift, sum, square);
  else
    k.template add_up<false>(shift, sum, square);
  lane.add_rows(sum);
  if (args.options.far_field) {
    lane.add_rows(square);
    if (lane.first == 0) {
      write_columns(&shared.sum[warp][kWide * lane.chunk], sum);
      write_columns(&shared.square[warp][kWide * lane.chunk], square);
    }
  }
  const int exist = max(0, min(at.rows - warp * decide::kCell, decide::kCell));
  const float inverse = exist > 0 ? 1.0f / static_cast<float>(exist) : 0.0f;
#pragma unroll
  for (int c = 0; c < kWide; ++c) sum[c] *= inverse;
  put_cell(lane, sum, 1.0f, args.tables.key_cells + cell * d, args.tables.key_scales + cell);
  if (!args.options.far_field) return;
  __syncthreads();
  if (thread >= d) return;
  float mean = 0, variance = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    mean += shared.sum[w][thread];
    variance += shared.square[w][thread];
  }
  const float of_rows = 1.0f / static_cast<float>(at.rows);
  mean *= of_rows;
  variance = fmaxf(0.0f, fmaf(-mean, mean, variance * of_rows));
  __nv_bfloat16* const centroid = args.tables.group_k + int64_t{at.table} * 2 * d;
  centroid[thread] = __float2bfloat16_rn(mean + of_all[thread]);
  centroid[d + thread] = __float2bfloat16_rn(args.scale_log2 * kHalfLn2 * variance);
}

// Energies and the centroid of a tile's values, and the values in the basis.
template <typename T, int kRank>
__device__ __forceinline__ void value_tile(const AnalyzeArgs& args, Shared& shared, int index) {
  extern __shared__ __align__(16) unsigned char dynamic[];
  const TableShape& s = args.shape;
  const int d = s.d_v, thread = static_cast<int>(threadIdx.x);
  const KeyTile at(args, index);
  if (at.rows <= 0) {
    if (args.options.far_field) {
      clear_group(args.tables.group_v, at.table, d);
      clear_group(args.tables.group_v_low, at.table, kRank);
    }
    return;
  }
  const TileRows<T> v(key_rows<T>(args.p, args.p.v, at.seq, at.b, at.head), int64_t{at.tile} * kRows, at.rows, d);
  wait_for_previous_grid();  // means and bases
  const LaneRows& lane = v.lane();
  const int ld = d + 8;
  auto* centred = reinterpret_cast<__nv_bfloat16*>(dynamic);
  __nv_bfloat16* basis = centred + kRows * ld;
  const float* means = args.tables.v_mean + int64_t{at.unit} * d;
  float shift[kWide], sum[kWide], square[kWide];
  read_columns(means + kWide * lane.chunk, shift);
  if constexpr (kRank > 0) {
    const auto* from = args.tables.basis + int64_t{at.unit} * d * kRank;
    for (int i = thread; i < d * (kRank / 8); i += kThreads) {
      const int r = i / (kRank / 8), column = i % (kRank / 8);
      cp_async16(shared_address(basis + r * (kRank + 8) + 8 * column), from + 8 * i);
    }
    cp_async_commit();
#pragma unroll
    for (int i = 0; i < TileRows<T>::kEach; ++i) {
      if (!v.within(i)) continue;
      float x[kWide];
      v.widen(i, x);
      uint32_t w[4] = {};
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (v.holds(i)) w[e] = pack2<__nv_bfloat16>(x[2 * e] - shift[2 * e], x[2 * e + 1] - shift[2 * e + 1]);
      *reinterpret_cast<uint4*>(centred + v.row_of(i) * ld + kWide * lane.chunk) = make_uint4(w[0], w[1], w[2], w[3]);
    }
  }
  v.template add_up<true>(shift, sum, square);
  lane.add_rows(sum);
  if (lane.first == 0) write_columns(&shared.sum[thread / 32][kWide * lane.chunk], sum);
  __syncthreads();
  // Within and between, then what each class captures.
  float sums[1 + decide::kRankClasses] = {};
#pragma unroll
  for (int c = 0; c < kWide; ++c) sums[0] += square[c];
  if (thread < d) {
    float mean = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) mean += shared.sum[w][thread];
    mean /= static_cast<float>(at.rows);
    sums[1] = static_cast<float>(at.rows) * mean * mean;
    if (args.options.far_field || args.tables.shares != nullptr)
      args.tables.group_v[int64_t{at.table} * d + thread] = __float2bfloat16_rn(mean + means[thread]);
  }
  if constexpr (kRank > 0) {
    cp_async_wait<0>();
    __syncthreads();
    float captured[decide::kRankClasses] = {};
    project<kRank>(args, shared, centred, ld, basis, d, at.unit, at.tile, at.rows, captured);
#pragma unroll
    for (int rank_class = 1; rank_class < decide::kRankClasses; ++rank_class)
      sums[1 + rank_class] = captured[rank_class];
  }
  block_sum(shared, sums);
  if (thread != 0) return;
  TileEnergy& out = args.tables.energy[at.table];
  out.within = fmaxf(0.0f, sums[0] - sums[1]);
  out.between = sums[1];
  out.captured[0] = 0;
#pragma unroll
  for (int rank_class = 1; rank_class < decide::kRankClasses; ++rank_class)
    out.captured[rank_class] = sums[1 + rank_class];
  out.finite = isfinite(sums[0] + sums[1]);
}

// What decide adds to.
__device__ __forceinline__ void clear_sums(const AnalyzeArgs& args, int unit) {
  const int group = args.shape.group;
  constexpr int kWords = sizeof(HeadSums) / sizeof(unsigned long long);
  auto* const sums = reinterpret_cast<unsigned long long*>(args.tables.head_sums + int64_t{unit} * group);
  for (int i = static_cast<int>(threadIdx.x); i < group * kWords; i += kThreads) sums[i] = 0;
  if (threadIdx.x == 0) args.tables.unit_sums[unit] = {0, 0};
}

// Values first: their tiles take longest.
template <typename T, int kRank>
__global__ __launch_bounds__(kThreads, 4) void statistics_kernel(const __grid_constant__ AnalyzeArgs args) {
  __shared__ Shared shared;
  launch_dependents();
  const int key_items = static_cast<int>(args.p.batch) * args.shape.heads_kv * args.shape.key_tiles;
  const int item = static_cast<int>(blockIdx.x);
  if (item < static_cast<int>(args.p.batch) * args.shape.heads_kv) clear_sums(args, item);
  if (item < key_items)
    value_tile<T, kRank>(args, shared, item);
  else if (item < 2 * key_items)
    key_tile<T>(args, shared, item - key_items);
  else
    query_tiles<T>(args, item - 2 * key_items);
}

template <int kRank>
constexpr int statistics_bytes(int d_v) {
  return kRank > 0 ? 2 * (kRows * (d_v + 8) + d_v * (kRank + 8)) : 0;
}

template <typename T, int kRank>
void launch_statistics(const AnalyzeArgs& args, cudaStream_t stream) {
  const TableShape& s = args.shape;
  const int bytes = statistics_bytes<kRank>(s.d_v);
  const auto kernel = &statistics_kernel<T, kRank>;
  const auto items =
      static_cast<unsigned>(args.p.batch * (2 * int64_t{s.heads_kv} * s.key_tiles +
                                            int64_t{s.heads_q} * ((s.query_tiles + kQueryTiles - 1) / kQueryTiles)));
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

void prepare_statistics() {
  const auto prepare = [](auto kernel, int bytes) {
    check(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "adaptive kernels");
  };
  const auto of_type = [&](auto zero) {
    using T = decltype(zero);
    prepare(&statistics_kernel<T, 0>, statistics_bytes<0>(kMaxDim));
    prepare(&statistics_kernel<T, 32>, statistics_bytes<32>(kMaxDim));
    prepare(&statistics_kernel<T, 64>, statistics_bytes<64>(kMaxDim));
  };
  of_type(__nv_bfloat16{});
  of_type(__half{});
}

void tile_statistics(const AnalyzeArgs& args, cudaStream_t stream) {
  if (args.p.k.dtype == Dtype::kBF16)
    launch_statistics<__nv_bfloat16>(args, stream);
  else
    launch_statistics<__half>(args, stream);
}

}  // namespace adaattn::cuda
