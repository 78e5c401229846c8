// From 16-bit K and V to Int8Tables. Softmax does not see a vector subtracted from every key, and one subtracted from
// every value comes back in the epilogue: any vectors are right, and means of a sample are near the best.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>

#include "adaptive/int8_tables.h"
#include "attend/launch.h"
#include "common/sm90_int8.cuh"

namespace adaattn::cuda {
namespace {

using sm90::max_or_nan;
using sm90::pack_e4m3;
using sm90::pack_int8;
using sm90::swizzled;
using sm90::unpack_pair;

constexpr int kSampleRows = 256;  // a mean within 6 % of the rows' deviation
constexpr int kMeanThreads = 512;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr float kE4m3Max = 448;

int64_t key_tiles_of(int64_t seqlen_k) { return (seqlen_k + kInt8TileK - 1) / kInt8TileK; }

// Offsets of the arrays, in the order of the struct.
struct Layout {
  size_t k, v, scales, k_mean, v_mean, end;
  Layout(int64_t units, int64_t tiles, int64_t d_qk, int64_t d_v) {
    size_t at = 0;
    const auto take = [&](int64_t bytes) {
      const size_t start = at;
      at += (static_cast<size_t>(bytes) + 255) / 256 * 256;
      return start;
    };
    k = take(units * tiles * kInt8TileK * d_qk);
    v = take(units * tiles * kInt8TileK * d_v);
    scales = take(units * tiles * static_cast<int64_t>(sizeof(Int8Scales)));
    k_mean = take(units * d_qk * static_cast<int64_t>(sizeof(float)));
    v_mean = take(units * d_v * static_cast<int64_t>(sizeof(float)));
    end = at;
  }
};

struct QuantizeArgs {
  AttnParams p;
  Int8Tables tables;
};

template <typename T>
__device__ __forceinline__ void unpack(const uint4& words, float (&x)[8]) {
  const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = unpack_pair(pairs[i], static_cast<const T*>(nullptr));
    x[2 * i] = two.x;
    x[2 * i + 1] = two.y;
  }
}

template <typename T>
__device__ __forceinline__ const T* row_of(const Operand& x, const Sequence& s, int b, int head, int64_t row) {
  return static_cast<const T*>(x.data) + b * x.stride_b + (s.k_start + row) * x.stride_s + head * x.stride_h;
}

// Means of V are rounded to this many bits below the column's deviation. 16-bit values lie on a grid on which every
// 16th is halfway between two e4m3 numbers; a mean off that grid would make all of these fall to the same side, an
// error that no averaging over keys removes. On the grid they go to even.
constexpr int kMeanBits = 2;

__device__ __forceinline__ float on_grid(float mean, float variance) {
  const float step = __uint_as_float(__float_as_uint(sqrtf(variance)) & 0x7f800000) * (1.f / (1 << kMeanBits));
  return variance > FLT_MIN && variance < FLT_MAX ? rintf(mean / step) * step : mean;
}

// One CTA per unit and operand: means over at most kSampleRows rows at equal distances.
template <typename T, int kD>
__global__ __launch_bounds__(kMeanThreads) void means_kernel(const __grid_constant__ QuantizeArgs args) {
  constexpr int kLanes = kD / 8, kRows = kMeanThreads / kLanes, kPerThread = kSampleRows / kRows;
  __shared__ float sums[kRows][kD], squares[kRows][kD], bases[kD];
  const AttnParams& p = args.p;
  const int heads = static_cast<int>(p.heads_kv), b = blockIdx.x / heads, head = blockIdx.x - b * heads;
  const Sequence s = sequence_of(p, b);
  const int part = threadIdx.x % kLanes, first = threadIdx.x / kLanes;
  const int count = static_cast<int>(s.len_k < kSampleRows ? s.len_k : kSampleRows);
  const bool values = blockIdx.y == 1;
  const auto load = [&](int sample) {
    const int64_t row = count < kSampleRows ? sample : sample * s.len_k / kSampleRows;
    return *reinterpret_cast<const uint4*>(row_of<T>(values ? p.v : p.k, s, b, head, row) + 8 * part);
  };
  if (count == 0) return;
  uint4 raw[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i)
    if (first + i * kRows < count) raw[i] = load(first + i * kRows);
  // Differences from the first row, or the variance of a column far from 0 would be lost in the mean's square.
  float base[8], sum[8] = {}, square[8] = {};
  unpack<T>(load(0), base);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    if (first + i * kRows >= count) continue;
    float x[8];
    unpack<T>(raw[i], x);
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      x[c] -= base[c];
      sum[c] += x[c];
      square[c] = fmaf(x[c], x[c], square[c]);
    }
  }
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    sums[first][8 * part + c] = sum[c];
    squares[first][8 * part + c] = square[c];
    if (first == 0) bases[8 * part + c] = base[c];
  }
  __syncthreads();
  const int column = threadIdx.x;
  if (column >= kD) return;
  float total = 0, total_square = 0;
