// Forward attention for 16-bit inputs on mma.sync and cp.async: four warps share a tile of queries, K and V stream
// through one buffer each. K of the next block loads during softmax and PV, V of this block during QK.
#pragma once

#include "attend/launch.h"
#include "common/scores.cuh"
#include "common/tile.cuh"

namespace adaattn::cuda::sm80 {

template <typename T, int kDqkPadded, int kDvPadded>
struct ForwardShape {
  static constexpr int kDqk = kDqkPadded, kDv = kDvPadded;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  // 32 rows per warp halve the K and V fragments read per product; from d_v = 192 the accumulators do not fit.
  static constexpr int kRowTiles = kDv > 128 ? 1 : 2;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kM = kWarps * kWarpRows;
  static constexpr int kN = kDqk <= 64 && kDv <= 64 ? 128 : 64;
  static constexpr int kQBytes = kM * (kDqk > kDv ? kDqk : kDv) * 2;
  static constexpr int kKBytes = kN * kDqk * 2, kVBytes = kN * kDv * 2;
  static constexpr int kSharedBytes = kQBytes + kKBytes + kVBytes;
  static_assert(kSharedBytes <= 99 * 1024, "compute capability 8.6 and 8.9 have 99 KiB");
};

// Maximum, sum and entropy accumulators of the rows that a thread shares with its quad.
template <int kRows, bool kEntropyToo>
struct RunningSoftmax {
  float max2[kRows];  // of the scaled scores in log2 units; may lag the true maximum by kSlack
  float sum[kRows];   // this thread's columns only
  float weighted[kEntropyToo ? kRows : 1];
};

// A maximum that grew by less than this is kept: exact by shift invariance, and probabilities up to 2^8 lose nothing
// in either 16-bit format.
inline constexpr float kSlack = 8.0f;

template <typename T, int kDqk, int kDv, bool kExtras>
__global__ __launch_bounds__(128, 2) void forward_kernel(const __grid_constant__ AttendArgs args) {
  using Shape = ForwardShape<T, kDqk, kDv>;
  using QLayout = TileLayout<kDqk>;
  using VLayout = TileLayout<kDv>;
  constexpr int kM = Shape::kM, kN = Shape::kN, kRowTiles = Shape::kRowTiles, kRows = 2 * kRowTiles;
  constexpr int kKeyTiles = kN / 8, kDimTiles = kDv / 8;
  extern __shared__ __align__(16) unsigned char shared_memory[];

  const AttnParams& p = args.p;
  const TileIndex tile = tile_index(args);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const Sequence s = sequence_of(p, tile.batch);
  const int pack = args.pack, rows = static_cast<int>(s.len_q) * pack, m0 = tile.m * kM;
  if (m0 >= rows) {
    if (reports(args, tile)) report_sequence(args, tile.batch, thread, Shape::kThreads);
    return;
  }
  const RowMap row_map{pack, tile.head * pack};
  const int q_first = row_map.position(m0), q_last = row_map.position(min(m0 + kM, rows) - 1);
  const BlockRange blocks = block_range<kN>(args, s, q_first, q_last, tile.split);
  const int len_k = static_cast<int>(s.len_k);
  const int head_kv = row_map.first_head / static_cast<int>(p.heads_q / p.heads_kv);
  const int d_qk = static_cast<int>(p.d_qk), d_v = static_cast<int>(p.d_v);

  const uint32_t q_shared = shared_address(shared_memory);
  const uint32_t k_shared = q_shared + Shape::kQBytes, v_shared = k_shared + Shape::kKBytes;
  const KeyRows<T> k_rows(args, p.k, s, tile.batch, head_kv), v_rows(args, p.v, s, tile.batch, head_kv);
  const auto load_k = [&](int n) {
    load_keys<kDqk, kN, Shape::kThreads, kExtras>(k_shared, thread, d_qk, k_rows, n * kN, len_k - n * kN, args.aligned);
  };
  const auto load_v = [&](int n) {
    load_keys<kDv, kN, Shape::kThreads, kExtras>(v_shared, thread, d_v, v_rows, n * kN, len_k - n * kN, args.aligned);
  };

  if (blocks.end > blocks.begin) {
    const T* q_base = static_cast<const T*>(p.q.data) + tile.batch * p.q.stride_b + s.q_start * p.q.stride_s;
    load_rows<kDqk, kM, Shape::kThreads, kExtras>(q_shared, thread, d_qk, rows - m0, args.aligned, [&](int r) {
      return q_base + row_map.position(m0 + r) * p.q.stride_s + row_map.head(m0 + r) * p.q.stride_h;
    });
    load_k(blocks.end - 1);
    cp_async_commit();
  }

  // ldmatrix addresses: the row part of each operand; the chunk part is XORed in per step.
  const int q_row = warp * Shape::kWarpRows + (lane & 15), q_chunk = lane >> 4;
  const int k_row = (lane & 7) + ((lane >> 4) << 3), k_chunk = (lane >> 3) & 1;
  const int v_row = lane & 15, v_chunk = lane >> 4;
  const int q_twist = QLayout::twist(q_row) ^ q_chunk, k_twist = QLayout::twist(k_row) ^ k_chunk;
  const int v_twist = VLayout::twist(v_row) ^ v_chunk;
  const uint32_t q_lane = q_shared + q_row * QLayout::kPitch, k_lane = k_shared + k_row * QLayout::kPitch;
  const uint32_t v_lane = v_shared + v_row * VLayout::kPitch;

  const int first_row = m0 + warp * Shape::kWarpRows + lane / 4;  // row i of this thread is first_row + 8 i
  const float to_log2 = kExtras ? kLog2e : p.scale * kLog2e;

  float out[kRowTiles][kDimTiles][4];
  RunningSoftmax<kRows, kExtras> soft;
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
    for (int j = 0; j < kDimTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) out[t][j][e] = 0;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    soft.max2[i] = kNegInf;
    soft.sum[i] = 0;
    if (kExtras) soft.weighted[i] = 0;
  }

