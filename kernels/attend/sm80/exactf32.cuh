// Forward attention in f32 with ordinary multiply-adds: every product as precise as the inputs. 16 x 16 threads share
// a tile of queries; K and V take turns in one buffer, two CTAs per multiprocessor overlap loads and arithmetic.
#pragma once

#include "attend/sm80/portable.cuh"
#include "common/scores.cuh"
#include "common/tile_f32.cuh"

namespace adaattn::cuda::sm80 {

template <int kDPadded>
struct ExactF32Shape {
  static constexpr int kD = kDPadded, kThreads = 256;
  static constexpr int kM = kD > 128 ? 32 : 64, kN = kM;
  static constexpr int kPitch = kD + 4, kScorePitch = kN + 4;
  static constexpr int kSharedBytes = ((kM + kN) * kPitch + kM * kScorePitch) * 4;
  static_assert(kSharedBytes <= 99 * 1024, "compute capability 8.6 and 8.9 have 99 KiB");
};

__device__ __forceinline__ float half_warp_max(float x) {
#pragma unroll
  for (int step = 8; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}
__device__ __forceinline__ float half_warp_sum(float x) {
#pragma unroll
  for (int step = 8; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

template <int kD, bool kEntropyTool = false>
__global__ __launch_bounds__(256, 2) void exact_f32_kernel(const __grid_constant__ AttendArgs args) {
  using Shape = ExactF32Shape<kD>;
  constexpr int kM = Shape::kM, kN = Shape::kN, kPitch = Shape::kPitch, kScorePitch = Shape::kScorePitch;
  constexpr int kRows = kM / 16, kKeys = kN / 16, kGroups = kD / 64;  // of one thread; columns in groups of 4
  extern __shared__ __align__(128) unsigned char shared_memory[];
  float* q_tile = reinterpret_cast<float*>(shared_memory);
  float* kv_tile = q_tile + kM * kPitch;
  float* score_tile = kv_tile + kN * kPitch;

  if (args.splits > 1) launch_dependents();
  const AttnParams& p = args.p;
  const TileIndex tile = tile_index(args);
  const int thread = threadIdx.x, tx = thread % 16, ty = thread / 16;
  const Sequence s = sequence_of(p, tile.batch);
  const auto row_map = row_map_of<kEntropyTool>(args, tile, s);
  const int rows = row_count(args, row_map, s), m0 = tile.m * kM;
  if (m0 >= rows) {
    if (reports(args, tile)) report_sequence(args, tile.batch, thread, Shape::kThreads);
    return;
  }
  const int q_first = row_map.position(m0), q_last = row_map.position(min(m0 + kM, rows) - 1);
  const BlockRange blocks = block_range<kN>(args, s, q_first, q_last, tile.split);
  const int head_kv = row_map.first_head / args.group;
  const int d_qk = static_cast<int>(p.d_qk), d_v = static_cast<int>(p.d_v);
  const KeyRows<float, true> k_rows(args, p.k, s, tile.batch, head_kv), v_rows(args, p.v, s, tile.batch, head_kv);

  const float* q_base = static_cast<const float*>(p.q.data) + tile.batch * p.q.stride_b + s.q_start * p.q.stride_s;
  load_rows_f32<kD, kM, Shape::kThreads>(q_tile, thread, d_qk, RowSpan{0, rows - m0}, args.aligned, [&](int r) {
    return q_base + row_map.position(m0 + r) * p.q.stride_s + row_map.head(m0 + r) * p.q.stride_h;
  });
  cp_async_commit();

  float out[kRows][kGroups][4] = {}, max2[kRows], sum[kRows] = {}, weighted[kRows] = {};
#pragma unroll
  for (int i = 0; i < kRows; ++i) max2[i] = kNegInf;

  for (int n = blocks.begin; n < blocks.end; ++n) {
    __syncthreads();  // V of the block before is used up
    load_rows_f32<kD, kN, Shape::kThreads>(kv_tile, thread, d_qk,
                                           RowSpan{blocks.first_key - n * kN, blocks.end_key - n * kN}, args.aligned,
                                           [&](int r) { return k_rows.row(n * kN + r); });
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();

    float score[kRows][kKeys] = {};  // rows ty * kRows + i, keys tx + 16 j
#pragma unroll 4
    for (int c = 0; c < kD; c += 4) {
      float4 a[kRows], b[kKeys];
#pragma unroll
      for (int i = 0; i < kRows; ++i) a[i] = *reinterpret_cast<const float4*>(q_tile + (ty * kRows + i) * kPitch + c);
#pragma unroll
      for (int j = 0; j < kKeys; ++j) b[j] = *reinterpret_cast<const float4*>(kv_tile + (tx + 16 * j) * kPitch + c);
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int j = 0; j < kKeys; ++j) {
          float x = score[i][j];
          x = fmaf(a[i].x, b[j].x, x);
          x = fmaf(a[i].y, b[j].y, x);
          x = fmaf(a[i].z, b[j].z, x);
          score[i][j] = fmaf(a[i].w, b[j].w, x);
        }
    }
    __syncthreads();  // K is used up
    if constexpr (!kEntropyTool)
      load_rows_f32<kD, kN, Shape::kThreads>(kv_tile, thread, d_v,
                                             RowSpan{blocks.first_key - n * kN, blocks.end_key - n * kN}, args.aligned,
                                             [&](int r) { return v_rows.row(n * kN + r); });
    cp_async_commit();

#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int m = m0 + ty * kRows + i;
      const bool real = m < rows;
      const int position = real ? row_map.position(m) : 0;
      const ScoreModifier modify(args, s, tile.batch, real ? row_map.head(m) : 0, position);
      const KeySpan span = key_span(args, s, position);
      float top = max2[i];
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        const int key = n * kN + tx + 16 * j;
        float& x = score[i][j];
        x = real && key >= span.begin && key < span.end ? modify(x, key) * kLog2e : kNegInf;
        top = fmaxf(top, x);
      }
      top = half_warp_max(top);
      const float base = top == kNegInf ? 0.0f : top;
      const float shrink = exp2f(max2[i] - base);
      const float shift = max2[i] == kNegInf ? 0.0f : max2[i] - top;
      weighted[i] = shrink * fmaf(shift, sum[i], weighted[i]);
      sum[i] *= shrink;
      max2[i] = top;
#pragma unroll
      for (int g = 0; g < kGroups; ++g)
#pragma unroll
        for (int e = 0; e < 4; ++e) out[i][g][e] *= shrink;
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        const float centred = score[i][j] - base;
        const float w = exp2f(centred);
        sum[i] += w;
        if (w > 0) weighted[i] = fmaf(w, centred, weighted[i]);
        score_tile[(ty * kRows + i) * kScorePitch + tx + 16 * j] = w;
      }
    }
    cp_async_wait<0>();
    __syncthreads();

    if constexpr (!kEntropyTool) {
#pragma unroll 2
      for (int key = 0; key < kN; key += 4) {
        float w[kRows][4];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const float4 x = *reinterpret_cast<const float4*>(score_tile + (ty * kRows + i) * kScorePitch + key);
          w[i][0] = x.x, w[i][1] = x.y, w[i][2] = x.z, w[i][3] = x.w;
        }
#pragma unroll
        for (int e = 0; e < 4; ++e)
#pragma unroll
          for (int g = 0; g < kGroups; ++g) {
            const float4 v = *reinterpret_cast<const float4*>(kv_tile + (key + e) * kPitch + 64 * g + 4 * tx);
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
              out[i][g][0] = fmaf(w[i][e], v.x, out[i][g][0]);
              out[i][g][1] = fmaf(w[i][e], v.y, out[i][g][1]);
              out[i][g][2] = fmaf(w[i][e], v.z, out[i][g][2]);
              out[i][g][3] = fmaf(w[i][e], v.w, out[i][g][3]);
            }
          }
      }
    }
  }
  cp_async_wait<0>();

