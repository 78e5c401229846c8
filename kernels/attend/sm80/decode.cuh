// Attention of few query rows over many keys, bound by the bytes of K and V. One 16-row tile holds the queries of all
// heads that share a key head; each warp walks its own keys through its own cp.async stages, so no warp waits for
// another until the end, where their partial results join in shared memory. With split keys and an arrival counter for
// each tile (AttendArgs::scheduler, zero before and after) the last CTA of a tile joins its parts, so that no other
// grid has to follow.
#pragma once

#include "attend/sm80/portable.cuh"
#include "common/e4m3.cuh"
#include "common/join.cuh"
#include "common/scores.cuh"
#include "common/tile.cuh"

namespace adaattn::cuda::sm80 {

template <typename T, int kDPadded>
struct DecodeShape {
  static constexpr int kD = kDPadded;
  static constexpr int kWarps = kD > 128 ? 2 : 4, kThreads = 32 * kWarps;
  static constexpr int kStages = kD > 64 ? 3 : 4;
  static constexpr int kKeys = 32 / sizeof(T);  // of one stage of one warp
  static constexpr int kM = 16, kN = kKeys * kWarps;
  static constexpr int kTileBytes = kKeys * kD * static_cast<int>(sizeof(T)), kStageBytes = 2 * kTileBytes;
  static constexpr int kWarpBytes = kStages * kStageBytes;
  static constexpr int kSharedBytes = kWarps * kWarpBytes;
  static_assert(16 * kD * 4 <= kWarpBytes, "a warp's partial output replaces its stages");
  static_assert(kSharedBytes <= 98 * 1024, "compute capability 8.6 and 8.9 have 99 KiB");
};

// Whether this CTA is the last of its tile; what the others wrote is to be seen then.
__device__ __forceinline__ bool arrives_last(const AttendArgs& args, int thread) {
  __shared__ bool last;
  __syncthreads();
  if (thread == 0) {
    uint32_t* arrived = args.scheduler + blockIdx.x;
    fence_device();
    last = atomicAdd(arrived, 1u) + 1 == static_cast<uint32_t>(args.splits);
    if (last) *arrived = 0;
    fence_device();
  }
  __syncthreads();
  return last;
}

// The rows of a tile from their partial results, a warp for each. weights: [warps][kMaxSplits].
template <int kD, int kWarps>
__device__ __forceinline__ void join_parts(const AttendArgs& args, const TileIndex& tile, const Sequence& s,
                                           const RowMap& row_map, int m0, int rows, int thread, float* weights) {
  constexpr int kColumns = kD / 32;
  const int warp = thread / 32, lane = thread % 32, d_v = static_cast<int>(args.p.d_v);
  float* weight = weights + warp * kMaxSplits;
  for (int m = m0 + warp; m < min(m0 + 16, rows); m += kWarps) {
    const RowPlace part(args, tile, s, row_map, m);
    const int64_t row = part.partial - tile.split * args.partial_rows;
    const RowResult result = join_weights(args, row, part.head, lane, weight);
    __syncwarp();
    float sum[kColumns] = {};
    const float* from = args.partial_o + row * d_v + lane;
    const int64_t step = args.partial_rows * d_v;
#pragma unroll 8
    for (int i = 0; i < args.splits; ++i, from += step) {
      const float w = weight[i];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        // An empty part's numbers do not count: they may be anything.
        const float x = lane + 32 * c < d_v ? __ldcg(from + 32 * c) : 0.0f;
        sum[c] = w != 0 ? fmaf(w, x, sum[c]) : sum[c];
      }
    }
    __syncwarp();
    const JoinedPlace place{tile.batch, part.token, part.head};
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (lane + 32 * c < d_v) place.store(args.p, lane + 32 * c, sum[c] * result.factor);
    if (lane == 0) place.store_statistics(args.p, result);
  }
}

