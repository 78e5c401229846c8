// One read of Q, K and V through TMA for schedules without a far field or a projected V: means of blocks of rows in 8
// bits, and the energies of V's tiles. Sums over rows are products with ones on the tensor cores.
#include <algorithm>

#include "adaptive/analyze.h"
#include "adaptive/sample.h"
#include "attend/launch.h"
#include "attend/sm90/tensor_map.h"
#include "common/ptx.cuh"
#include "common/sm90_ptx.cuh"
#include "decide/needles.h"
#include "runtime.h"

namespace adaattn::cuda {
namespace {

using sm90::mbarrier_arrive;
using sm90::mbarrier_arrive_expect_tx;
using sm90::mbarrier_wait;

constexpr int kDim = 128, kRows = decide::kTileK, kCells = decide::kCellsOfTile;
constexpr int kConsumers = 6;  // warps, each with a tile of its own
constexpr int kThreads = 32 * (kConsumers + 1);
constexpr int kStages = 6;
constexpr int kWidth = 128;                    // bytes of a row in a box: TMA's widest swizzle
constexpr int kHalf = kRows * kWidth;          // of a tile: 64 columns
constexpr int kStageBytes = kRows * kDim * 2;  // two halves
constexpr int kColumnTiles = kDim / 8;         // of a product
constexpr int kGroups = kRows / 16;            // rows of a product
constexpr int kQueryTiles = kQueryStep;        // whose sampled rows fill a stage
constexpr int kQueryBox = 256;                 // rows that a box of sampled ones goes over
static_assert(decide::kTileQ == kRows && kCells * decide::kCell == kRows);
static_assert(decide::kNeedleRows == 16 && decide::kNeedleKeys == 8);
static_assert(decide::kCell / kQueryStep == decide::kNeedleKeys, "sampled rows of a cell are as many as a needle's");

struct StreamArgs {
  AnalyzeArgs analyze;
  CUtensorMap q, k, v;
  int32_t query_items, key_items;  // of Q, of K and of V each
};

struct Shared {
  uint64_t full[kStages], empty[kStages];
};

enum class Kind { kQueries, kKeys, kValues };

// A stage's rows: of Q a tile, or the sampled rows of kQueryTiles tiles; of K and V a tile.
struct Item {
  Kind kind;
  int b, head, tile, rows;  // rows of Q that are not sampled are not counted
  int token, batch;         // where the boxes begin
};

template <bool kNeedles>
__device__ __forceinline__ Item item_of(const StreamArgs& args, int index) {
  const TableShape& s = args.analyze.shape;
  const AttnParams& p = args.analyze.p;
  Item x;
  // Heads side by side: their rows stand beside each other in memory.
  if (index < args.query_items) {
    constexpr int kTiles = kNeedles ? 1 : kQueryTiles;
    const int groups = (s.query_tiles + kTiles - 1) / kTiles;
    x.kind = Kind::kQueries;
    x.head = index % s.heads_q;
    x.tile = index / s.heads_q % groups * kTiles;
    x.b = index / s.heads_q / groups;
    const Sequence seq = sequence_of(p, x.b);
    const int64_t rows = min(seq.len_q - int64_t{x.tile} * kRows, int64_t{kTiles} * kRows);
    x.rows = static_cast<int>((max(rows, int64_t{0}) + kTiles - 1) / kTiles);
    x.token = static_cast<int>(seq.q_start + int64_t{x.tile} * kRows);
    x.batch = p.cu_seqlens_q != nullptr ? 0 : x.b;
    return x;
  }
  index -= args.query_items;
  x.kind = index < args.key_items ? Kind::kKeys : Kind::kValues;
  if (index >= args.key_items) index -= args.key_items;
  x.head = index % s.heads_kv;
  x.tile = index / s.heads_kv % s.key_tiles;
  x.b = index / s.heads_kv / s.key_tiles;
  const Sequence seq = sequence_of(p, x.b);
  x.rows = static_cast<int>(max(int64_t{0}, min(seq.len_k - int64_t{x.tile} * kRows, int64_t{kRows})));
  x.token = static_cast<int>(seq.k_start + int64_t{x.tile} * kRows);
  x.batch = p.cu_seqlens_k != nullptr ? 0 : x.b;
  return x;
}

// One thread keeps the stages flowing.
template <bool kNeedles>
__device__ __forceinline__ void produce(const StreamArgs& args, Shared& shared, uint8_t* stages) {
  const uint64_t once = sm90::l2_evict_first(), keep = sm90::l2_evict_last();
  const int items = args.query_items + 2 * args.key_items;
  int n = 0;
  for (int index = static_cast<int>(blockIdx.x); index < items; index += static_cast<int>(gridDim.x), ++n) {
    const Item x = item_of<kNeedles>(args, index);
    const int stage = n % kStages;
    mbarrier_wait(&shared.empty[stage], (n / kStages & 1) ^ 1);
    uint64_t* const full = &shared.full[stage];
    if (x.rows == 0) {
      mbarrier_arrive(full);
      continue;
    }
    mbarrier_arrive_expect_tx(full, kStageBytes);
    uint8_t* const to = stages + stage * kStageBytes;
    const CUtensorMap* const map = x.kind == Kind::kQueries ? &args.q : x.kind == Kind::kKeys ? &args.k : &args.v;
    const uint64_t policy = x.kind == Kind::kQueries ? once : keep;
    const int boxes = x.kind == Kind::kQueries && !kNeedles ? kQueryTiles * kRows / kQueryBox : 1;
    for (int half = 0; half < 2; ++half)
      for (int box = 0; box < boxes; ++box)
        sm90::tma_load_4d(to + half * kHalf + box * (kHalf / boxes), map, full, policy, half * (kWidth / 2),
                          x.token + box * kQueryBox, x.head, x.batch);
  }
}

__device__ __forceinline__ uint32_t ones_if(bool x) { return x ? 0x3f803f80u : 0u; }  // a pair in bf16

// Whether rows `row` and the next exist, as a mask of a pair.
__device__ __forceinline__ uint32_t pair_mask(int row, int rows) {
  return (row < rows ? 0xffffu : 0u) | (row + 1 < rows ? 0xffff0000u : 0u);
}

// A lane's place in a stage for ldmatrix: row lane % 16 of a group, 16 bytes lane / 16 of a pair of them.
struct Place {
  uint32_t base, turn, chunk;
  __device__ explicit Place(const uint8_t* stage) {
    const uint32_t lane = threadIdx.x % 32;
    base = shared_address(stage) + lane % 16 * kWidth;
    turn = lane % 8;
    chunk = lane / 16;
  }
  __device__ __forceinline__ uint32_t operator()(int pair, int group) const {
    return base + pair / 4 * kHalf + group * 16 * kWidth + ((pair % 4 * 2 + chunk ^ turn) << 4);
  }
};

using Sums = float[kColumnTiles][4];
using Squares = float[2][2][4];  // of even and odd pairs of column tiles: products that need not wait for each other

// sums[t]: rows lane / 4 and 8 more of the selection, columns 8 t + 2 (lane % 4) and the next. ones(group, a): the
// selection of a group of 16 rows. Rows from `rows` on count as zeros. squares: on the diagonals of the
// products of a pair of column tiles with each of them, whose fragments as either operand are alike; or null.
template <bool kWhole, typename Ones>
__device__ __forceinline__ void add_rows(const uint8_t* stage, int rows, const Ones& ones, Sums& sums,
                                         Squares* squares) {
  const Place place(stage);
  const int row = static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int t = 0; t < kColumnTiles; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[t][i] = 0;
      // A short body: warps go their own ways here, and code that each runs but once is fetched at a tenth of the rate.
#pragma unroll 1
  for (int group = 0; group < kGroups; ++group) {
    uint32_t a[4], mask[2];
    ones(group, a);
    if constexpr (!kWhole) {
      mask[0] = pair_mask(16 * group + row, rows);
      mask[1] = pair_mask(16 * group + 8 + row, rows);
    }
#pragma unroll
    for (int pair = 0; pair < kColumnTiles / 2; ++pair) {
      uint32_t x[4];
      ldmatrix_x4_trans(x, place(pair, group));
      if constexpr (!kWhole) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] &= mask[i % 2];
      }
      mma_m16n8k16<__nv_bfloat16>(sums[2 * pair], a, x[0], x[1]);
      mma_m16n8k16<__nv_bfloat16>(sums[2 * pair + 1], a, x[2], x[3]);
      if (squares == nullptr) continue;
      const uint32_t columns[4] = {x[0], x[2], x[1], x[3]};
      mma_m16n8k16<__nv_bfloat16>((*squares)[pair % 2][0], columns, x[0], x[1]);
      mma_m16n8k16<__nv_bfloat16>((*squares)[pair % 2][1], columns, x[2], x[3]);
    }
  }
}
template <typename Ones>
__device__ __forceinline__ void add_rows(const uint8_t* stage, int rows, const Ones& ones, Sums& sums,
                                         Squares* squares = nullptr) {
  if (rows >= kRows)
    add_rows<true>(stage, rows, ones, sums, squares);
  else
    add_rows<false>(stage, rows, ones, sums, squares);
}

