// From 16-bit K and V to Int8Tables. Softmax does not see a vector subtracted from every key, and one subtracted from
// every value comes back in the epilogue: any vectors are right, and means of a sample are near the best.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>

#include "adaptive/bytes.h"
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
  const decide::HeadChoice* choice;  // null: all units are wanted
  int32_t group;                     // query heads of a KV head
};

// Whether some query head of KV head `head` takes 8 bits.
__device__ __forceinline__ bool is_wanted(const QuantizeArgs& args, int b, int head) {
  if (args.choice == nullptr) return true;
  const int heads = static_cast<int>(args.p.heads_kv);
  const decide::HeadChoice* const choice = args.choice + (b * heads + head) * args.group;
  bool wanted = false;
#pragma unroll 1
  for (int i = 0; i < args.group; ++i) wanted = wanted || choice[i].bytes;
  return wanted;
}

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
  cudaTriggerProgrammaticLaunchCompletion();
  const AttnParams& p = args.p;
  const int heads = static_cast<int>(p.heads_kv), b = blockIdx.x / heads, head = blockIdx.x - b * heads;
  const Sequence s = sequence_of(p, b);
  const int part = threadIdx.x % kLanes, first = threadIdx.x / kLanes;
  const int count = static_cast<int>(s.len_k < kSampleRows ? s.len_k : kSampleRows);
  if (!is_wanted(args, b, head)) return;
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

// One CTA per tile of K (blockIdx.y 0) or of V. A thread's columns are eight adjacent ones, always the same; all of its
// rows are loaded before the first is used, and before the means are waited for. Rows beyond the sequence become 0.
template <typename T, int kD>
class Quantizer {
  static constexpr int kLanes = kD / 8;                 // threads of a row
  static constexpr int kRowStep = kThreads / kLanes;    // rows of one load
  static constexpr int kLoads = kInt8TileK / kRowStep;  // loads of a thread
  static constexpr int kQuads = kLoads / 4;             // groups of four keys of V that a thread holds

 public:
  struct Shared {
    alignas(16) uint32_t transposed[kD][kInt8TileK / 4];
    float tops[kWarps];
  };

  __device__ __forceinline__ Quantizer(const QuantizeArgs& args, Shared& shared, const Sequence& s, int unit, int tile)
      : args_(args),
        shared_(shared),
        unit_(unit),
        warp_(threadIdx.x / 32),
        part_(threadIdx.x % kLanes),
        first_(threadIdx.x / kLanes),
        rows_(static_cast<int>(s.len_k) - tile * kInt8TileK),
        at_(int64_t{unit} * args.tables.key_tiles + tile) {}

  __device__ __forceinline__ void keys(const T* from, int64_t stride) {
    // Rows in blocks of kInt8ScaleBlock by halves of the CTA.
    constexpr int kHalf = kRowStep / 2;
    static_assert(kInt8TileK / kInt8ScaleBlock == 2);
    const auto row_of = [&](int i) { return first_ / kHalf * kInt8ScaleBlock + i * kHalf + first_ % kHalf; };
    float mean[8];
    load(from, stride, row_of);
    read_mean(args_.tables.k_mean, mean);
    find_tops(row_of, mean);
    float tops[2] = {0, 0};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) tops[w / (kWarps / 2)] = max_or_nan(tops[w / (kWarps / 2)], shared_.tops[w]);
    const float top = tops[warp_ / (kWarps / 2)];
    // Differences so small that the factor would overflow count as 0.
    const float factor = top < FLT_MIN * 127 ? 0.f : 127.f / top;
    if (threadIdx.x == 0)
      *reinterpret_cast<float2*>(args_.tables.scales[at_].k) = make_float2(tops[0] / 127, tops[1] / 127);
    uint8_t* to = args_.tables.k + at_ * kInt8TileK * kD;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int row = row_of(i);
      uint2 words = make_uint2(0, 0);
      if (row < rows_) {
        float x[8];
        unpack<T>(raw_[i], x);
#pragma unroll
        for (int c = 0; c < 8; ++c) x[c] -= mean[c];
        words.x = pack_int8(x[0], x[1], x[2], x[3], factor);
        words.y = pack_int8(x[4], x[5], x[6], x[7], factor);
      }
      *reinterpret_cast<uint2*>(to + swizzled<kD>(row * kD + 8 * part_)) = words;
    }
  }

  __device__ __forceinline__ void values(const T* from, int64_t stride) {
    const auto word_of = [&](int quad) { return quad * kRowStep + first_; };  // four keys of the transposed tile
    const auto row_of = [&](int i) { return v_key(4 * word_of(i / 4) + i % 4); };
    float mean[8];
    load(from, stride, row_of);
    read_mean(args_.tables.v_mean, mean);
    find_tops(row_of, mean);
    float top = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) top = max_or_nan(top, shared_.tops[w]);
    // The power of two that leaves the largest value in (224, 448].
    const bool zero = top < FLT_MIN * kE4m3Max;
    const uint32_t bits = __float_as_uint(top / kE4m3Max);
    const float scale = zero ? 1.f : __uint_as_float((bits + 0x7fffff) & 0x7f800000);
    const float factor = 1.f / scale;
    if (threadIdx.x == 0) *reinterpret_cast<float2*>(&args_.tables.scales[at_].v) = make_float2(scale, factor);
      // Words of line d of the transposed tile are permuted by d / 8, so that neither the writes (eight lines apart)
      // nor the reads (along a line) of a warp share banks.
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      float x[4][8];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const bool inside = row_of(4 * quad + k) < rows_;
        unpack<T>(raw_[4 * quad + k], x[k]);