#pragma unroll 8
  for (int r = 0; r < kRows; ++r) {
    total += sums[r][column];
    total_square += squares[r][column];
  }
  const float difference = total / static_cast<float>(count), mean = bases[column] + difference;
  const float variance = fmaf(-difference, difference, total_square / static_cast<float>(count));
  (values ? args.tables.v_mean : args.tables.k_mean)[blockIdx.x * kD + column] =
      values ? on_grid(mean, variance) : mean;
}

// One CTA per tile. A thread's columns are eight adjacent ones, always the same; all of its rows are loaded before the
// first is used. Rows beyond the sequence become 0 in both tables.
template <typename T, int kD>
__global__ __launch_bounds__(kThreads, 2) void quantize_kernel(const __grid_constant__ QuantizeArgs args) {
  constexpr int kLanes = kD / 8;                 // threads of a row
  constexpr int kRowStep = kThreads / kLanes;    // rows of one load
  constexpr int kLoads = kInt8TileK / kRowStep;  // loads of a thread and operand
  constexpr int kQuads = kLoads / 4;             // groups of four keys of V that a thread holds
  __shared__ __align__(16) uint32_t transposed[kD][kInt8TileK / 4];
  __shared__ float tops[2][kWarps];
  const AttnParams& p = args.p;
  const int tile = static_cast<int>(blockIdx.x % static_cast<unsigned>(args.tables.key_tiles));
  const int unit = static_cast<int>(blockIdx.x / static_cast<unsigned>(args.tables.key_tiles));
  const int heads = static_cast<int>(p.heads_kv), b = unit / heads, head = unit - b * heads;
  const Sequence s = sequence_of(p, b);
  const int rows = static_cast<int>(s.len_k) - tile * kInt8TileK;  // of this tile and all after it
  if (rows <= 0) return;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int part = thread % kLanes, first = thread / kLanes;

  // K: rows in blocks of kInt8ScaleBlock by halves of the CTA. V: the four keys of a word of the transposed tile.
  const auto k_row = [&](int i) {
    constexpr int kHalf = kRowStep / 2;
    return first / kHalf * kInt8ScaleBlock + i * kHalf + first % kHalf;
  };
  const auto v_word = [&](int quad) { return quad * kRowStep + first; };
  const T* k_from = row_of<T>(p.k, s, b, head, int64_t{tile} * kInt8TileK) + 8 * part;
  const T* v_from = row_of<T>(p.v, s, b, head, int64_t{tile} * kInt8TileK) + 8 * part;
  uint4 k_raw[kLoads], v_raw[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int row = k_row(i);
    if (row < rows) k_raw[i] = __ldcs(reinterpret_cast<const uint4*>(k_from + row * p.k.stride_s));
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int row = v_key(4 * v_word(i / 4) + i % 4);
    if (row < rows) v_raw[i] = __ldcs(reinterpret_cast<const uint4*>(v_from + row * p.v.stride_s));
  }
  float k_mean[8], v_mean[8];
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    k_mean[c] = args.tables.k_mean[unit * kD + 8 * part + c];
    v_mean[c] = args.tables.v_mean[unit * kD + 8 * part + c];
  }

  float k_top = 0, v_top = 0;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    float x[8];
    if (k_row(i) < rows) {
      unpack<T>(k_raw[i], x);
#pragma unroll
      for (int c = 0; c < 8; ++c) k_top = max_or_nan(k_top, fabsf(x[c] - k_mean[c]));
    }
    if (v_key(4 * v_word(i / 4) + i % 4) < rows) {
      unpack<T>(v_raw[i], x);
#pragma unroll
      for (int c = 0; c < 8; ++c) v_top = max_or_nan(v_top, fabsf(x[c] - v_mean[c]));
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    k_top = max_or_nan(k_top, __shfl_xor_sync(~0u, k_top, step));
    v_top = max_or_nan(v_top, __shfl_xor_sync(~0u, v_top, step));
  }
  if (lane == 0) {
    tops[0][warp] = k_top;
    tops[1][warp] = v_top;
  }
  __syncthreads();
  static_assert(kInt8TileK / kInt8ScaleBlock == 2);
  float k_tops[2] = {0, 0};
  v_top = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    k_tops[w / (kWarps / 2)] = max_or_nan(k_tops[w / (kWarps / 2)], tops[0][w]);
    v_top = max_or_nan(v_top, tops[1][w]);
  }
  k_top = k_tops[warp / (kWarps / 2)];
  // Differences so small that the factor would overflow count as 0.
  const float k_factor = k_top < FLT_MIN * 127 ? 0.f : 127.f / k_top;
  // The power of two that leaves the largest value in (224, 448].
  const bool v_zero = v_top < FLT_MIN * kE4m3Max;
  const uint32_t v_bits = __float_as_uint(v_top / kE4m3Max);
  const float v_scale = v_zero ? 1.f : __uint_as_float((v_bits + 0x7fffff) & 0x7f800000);
  const float v_factor = 1.f / v_scale;

  const int64_t at = int64_t{unit} * args.tables.key_tiles + tile;
  if (thread == 0) args.tables.scales[at] = {{k_tops[0] / 127, k_tops[1] / 127}, v_scale, v_factor};

  uint8_t* k_to = args.tables.k + at * kInt8TileK * kD;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int row = k_row(i);
    uint2 words = make_uint2(0, 0);
    if (row < rows) {
      float x[8];
      unpack<T>(k_raw[i], x);
#pragma unroll
      for (int c = 0; c < 8; ++c) x[c] -= k_mean[c];
      words.x = pack_int8(x[0], x[1], x[2], x[3], k_factor);
      words.y = pack_int8(x[4], x[5], x[6], x[7], k_factor);
    }
    *reinterpret_cast<uint2*>(k_to + swizzled<kD>(row * kD + 8 * part)) = words;
  }

  // Words of line d of the transposed tile are permuted by d / 8, so that neither the writes (eight lines apart) nor
  // the reads (along a line) of a warp share banks.
