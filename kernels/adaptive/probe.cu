// What a probe in fewer dimensions reads: Q and K in the directions in which scores vary most. With the queries' second
// moment r^T r and the second moment C of K less its mean, these are the leading eigenvectors W of r C r^T; queries are
// multiplied by r^-1 W, keys by r^T W.
#include <algorithm>

#include "adaptive/analyze.h"
#include "adaptive/rows.cuh"
#include "adaptive/sample.h"
#include "attend/launch.h"
#include "common/ptx.cuh"
#include "common/warp.cuh"
#include "lowrank/gram.cuh"
#include "lowrank/subspace.h"
#include "runtime.h"

namespace adaattn::cuda {
namespace {

constexpr int kDim = 128;
constexpr int kRows = decide::kTileK;
static_assert(decide::kTileQ == kRows);
// On the queries' second moment, relative to its mean diagonal, so that directions without queries stay invertible.
constexpr float kRidge = 1e-3f;

// About kSampleRows strided rows of the unit's queries, over all of its heads, and of its keys less their mean, a part
// of them in each CTA.
constexpr int kGatherThreads = 256;
__global__ __launch_bounds__(kGatherThreads) void gather_kernel(const __grid_constant__ AnalyzeArgs args) {
  constexpr int kPairs = kDim / 2, kLanes = kGatherThreads / kPairs, kPartRows = kSampleRows / kSampleParts;
  const TableShape& s = args.shape;
  const int unit = blockIdx.x, part = blockIdx.y, b = unit / s.heads_kv, head = unit % s.heads_kv;
  const bool of_keys = blockIdx.z != 0;
  const Sequence seq = sequence_of(args.p, b);
  const int64_t group = of_keys ? 1 : s.group, rows = of_keys ? seq.len_k : seq.len_q * group;
  int64_t step = max(int64_t{1}, (rows + kSampleRows - 1) / kSampleRows);
  // A step that shares no factor with the group size visits all of its heads.
  if (group > 1 && step % group == 0) ++step;
  const int c = static_cast<int>(threadIdx.x) % kPairs;
  float2 mean{0, 0};
  if (of_keys) mean = *reinterpret_cast<const float2*>(args.tables.k_mean + int64_t{unit} * kDim + 2 * c);
  float* const out = args.tables.probe_sample + (int64_t{unit} * 2 + of_keys) * kSampleRows * kDim + 2 * c;
#pragma unroll 8
  for (int i = static_cast<int>(threadIdx.x) / kPairs; i < kPartRows; i += kLanes) {
    const int64_t sample = part * kPartRows + i, row = sample * step;
    float2 x{0, 0};
    if (row < rows) {
      const auto from = of_keys ? key_rows<__nv_bfloat16>(args.p, args.p.k, seq, b, head)
                                : query_rows<__nv_bfloat16>(args.p, seq, b, head * group + row % group);
      x = widen2<__nv_bfloat16>(pair_at(from.row(row / group), c));
      x.x -= mean.x;
      x.y -= mean.y;
    }
    *reinterpret_cast<float2*>(out + sample * kDim) = x;
  }
}

// A matrix in shared memory, whose columns are read without conflicts too.
constexpr int kLd = kDim + 1;

// The factor l = r^T of each unit's queries, and r C r^T.
constexpr int kWhitenThreads = 1024;
constexpr size_t kWhitenBytes = 2 * kDim * kLd * sizeof(float);
__global__ __launch_bounds__(kWhitenThreads) void whiten_kernel(const __grid_constant__ AnalyzeArgs args,
                                                                const double* grams) {
  extern __shared__ float matrices[];
  float *const l = matrices, *const x = matrices + kDim * kLd;
  const int unit = blockIdx.x, thread = static_cast<int>(threadIdx.x);
  const double* const of_queries = grams + int64_t{unit} * 2 * kDim * kDim;
  __shared__ float column[2][kDim], trace;
  if (thread < 32) {
    float sum = 0;
#pragma unroll
    for (int i = thread; i < kDim; i += 32) sum += static_cast<float>(of_queries[i * (kDim + 1)]);
    sum = warp_sum(sum);
    if (thread == 0) trace = sum;
  }
  for (int i = thread; i < kDim * kDim; i += kWhitenThreads)
    x[i / kDim * kLd + i % kDim] = static_cast<float>(of_queries[kDim * kDim + i]);
  __syncthreads();
  const float ridge = kRidge / kDim * trace;
  // Cholesky, a row's every eighth column in each thread: column k is final when it is handed round.
  constexpr int kAcross = kWhitenThreads / kDim, kEach = kDim / kAcross;
  const int row = thread / kAcross, first_column = thread % kAcross;
  float own[kEach];
#pragma unroll
  for (int m = 0; m < kEach; ++m) {
    const int c = first_column + kAcross * m;
    own[m] = c > row ? 0.0f : static_cast<float>(of_queries[row * kDim + c]) + (c == row ? ridge : 0.0f);
  }
#pragma unroll
  for (int m = 0; m < kEach; ++m) {
#pragma unroll 1
    for (int i = 0; i < kAcross; ++i) {
      const int k = kAcross * m + i;
      float* const handed = column[k % 2];
      if (first_column == i) handed[row] = own[m];
      __syncthreads();
      // Without queries everything is 0, and stays so.
      const float pivot = fmaxf(handed[k], 1e-6f * ridge), inverse = pivot > 0 ? rsqrtf(pivot) : 0.0f;
      const float mine = row > k ? handed[row] * inverse : 0.0f;
      if (first_column == i) own[m] = row == k ? pivot * inverse : mine;
#pragma unroll
      for (int n = m; n < kEach; ++n) {
        const int c = first_column + kAcross * n;
        if (c > k && c <= row) own[n] = fmaf(-mine, handed[c] * inverse, own[n]);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kEach; ++m) l[row * kLd + first_column + kAcross * m] = own[m];
  __syncthreads();
  // Four rows by four columns of each thread.
  static_assert(kWhitenThreads * 16 == kDim * kDim);
  const int first = thread / 32 * 4, lane = thread % 32;
  float sum[4][4];
  const auto multiply = [&](const auto& left, const float* right) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] = 0;
#pragma unroll 4
    for (int m = 0; m < kDim; ++m) {
      float a[4], b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = left(first + i, m);
        b[i] = right[m * kLd + lane + 32 * i];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(a[i], b[j], sum[i][j]);
    }
  };
  multiply([&](int i, int m) { return x[i * kLd + m]; }, l);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) x[(first + i) * kLd + lane + 32 * j] = sum[i][j];
  __syncthreads();
  multiply([&](int i, int m) { return l[m * kLd + i]; }, x);
  double* const out = args.tables.probe_matrix + int64_t{unit} * kDim * kDim;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int r = first + i, c = lane + 32 * j;
      if (r >= c) out[r * kDim + c] = out[c * kDim + r] = sum[i][j];
    }
  float* const factor = args.tables.probe_factor + int64_t{unit} * kDim * kDim;
  for (int i = thread; i < kDim * kDim; i += kWhitenThreads) factor[i] = l[i / kDim * kLd + i % kDim];
}

