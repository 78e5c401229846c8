#include "attend/sm90/forward_launch.h"

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>

#include "core/error.h"

namespace adaattn::sm90 {
namespace {

constexpr int64_t kLimit = int64_t{1} << 30;  // windows and tile counts: sums of two stay within int32

PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) {
      fail(ADAATTN_ERROR_DEVICE, "the driver has no cuTensorMapEncodeTiled: %s", cudaGetErrorString(error));
    }
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
  }();
  return encoder;
}

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// A [batch, token, head, dim] operand as TMA's (dim, token, head, batch); box_rows tokens of one swizzle width.
CUtensorMap make_map(const Operand& operand, int64_t dim, int64_t tokens, int64_t heads, int64_t batch, int width,
                     int box_rows, const char* name) {
  const int64_t element = 2;
  // The stride of a dimension of extent 1 is free: TMA wants a multiple of 16 bytes all the same.
  const auto bytes = [&](int64_t stride, int64_t extent) {
    return static_cast<cuuint64_t>(extent > 1 ? stride * element : round_up(dim * element, 16));
  };
  const cuuint64_t extents[4] = {static_cast<cuuint64_t>(dim), static_cast<cuuint64_t>(tokens),
                                 static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(batch)};
  const cuuint64_t strides[3] = {bytes(operand.stride_s, tokens), bytes(operand.stride_h, heads),
                                 bytes(operand.stride_b, batch)};
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(width / element), static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result = tensor_map_encoder()(
      &map, operand.dtype == Dtype::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
      operand.data, extents, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      width == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    fail(ADAATTN_ERROR_DEVICE, "cuTensorMapEncodeTiled refused %s (CUresult %d)", name, static_cast<int>(result));
  }
  return map;
}

}  // namespace

void launch_forward(const ForwardInstance& instance, const AttnParams& p, int32_t* counters, int multiprocessors,
                    cudaStream_t stream) {
  const ForwardConfig& c = instance.config;
  const int tile_m = 64 * c.groups;
  const bool packed_q = p.cu_seqlens_q != nullptr, packed_k = p.cu_seqlens_k != nullptr;
  const int64_t tokens_q = packed_q ? p.total_q : p.seqlen_q, tokens_k = packed_k ? p.total_k : p.seqlen_k;
  const int width_qk = c.d_qk % 64 == 0 ? 128 : 64, width_v = c.d_v % 64 == 0 ? 128 : 64;

  ForwardArgs args{};
  args.q_map = make_map(p.q, p.d_qk, tokens_q, p.heads_q, packed_q ? 1 : p.batch, width_qk, 64, "q");
  args.k_map = make_map(p.k, p.d_qk, tokens_k, p.heads_kv, packed_k ? 1 : p.batch, width_qk, c.tile_n, "k");
  args.v_map = make_map(p.v, p.d_v, tokens_k, p.heads_kv, packed_k ? 1 : p.batch, width_v, c.tile_n, "v");
  args.p = p;
  if (packed_q) args.p.o.stride_b = args.p.lse.stride_b = 0;
  constexpr float kLog2e = 1.4426950408889634f;
  args.scale_log2 = (p.softcap != 0 ? p.softcap : p.scale) * kLog2e;
  args.softcap_log2 = p.softcap != 0 ? 2 * p.scale / p.softcap * kLog2e : 0;
  args.batch = static_cast<int32_t>(p.batch);
  args.heads_q = static_cast<int32_t>(p.heads_q);
  args.seqlen_q = static_cast<int32_t>(p.seqlen_q);
  args.seqlen_k = static_cast<int32_t>(p.seqlen_k);
  args.total_q = static_cast<int32_t>(p.total_q);
  args.total_k = static_cast<int32_t>(p.total_k);
  args.window_left = static_cast<int32_t>(std::min(p.window_left, kLimit));
  args.window_right = static_cast<int32_t>(std::min(p.window_right, kLimit));
  args.group_size = static_cast<int32_t>(p.heads_q / p.heads_kv);
  args.m_blocks = static_cast<int32_t>((p.seqlen_q + tile_m - 1) / tile_m);
  // Packed: every sequence may end in a partial tile.
  const int64_t rows = p.batch * p.heads_q;
  const int64_t tiles = packed_q ? (p.total_q / tile_m + p.batch) * p.heads_q : args.m_blocks * rows;
  if (tiles >= kLimit)
    fail(ADAATTN_ERROR_NOT_SUPPORTED, "%lld query tiles, at most 2^30", static_cast<long long>(tiles));
  args.num_tiles = static_cast<int32_t>(tiles);
  // Heads whose K and V fit 32 MB of the 50 MB of L2 together.
  const int64_t head_bytes = std::max<int64_t>(1, p.seqlen_k * (p.d_qk + p.d_v) * 2);
  const int64_t kv_heads =
      std::bit_floor(static_cast<uint64_t>(std::max<int64_t>(1, (int64_t{32} << 20) / head_bytes)));
  args.section_heads = static_cast<int32_t>(std::min(rows, kv_heads * args.group_size));
  args.zero_v_tail = packed_k || p.seqused_k != nullptr;
  args.counters = counters;

  const int grid = static_cast<int>(std::min<int64_t>(multiprocessors, tiles));
  void* arguments[] = {&args};
  cudaError_t error =
      cudaFuncSetAttribute(instance.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, instance.shared_bytes);
  if (error == cudaSuccess) {
    error = cudaLaunchKernel(instance.kernel, dim3(grid), dim3(128 * (c.groups + 1)), arguments, instance.shared_bytes,
                             stream);
  }
  if (error != cudaSuccess) fail(ADAATTN_ERROR_DEVICE, "launch of %s: %s", instance.name, cudaGetErrorString(error));
}

}  // namespace adaattn::sm90