// Blocks of 16 rows in rows 0 to 7 of the selection, of 32 in rows 8 to 11.
__device__ __forceinline__ void blocks_of_16(int group, uint32_t (&a)[4]) {
  const int row = static_cast<int>(threadIdx.x) % 32 / 4;
  a[0] = a[2] = ones_if(row == group);
  a[1] = a[3] = ones_if(row == group / 2);
}
// Blocks of 8 rows.
__device__ __forceinline__ void blocks_of_8(int group, uint32_t (&a)[4]) {
  const int row = static_cast<int>(threadIdx.x) % 32 / 4;
  a[0] = ones_if(row == 2 * group);
  a[1] = ones_if(row == 2 * group - 8);
  a[2] = ones_if(row == 2 * group + 1);
  a[3] = ones_if(row == 2 * group - 7);
}

__device__ __forceinline__ float of_rows(int rows, int first, int each) {
  const int count = min(max(rows - first, 0), each);
  return count > 0 ? 1.0f / static_cast<float>(count) : 0.0f;
}

// Column c of the lane's in row lane / 4, or 8 rows on.
__device__ __forceinline__ float half_of(const Sums& sums, int half, int c) {
  return half == 0 ? sums[c / 2][c % 2] : sums[c / 2][2 + c % 2];
}