// Both bases of each unit, [kDim][probe_columns], 0 from the probe's rank on; a warp a vector.
constexpr int kBasisThreads = 1024;
constexpr size_t kBasisBytes = kDim * kLd * sizeof(float);
__global__ __launch_bounds__(kBasisThreads) void basis_kernel(const __grid_constant__ AnalyzeArgs args, int columns) {
  extern __shared__ float l[];
  __shared__ float inverse[kDim];
  const TableShape& s = args.shape;
  const int unit = blockIdx.x, warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const float* const factor = args.tables.probe_factor + int64_t{unit} * kDim * kDim;
  for (int i = static_cast<int>(threadIdx.x); i < kDim * kDim; i += kBasisThreads)
    l[i / kDim * kLd + i % kDim] = factor[i];
  if (threadIdx.x < kDim) {
    const float pivot = factor[threadIdx.x * (kDim + 1)];
    inverse[threadIdx.x] = pivot > 0 ? 1 / pivot : 0.0f;
  }
  __syncthreads();
  __nv_bfloat16* const of_queries = args.tables.probe_bases + int64_t{unit} * 2 * kDim * s.probe_columns;
  __nv_bfloat16* const of_keys = of_queries + kDim * s.probe_columns;
  constexpr int kEach = kDim / 32;  // elements lane + 32 i of a vector
  for (int j = warp; j < s.probe_columns; j += kBasisThreads / 32) {
    float rest[kEach] = {}, q[kEach] = {}, k[kEach] = {};
    if (j < args.options.probe_rank) {
      const double* const w = args.tables.probe_vectors + (int64_t{unit} * columns + j) * kDim;
#pragma unroll
      for (int e = 0; e < kEach; ++e) rest[e] = static_cast<float>(w[lane + 32 * e]);
    }
    // k = l w, and l^T q = w from its last row on.
#pragma unroll
    for (int half = 0; half < kEach; ++half)
      for (int i = 0; i < 32; ++i) {
        const float x = __shfl_sync(~0u, rest[half], i);
#pragma unroll
        for (int e = 0; e < kEach; ++e) k[e] = fmaf(l[(lane + 32 * e) * kLd + 32 * half + i], x, k[e]);
      }
#pragma unroll
    for (int half = kEach - 1; half >= 0; --half)
      for (int i = 31; i >= 0; --i) {
        const int row = 32 * half + i;
        const float x = __shfl_sync(~0u, rest[half], i) * inverse[row];
        if (lane == i) q[half] = x;
#pragma unroll
        for (int e = 0; e < kEach; ++e) rest[e] = fmaf(-l[row * kLd + lane + 32 * e], x, rest[e]);
      }
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const bool finite = isfinite(q[e]) && isfinite(k[e]);
      of_queries[(lane + 32 * e) * s.probe_columns + j] = __float2bfloat16_rn(finite ? q[e] : 0.0f);
      of_keys[(lane + 32 * e) * s.probe_columns + j] = __float2bfloat16_rn(finite ? k[e] : 0.0f);
    }
  }
}

