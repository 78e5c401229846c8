#include "attend/sm90/forward_launch.h"

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <algorithm>

#include "core/error.h"

namespace adaattn::cuda::sm90 {
namespace {

constexpr int64_t kElement = 2;  // bytes

PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) {
      fail(ADAATTN_ERROR_DRIVER_TOO_OLD, "the driver has no cuTensorMapEncodeTiled: %s", cudaGetErrorString(error));
    }
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
  }();
  return encoder;
}

struct Extents {
  int64_t dim, tokens, heads, batch;
};

// A [batch, token, head, dim] operand as TMA's (dim, token, head, batch), in boxes of box_rows tokens by one swizzle
// width. A dimension of stride 0 gets extent 1: its coordinate stays 0.
CUtensorMap make_map(const Operand& operand, Extents extents, int width, int box_rows, const char* name) {
  const auto bytes = [&](int64_t stride, int64_t extent) {
    // The stride of a dimension of extent 1 is free, but TMA wants a multiple of 16 bytes all the same.
    return static_cast<cuuint64_t>(extent > 1 ? stride * kElement : (extents.dim * kElement + 15) / 16 * 16);
  };
  if (operand.stride_h == 0) extents.heads = 1;
  if (operand.stride_b == 0) extents.batch = 1;
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(extents.dim), static_cast<cuuint64_t>(extents.tokens),
                               static_cast<cuuint64_t>(extents.heads), static_cast<cuuint64_t>(extents.batch)};
  const cuuint64_t strides[3] = {bytes(operand.stride_s, extents.tokens), bytes(operand.stride_h, extents.heads),
                                 bytes(operand.stride_b, extents.batch)};
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(width / kElement), static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result = tensor_map_encoder()(
      &map, operand.dtype == Dtype::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
      operand.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      width == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    fail(ADAATTN_ERROR_DEVICE, "cuTensorMapEncodeTiled refused %s (CUresult %d)", name, static_cast<int>(result));
  }
  return map;
}

}  // namespace

cudaError_t launch_forward(const ForwardInstance& instance, const AttendArgs& call, cudaStream_t stream) {
  const ForwardConfig& c = instance.config;
  const AttnParams& p = call.p;
  const int tile_m = 64 * c.groups;
  const bool packed_q = p.cu_seqlens_q != nullptr, packed_k = p.cu_seqlens_k != nullptr;
  const Extents queries{p.d_qk, packed_q ? p.total_q : p.seqlen_q, p.heads_q, packed_q ? 1 : p.batch};
  const int64_t tokens_k = packed_k ? p.total_k : p.seqlen_k;
  const Extents keys{p.d_qk, tokens_k, p.heads_kv, packed_k ? 1 : p.batch};
  const Extents values{p.d_v, tokens_k, p.heads_kv, packed_k ? 1 : p.batch};
  const int width_qk = c.d_qk % 64 == 0 ? 128 : 64, width_v = c.d_v % 64 == 0 ? 128 : 64;

  ForwardArgs args{};
  args.q_map = make_map(p.q, queries, width_qk, 64, "q");
  args.o_map = make_map(p.o, {p.d_v, queries.tokens, p.heads_q, queries.batch}, width_v, 16, "o");
  if (tokens_k > 0) {  // otherwise nothing is loaded
    args.k_map = make_map(p.k, keys, width_qk, c.tile_n, "k");
    args.v_map = make_map(p.v, values, width_v, c.tile_n, "v");
  }
  args.p = p;
  if (packed_q) args.p.o.stride_b = args.p.lse.stride_b = 0;
  constexpr float kLog2e = 1.4426950408889634f;
  args.scale_log2 = (c.softcap ? p.softcap : p.scale) * kLog2e;
  args.softcap_log2 = c.softcap ? 2 * p.scale / p.softcap * kLog2e : 0;
  args.batch = static_cast<int32_t>(p.batch);
  args.heads_q = static_cast<int32_t>(p.heads_q);
  args.seqlen_q = static_cast<int32_t>(p.seqlen_q);
  args.seqlen_k = static_cast<int32_t>(p.seqlen_k);
  args.total_q = static_cast<int32_t>(p.total_q);
  args.total_k = static_cast<int32_t>(p.total_k);
  args.window_left = static_cast<int32_t>(p.window_left);
  args.window_right = static_cast<int32_t>(p.window_right);
  args.group_size = call.group;
  args.k_head_step = p.k.stride_h != 0;
  args.k_batch_step = !packed_k && p.k.stride_b != 0;
  args.v_head_step = p.v.stride_h != 0;
  args.v_batch_step = !packed_k && p.v.stride_b != 0;
  args.m_blocks = call.m_tiles;
  // Packed: every sequence may end in a partial tile.
  const int64_t rows = p.batch * p.heads_q;
  const int64_t tiles = packed_q ? (p.total_q / tile_m + p.batch) * p.heads_q : call.m_tiles * rows;
  if (tiles >= int64_t{1} << 30) {
    fail(ADAATTN_ERROR_NOT_SUPPORTED, "max_batch: %lld query tiles of %d rows; one launch takes less than 2^30",
         static_cast<long long>(tiles), tile_m);
  }
  args.num_tiles = static_cast<int32_t>(tiles);
  args.section_heads = static_cast<int32_t>(std::min<int64_t>(rows, call.section));
  args.zero_v_tail = packed_k || p.seqused_k != nullptr;
  const int grid = static_cast<int>(std::min<int64_t>(call.multiprocessors, tiles));
  args.counters = tiles > grid ? call.scheduler : nullptr;  // otherwise every CTA has its one tile
  void* arguments[] = {&args};
  return cudaLaunchKernel(instance.kernel, dim3(grid), dim3(128 * (c.groups + 1)), arguments, instance.shared_bytes,
                          stream);
}

}  // namespace adaattn::cuda::sm90