template <typename T, int kD, uint32_t kFeatures>
__global__ __launch_bounds__(DecodeShape<T, kD>::kThreads) void decode_kernel(const __grid_constant__ AttendArgs args) {
  constexpr bool kExtras = (kFeatures & kUnaligned) != 0, kEightBits = Products<T>::kEightBits;
  using Shape = DecodeShape<T, kD>;
  using Layout = RowLayout<T, kD>;
  using Product = typename Products<T>::Type;
  constexpr int kWarps = Shape::kWarps, kKeys = Shape::kKeys, kStages = Shape::kStages, kDimTiles = kD / 8;
  constexpr int kKeyTiles = kKeys / 8;
  extern __shared__ __align__(128) unsigned char shared_memory[];
  __shared__ float warp_max2[kWarps][16], warp_sum[kWarps][16], warp_weighted[kWarps][16];
  // Descale factors of K and V come with the blocks they belong to.
  __shared__ float block_factors[kEightBits ? kWarps : 1][kStages][2], row_unscale[kEightBits ? 16 : 1];

  const bool joins = args.splits > 1 && args.scheduler != nullptr;
  if (args.splits > 1 && !joins) launch_dependents();
  const AttnParams& p = args.p;
  const TileIndex tile = tile_index(args);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const Sequence s = sequence_of(p, tile.batch);
  const int rows = static_cast<int>(s.len_q) * args.pack, m0 = tile.m * Shape::kM;
  if (m0 >= rows) {
    if (reports(args, tile)) report_sequence(args, tile.batch, thread, Shape::kThreads);
    return;
  }
  const RowMap row_map{args.pack, tile.head * args.pack};
  const int q_first = row_map.position(m0), q_last = row_map.position(min(m0 + Shape::kM, rows) - 1);
  const BlockRange blocks = block_range<kKeys>(args, s, q_first, q_last, tile.split);
  const int head_kv = row_map.first_head / args.group;
  const int d_qk = static_cast<int>(p.d_qk), d_v = static_cast<int>(p.d_v);
  const KeyRows<T, true> k_rows(args, p.k, s, tile.batch, head_kv), v_rows(args, p.v, s, tile.batch, head_kv);

  const uint32_t stages = shared_address(shared_memory) + warp * Shape::kWarpBytes;
  // A lane finds the row of one key of a block, and others get it from there. Its table entry it has looked up a block
  // ahead: it arrives while others are multiplied.
  const auto key_of_lane = [&](int block) {
    return max(min(block * kKeys + lane % kKeys, blocks.end_key - 1), blocks.first_key);
  };
  int32_t entry = 0;
  const auto look_up = [&](int block) {
    if (k_rows.paged() && block < blocks.end) entry = k_rows.entry(key_of_lane(block));
  };
  look_up(blocks.begin + warp);
  const auto load_stage = [&](int stage, int block) {
    if (block < blocks.end) {
      const uint32_t to = stages + stage * Shape::kStageBytes;
      const int first_key = block * kKeys, key = key_of_lane(block);
      const RowSpan valid{blocks.first_key - first_key, blocks.end_key - first_key};
      const bool all = valid.begin <= 0 && valid.end >= kKeys && (!kExtras || args.aligned);
      const auto load = [&](uint32_t tile, int d, const KeyRows<T, true>& rows) {
        const auto row = reinterpret_cast<unsigned long long>(rows.row(key, entry));
        const auto row_of = [&](int r) { return reinterpret_cast<const T*>(__shfl_sync(0xffffffffu, row, r)); };
        if (all && d == kD) {
          load_whole_rows<kD, kKeys, 32>(tile, lane, row_of);
        } else {
          load_rows<kD, kKeys, 32, kExtras>(tile, lane, d, valid, args.aligned, row_of);
        }
      };
      load(to, d_qk, k_rows);
      load(to + Shape::kTileBytes, d_v, v_rows);
      look_up(block + kWarps);
      if constexpr (kEightBits)
        if (lane < 2)
          cp_async4(
              shared_address(&block_factors[warp][stage][lane]),
              block_factor(lane == 0 ? p.k_descale : p.v_descale, p.descale_block, kKeys, tile.batch, head_kv, block));
    }
    cp_async_commit();
  };
  // The two query rows of this thread, and their fragments: columns 2(lane%4) + {0, 1, 8, 9} of each 16.
  uint32_t q[kD / 16][4];
  int position[2], head[2];
  KeySpan span[2];
  const auto query_row = [&](int at, int of_head) {
    return tile.batch * p.q.stride_b + (s.q_start + at) * p.q.stride_s + of_head * p.q.stride_h;
  };
  // With keys to be widened the CTA's threads bring chunks of the rows and make f16 of them in warp 0's last stage.
  constexpr int kLanes = kD / 8, kRowStep = Shape::kThreads / kLanes, kChunks = kEightBits ? 16 / kRowStep : 1;
  uint4 raw[kChunks];
  if constexpr (kEightBits) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int m = m0 + thread / kLanes + i * kRowStep;
      raw[i] = {0, 0, 0, 0};
      if (m < rows)
        raw[i] = load_query_chunk<kExtras>(p.q, query_row(row_map.position(m), row_map.head(m)), 8 * (thread % kLanes),
                                           d_qk, args.aligned);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int m = m0 + lane / 4 + 8 * half;
    const bool real = m < rows;
    position[half] = real ? row_map.position(m) : 0;
    head[half] = real ? row_map.head(m) : row_map.first_head;
    span[half] = real ? key_span(args, s, position[half]) : KeySpan{0, 0};
    if constexpr (kEightBits) continue;
    // Straight from memory. Rows that are not real get the numbers of one that is, and no key.
    const T* from = static_cast<const T*>(p.q.data) + query_row(position[half], head[half]);
    const bool whole = d_qk == kD && (!kExtras || args.aligned);
    if (whole) {
#pragma unroll
      for (int k = 0; k < kD / 16; ++k)
#pragma unroll
        for (int side = 0; side < 2; ++side)
          q[k][half + 2 * side] = *reinterpret_cast<const uint32_t*>(from + 16 * k + 8 * side + 2 * (lane % 4));
      continue;
    }
#pragma unroll
    for (int k = 0; k < kD / 16; ++k)
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int c = 16 * k + 8 * side + 2 * (lane % 4);
        uint32_t pair = 0;
        if ((!kExtras || args.aligned) && c + 1 < d_qk) {
          pair = *reinterpret_cast<const uint32_t*>(from + c);
        } else {
          if (c < d_qk) pair = reinterpret_cast<const unsigned short*>(from)[c];
          if (c + 1 < d_qk) pair |= static_cast<uint32_t>(reinterpret_cast<const unsigned short*>(from)[c + 1]) << 16;
        }
        q[k][half + 2 * side] = pair;
      }
  }

  const uint32_t k_lane = stages + (kEightBits ? Layout::offset(lane, 0)
                                               : Layout::offset((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1));
  const uint32_t v_lane = stages + Shape::kTileBytes + Layout::offset(lane & 15, lane >> 4);

  const float to_log2 = p.scale * kLog2e;
  const float q_factor = kEightBits ? query_factor(p, tile.batch, head_kv) : 1.0f;
  float row_factor[2] = {1, 1};  // of products with rows of Q
  ValueUnit unit;
  float out[1][kDimTiles][4], max2[2] = {kNegInf, kNegInf}, sum[2] = {0, 0}, weighted[2] = {0, 0};
#pragma unroll
  for (int j = 0; j < kDimTiles; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) out[0][j][e] = 0;

  // The first rounds only load: code in one place, for a short call waits for most of its instructions once.
  constexpr int kAhead = kStages - 1;
  const int first = blocks.begin + warp;
  int stage = 1;  // of `block`; a load goes to the stage before
#pragma unroll 1
  for (int block = first - kAhead * kWarps; block < blocks.end || (kEightBits && block <= first); block += kWarps) {
    if constexpr (kEightBits)
      if (block == first) {
        const uint32_t queries = shared_address(shared_memory) + (kStages - 1) * Shape::kStageBytes;
#pragma unroll
        for (int i = 0; i < kChunks; ++i)
          store_query_chunk<kD>(queries, row_unscale, thread / kLanes + i * kRowStep, thread % kLanes, raw[i],
                                p.q.dtype);
        __syncthreads();
        const uint32_t q_lane = queries + TileLayout<kD>::offset(lane & 15, lane >> 4);
#pragma unroll
        for (int k = 0; k < kD / 16; ++k) ldmatrix_x4(q[k], TileLayout<kD>::advance(q_lane, k));
        row_factor[0] = row_unscale[lane / 4] * q_factor;
        row_factor[1] = row_unscale[lane / 4 + 8] * q_factor;
        __syncthreads();
      }
    if (block >= first) {
      cp_async_wait<kAhead - 1>();
      __syncwarp();  // this block is there, and all lanes are done with the one before
    }
    load_stage(stage == 0 ? kStages - 1 : stage - 1, block + kAhead * kWarps);
    const uint32_t shift = stage * Shape::kStageBytes;
    const float* factors = block_factors[kEightBits ? warp : 0][stage];
    stage = stage + 1 == kStages ? 0 : stage + 1;
    if (block < first || (kEightBits && block >= blocks.end)) continue;

    float score[kKeyTiles][4] = {};
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
      uint32_t b[4];
      if constexpr (kEightBits) {
        ldmatrix_x4(b, Layout::advance_chunk(k_lane + shift, k));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const F16Pairs key = widen_adjacent(b[j]);
          mma_m16n8k16<Product>(score[j], q[k], key.first, key.second);
        }
      } else {
        ldmatrix_x4(b, Layout::advance(k_lane + shift, k));
        mma_m16n8k16<Product>(score[0], q[k], b[0], b[1]);
        mma_m16n8k16<Product>(score[1], q[k], b[2], b[3]);
      }
    }

