// Forward attention for f32 inputs whose descriptor allows narrower products: TF32 on mma.sync, f32 accumulation and
// softmax. The pipeline is that of forward.cuh.
#pragma once

#include "attend/sm80/portable.cuh"
#include "common/scores.cuh"
#include "common/tile_f32.cuh"

namespace adaattn::cuda::sm80 {

template <int kDPadded>
struct Tf32Shape {
  static constexpr int kD = kDPadded, kWarps = 4, kThreads = 128;
  static constexpr int kRowTiles = kD > 128 ? 1 : 2, kWarpRows = 16 * kRowTiles;
  static constexpr int kM = kWarps * kWarpRows, kN = 32;
  static constexpr int kPitch = kD + 4;  // floats; rows 4 banks apart serve ldmatrix and the transposed reads of V
  static constexpr int kSharedBytes = (kM + 2 * kN) * kPitch * 4;
};

// The hardware drops the low 13 mantissa bits; this makes it round to nearest instead. Infinities survive.
__device__ __forceinline__ uint32_t round_tf32(uint32_t bits) { return bits + 0x1000u; }

template <int kD>
__global__ __launch_bounds__(128, kD > 128 ? 1 : 2) void tf32_kernel(const __grid_constant__ AttendArgs args) {
  using Shape = Tf32Shape<kD>;
  constexpr int kM = Shape::kM, kN = Shape::kN, kPitch = Shape::kPitch, kRowTiles = Shape::kRowTiles;
  constexpr int kRows = 2 * kRowTiles, kKeyTiles = kN / 8, kDimTiles = kD / 8;
  extern __shared__ __align__(128) unsigned char shared_memory[];
  float* q_tile = reinterpret_cast<float*>(shared_memory);
  float* k_tile = q_tile + kM * kPitch;
  float* v_tile = k_tile + kN * kPitch;

  if (args.splits > 1) launch_dependents();
  const AttnParams& p = args.p;
  const TileIndex tile = tile_index(args);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const Sequence s = sequence_of(p, tile.batch);
  const int rows = static_cast<int>(s.len_q) * args.pack, m0 = tile.m * kM;
  if (m0 >= rows) {
    if (reports(args, tile)) report_sequence(args, tile.batch, thread, Shape::kThreads);
    return;
  }
  const RowMap row_map{args.pack, tile.head * args.pack};
  const int q_first = row_map.position(m0), q_last = row_map.position(min(m0 + kM, rows) - 1);
  const BlockRange blocks = block_range<kN>(args, s, q_first, q_last, tile.split);
  const int head_kv = row_map.first_head / args.group;
  const int d_qk = static_cast<int>(p.d_qk), d_v = static_cast<int>(p.d_v);
  const KeyRows<float, true> k_rows(args, p.k, s, tile.batch, head_kv), v_rows(args, p.v, s, tile.batch, head_kv);
  const auto load_k = [&](int n) {
    load_rows_f32<kD, kN, Shape::kThreads>(k_tile, thread, d_qk,
                                           RowSpan{blocks.first_key - n * kN, blocks.end_key - n * kN}, args.aligned,
                                           [&](int r) { return k_rows.row(n * kN + r); });
    cp_async_commit();
  };
  const auto load_v = [&](int n) {
    load_rows_f32<kD, kN, Shape::kThreads>(v_tile, thread, d_v,
                                           RowSpan{blocks.first_key - n * kN, blocks.end_key - n * kN}, args.aligned,
                                           [&](int r) { return v_rows.row(n * kN + r); });
    cp_async_commit();
  };

  if (blocks.end > blocks.begin) {
    const float* q_base = static_cast<const float*>(p.q.data) + tile.batch * p.q.stride_b + s.q_start * p.q.stride_s;
    load_rows_f32<kD, kM, Shape::kThreads>(q_tile, thread, d_qk, RowSpan{0, rows - m0}, args.aligned, [&](int r) {
      return q_base + row_map.position(m0 + r) * p.q.stride_s + row_map.head(m0 + r) * p.q.stride_h;
    });
    load_k(blocks.end - 1);
  }

  // ldmatrix moves 8 x 16 bytes: 8 rows of 4 floats, one float per lane, which is the TF32 fragment.
  const uint32_t q_lane = shared_address(q_tile + (warp * Shape::kWarpRows + (lane & 15)) * kPitch + 4 * (lane >> 4));
  const uint32_t k_lane = shared_address(k_tile + ((lane & 7) + ((lane >> 4) << 3)) * kPitch + 4 * ((lane >> 3) & 1));
  const float* v_lane = v_tile + 2 * (lane % 4) * kPitch + lane / 4;
  const int first_row = m0 + warp * Shape::kWarpRows + lane / 4;  // row i of this thread is first_row + 8 i
  const bool modified = p.softcap > 0 || p.alibi_slopes != nullptr || p.bias.data != nullptr;
  const float to_log2 = p.scale * kLog2e;

  float out[kRowTiles][kDimTiles][4], max2[kRows], sum[kRows], weighted[kRows];
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
    for (int j = 0; j < kDimTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) out[t][j][e] = 0;
#pragma unroll
  for (int i = 0; i < kRows; ++i) max2[i] = kNegInf, sum[i] = weighted[i] = 0;

  for (int n = blocks.end - 1; n >= blocks.begin; --n) {
    cp_async_wait<0>();
    __syncthreads();  // K(n) is there, and all warps are done with V(n + 1)
    load_v(n);

    float score[kRowTiles][kKeyTiles][4] = {};
#pragma unroll 8
    for (int k = 0; k < kD / 8; ++k) {
      uint32_t q[kRowTiles][4];
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) {
        ldmatrix_x4(q[t], q_lane + t * 16 * kPitch * 4 + k * 32);
#pragma unroll
        for (int e = 0; e < 4; ++e) q[t][e] = round_tf32(q[t][e]);
      }
#pragma unroll
      for (int j = 0; j < kKeyTiles; j += 2) {
        uint32_t b[4];
        ldmatrix_x4(b, k_lane + j * 8 * kPitch * 4 + k * 32);
#pragma unroll
        for (int e = 0; e < 4; ++e) b[e] = round_tf32(b[e]);
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) {
          mma_m16n8k8_tf32(score[t][j], q[t], b[0], b[1]);
          mma_m16n8k8_tf32(score[t][j + 1], q[t], b[2], b[3]);
        }
      }
    }
    cp_async_wait<0>();
    __syncthreads();  // V(n) is there, and all warps are done with K(n)
    if (n > blocks.begin) load_k(n - 1);