// Columns 8 t + 2 (lane % 4) and the next of one row, in units of a scale, as the lane's 32 bytes of it:
// table_column().
__device__ __forceinline__ void put_bytes(const float (&x)[2 * kColumnTiles], float inverse, int8_t* row) {
  uint32_t words[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    uint32_t y[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) y[j] = __float_as_uint(fmaf(x[4 * i + j], inverse, 12582912.0f));  // 1.5 * 2^23
    words[i] = __byte_perm(__byte_perm(y[0], y[1], 0x40), __byte_perm(y[2], y[3], 0x40), 0x5410);
  }
  auto* const to = reinterpret_cast<uint4*>(row + threadIdx.x % 4 * (kDim / 4));
  to[0] = make_uint4(words[0], words[1], words[2], words[3]);
  to[1] = make_uint4(words[4], words[5], words[6], words[7]);
}

// The largest element of a row that four lanes share; NaN if some is not finite.
__device__ __forceinline__ float top_of(const float (&x)[2 * kColumnTiles]) {
  float top = 0, sum = 0;
#pragma unroll
  for (int c = 0; c < 2 * kColumnTiles; ++c) {
    top = fmaxf(top, fabsf(x[c]));
    sum += fabsf(x[c]);
  }
  top = quad_max(top);
  return isfinite(quad_sum(sum)) ? top : NAN;
}

// What a row of the top is multiplied with to be bytes; 0 for zeros and what is not finite.
__device__ __forceinline__ float to_bytes(float top) { return top > 0 ? 127.0f / top : 0.0f; }

