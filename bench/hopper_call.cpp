#include "hopper_call.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attend/plan.h"
#include "cuda_call.h"

namespace adaattn::bench {

AttnParams hopper_params(const HopperShape& shape, void* q, void* k, void* v, void* o) {
  AttnParams p;
  p.batch = shape.batch;
  p.heads_q = shape.heads_q;
  p.heads_kv = shape.heads_kv;
  p.d_qk = p.d_v = shape.head_dim;
  p.seqlen_q = p.seqlen_k = shape.seqlen;
  p.total_q = p.total_k = shape.batch * shape.seqlen;
  p.window_right = shape.causal ? 0 : -1;
  p.scale = 1 / std::sqrt(static_cast<float>(shape.head_dim));
  const auto operand = [&](void* data, int64_t heads) {
    return Operand{data, shape.seqlen * heads * shape.head_dim, heads * shape.head_dim, shape.head_dim, Dtype::kBF16};
  };
  p.q = operand(q, shape.heads_q);
  p.o = operand(o, shape.heads_q);
  p.k = operand(k, shape.heads_kv);
  p.v = operand(v, shape.heads_kv);
  return p;
}

ExactCall exact_call(const char* name, const AttnParams& params, void* counters) {
  ExactCall call;
  for (const cuda::AttendKernel* row : cuda::attend_kernels())
    if (std::strcmp(row->name, name) == 0) call.kernel = row;
  if (call.kernel == nullptr) return call;
  cuda::prepare_kernel(*call.kernel);
  cuda::AttendArgs& args = call.args;
  args.p = params;
  args.m_tiles = static_cast<int32_t>((params.seqlen_q + call.kernel->tile_q - 1) / call.kernel->tile_q);
  args.heads = static_cast<int32_t>(params.heads_q);
  args.group = static_cast<int32_t>(params.heads_q / params.heads_kv);
  const int64_t kv_bytes = params.seqlen_k * (params.d_qk + params.d_v) * 2 / args.group;
  args.section = static_cast<int32_t>(
      std::clamp<int64_t>((int64_t{25} << 20) / kv_bytes, std::min<int64_t>(args.group, 8), 1 << 16));
  args.causal_order = params.window_right >= 0;
  args.scheduler = static_cast<uint32_t*>(counters);
  args.multiprocessors = multiprocessors();
  return call;
}

int multiprocessors() {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0));
  return count;
}

}  // namespace adaattn::bench