    const bool masked = n < blocks.full_begin || n >= blocks.full_end;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int m = first_row + 8 * i, key0 = n * kN + 2 * (lane % 4);
      if (modified || masked) {
        const bool real = m < rows;
        const int position = real ? row_map.position(m) : 0;
        const ScoreModifier modify(args, s, tile.batch, real ? row_map.head(m) : row_map.first_head, position);
        const KeySpan span = key_span(args, s, position);
#pragma unroll
        for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = score[i / 2][j][2 * (i % 2) + e];
            const int key = key0 + 8 * j + e;
            const bool visible = real && key >= span.begin && key < span.end;
            x = !visible ? kNegInf : modified ? modify(x, key) * kLog2e : x * to_log2;
          }
      } else {
#pragma unroll
        for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) score[i / 2][j][2 * (i % 2) + e] *= to_log2;
      }
      float top = max2[i];
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j)
        top = fmaxf(top, fmaxf(score[i / 2][j][2 * (i % 2)], score[i / 2][j][2 * (i % 2) + 1]));
      top = quad_max(top);
      const float base = top == kNegInf ? 0.0f : top;
      if (__any_sync(0xffffffffu, top != max2[i])) {
        const float shrink = exp2_approx(max2[i] - base);
        const float shift = max2[i] == kNegInf ? 0.0f : max2[i] - top;
        weighted[i] = shrink * fmaf(shift, sum[i], weighted[i]);
        sum[i] *= shrink;
        max2[i] = top;
#pragma unroll
        for (int j = 0; j < kDimTiles; ++j) {
          out[i / 2][j][2 * (i % 2)] *= shrink;
          out[i / 2][j][2 * (i % 2) + 1] *= shrink;
        }
      }
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = score[i / 2][j][2 * (i % 2) + e];
          const float centred = x - base;
          x = exp2_approx(centred);
          sum[i] += x;
          if (p.entropy.data != nullptr && x > 0) weighted[i] = fmaf(x, centred, weighted[i]);
        }
    }

    // A lane's accumulator columns 2t and 2t + 1 serve as the operand's columns t and t + 4; V's rows follow suit.
#pragma unroll
    for (int k = 0; k < kKeyTiles; ++k) {
      uint32_t prob[kRowTiles][4];
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) {
        prob[t][0] = round_tf32(__float_as_uint(score[t][k][0]));
        prob[t][1] = round_tf32(__float_as_uint(score[t][k][2]));
        prob[t][2] = round_tf32(__float_as_uint(score[t][k][1]));
        prob[t][3] = round_tf32(__float_as_uint(score[t][k][3]));
      }
#pragma unroll
      for (int j = 0; j < kDimTiles; ++j) {
        const float* from = v_lane + k * 8 * kPitch + j * 8;
        const uint32_t b0 = round_tf32(__float_as_uint(from[0])), b1 = round_tf32(__float_as_uint(from[kPitch]));
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) mma_m16n8k8_tf32(out[t][j], prob[t], b0, b1);
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int m = first_row + 8 * i;
    const float total = quad_sum(sum[i]), total_weighted = quad_sum(weighted[i]);
    if (m >= rows) continue;
    const RowPlace place(args, tile, s, row_map, m);
    const RowResult result = finish_row<true>(max2[i], total, total_weighted, place.sink2(args));
    if (lane % 4 == 0) place.store_statistics<true>(args, result);
    float* to = place.f32_output(args);
#pragma unroll
    for (int j = 0; j < kDimTiles; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (const int c = 8 * j + 2 * (lane % 4) + e; c < d_v)
          to[c] = result.factor == 0 ? 0.0f : out[i / 2][j][2 * (i % 2) + e] * result.factor;
  }
  if (reports(args, tile)) report_sequence(args, tile.batch, thread, Shape::kThreads);
}

template <typename T, int kDqk, int kDv, uint32_t kFeatures>
struct Tf32 {
  static_assert(kDqk == kDv);
  using Shape = Tf32Shape<kDqk>;
  static constexpr auto kernel() { return &tf32_kernel<kDqk>; }
  static AttendKernel row(const char* name) {
    return portable_row<Tf32>(name, Phase::kTf32, dtype_of<T>(), kDqk, kDv, kCommon | kFeatures, kDqk > 128 ? 1 : 2);
  }
};

}  // namespace adaattn::cuda::sm80
