// The queries that all heads of a unit sample are the rows of one problem, sample by sample with the heads interleaved.
// As in decoding, its time is that of reading K and V: a CTA reads a part of them once for as many tiles of rows as it
// has warps, and the parts meet when the rows are judged.
#include <algorithm>

#include "adaptive/judge.cuh"
#include "adaptive/stage_clock.cuh"
#include "adaptive/verify.h"
#include "attend/launch.h"
#include "common/ptx.cuh"
#include "common/scores.cuh"
#include "common/tile.cuh"
#include "runtime.h"

namespace adaattn::cuda {
namespace {

using T = __nv_bfloat16;
constexpr int kD = 128, kM = kVerifyTile;
constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kKeys = 64;  // of one stage
constexpr int kStages = 3;
constexpr int kTileBytes = kKeys * kD * 2, kStageBytes = 2 * kTileBytes, kSharedBytes = kStages * kStageBytes;
constexpr int kMaxSplits = 64;

__global__ __launch_bounds__(kThreads) void exact_rows_kernel(const __grid_constant__ AnalyzeArgs args,
                                                              VerifyShape verify, VerifyPart* parts) {
  using Layout = TileLayout<kD>;
  wait_for_previous_grid();
  begin_stage(args.state, kVerifyStage);
  if (*args.state.calls % verify.every != 0) return;
  extern __shared__ __align__(128) unsigned char shared_memory[];
  const AttnParams& p = args.p;
  const int ctas = (verify.row_tiles + kWarps - 1) / kWarps, group = args.shape.group, unit = blockIdx.x / ctas;
  const int b = unit / args.shape.heads_kv, head_kv = unit % args.shape.heads_kv, first_head = head_kv * group;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, split = blockIdx.y;
  const Sequence s = sequence_of(p, b);
  const SpreadRows sample = verified_rows(args, verify, s);
  const int rows = static_cast<int>(sample.count) * group, first_row = blockIdx.x % ctas * kWarps * kM;
  bool approximate = false;
  for (int i = thread; i < group; i += kThreads)
    approximate = approximate || !args.tables.choice[int64_t{b} * args.shape.heads_q + first_head + i].dense;
  if (first_row >= rows || __syncthreads_or(approximate) == 0) return;

  const auto position_of = [&](int m) { return sample.first + m / group * sample.step; };
  const int64_t low = visible_keys(p, s, position_of(first_row)).begin;
  const int64_t high = visible_keys(p, s, position_of(min(first_row + kWarps * kM, rows) - 1)).end;
  const int first_block = static_cast<int>(low / kKeys), last_block = static_cast<int>((high + kKeys - 1) / kKeys);
  const int per_split = max(0, (last_block - first_block + verify.splits - 1) / verify.splits);
  const int begin = first_block + split * per_split, end = min(begin + per_split, last_block);
  const T* const k_base =
      static_cast<const T*>(p.k.data) + b * p.k.stride_b + s.k_start * p.k.stride_s + head_kv * p.k.stride_h;
  const T* const v_base =
      static_cast<const T*>(p.v.data) + b * p.v.stride_b + s.k_start * p.v.stride_s + head_kv * p.v.stride_h;

  const uint32_t stages = shared_address(shared_memory);
  const auto load_stage = [&](int stage, int block) {
    if (block < end) {
      const uint32_t to = stages + stage * kStageBytes;
      const int64_t first_key = int64_t{block} * kKeys;
      const T *k = k_base + first_key * p.k.stride_s, *v = v_base + first_key * p.v.stride_s;
      if (first_key + kKeys <= s.len_k) {
        load_whole_rows<kD, kKeys, kThreads>(to, thread, k, p.k.stride_s);
        load_whole_rows<kD, kKeys, kThreads>(to + kTileBytes, thread, v, p.v.stride_s);
      } else {
        const RowSpan valid{0, static_cast<int>(s.len_k - first_key)};
        load_rows<kD, kKeys, kThreads, false>(to, thread, kD, valid, true, [&](int r) { return k + r * p.k.stride_s; });
        load_rows<kD, kKeys, kThreads, false>(to + kTileBytes, thread, kD, valid, true,
                                              [&](int r) { return v + r * p.v.stride_s; });
      }
    }
    cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) load_stage(i, begin + i);

  const int m0 = first_row + warp * kM;
  // Query rows of this thread: fragments hold columns 2(lane%4) + {0, 1, 8, 9} of each 16.
  uint32_t q[kD / 16][4];
  KeyRange span[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int m = m0 + lane / 4 + 8 * half;
    const bool real = m < rows;
    const int64_t position = real ? position_of(m) : 0;
    const int head = first_head + (real ? m % group : 0);
    span[half] = real ? visible_keys(p, s, position) : KeyRange{};
    const T* from = static_cast<const T*>(p.q.data) + b * p.q.stride_b + (s.q_start + position) * p.q.stride_s +
                    head * p.q.stride_h + 2 * (lane % 4);
#pragma unroll
    for (int k = 0; k < kD / 16; ++k)
#pragma unroll
      for (int side = 0; side < 2; ++side)
        q[k][half + 2 * side] = real ? *reinterpret_cast<const uint32_t*>(from + 16 * k + 8 * side) : 0u;
  }

  const uint32_t k_lane = stages + Layout::offset((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
  const uint32_t v_lane = stages + kTileBytes + Layout::offset(lane & 15, lane >> 4);
  float out[kD / 8][4] = {}, top[2] = {kNegInf, kNegInf}, sum[2] = {0, 0};
  const int64_t own_end = m0 < rows ? visible_keys(p, s, position_of(min(m0 + kM, rows) - 1)).end : 0;
  for (int block = begin; block < end; ++block) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this block is there, and all warps are done with the one before
    load_stage((block - begin + kStages - 1) % kStages, block + kStages - 1);
    const int64_t first_key = int64_t{block} * kKeys;
#pragma unroll 1
    for (int part = 0; part < kKeys / 16 && first_key + 16 * part < own_end; ++part) {
      const uint32_t shift = (block - begin) % kStages * kStageBytes + part * 16 * Layout::kPitch;
      float score[2][4] = {};
#pragma unroll
      for (int k = 0; k < kD / 16; ++k) {
        uint32_t keys[4];
        ldmatrix_x4(keys, Layout::advance(k_lane + shift, k));
        mma_m16n8k16<T>(score[0], q[k], keys[0], keys[1]);
        mma_m16n8k16<T>(score[1], q[k], keys[2], keys[3]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float highest = top[i];
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = score[j][2 * i + e];
            const int64_t key = first_key + 16 * part + 8 * j + 2 * (lane % 4) + e;
            x = key >= span[i].begin && key < span[i].end ? x * args.scale_log2 : kNegInf;
            highest = fmaxf(highest, x);
          }
        highest = quad_max(highest);
        const float base = highest == kNegInf ? 0.0f : highest, shrink = exp2_approx(top[i] - base);
        top[i] = highest;
        sum[i] *= shrink;
#pragma unroll
        for (int j = 0; j < kD / 8; ++j) {
          out[j][2 * i] *= shrink;
          out[j][2 * i + 1] *= shrink;
        }
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = score[j][2 * i + e];
            x = exp2_approx(x - base);
            sum[i] += x;
          }
      }
      const uint32_t weights[4] = {pack2<T>(score[0][0], score[0][1]), pack2<T>(score[0][2], score[0][3]),
                                   pack2<T>(score[1][0], score[1][1]), pack2<T>(score[1][2], score[1][3])};
#pragma unroll
      for (int j = 0; j < kD / 8; j += 2) {
        uint32_t values[4];
        ldmatrix_x4_trans(values, Layout::advance(v_lane + shift, j / 2));
        mma_m16n8k16<T>(out[j], weights, values[0], values[1]);
        mma_m16n8k16<T>(out[j + 1], weights, values[2], values[3]);
      }
    }
  }
  cp_async_wait<0>();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int m = m0 + lane / 4 + 8 * i;
    const float total = quad_sum(sum[i]);
    if (m >= rows) continue;
    VerifyPart* const to = part_of(parts, verify, unit, m, split);
    if (lane % 4 == 0) to->statistics = {top[i], total};
#pragma unroll
    for (int j = 0; j < kD / 8; ++j)
      *reinterpret_cast<float2*>(to->o + 8 * j + 2 * (lane % 4)) = make_float2(out[j][2 * i], out[j][2 * i + 1]);
  }
}

}  // namespace

