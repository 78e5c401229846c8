#include "attend/sm90/int8_launch.h"

#include "attend/sm90/forward_launch.h"
#include "attend/sm90/int8_args.h"

namespace adaattn::cuda::sm90 {

cudaError_t launch_int8(const ForwardInstance& instance, const AttendArgs& call, cudaStream_t stream) {
  Int8Args args{};
  args.forward = common_args(instance.config, call.p);
  args.tables = call.int8;
  args.with_shift = call.p.lse.data != nullptr || call.p.sinks != nullptr;
  return launch_tiles(instance, call, args.forward, &args, stream);
}

}  // namespace adaattn::cuda::sm90
