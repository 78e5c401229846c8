// Forward attention for 16-bit inputs on mma.sync and cp.async: four warps share a tile of queries. Up to head_dim 128
// K and V have two buffers each and one barrier per block; wider ones have one buffer each, K of the next block loads
// during softmax and PV, V of this block during QK.
#pragma once

#include "attend/sm80/portable.cuh"
#include "common/e4m3.cuh"
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
  // Blocks of 64 keys of E4M3 have one descale factor each.
  static constexpr bool kEightBits = Products<T>::kEightBits;
  static constexpr int kN = kDqk <= 64 && kDv <= 64 && kDv > 0 && !kEightBits ? 128 : 64;
  static constexpr int kStages = (kDqk <= 128 && kDv <= 128) || kEightBits ? 2 : 1;
  static constexpr int kQBytes = kM * (kDqk > kDv ? kDqk : kDv) * 2;
  static constexpr int kElement = static_cast<int>(sizeof(T));
  static constexpr int kKBytes = kN * kDqk * kElement, kVBytes = kN * kDv * kElement;
  static constexpr int kSharedBytes = kQBytes + kStages * (kKBytes + kVBytes);
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

template <typename T, int kDqk, int kDv, uint32_t kFeatures>
__global__ __launch_bounds__(128, 2) void forward_kernel(const __grid_constant__ AttendArgs args) {
  constexpr bool kExtras = (kFeatures & kUnaligned) != 0, kPages = (kFeatures & kPaged) != 0, kEntropyTool = kDv == 0;
  using Shape = ForwardShape<T, kDqk, kDv>;
  constexpr bool kEightBits = Shape::kEightBits;
  using Product = typename Products<T>::Type;
  using QLayout = TileLayout<kDqk>;
  using OLayout = TileLayout<kDv>;
  using KLayout = RowLayout<T, kDqk>;
  using VLayout = RowLayout<T, kDv>;
  constexpr int kM = Shape::kM, kN = Shape::kN, kRowTiles = Shape::kRowTiles, kRows = 2 * kRowTiles;
  constexpr int kKeyTiles = kN / 8, kDimTiles = kDv / 8, kStages = Shape::kStages;
  extern __shared__ __align__(128) unsigned char shared_memory[];
  __shared__ float row_unscale[kEightBits ? kM : 1], block_factors[kStages][2];  // E4M3: of Q's rows, of K and V

  if (args.splits > 1) launch_dependents();
  const AttnParams& p = args.p;
  const TileIndex tile = tile_index(args);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const Sequence s = sequence_of(p, tile.batch);
  const auto row_map = row_map_of<kEntropyTool>(args, tile, s);
  const int pack = args.pack, rows = row_count(args, row_map, s), m0 = tile.m * kM;
  if (m0 >= rows) {
    if (reports(args, tile)) report_sequence(args, tile.batch, thread, Shape::kThreads);
    return;
  }
  const int q_first = row_map.position(m0), q_last = row_map.position(min(m0 + kM, rows) - 1);
  const BlockRange blocks = block_range<kN>(args, s, q_first, q_last, tile.split);
  const int head_kv = row_map.first_head / args.group;
  const int d_qk = static_cast<int>(p.d_qk), d_v = static_cast<int>(p.d_v);

  const uint32_t q_shared = shared_address(shared_memory);
  const uint32_t k_shared = q_shared + Shape::kQBytes, v_shared = k_shared + kStages * Shape::kKBytes;
  const KeyRows<T, kPages> k_rows(args, p.k, s, tile.batch, head_kv), v_rows(args, p.v, s, tile.batch, head_kv);
  const auto load_k = [&](int n, uint32_t to) {
    load_keys<kDqk, kN, Shape::kThreads, kExtras>(to, thread, d_qk, k_rows, n, blocks.first_key, blocks.end_key,
                                                  args.aligned);
  };
  const auto load_v = [&](int n, uint32_t to) {
    if constexpr (!kEntropyTool)
      load_keys<kDv, kN, Shape::kThreads, kExtras>(to, thread, d_v, v_rows, n, blocks.first_key, blocks.end_key,
                                                   args.aligned);
  };
  const auto load_factors = [&](int n, int to) {
    if constexpr (kEightBits)
      if (thread < 2)
        cp_async4(shared_address(&block_factors[to][thread]),
                  block_factor(thread == 0 ? p.k_descale : p.v_descale, p.descale_block, kN, tile.batch, head_kv, n));
  };

  if (blocks.end > blocks.begin) {
    if constexpr (kEightBits) {
      load_k(blocks.end - 1, k_shared);
      load_v(blocks.end - 1, v_shared);
      load_factors(blocks.end - 1, 0);
      const int64_t first = tile.batch * p.q.stride_b + s.q_start * p.q.stride_s;
      load_queries<kDqk, kM, Shape::kThreads, kExtras>(
          q_shared, row_unscale, thread, p.q, d_qk, rows - m0, args.aligned,
          [&](int r) { return first + row_map.position(m0 + r) * p.q.stride_s + row_map.head(m0 + r) * p.q.stride_h; });
    } else {
      const T* q_base = static_cast<const T*>(p.q.data) + tile.batch * p.q.stride_b + s.q_start * p.q.stride_s;
      if (!kEntropyTool && pack == 1 && rows - m0 >= kM && d_qk == kDqk && (!kExtras || args.aligned)) {
        load_whole_rows<kDqk, kM, Shape::kThreads>(
            q_shared, thread, q_base + m0 * p.q.stride_s + row_map.first_head * p.q.stride_h, p.q.stride_s);
      } else {
        load_rows<kDqk, kM, Shape::kThreads, kExtras>(
            q_shared, thread, d_qk, RowSpan{0, rows - m0}, args.aligned, [&](int r) {
              return q_base + row_map.position(m0 + r) * p.q.stride_s + row_map.head(m0 + r) * p.q.stride_h;
            });
      }
      load_k(blocks.end - 1, k_shared);
      if (kStages == 2) load_v(blocks.end - 1, v_shared);
    }
    cp_async_commit();
  }

  // ldmatrix addresses of this lane's row in the first 16 columns of each operand.
  const uint32_t q_lane = q_shared + QLayout::offset(warp * Shape::kWarpRows + (lane & 15), lane >> 4);
  uint32_t k_lane = k_shared + (kEightBits ? KLayout::offset(lane, 0)
                                           : KLayout::offset((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1));
  uint32_t v_lane = v_shared + VLayout::offset(lane & 15, lane >> 4);

  const int first_row = m0 + warp * Shape::kWarpRows + lane / 4;  // row i of this thread is first_row + 8 i
  // Scores that are more than scaled products, or products scaled by 0 or less, are changed one by one. To ask which a
  // call has takes registers, which only the tool has left.
  const bool modified =
      kEntropyTool ? p.softcap > 0 || p.alibi_slopes != nullptr || p.bias.data != nullptr || !(p.scale > 0) : kExtras;
  const float to_log2 = modified ? kLog2e : p.scale * kLog2e;
  const float q_factor = kEightBits ? query_factor(p, tile.batch, head_kv) : 1.0f;
  ValueUnit unit;

  float out[kRowTiles][kEntropyTool ? 1 : kDimTiles][4];
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

  int stage = 0;
  for (int n = blocks.end - 1; n >= blocks.begin; --n) {
    cp_async_wait<0>();
    __syncthreads();  // what was asked for is there, and all warps are done with block n + 1
    if constexpr (kStages == 1) {
      load_v(n, v_shared);
      cp_async_commit();
    } else if (n > blocks.begin) {
      load_k(n - 1, k_shared + (stage ^ 1) * Shape::kKBytes);
      load_v(n - 1, v_shared + (stage ^ 1) * Shape::kVBytes);
      load_factors(n - 1, stage ^ 1);
      cp_async_commit();
    }

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
      for (int t = 0; t < kRowTiles; ++t) ldmatrix_x4(q[t], QLayout::advance(q_lane, k) + t * 16 * QLayout::kPitch);
      if constexpr (kEightBits) {
#pragma unroll
        for (int j = 0; j < kKeyTiles; j += 4) {
          uint32_t b[4];
          ldmatrix_x4(b, KLayout::advance_chunk(k_lane, k) + j * 8 * KLayout::kPitch);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const F16Pairs key = widen_adjacent(b[i]);
#pragma unroll
            for (int t = 0; t < kRowTiles; ++t) mma_m16n8k16<Product>(score[t][j + i], q[t], key.first, key.second);
          }
        }
      } else {
#pragma unroll
        for (int j = 0; j < kKeyTiles; j += 2) {
          uint32_t b[4];
          ldmatrix_x4(b, KLayout::advance(k_lane, k) + j * 8 * KLayout::kPitch);
#pragma unroll
          for (int t = 0; t < kRowTiles; ++t) {
            mma_m16n8k16<Product>(score[t][j], q[t], b[0], b[1]);
            mma_m16n8k16<Product>(score[t][j + 1], q[t], b[2], b[3]);
          }
        }
      }
    }
    float product[kRows], row_log2[kRows];  // what a product is multiplied by, and then a score
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      product[i] = 1;
      row_log2[i] = to_log2;
      if constexpr (kEightBits) {
        product[i] = row_unscale[warp * Shape::kWarpRows + lane / 4 + 8 * i] * (q_factor * block_factors[stage][0]);
        if (!modified) row_log2[i] = positive_factor(product[i] * to_log2);
      }
    }

    if constexpr (kStages == 1) {
      cp_async_wait<0>();
      __syncthreads();  // V(n) is there, and all warps are done with K(n)
      if (n > blocks.begin) {
        load_k(n - 1, k_shared);
        cp_async_commit();
      }
    }

    const bool masked = n < blocks.full_begin || n >= blocks.full_end;
    if (modified || masked) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int m = first_row + 8 * i, position = row_map.position(m);
        const KeySpan span = key_span(args, s, position);
        const int key0 = n * kN + 2 * (lane % 4);
        if (modified) {
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
              x = visible ? modify(x * product[i], key) : kNegInf;
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
      top[i] = fmaxf(soft.max2[i], quad_max(x) * row_log2[i]);
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
          const float centred = fmaf(x, row_log2[i], -base);
          x = exp2_approx(centred);
          soft.sum[i] += x;
          // -inf times 0 is not a number; 2^-150 is 0.
          if constexpr (kEntropyTool) {
            soft.weighted[i] = fmaf(x, fmaxf(centred, -150.0f), soft.weighted[i]);
          } else if (kExtras && x > 0) {
            soft.weighted[i] = fmaf(x, centred, soft.weighted[i]);
          }
        }
    }

    float weight = 1;
    if constexpr (kEightBits) {
      float shrink;
      weight = unit.weight(block_factors[stage][1], shrink);
      if (shrink != 1) {
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
          for (int j = 0; j < kDimTiles; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) out[t][j][e] *= shrink;
      }
    }