// One warp: a row of means in bytes for every four lanes. to: null: nobody asks for this one.
__device__ __forceinline__ void put_mean(const float (&x)[2 * kColumnTiles], float factor, int8_t* row, float* scale) {
  const float top = top_of(x);
  if (row == nullptr) return;
  put_bytes(x, to_bytes(top), row);
  if (threadIdx.x % 4 == 0) *scale = factor * top * (1.0f / 127.0f);
}

template <bool kNeedles>
__device__ __forceinline__ void take_queries(const AnalyzeArgs& args, const Item& x, const uint8_t* stage,
                                             uint64_t* empty) {
  const TableShape& s = args.shape;
  const int lane = static_cast<int>(threadIdx.x) % 32, row = lane / 4;
  Sums sums;
  add_rows(
      stage, x.rows, [](int group, uint32_t(&a)[4]) { kNeedles ? blocks_of_16(group, a) : blocks_of_8(group, a); },
      sums);
  __syncwarp();
  if (lane == 0) mbarrier_arrive(empty);
  const int64_t tile = (int64_t{x.b} * s.heads_q + x.head) * s.query_tiles + x.tile;
  const int64_t cells_left = int64_t{s.query_tiles - x.tile} * kCells;
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    const bool needles = kNeedles && half == 0;
    const int each = needles || !kNeedles ? (kNeedles ? decide::kNeedleRows : decide::kNeedleKeys) : decide::kCell;
    const int block = kNeedles ? row : row + 8 * half;
    const float inverse = of_rows(x.rows, block * each, each);
    float mean[2 * kColumnTiles];
#pragma unroll
    for (int c = 0; c < 2 * kColumnTiles; ++c) mean[c] = half_of(sums, half, c) * inverse;
    const int64_t at = (needles ? tile * decide::kNeedleRowsOfTile : tile * kCells) + block;
    const bool there = needles || (kNeedles ? block < kCells : block < cells_left);
    int8_t* const bytes = (needles ? args.tables.needle_queries : args.tables.query_cells) + at * kDim;
    float* const scales = (needles ? args.tables.needle_query_scales : args.tables.query_scales) + at;
    put_mean(mean, args.scale_log2, there ? bytes : nullptr, scales);
  }
}

__device__ __forceinline__ void take_keys(const AnalyzeArgs& args, const Item& x, const uint8_t* stage,
                                          uint64_t* empty) {
  const TableShape& s = args.shape;
  const int lane = static_cast<int>(threadIdx.x) % 32, row = lane / 4;
  const int unit = x.b * s.heads_kv + x.head;
  const int64_t first_cell = int64_t{unit} * key_cells_of_unit(s) + x.tile * kCells;
  if (x.rows == 0) {
    if (lane == 0) mbarrier_arrive(empty);
    if (lane < kCells) args.tables.key_scales[first_cell + lane] = 0;
    return;
  }
  Sums sums;
  add_rows(stage, x.rows, blocks_of_8, sums);
  __syncwarp();
  if (lane == 0) mbarrier_arrive(empty);
  wait_for_previous_grid();  // for the means, which the sums do not need
  float shift[2 * kColumnTiles];
#pragma unroll
  for (int t = 0; t < kColumnTiles; ++t) {
    const float2 pair = *reinterpret_cast<const float2*>(args.tables.k_mean + unit * kDim + 8 * t + lane % 4 * 2);
    shift[2 * t] = pair.x;
    shift[2 * t + 1] = pair.y;
  }
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    const int cell = 2 * half + row / 4, block = 8 * half + row;
    const float of_cell = of_rows(x.rows, cell * decide::kCell, decide::kCell);
    float mean[2 * kColumnTiles];
#pragma unroll
    for (int c = 0; c < 2 * kColumnTiles; ++c) {
      float sum = half_of(sums, half, c);
      sum += __shfl_xor_sync(0xffffffffu, sum, 4);
      sum += __shfl_xor_sync(0xffffffffu, sum, 8);
      mean[c] = of_cell > 0 ? fmaf(sum, of_cell, -shift[c]) : 0.0f;
    }
    const int64_t at = first_cell + cell;
    put_mean(mean, 1.0f, row % 4 == 0 ? args.tables.key_cells + at * kDim : nullptr, args.tables.key_scales + at);
    if (!s.needles) continue;
    // With one scale for the needles of a cell.
    const float of_block = of_rows(x.rows, block * decide::kNeedleKeys, decide::kNeedleKeys);
#pragma unroll
    for (int c = 0; c < 2 * kColumnTiles; ++c)
      mean[c] = of_block > 0 ? fmaf(half_of(sums, half, c), of_block, -shift[c]) : 0.0f;
    float top = top_of(mean);
    top = top >= 0 ? top : INFINITY;
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 4));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 8));
    put_bytes(mean, to_bytes(top), args.tables.needle_keys + (first_cell * decide::kNeedlesOfCell + block) * kDim);
    if (lane % 16 == 0) args.tables.needle_key_scales[at] = top * (1.0f / 127.0f);
  }
}