#pragma unroll
  for (int quad = 0; quad < kQuads; ++quad) {
    float x[4][8];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const bool inside = v_key(4 * v_word(quad) + k) < rows;
      unpack<T>(v_raw[4 * quad + k], x[k]);
#pragma unroll
      for (int c = 0; c < 8; ++c) x[k][c] = inside ? (x[k][c] - v_mean[c]) * v_factor : 0.f;
    }
#pragma unroll
    for (int c = 0; c < 8; ++c)
      transposed[8 * part + c][v_word(quad) ^ 2 * part] = pack_e4m3(x[0][c], x[1][c], x[2][c], x[3][c]);
  }
  __syncthreads();
  uint8_t* v_to = args.tables.v + at * kInt8TileK * kD;
#pragma unroll
  for (int i = 0; i < kD * 8 / kThreads; ++i) {
    const int line = (i * kThreads + thread) / 8, chunk = thread % 8, turn = line / 8;
    uint4 words = *reinterpret_cast<const uint4*>(&transposed[line][4 * (chunk ^ turn / 2)]);
    if (turn % 2 == 1) words = make_uint4(words.z, words.w, words.x, words.y);
    *reinterpret_cast<uint4*>(v_to + swizzled<128>(line * 128 + chunk * 16)) = words;
  }
}

template <typename T, int kD>
cudaError_t launch(const QuantizeArgs& args, cudaStream_t stream) {
  const auto units = static_cast<unsigned>(args.p.batch * args.p.heads_kv);
  if (const cudaError_t error = launch_grid(means_kernel<T, kD>, dim3(units, 2), kMeanThreads, 0, stream, args);
      error != cudaSuccess)
    return error;
  return launch_grid(quantize_kernel<T, kD>, dim3(units * static_cast<unsigned>(args.tables.key_tiles)), kThreads, 0,
                     stream, args);
}

}  // namespace

size_t int8_tables_bytes(int64_t batch, int64_t heads_kv, int64_t seqlen_k, int64_t d_qk, int64_t d_v) {
  return Layout(batch * heads_kv, key_tiles_of(seqlen_k), d_qk, d_v).end;
}

Int8Tables lay_out_int8_tables(const AttnParams& p, void* memory) {
  const int64_t tiles = key_tiles_of(p.seqlen_k);
  const Layout layout(p.batch * p.heads_kv, tiles, p.d_qk, p.d_v);
  auto* base = static_cast<uint8_t*>(memory);
  Int8Tables tables;
  tables.key_tiles = static_cast<int32_t>(tiles);
  tables.k = base + layout.k;
  tables.v = base + layout.v;
  tables.scales = reinterpret_cast<Int8Scales*>(base + layout.scales);
  tables.k_mean = reinterpret_cast<float*>(base + layout.k_mean);
  tables.v_mean = reinterpret_cast<float*>(base + layout.v_mean);
  return tables;
}

cudaError_t launch_quantize(const AttnParams& p, const Int8Tables& tables, cudaStream_t stream) {
  const QuantizeArgs args{p, tables};
  if (tables.key_tiles == 0) return cudaSuccess;
  if (p.k.dtype == Dtype::kBF16)
    return p.d_qk == 64 ? launch<__nv_bfloat16, 64>(args, stream) : launch<__nv_bfloat16, 128>(args, stream);
  return p.d_qk == 64 ? launch<__half, 64>(args, stream) : launch<__half, 128>(args, stream);
}

}  // namespace adaattn::cuda
