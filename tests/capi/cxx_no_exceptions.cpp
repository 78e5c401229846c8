// Compiled with -fno-exceptions and linked with code that has them.
#include "adaattn/adaattn.hpp"

#if defined(__cpp_exceptions)
#error "this file tests -fno-exceptions"
#endif

const char* check_wrapper_without_exceptions() {
  auto context = adaattn::Context::create();
  if (!context) return "create failed";
  const float q[2] = {0, 0}, k[4] = {1, 2, 3, 4}, v[4] = {1, 10, 3, 30};
  float o[2] = {-1, -1};
  adaattn::AttnDesc desc;
  desc.max_batch = 1;
  desc.max_seqlen_q = 1;
  desc.max_seqlen_k = 2;
  desc.heads_q = desc.heads_kv = 1;
  desc.head_dim_qk = 2;
  desc.dtype_q = ADAATTN_DTYPE_F32;
  adaattn::Io io;
  io.q = adaattn::tensor(q, {1, 1, 1, 2});
  io.k = adaattn::tensor(k, {1, 2, 1, 2});
  io.v = adaattn::tensor(v, {1, 2, 1, 2});
  io.o = adaattn::tensor(o, {1, 1, 1, 2});
  const auto plan = context->make_plan(desc);
  if (!plan) return "make_plan failed";
  if (!plan.value().execute(io).ok()) return "execute failed";
  if (o[0] != 2 || o[1] != 20) return "wrong output";
  desc.softcap = -1;
  const auto refused = context->make_plan(desc);
  if (refused) return "a bad descriptor was accepted";
  if (refused.status().code() != ADAATTN_ERROR_INVALID_ARGUMENT) return "wrong status";
  if (refused.status().text().find("desc.softcap is -1") == std::string::npos) return "wrong text";
  return "";
}