#pragma unroll
        for (int c = 0; c < 8; ++c) x[k][c] = inside ? (x[k][c] - mean[c]) * factor : 0.f;
      }
#pragma unroll
      for (int c = 0; c < 8; ++c)
        shared_.transposed[8 * part_ + c][word_of(quad) ^ 2 * part_] = pack_e4m3(x[0][c], x[1][c], x[2][c], x[3][c]);
    }
    __syncthreads();
    uint8_t* to = args_.tables.v + at_ * kInt8TileK * kD;
#pragma unroll
    for (int i = 0; i < kD * 8 / kThreads; ++i) {
      const int line = (i * kThreads + threadIdx.x) / 8, chunk = threadIdx.x % 8, turn = line / 8;
      uint4 words = *reinterpret_cast<const uint4*>(&shared_.transposed[line][4 * (chunk ^ turn / 2)]);
      if (turn % 2 == 1) words = make_uint4(words.z, words.w, words.x, words.y);
      *reinterpret_cast<uint4*>(to + swizzled<128>(line * 128 + chunk * 16)) = words;
    }
  }

 private:
  template <class RowOf>
  __device__ __forceinline__ void load(const T* from, int64_t stride, const RowOf& row_of) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int row = row_of(i);
      if (row < rows_) raw_[i] = __ldcs(reinterpret_cast<const uint4*>(from + row * stride + 8 * part_));
    }
  }

  __device__ __forceinline__ void read_mean(const float* means, float (&mean)[8]) {
    cudaGridDependencySynchronize();
    const float4* from = reinterpret_cast<const float4*>(means + unit_ * kD + 8 * part_);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 four = from[i];
      mean[4 * i] = four.x, mean[4 * i + 1] = four.y, mean[4 * i + 2] = four.z, mean[4 * i + 3] = four.w;
    }
  }

  // The largest difference from the mean in each warp's rows.
  template <class RowOf>
  __device__ __forceinline__ void find_tops(const RowOf& row_of, const float (&mean)[8]) {
    float top = 0;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (row_of(i) >= rows_) continue;
      float x[8];
      unpack<T>(raw_[i], x);
#pragma unroll
      for (int c = 0; c < 8; ++c) top = max_or_nan(top, fabsf(x[c] - mean[c]));
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) top = max_or_nan(top, __shfl_xor_sync(~0u, top, step));
    if (threadIdx.x % 32 == 0) shared_.tops[warp_] = top;
    __syncthreads();
  }

  const QuantizeArgs& args_;
  Shared& shared_;
  const int unit_, warp_, part_, first_;
  const int rows_;  // of this tile and all after it
  const int64_t at_;
  uint4 raw_[kLoads];
};

template <typename T, int kD>
__global__ __launch_bounds__(kThreads, 4) void quantize_kernel(const __grid_constant__ QuantizeArgs args) {
  __shared__ typename Quantizer<T, kD>::Shared shared;
  const AttnParams& p = args.p;
  const int item = static_cast<int>(blockIdx.x / 2);
  const int unit = item / args.tables.key_tiles, tile = item - unit * args.tables.key_tiles;
  const int heads = static_cast<int>(p.heads_kv), b = unit / heads, head = unit - b * heads;
  const Sequence s = sequence_of(p, b);
  if (s.len_k <= tile * kInt8TileK || !is_wanted(args, b, head)) return;
  Quantizer<T, kD> quantizer(args, shared, s, unit, tile);
  const int64_t first_row = int64_t{tile} * kInt8TileK;
  if (blockIdx.x % 2 == 0) {
    quantizer.keys(row_of<T>(p.k, s, b, head, first_row), p.k.stride_s);
  } else {
    quantizer.values(row_of<T>(p.v, s, b, head, first_row), p.v.stride_s);
  }
}

template <typename T, int kD>
cudaError_t launch(const QuantizeArgs& args, cudaStream_t stream) {
  const auto units = static_cast<unsigned>(args.p.batch * args.p.heads_kv);
  if (const cudaError_t error = launch_grid(means_kernel<T, kD>, dim3(units, 2), kMeanThreads, 0, stream, args);
      error != cudaSuccess)
    return error;
  return launch_grid_overlapped(quantize_kernel<T, kD>, dim3(2 * units * static_cast<unsigned>(args.tables.key_tiles)),
                                kThreads, 0, stream, true, args);
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
  return launch_quantize_chosen(p, tables, nullptr, stream);
}

cudaError_t launch_quantize_chosen(const AttnParams& p, const Int8Tables& tables, const decide::HeadChoice* choice,
                                   cudaStream_t stream) {
  const QuantizeArgs args{p, tables, choice, static_cast<int32_t>(p.heads_q / p.heads_kv)};
  if (tables.key_tiles == 0) return cudaSuccess;
  if (p.k.dtype == Dtype::kBF16)
    return p.d_qk == 64 ? launch<__nv_bfloat16, 64>(args, stream) : launch<__nv_bfloat16, 128>(args, stream);
  return p.d_qk == 64 ? launch<__half, 64>(args, stream) : launch<__half, 128>(args, stream);
}

}  // namespace adaattn::cuda