// A tile of keys or of a head's queries in its basis, and of queries the product with the mean of K.
constexpr int kProjectThreads = 128;
template <int kColumns>
struct Projection {
  static constexpr int kLdRows = kDim + 8, kLdBasis = kColumns + 8;
  alignas(16) __nv_bfloat16 rows[kRows][kLdRows];
  alignas(16) __nv_bfloat16 basis[kDim][kLdBasis];
  float mean[kDim];
};
template <int kColumns>
__global__ __launch_bounds__(kProjectThreads) void project_kernel(const __grid_constant__ AnalyzeArgs args) {
  using Tables = Projection<kColumns>;
  extern __shared__ __align__(16) unsigned char dynamic[];
  auto& shared = *reinterpret_cast<Tables*>(dynamic);
  launch_dependents();
  const TableShape& s = args.shape;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int key_items = static_cast<int>(args.p.batch) * s.heads_kv * s.key_tiles;
  const bool of_keys = static_cast<int>(blockIdx.x) < key_items;
  const int item = static_cast<int>(blockIdx.x) - (of_keys ? 0 : key_items);
  const int tiles = of_keys ? s.key_tiles : s.query_tiles, tile = item % tiles, index = item / tiles;
  const int heads = of_keys ? s.heads_kv : s.heads_q, b = index / heads, head = index % heads;
  const int unit = of_keys ? index : b * s.heads_kv + head / s.group;
  const Sequence seq = sequence_of(args.p, b);
  const int64_t first = int64_t{tile} * kRows, count = (of_keys ? seq.len_k : seq.len_q) - first;
  if (count <= 0) return;
  const auto from = of_keys ? key_rows<__nv_bfloat16>(args.p, args.p.k, seq, b, head)
                            : query_rows<__nv_bfloat16>(args.p, seq, b, head);
  shared.mean[thread] = args.tables.k_mean[int64_t{unit} * kDim + thread];
  const auto* const basis = args.tables.probe_bases + (int64_t{unit} * 2 + of_keys) * kDim * kColumns;
  for (int i = thread; i < kDim * kColumns / 8; i += kProjectThreads)
    *reinterpret_cast<uint4*>(&shared.basis[i / (kColumns / 8)][i % (kColumns / 8) * 8]) =
        reinterpret_cast<const uint4*>(basis)[i];
  __syncthreads();
  constexpr int kChunks = kDim / 8;
  const int chunk = thread % kChunks;
#pragma unroll 8
  for (int row = thread / kChunks; row < kRows; row += kProjectThreads / kChunks) {
    uint4 raw = make_uint4(0, 0, 0, 0);
    if (row < count) raw = *reinterpret_cast<const uint4*>(from.row(first + row) + 8 * chunk);
    if (of_keys && row < count) {
      uint32_t* const words = &raw.x;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float2 x = widen2<__nv_bfloat16>(words[w]);
        words[w] = pack2<__nv_bfloat16>(x.x - shared.mean[8 * chunk + 2 * w], x.y - shared.mean[8 * chunk + 2 * w + 1]);
      }
    }
    *reinterpret_cast<uint4*>(&shared.rows[row][8 * chunk]) = raw;
  }
  __syncthreads();
  const int64_t out_row =
      (of_keys ? int64_t{unit} * s.key_rows() : (int64_t{b} * s.heads_q + head) * s.query_rows()) + first;
  if (!of_keys) {
    float sum = 0;
    for (int c = 0; c < kDim; c += 2) {
      const float2 x = widen2<__nv_bfloat16>(*reinterpret_cast<const uint32_t*>(&shared.rows[thread][c]));
      sum = fmaf(x.x, shared.mean[c], fmaf(x.y, shared.mean[c + 1], sum));
    }
    args.tables.probe_base[out_row + thread] = sum;
  }
  __nv_bfloat16* const table = (of_keys ? args.tables.probe_k : args.tables.probe_q) + out_row * kColumns;