  for (int n = blocks.end - 1; n >= blocks.begin; --n) {
    cp_async_wait<0>();
    __syncthreads();  // K(n) is there, and all warps are done with V(n + 1)
    load_v(n);
    cp_async_commit();

    float score[kRowTiles][kKeyTiles][4];
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) score[t][j][e] = 0;
#pragma unroll
    for (int k = 0; k < kDqk / 16; ++k) {
      uint32_t q[kRowTiles][4];
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t)
        ldmatrix_x4(q[t], q_lane + t * 16 * QLayout::kPitch + ((2 * k ^ q_twist) << 4));
#pragma unroll
      for (int j = 0; j < kKeyTiles; j += 2) {
        uint32_t b[4];
        ldmatrix_x4(b, k_lane + j * 8 * QLayout::kPitch + ((2 * k ^ k_twist) << 4));
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) {
          mma_m16n8k16<T>(score[t][j], q[t], b[0], b[1]);
          mma_m16n8k16<T>(score[t][j + 1], q[t], b[2], b[3]);
        }
      }
    }

    cp_async_wait<0>();
    __syncthreads();  // V(n) is there, and all warps are done with K(n)
    if (n > blocks.begin) {
      load_k(n - 1);
      cp_async_commit();
    }

    const bool masked = n < blocks.full_begin || n >= blocks.full_end;
    if (kExtras || masked) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int m = first_row + 8 * i, position = row_map.position(m);
        const KeySpan span = key_span(args, s, position);
        const int key0 = n * kN + 2 * (lane % 4);
        if constexpr (kExtras) {
          const bool real = m < rows;
          const ScoreModifier modify(args, s, tile.batch, real ? row_map.head(m) : row_map.first_head,
                                     real ? position : 0);
#pragma unroll
          for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float& x = score[i / 2][j][2 * (i % 2) + e];
              const int key = key0 + 8 * j + e;
              const bool visible = real && key >= span.begin && key < span.end;
              x = visible ? modify(x, key) : kNegInf;
            }
        } else {
#pragma unroll
          for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int key = key0 + 8 * j + e;
              if (key < span.begin || key >= span.end) score[i / 2][j][2 * (i % 2) + e] = kNegInf;
            }
        }
      }
    }

    // Row maxima; the old ones stay unless some row of the warp grew by more than the slack.
    float top[kRows];
    bool grew = false;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float x = kNegInf;
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j)
        x = fmaxf(x, fmaxf(score[i / 2][j][2 * (i % 2)], score[i / 2][j][2 * (i % 2) + 1]));
      top[i] = fmaxf(soft.max2[i], quad_max(x) * to_log2);
      grew |= top[i] - soft.max2[i] > kSlack;
    }
    if (__any_sync(0xffffffffu, grew)) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float shrink = soft.max2[i] == kNegInf ? 0.0f : exp2_approx(soft.max2[i] - top[i]);
        if constexpr (kExtras) {
          // A first finite maximum meets sum 0: the product is -inf * 0 then.
          const float shift = soft.max2[i] == kNegInf ? 0.0f : soft.max2[i] - top[i];
          soft.weighted[i] = shrink * fmaf(shift, soft.sum[i], soft.weighted[i]);
        }
        soft.max2[i] = top[i];
        soft.sum[i] *= shrink;
#pragma unroll
        for (int j = 0; j < kDimTiles; ++j) {
          out[i / 2][j][2 * (i % 2)] *= shrink;
          out[i / 2][j][2 * (i % 2) + 1] *= shrink;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float base = soft.max2[i] == kNegInf ? 0.0f : soft.max2[i];
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = score[i / 2][j][2 * (i % 2) + e];
          const float centred = fmaf(x, to_log2, -base);
          x = exp2_approx(centred);
          soft.sum[i] += x;
          if (kExtras && x > 0) soft.weighted[i] = fmaf(x, centred, soft.weighted[i]);
        }
    }

