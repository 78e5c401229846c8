#include "attend/sm90/forward_launch.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <bit>

#include "attend/sm90/overlapped_launch.h"
#include "attend/sm90/paged_boxes.h"
#include "attend/sm90/tensor_map.h"
#include "core/error.h"

namespace adaattn::cuda::sm90 {

ForwardArgs common_args(const ForwardConfig& c, const AttnParams& p) {
  const bool packed_q = p.cu_seqlens_q != nullptr, packed_k = p.cu_seqlens_k != nullptr;
  const Extents queries{p.d_qk, packed_q ? p.total_q : p.seqlen_q, p.heads_q, packed_q ? 1 : p.batch};
  // A page stands where otherwise a sequence does.
  const bool paged = p.block_table != nullptr;
  const int64_t tokens_k = paged ? p.page_size : packed_k ? p.total_k : p.seqlen_k;
  const int64_t batch_k = paged ? p.num_pages : packed_k ? 1 : p.batch;
  const int rows_k = paged ? box_rows(static_cast<int>(p.page_size & -p.page_size), c.tile_n) : c.tile_n;
  const Extents keys{p.d_qk, tokens_k, p.heads_kv, batch_k}, values{p.d_v, tokens_k, p.heads_kv, batch_k};
  const int width_qk = c.d_qk % 64 == 0 ? 128 : 64, width_v = c.d_v % 64 == 0 ? 128 : 64;

  ForwardArgs args{};
  args.q_map = make_map(p.q, queries, width_qk, 64, "q");
  args.o_map = make_map(p.o, {p.d_v, queries.tokens, p.heads_q, queries.batch}, width_v, 16, "o");
  if (p.seqlen_k > 0 && tokens_k > 0) {  // otherwise nothing is loaded
    args.k_map = make_map(p.k, keys, width_qk, rows_k, "k");
    args.v_map = make_map(p.v, values, width_v, rows_k, "v");
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
  args.group_size = static_cast<int32_t>(p.heads_q / p.heads_kv);
  args.k_head_step = p.k.stride_h != 0;
  args.k_batch_step = !packed_k && p.k.stride_b != 0;
  args.v_head_step = p.v.stride_h != 0;
  args.v_batch_step = !packed_k && p.v.stride_b != 0;
  args.splits = 1;
  args.zero_v_tail = packed_k || p.seqused_k != nullptr;
  return args;
}

namespace {

// The query heads that share keys become rows of one tile; every tile's keys come in parts.
void set_parts(const ForwardConfig& c, const AttendArgs& call, ForwardArgs& args) {
  const AttnParams& p = call.p;
  const bool packed = p.cu_seqlens_q != nullptr;
  args.q_map = make_rows_map(p.q, {p.d_qk, packed ? p.total_q : p.seqlen_q, p.heads_q, packed ? 1 : p.batch},
                             c.d_qk % 64 == 0 ? 128 : 64, 64, call.pack, "q");
  args.pack_shift = std::countr_zero(static_cast<uint32_t>(call.pack));
  args.heads_q = call.heads;
  args.group_size = call.group / call.pack;
  args.splits = call.splits;
  args.partial_o = call.partial_o;
  args.partial_lse = call.partial_lse;
  args.partial_rows = call.partial_rows;
}

// Short tiles for each CTA, from whole sections at the end: what is left once the last long tiles are drawn. Half of a
// pair's tiles; a quarter where sections hold more pairs, for half of all would not stay in L2 (NOTES.md).
void set_late(const ForwardConfig& c, const AttendArgs& call, ForwardArgs& args) {
  const int64_t pairs = call.p.batch * args.heads_q, section = call.section;
  const int64_t wanted = std::max<int64_t>(call.multiprocessors / 2 / section, 1) * section;
  args.late_heads = static_cast<int32_t>(std::min(pairs, wanted));
  args.late_tiles = std::max(call.m_tiles / (c.d_qk <= 64 ? 4 : 2), std::min(call.m_tiles / 2, 2));
  if (args.late_tiles == 0 || call.p.window_right < 0) args.late_tiles = args.late_heads = 0;
}

// overlapped: the grid may start before the one before it has ended.
cudaError_t launch_grid_of_tiles(const ForwardInstance& instance, const AttendArgs& call, ForwardArgs& forward,
                                 void* args, bool overlapped, cudaStream_t stream) {
  const ForwardConfig& c = instance.config;
  const AttnParams& p = call.p;
  const int tile_m = 64 * c.groups;
  forward.m_blocks = call.m_tiles;
  // Packed: every sequence may end in a partial tile.
  const int64_t heads = forward.heads_q, rows = p.batch * heads, tokens = p.total_q << forward.pack_shift;
  const int64_t tiles =
      forward.splits * (p.cu_seqlens_q != nullptr ? (tokens / tile_m + p.batch) * heads : call.m_tiles * rows);
  if (tiles >= int64_t{1} << 30) {
    fail(ADAATTN_ERROR_NOT_SUPPORTED, "io.q makes %lld query tiles of %d rows; accepted: less than 2^30 in one call",
         static_cast<long long>(tiles), tile_m);
  }
  forward.num_tiles = static_cast<int32_t>(tiles);
  forward.section_heads = static_cast<int32_t>(std::min<int64_t>(rows, call.section));
  const int64_t grid = std::min<int64_t>(call.multiprocessors, tiles);
  forward.counters = tiles > grid ? call.scheduler : nullptr;  // otherwise every CTA has its one tile
  void* arguments[] = {args};
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = overlapped ? 1 : 0;
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(static_cast<unsigned>(128 * (c.groups + 1)));
  config.dynamicSmemBytes = static_cast<size_t>(instance.shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelExC(&config, instance.kernel, arguments);
}

}  // namespace

cudaError_t launch_tiles(const ForwardInstance& instance, const AttendArgs& call, ForwardArgs& forward, void* args,
                         cudaStream_t stream) {
  return launch_grid_of_tiles(instance, call, forward, args, false, stream);
}

cudaError_t launch_forward(const ForwardInstance& instance, const AttendArgs& call, cudaStream_t stream) {
  ForwardArgs args = common_args(instance.config, call.p);
  if (instance.config.split) set_parts(instance.config, call, args);
  if (instance.config.from_end) set_late(instance.config, call, args);
  return launch_tiles(instance, call, args, &args, stream);
}

cudaError_t launch_forward_overlapped(const ForwardInstance& instance, const AttendArgs& call, ForwardArgs& forward,
                                      void* args, cudaStream_t stream) {
  forward = common_args(instance.config, call.p);
  if (instance.config.from_end) set_late(instance.config, call, forward);
  return launch_grid_of_tiles(instance, call, forward, args, true, stream);
}

}  // namespace adaattn::cuda::sm90