VerifyShape verify_shape(const TableShape& s, int32_t rows, int32_t multiprocessors) {
  VerifyShape v;
  if (rows == 0) return v;
  v.rows = rows;
  v.row_tiles = (std::min(rows, s.query_tiles * decide::kTileQ) * s.group + kM - 1) / kM;
  // Two CTAs run on a multiprocessor at a time.
  const int64_t ctas = int64_t{s.batch} * s.heads_kv * ((v.row_tiles + kWarps - 1) / kWarps);
  const int64_t wanted = (2 * int64_t{multiprocessors} + ctas - 1) / ctas;
  const int64_t most = std::max<int64_t>(1, s.key_rows() / (2 * kKeys));
  v.splits = static_cast<int32_t>(std::min({wanted, most, int64_t{kMaxSplits}}));
  return v;
}

size_t verify_bytes(const TableShape& s, const VerifyShape& v) {
  return static_cast<size_t>(int64_t{s.batch} * s.heads_kv * v.row_tiles * v.splits * kM) * sizeof(VerifyPart);
}

cudaError_t launch_exact_rows(const AnalyzeArgs& args, const VerifyShape& verify, VerifyPart* parts,
                              cudaStream_t stream) {
  const dim3 grid(
      static_cast<unsigned>(args.p.batch * args.shape.heads_kv * ((verify.row_tiles + kWarps - 1) / kWarps)),
      static_cast<unsigned>(verify.splits));
  return launch_grid_overlapped(exact_rows_kernel, grid, kThreads, kSharedBytes, stream, true, args, verify, parts);
}

void prepare_verify() {
  check(cudaFuncSetAttribute(exact_rows_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes), "verify");
}

}  // namespace adaattn::cuda