__device__ __forceinline__ void take_values(const AnalyzeArgs& args, const Item& x, const uint8_t* stage,
                                            uint64_t* empty) {
  const TableShape& s = args.shape;
  const int lane = static_cast<int>(threadIdx.x) % 32, row = lane / 4;
  if (x.rows == 0) {
    if (lane == 0) mbarrier_arrive(empty);
    return;
  }
  Sums sums;  // all rows alike
  Squares squares = {};
  add_rows(
      stage, x.rows, [](int, uint32_t(&a)[4]) { a[0] = a[1] = a[2] = a[3] = ones_if(true); }, sums, &squares);
  __syncwarp();
  if (lane == 0) mbarrier_arrive(empty);
  wait_for_previous_grid();  // as in take_keys
  const int column = lane % 4 * 2;
  float square = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (row == column + i) square = squares[0][0][i] + squares[1][0][i] + squares[0][1][2 + i] + squares[1][1][2 + i];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) square += __shfl_xor_sync(0xffffffffu, square, step);
  const int unit = x.b * s.heads_kv + x.head;
  const int64_t at = int64_t{unit} * s.key_tiles + x.tile;
  const float inverse = 1.0f / static_cast<float>(x.rows);
  float of_mean = 0, between = 0;
#pragma unroll
  for (int t = 0; t < kColumnTiles; ++t) {
    const float2 of_all = *reinterpret_cast<const float2*>(args.tables.v_mean + unit * kDim + 8 * t + column);
    const float2 mean = {sums[t][0] * inverse, sums[t][1] * inverse};
    of_mean = fmaf(mean.x, mean.x, fmaf(mean.y, mean.y, of_mean));
    between = fmaf(mean.x - of_all.x, mean.x - of_all.x, between);
    between = fmaf(mean.y - of_all.y, mean.y - of_all.y, between);
    if (args.tables.shares != nullptr && t / 2 == row)
      *reinterpret_cast<uint32_t*>(args.tables.group_v + at * kDim + 8 * t + column) =
          pack2<__nv_bfloat16>(mean.x, mean.y);
  }
  const auto count = static_cast<float>(x.rows);
  of_mean = count * quad_sum(of_mean);
  between = count * quad_sum(between);
  if (lane != 0) return;
  TileEnergy& out = args.tables.energy[at];
  out.within = fmaxf(0.0f, square - of_mean);
  out.between = between;
#pragma unroll
  for (float& captured : out.captured) captured = 0;
  out.finite = isfinite(square + between);
}

// What decide adds to.
__device__ __forceinline__ void clear_sums(const AnalyzeArgs& args) {
  constexpr int kWords = sizeof(HeadSums) / sizeof(unsigned long long);
  const int heads = static_cast<int>(args.p.batch) * args.shape.heads_q, first = blockIdx.x * kThreads + threadIdx.x;
  const int step = static_cast<int>(gridDim.x) * kThreads, units = heads / args.shape.group;
  auto* const sums = reinterpret_cast<unsigned long long*>(args.tables.head_sums);
  for (int i = first; i < heads * kWords; i += step) sums[i] = 0;
  for (int i = first; i < units; i += step) args.tables.unit_sums[i] = {0, 0};
}

