#include "attend/sm90/e4m3_launch.h"

#include <algorithm>

#include "attend/sm90/e4m3_args.h"
#include "attend/sm90/forward_launch.h"
#include "attend/sm90/tensor_map.h"

namespace adaattn::cuda::sm90 {

cudaError_t launch_e4m3(const ForwardInstance& instance, const AttendArgs& call, cudaStream_t stream) {
  const ForwardConfig& c = instance.config;
  // O, in a dtype of its own, is not written through a map: the one of its place is made for Q's rows.
  AttnParams p = call.p;
  p.o = p.q;
  E4m3Args args{common_args(c, p), INT32_MAX, INT32_MAX, nullptr, nullptr};
  if (p.descale_block != 0)
    args.factor_blocks = static_cast<int32_t>(std::min<int64_t>(p.descale_block / c.tile_n, INT32_MAX));
  args.p.o = call.p.o;
  if (p.cu_seqlens_q != nullptr) args.p.o.stride_b = 0;
  if (call.splits > 1 && reinterpret_cast<uintptr_t>(call.partial_o) % sizeof(float4) == 0) {
    const int64_t tiles = p.batch * p.heads_q * call.m_tiles;
    args.whole_tiles = static_cast<int32_t>(tiles - tiles % call.multiprocessors);
    args.tail = reinterpret_cast<float4*>(call.partial_o);
    args.arrivals = call.scheduler;
  }
  return launch_tiles(instance, call, args, &args, stream);
}

}  // namespace adaattn::cuda::sm90
