#include "attend/sm90/e4m3_launch.h"

#include "attend/sm90/forward_launch.h"
#include "attend/sm90/tensor_map.h"

namespace adaattn::cuda::sm90 {

cudaError_t launch_e4m3(const ForwardInstance& instance, const AttendArgs& call, cudaStream_t stream) {
  const ForwardConfig& c = instance.config;
  // O, in a dtype of its own, is not written through a map: the one of its place is made for Q's rows.
  AttnParams p = call.p;
  p.o = p.q;
  ForwardArgs args = common_args(c, p);
  args.p.o = call.p.o;
  if (p.cu_seqlens_q != nullptr) args.p.o.stride_b = 0;
  const bool packed = p.cu_seqlens_k != nullptr;
  const int64_t tokens = packed ? p.total_k : p.seqlen_k;
  // V comes in halves of a block.
  if (tokens > 0) args.v_map = make_map(p.v, {p.d_v, tokens, p.heads_kv, packed ? 1 : p.batch}, 128, c.tile_n / 2, "v");
  return launch_tiles(instance, call, args, &args, stream);
}

}  // namespace adaattn::cuda::sm90