// Bounds that leave registers for a CTA of means beside one of these.
template <bool kNeedles>
__global__ __launch_bounds__(kThreads + 160, 1) void stream_kernel(const __grid_constant__ StreamArgs args) {
  extern __shared__ __align__(1024) uint8_t dynamic[];
  __shared__ Shared shared;
  uint8_t* const stages = dynamic + (1024 - shared_address(dynamic) % 1024) % 1024;
  launch_dependents();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      sm90::ptx::mbarrier_init(&shared.full[i], 1);
      sm90::ptx::mbarrier_init(&shared.empty[i], 1);
    }
    sm90::ptx::fence_mbarrier_init(sm90::ptx::sem_release, sm90::ptx::scope_cluster);
  }
  clear_sums(args.analyze);
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (warp == kConsumers) {
    if (threadIdx.x % 32 == 0) produce<kNeedles>(args, shared, stages);
    return;
  }
  const int items = args.query_items + 2 * args.key_items;
  int n = 0;
  for (int index = static_cast<int>(blockIdx.x); index < items; index += static_cast<int>(gridDim.x), ++n) {
    if (n % kConsumers != warp) continue;
    const Item x = item_of<kNeedles>(args, index);
    const int stage = n % kStages;
    uint64_t* const empty = &shared.empty[stage];
    mbarrier_wait(&shared.full[stage], n / kStages & 1);
    const uint8_t* const from = stages + stage * kStageBytes;
    if (x.kind == Kind::kQueries)
      take_queries<kNeedles>(args.analyze, x, from, empty);
    else if (x.kind == Kind::kKeys)
      take_keys(args.analyze, x, from, empty);
    else
      take_values(args.analyze, x, from, empty);
  }
  wait_for_previous_grid();
}

constexpr size_t kDynamicBytes = size_t{kStages} * kStageBytes + 1024;

}  // namespace

void prepare_stream() {
  const auto prepare = [](auto... kernels) {
    (check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernels), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                kDynamicBytes),
           "adaptive kernels"),
     ...);
  };
  prepare(&stream_kernel<false>, &stream_kernel<true>);
}

bool streams(const AnalyzeArgs& args) {
  const TableShape& s = args.shape;
  return args.p.k.dtype == Dtype::kBF16 && s.d_qk == kDim && s.d_v == kDim && s.max_rank == 0 &&
         !args.options.far_field && args.p.block_table == nullptr;
}

void stream_statistics(const AnalyzeArgs& args, cudaStream_t stream) {
  const TableShape& s = args.shape;
  const AttnParams& p = args.p;
  const bool packed_q = p.cu_seqlens_q != nullptr, packed_k = p.cu_seqlens_k != nullptr;
  const sm90::Extents queries{kDim, packed_q ? p.total_q : p.seqlen_q, p.heads_q, packed_q ? 1 : p.batch};
  const sm90::Extents keys{kDim, packed_k ? p.total_k : p.seqlen_k, p.heads_kv, packed_k ? 1 : p.batch};
  const auto batch = static_cast<int32_t>(p.batch);
  StreamArgs call;
  call.analyze = args;
  const int32_t tiles = s.needles ? 1 : kQueryTiles;
  call.query_items = batch * s.heads_q * ((s.query_tiles + tiles - 1) / tiles);
  call.key_items = batch * s.heads_kv * s.key_tiles;
  call.q = s.needles ? sm90::make_map(p.q, queries, kWidth, kRows, "q")
                     : sm90::make_sampled_map(p.q, queries, kWidth, kQueryBox, kQueryStep, "q");
  if (keys.tokens > 0) {
    call.k = sm90::make_map(p.k, keys, kWidth, kRows, "k");
    call.v = sm90::make_map(p.v, keys, kWidth, kRows, "v");
  }
  const auto kernel = s.needles ? &stream_kernel<true> : &stream_kernel<false>;
  const int32_t ctas = std::min(args.multiprocessors, call.query_items + 2 * call.key_items);
  check(launch_grid_overlapped(kernel, dim3(static_cast<unsigned>(ctas)), kThreads, kDynamicBytes, stream, true, call),
        "analyze");
}

}  // namespace adaattn::cuda