#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int m = m0 + ty * kRows + i;
    const float total = half_warp_sum(sum[i]), total_weighted = half_warp_sum(weighted[i]);
    if (m >= rows) continue;
    if constexpr (kEntropyTool) {
      const RowResult result = finish_row<true>(max2[i], total, total_weighted, kNegInf);
      if (tx == 0) store_tool_entropy(args, s, row_map, m, key_span(args, s, row_map.position(m)), result.entropy);
    } else {
      const RowPlace place(args, tile, s, row_map, m);
      const RowResult result = finish_row<true>(max2[i], total, total_weighted, place.sink2(args));
      if (tx == 0) place.store_statistics<true>(args, result);
      float* to = place.f32_output(args);
#pragma unroll
      for (int g = 0; g < kGroups; ++g)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (const int c = 64 * g + 4 * tx + e; c < d_v)
            to[c] = result.factor == 0 ? 0.0f : out[i][g][e] * result.factor;
    }
  }
  if (reports(args, tile)) report_sequence(args, tile.batch, thread, Shape::kThreads);
}

template <typename T, int kDqk, int kDv, uint32_t kFeatures>
struct Exactf32 {
  static_assert(kDqk == kDv);
  using Shape = ExactF32Shape<kDqk>;
  static constexpr auto kernel() { return &exact_f32_kernel<kDqk>; }
  static AttendKernel row(const char* name) {
    return portable_row<Exactf32>(name, Phase::kExactF32, dtype_of<T>(), kDqk, kDv, kCommon | kFeatures, 2);
  }
};

}  // namespace adaattn::cuda::sm80