#pragma unroll
    for (int k = 0; k < kN / 16; ++k) {
      uint32_t prob[kRowTiles][4];
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) {
        const auto& low = score[t][2 * k];
        const auto& high = score[t][2 * k + 1];
        prob[t][0] = pack2<T>(low[0], low[1]);
        prob[t][1] = pack2<T>(low[2], low[3]);
        prob[t][2] = pack2<T>(high[0], high[1]);
        prob[t][3] = pack2<T>(high[2], high[3]);
      }
#pragma unroll
      for (int j = 0; j < kDimTiles; j += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, v_lane + k * 16 * VLayout::kPitch + ((j ^ v_twist) << 4));
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) {
          mma_m16n8k16<T>(out[t][j], prob[t], b[0], b[1]);
          mma_m16n8k16<T>(out[t][j + 1], prob[t], b[2], b[3]);
        }
      }
    }
  }

  // Normalise, then write: partial results and wide outputs from the fragments, narrow ones through shared memory.
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int m = first_row + 8 * i;
    const RowPlace place(args, tile, s, row_map, m < rows ? m : m0);
    const RowResult result =
        finish_row(soft.max2[i], quad_sum(soft.sum[i]), kExtras ? quad_sum(soft.weighted[i]) : 0.0f, place.sink2(args));
#pragma unroll
    for (int j = 0; j < kDimTiles; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = out[i / 2][j][2 * (i % 2) + e];
        x = result.factor == 0 ? 0.0f : x * result.factor;
      }
    if (m < rows) {
      if (lane % 4 == 0) place.store_statistics(args, result);
      if (place.split || p.o.dtype == Dtype::kF32) {
        float* to = place.f32_output(args);
#pragma unroll
        for (int j = 0; j < kDimTiles; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (const int c = 8 * j + 2 * (lane % 4) + e; c < d_v) to[c] = out[i / 2][j][2 * (i % 2) + e];
      }
    }
  }
  if (args.splits == 1 && p.o.dtype != Dtype::kF32) {
    // Each warp stages its rows where its own queries were; the region starts where they did.
    const int region = warp * Shape::kWarpRows * (Shape::kQBytes / Shape::kM);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int r = lane / 4 + 8 * i;
#pragma unroll
      for (int j = 0; j < kDimTiles; ++j) {
        *reinterpret_cast<uint32_t*>(shared_memory + region + VLayout::offset(r, j) + 4 * (lane % 4)) =
            pack2<T>(out[i / 2][j][2 * (i % 2)], out[i / 2][j][2 * (i % 2) + 1]);
      }
    }
    __syncwarp();
    constexpr int kLanes = chunk_lanes(VLayout::kChunks);
    T* o_base = static_cast<T*>(p.o.data) + tile.batch * p.o.stride_b + s.q_start * p.o.stride_s;
#pragma unroll 1
    for (int r = lane / kLanes; r < Shape::kWarpRows; r += 32 / kLanes) {
      const int m = m0 + warp * Shape::kWarpRows + r;
      if (m >= rows) break;
      T* to = o_base + row_map.position(m) * p.o.stride_s + row_map.head(m) * p.o.stride_h;
#pragma unroll
      for (int c = lane % kLanes; c < VLayout::kChunks; c += kLanes) {
        const int elements = min(d_v - 8 * c, 8);
        const unsigned char* from = shared_memory + region + VLayout::offset(r, c);
        if (elements == 8 && (!kExtras || args.aligned)) {
          *reinterpret_cast<uint4*>(to + 8 * c) = *reinterpret_cast<const uint4*>(from);
        } else {
          for (int e = 0; e < elements; ++e) to[8 * c + e] = reinterpret_cast<const T*>(from)[e];
        }
      }
    }
  }
  if (reports(args, tile)) report_sequence(args, tile.batch, thread, Shape::kThreads);
}

template <typename T, int kDqk, int kDv, uint32_t kFeatures>
struct Forward {
  using Shape = ForwardShape<T, kDqk, kDv>;
  static constexpr bool kExtrasToo = (kFeatures & kExtras) != 0;
  static AttendKernel row(const char* name) {
    AttendKernel k{};
    k.name = name;
    k.arch = 80;
    k.phase = Phase::kForward;
    k.dtype = dtype_of<T>();
    k.d_qk = kDqk;
    k.d_v = kDv;
    k.features = kCommon | kFeatures;
    k.tile_q = Shape::kM;
    k.tile_k = Shape::kN;
    k.ctas_per_sm = 2;
    k.reports = true;
    k.shared_bytes = Shape::kSharedBytes;
    k.function = reinterpret_cast<const void*>(&forward_kernel<T, kDqk, kDv, kExtrasToo>);
    k.launch = [](const AttendArgs& args, cudaStream_t stream) {
      const dim3 grid(static_cast<unsigned>(args.m_tiles * args.heads * args.p.batch), args.splits);
      return launch_grid(forward_kernel<T, kDqk, kDv, kExtrasToo>, grid, Shape::kThreads, Shape::kSharedBytes, stream,
                         args);
    };
    return k;
  }
};

}  // namespace adaattn::cuda::sm80