#pragma unroll
    for (int k = 0; k < kN / 16; ++k) {
      uint32_t prob[kRowTiles][4];
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) {
        const auto& low = score[t][2 * k];
        const auto& high = score[t][2 * k + 1];
        if constexpr (kEightBits) {
          prob[t][0] = pack2<Product>(low[0] * weight, low[1] * weight);
          prob[t][1] = pack2<Product>(low[2] * weight, low[3] * weight);
          prob[t][2] = pack2<Product>(high[0] * weight, high[1] * weight);
          prob[t][3] = pack2<Product>(high[2] * weight, high[3] * weight);
        } else {
          prob[t][0] = pack2<Product>(low[0], low[1]);
          prob[t][1] = pack2<Product>(low[2], low[3]);
          prob[t][2] = pack2<Product>(high[0], high[1]);
          prob[t][3] = pack2<Product>(high[2], high[3]);
        }
      }
      if constexpr (!kEntropyTool) multiply_values<T>(out, prob, v_lane + k * 16 * VLayout::kPitch);
    }
    if constexpr (kStages == 2) {
      k_lane += stage == 0 ? Shape::kKBytes : -Shape::kKBytes;
      v_lane += stage == 0 ? Shape::kVBytes : -Shape::kVBytes;
      stage ^= 1;
    }
  }

  if constexpr (kEntropyTool) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int m = first_row + 8 * i;
      const RowResult result =
          finish_row<true>(soft.max2[i], quad_sum(soft.sum[i]), quad_sum(soft.weighted[i]), kNegInf);
      if (lane % 4 == 0 && m < rows)
        store_tool_entropy(args, s, row_map, m, key_span(args, s, row_map.position(m)), result.entropy);
    }
    return;
  } else {
    // Normalise, then write: partial results and wide outputs from the fragments, narrow ones through shared memory.
    const bool staged = args.splits == 1 && p.o.dtype != Dtype::kF32;
    const bool statistics = args.splits > 1 || p.lse.data != nullptr || (kExtras && p.entropy.data != nullptr);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int m = first_row + 8 * i;
      float sink2 = kNegInf;
      if (p.sinks != nullptr && args.splits == 1 && m < rows)
        sink2 = p.sinks[row_map.head(m) * p.sinks_stride] * kLog2e;
      RowResult result =
          finish_row<kExtras>(soft.max2[i], quad_sum(soft.sum[i]), kExtras ? quad_sum(soft.weighted[i]) : 0.0f, sink2);
      if constexpr (kEightBits) result.factor *= unit.value();
#pragma unroll
      for (int j = 0; j < kDimTiles; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) out[i / 2][j][2 * (i % 2) + e] *= result.factor;
      if ((statistics || !staged) && m < rows) {
        const RowPlace place(args, tile, s, row_map, m);
        if (lane % 4 == 0) place.store_statistics<kExtras>(args, result);
        if (!staged) {
          const int first = (kEightBits ? 4 : 2) * (lane % 4);
          float* to = place.f32_output(args) + first;
#pragma unroll
          for (int j = 0; j < kDimTiles; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int column = kEightBits ? 16 * (j / 2) + 2 * e + j % 2 : 8 * j + e;
              if (column < d_v - first) to[column] = out[i / 2][j][2 * (i % 2) + e];
            }
        }
      }
    }
    if (staged) {
      // Each warp stages its rows where its own queries were; the region starts where they did.
      const int region = warp * Shape::kWarpRows * (Shape::kQBytes / Shape::kM);
      __syncwarp();
      if constexpr (kEightBits) {
        const uint32_t own = q_shared + region + OLayout::offset(lane / 4, lane % 4 / 2) + lane % 2 * 8;
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
          for (int j = 0; j < kDimTiles; j += 2) {
            const auto& even = out[i / 2][j];
            const auto& odd = out[i / 2][j + 1];
            const int e = 2 * (i % 2);
            store_shared8(OLayout::advance(own, j / 2) + i * 8 * OLayout::kPitch,
                          pack_narrow(p.o.dtype, even[e], odd[e]), pack_narrow(p.o.dtype, even[e + 1], odd[e + 1]));
          }
      } else {
        unsigned char* own = shared_memory + region + OLayout::offset(lane / 4, 0) + 4 * (lane % 4);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int j = 0; j < kDimTiles; ++j) {
            // offset(r, j) from offset(r, 0): chunks differ by an XOR in the low bits and a sum above them.
            constexpr int kMask = OLayout::kWhole ? 7 : 3;
            const int twisted = ((j & kMask) ^ OLayout::twist(lane / 4)) - OLayout::twist(lane / 4) + (j & ~kMask);
            *reinterpret_cast<uint32_t*>(own + i * 8 * OLayout::kPitch + twisted * 16) =
                pack2<T>(out[i / 2][j][2 * (i % 2)], out[i / 2][j][2 * (i % 2) + 1]);
          }
        }
      }
      __syncwarp();
      constexpr int kLanes = chunk_lanes(OLayout::kChunks);
      using Output = typename Products<T>::Output;
      Output* o_base = static_cast<Output*>(p.o.data) + tile.batch * p.o.stride_b + s.q_start * p.o.stride_s;
      const int warp_row = m0 + warp * Shape::kWarpRows;
      const bool whole = d_v == kDv && (!kExtras || args.aligned);