#pragma unroll 1
  for (int block = 32 * warp; block < 32 * (warp + 1); block += 16) {
    float y[kColumns / 8][4] = {};
    const uint32_t a_at = shared_address(&shared.rows[block + lane % 16][lane / 16 * 8]);
    const uint32_t b_at = shared_address(&shared.basis[lane % 16][lane / 16 * 8]);
#pragma unroll
    for (int k = 0; k < kDim; k += 16) {
      uint32_t a[4];
      ldmatrix_x4(a, a_at + 2 * k);
#pragma unroll
      for (int t = 0; t < kColumns / 8; t += 2) {
        uint32_t x[4];
        ldmatrix_x4_trans(x, b_at + 2 * (k * Tables::kLdBasis + 8 * t));
        mma_m16n8k16<__nv_bfloat16>(y[t], a, x[0], x[1]);
        mma_m16n8k16<__nv_bfloat16>(y[t + 1], a, x[2], x[3]);
      }
    }
    __nv_bfloat16* const out = table + (block + lane / 4) * kColumns + 2 * (lane % 4);
#pragma unroll
    for (int t = 0; t < kColumns / 8; ++t) {
      *reinterpret_cast<uint32_t*>(out + 8 * t) = pack2<__nv_bfloat16>(y[t][0], y[t][1]);
      *reinterpret_cast<uint32_t*>(out + 8 * kColumns + 8 * t) = pack2<__nv_bfloat16>(y[t][2], y[t][3]);
    }
  }
}

template <typename Kernel>
void prepare(Kernel* kernel, size_t bytes) {
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        "adaptive kernels");
}

template <int kColumns>
void project(const AnalyzeArgs& args, cudaStream_t stream) {
  const TableShape& s = args.shape;
  const int64_t items = args.p.batch * (int64_t{s.heads_kv} * s.key_tiles + int64_t{s.heads_q} * s.query_tiles);
  check(launch_grid(project_kernel<kColumns>, dim3(static_cast<unsigned>(items)), kProjectThreads,
                    sizeof(Projection<kColumns>), stream, args),
        "probe");
}

}  // namespace

void prepare_probe() {
  prepare(&whiten_kernel, kWhitenBytes);
  prepare(&basis_kernel, kBasisBytes);
  prepare(&project_kernel<32>, sizeof(Projection<32>));
  prepare(&project_kernel<64>, sizeof(Projection<64>));
}

void probe_tables(const AnalyzeArgs& args, cudaStream_t stream) {
  const TableShape& s = args.shape;
  const auto units = static_cast<unsigned>(args.p.batch * s.heads_kv);
  check(launch_grid(gather_kernel, dim3(units, kSampleParts, 2), kGatherThreads, 0, stream, args), "probe");
  const double* const grams =
      gram_of(sample_view(args.tables.probe_sample, int64_t{2} * units, kDim), args.tables.probe_gram_space, stream);
  check(launch_grid(whiten_kernel, dim3(units), kWhitenThreads, kWhitenBytes, stream, args, grams), "probe");
  SubspaceArgs basis;
  basis.batch = units;
  basis.dim = kDim;
  basis.ld = static_cast<int32_t>(subspace_ld(kDim));
  basis.columns = probe_vectors_of(s);
  basis.gram = args.tables.probe_matrix;
  basis.basis = args.tables.probe_vectors;
  basis.state = args.state.probe_basis;
  basis.values = args.tables.probe_values;
  basis.warm = args.state.probe_warm;
  basis.fast = true;
  // What is no longer among the first columns is left out.
  basis.rotate_warm = true;
  basis.seed = args.options.seed + 1;
  basis.scratch = args.tables.probe_scratch;
  subspace_iteration(basis, stream);
  check(launch_grid(basis_kernel, dim3(units), kBasisThreads, kBasisBytes, stream, args, basis.columns), "probe");
  if (s.probe_columns == 32)
    project<32>(args, stream);
  else
    project<64>(args, stream);
}

}  // namespace adaattn::cuda
