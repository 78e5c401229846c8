// Attention over contiguous bf16 operands, for benches of kernels that the C API does not reach one by one.
#pragma once

#include "attend/kernel.h"
#include "core/attn_params.h"

namespace adaattn::bench {

struct HopperShape {
  int64_t batch, heads_q, heads_kv, seqlen, head_dim;
  bool causal;
};

// q, k, v, o in BSHD order.
AttnParams hopper_params(const HopperShape& shape, void* q, void* k, void* v, void* o);

// What the exact kernel of this name is launched with; counters: two zeros in device memory. Null kernel: this build
// has none of that name.
struct ExactCall {
  const cuda::AttendKernel* kernel = nullptr;
  cuda::AttendArgs args;
};
ExactCall exact_call(const char* name, const AttnParams& params, void* counters);

int multiprocessors();

}  // namespace adaattn::bench