#pragma unroll 4
      for (int i = 0; i < Shape::kWarpRows; i += 32 / kLanes) {
        const int r = i + lane / kLanes, m = warp_row + r;
        if (m >= rows) break;
        Output* to = o_base + row_map.position(m) * p.o.stride_s + row_map.head(m) * p.o.stride_h;
#pragma unroll
        for (int c = lane % kLanes; c < OLayout::kChunks; c += kLanes) {
          const unsigned char* from = shared_memory + region + OLayout::offset(r, c);
          if (whole) {
            *reinterpret_cast<uint4*>(to + 8 * c) = *reinterpret_cast<const uint4*>(from);
          } else {
            const int elements = min(d_v - 8 * c, 8);
            if (elements == 8 && (!kExtras || args.aligned)) {
              *reinterpret_cast<uint4*>(to + 8 * c) = *reinterpret_cast<const uint4*>(from);
            } else {
              for (int e = 0; e < elements; ++e) to[8 * c + e] = reinterpret_cast<const Output*>(from)[e];
            }
          }
        }
      }
    }
    if (reports(args, tile)) report_sequence(args, tile.batch, thread, Shape::kThreads);
  }
}

template <typename T, int kDqk, int kDv, uint32_t kFeatures>
struct Forward {
  using Shape = ForwardShape<T, kDqk, kDv>;
  static constexpr auto kernel() { return &forward_kernel<T, kDqk, kDv, kFeatures>; }
  static AttendKernel row(const char* name) {
    return portable_row<Forward>(name, Phase::kForward, dtype_of<T>(), kDqk, kDv,
                                 kCommon | kFeatures | Products<T>::kFeatures, 2);
  }
};

}  // namespace adaattn::cuda::sm80