#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float product = kEightBits ? row_factor[i] * factors[0] : 1.0f;  // what a product is multiplied by
      float top = max2[i];
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = score[j][2 * i + e];
          const int key = block * kKeys + 8 * j + 2 * (lane % 4) + e;
          const bool visible = key >= span[i].begin && key < span[i].end;
          if constexpr (kExtras) {
            x = visible ? ScoreModifier(args, s, tile.batch, head[i], position[i])(x * product, key) * kLog2e : kNegInf;
          } else {
            x = visible ? x * (product * to_log2) : kNegInf;
          }
          top = fmaxf(top, x);
        }
      top = quad_max(top);
      const float base = top == kNegInf ? 0.0f : top;
      const float shrink = exp2_approx(max2[i] - base);
      if constexpr (kExtras) {
        const float shift = max2[i] == kNegInf ? 0.0f : max2[i] - top;
        weighted[i] = shrink * fmaf(shift, sum[i], weighted[i]);
      }
      sum[i] *= shrink;
      max2[i] = top;
#pragma unroll
      for (int j = 0; j < kDimTiles; ++j) {
        out[0][j][2 * i] *= shrink;
        out[0][j][2 * i + 1] *= shrink;
      }
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = score[j][2 * i + e];
          const float centred = x - base;
          x = exp2_approx(centred);
          sum[i] += x;
          if (kExtras && x > 0) weighted[i] = fmaf(x, centred, weighted[i]);
        }
    }

    float weight = 1;
    if constexpr (kEightBits) {
      float shrink;
      weight = unit.weight(factors[1], shrink);
      if (shrink != 1) {
#pragma unroll
        for (int j = 0; j < kDimTiles; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) out[0][j][e] *= shrink;
      }
    }
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      const auto& low = score[2 * k];
      const auto& high = score[2 * k + 1];
      uint32_t prob[1][4];
      if constexpr (kEightBits) {
        prob[0][0] = pack2<Product>(low[0] * weight, low[1] * weight);
        prob[0][1] = pack2<Product>(low[2] * weight, low[3] * weight);
        prob[0][2] = pack2<Product>(high[0] * weight, high[1] * weight);
        prob[0][3] = pack2<Product>(high[2] * weight, high[3] * weight);
      } else {
        prob[0][0] = pack2<Product>(low[0], low[1]);
        prob[0][1] = pack2<Product>(low[2], low[3]);
        prob[0][2] = pack2<Product>(high[0], high[1]);
        prob[0][3] = pack2<Product>(high[2], high[3]);
      }
      multiply_values<T>(out, prob, v_lane + shift + k * 16 * Layout::kPitch);
    }
  }

  cp_async_wait<0>();
  __syncwarp();
  float* own = reinterpret_cast<float*>(shared_memory + warp * Shape::kWarpBytes);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = lane / 4 + 8 * i;
    const float total = quad_sum(sum[i]), total_weighted = quad_sum(weighted[i]);
    if (lane % 4 == 0) {
      warp_max2[warp][r] = max2[i];
      warp_sum[warp][r] = total;
      warp_weighted[warp][r] = total_weighted;
    }
    if constexpr (kEightBits) {
#pragma unroll
      for (int j = 0; j < kDimTiles; j += 2)
        *reinterpret_cast<float4*>(own + r * kD + 8 * j + 4 * (lane % 4)) =
            make_float4(out[0][j][2 * i] * unit.value(), out[0][j + 1][2 * i] * unit.value(),
                        out[0][j][2 * i + 1] * unit.value(), out[0][j + 1][2 * i + 1] * unit.value());
    } else {
#pragma unroll
      for (int j = 0; j < kDimTiles; ++j)
        *reinterpret_cast<float2*>(own + r * kD + 8 * j + 2 * (lane % 4)) =
            make_float2(out[0][j][2 * i], out[0][j][2 * i + 1]);
    }
  }
  __syncthreads();

  for (int r = warp; r < 16 && m0 + r < rows; r += kWarps) {
    const RowPlace place(args, tile, s, row_map, m0 + r);
    float top = kNegInf;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, warp_max2[w][r]);
    float part[kWarps], total = 0, total_weighted = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float shift = warp_max2[w][r] - top;
      part[w] = warp_sum[w][r] == 0 ? 0.0f : exp2f(shift);
      if (part[w] != 0) {
        total += part[w] * warp_sum[w][r];
        total_weighted += part[w] * fmaf(shift, warp_sum[w][r], warp_weighted[w][r]);
      }
    }
    const RowResult result = finish_row<kExtras>(top, total, total_weighted, place.sink2(args));
    if (lane == 0) place.store_statistics<kExtras>(args, result);
    const bool wide = place.split || p.o.dtype == Dtype::kF32;
    for (int c = lane; c < d_v; c += 32) {
      float x = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w)
        if (part[w] != 0)
          x = fmaf(part[w], reinterpret_cast<float*>(shared_memory + w * Shape::kWarpBytes)[r * kD + c], x);
      x = result.factor == 0 ? 0.0f : x * result.factor;
      if (wide) {
        place.f32_output(args)[c] = x;
      } else if constexpr (kEightBits) {
        store_narrow(p.o, place.offset(p.o) + c, x);
      } else {
        static_cast<T*>(p.o.data)[place.offset(p.o) + c] = from_float<T>(x);
      }
    }
  }
  if (joins && arrives_last(args, thread))
    join_parts<kD, kWarps>(args, tile, s, row_map, m0, rows, thread, reinterpret_cast<float*>(shared_memory));
  if (reports(args, tile)) report_sequence(args, tile.batch, thread, Shape::kThreads);
}

template <typename T, int kDqk, int kDv, uint32_t kFeatures>
struct Decode {
  static_assert(kDqk == kDv);
  using Shape = DecodeShape<T, kDqk>;
  static constexpr auto kernel() { return &decode_kernel<T, kDqk, kFeatures>; }
  static AttendKernel row(const char* name) {
    return portable_row<Decode>(name, Phase::kDecode, dtype_of<T>(), kDqk, kDv,
                                kCommon | kPaged | kFeatures | Products<T>::kFeatures, 2);
  }
};

}  // namespace adaattn::cuda::sm80
