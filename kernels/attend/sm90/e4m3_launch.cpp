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
  return launch_tiles(instance, call, args, &args, stream);
}

}  // namespace adaattn::cuda::sm90
