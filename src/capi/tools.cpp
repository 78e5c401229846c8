#include "capi/context.h"
#include "capi/guard.h"
#include "capi/structs.h"

namespace adaattn::capi {
namespace {

Problem read_problem(const adaattn_attn_desc_t* attn) { return problem_from(read_struct(attn, "attn"), Use::kEntropy); }

}  // namespace
}  // namespace adaattn::capi

namespace capi = adaattn::capi;
using capi::guarded;
using capi::read_struct;
using capi::require;

extern "C" {

adaattn_status_t adaattn_merge(adaattn_context_t* context, const adaattn_tensor_t* o_a, const adaattn_tensor_t* lse_a,
                               const adaattn_tensor_t* o_b, const adaattn_tensor_t* lse_b, const adaattn_tensor_t* o,
                               const adaattn_tensor_t* lse, adaattn_stream_t stream) {
  return guarded([&] {
    capi::Running call(context);
    const adaattn::MergeParams params =
        adaattn::merge_from(require(o_a, "o_a"), require(lse_a, "lse_a"), require(o_b, "o_b"), require(lse_b, "lse_b"),
                            require(o, "o"), lse, call->scope());
    call.backend().check_stream(stream, false);
    if (params.batch * params.tokens * params.heads != 0) call.backend().merge(params, stream);
  });
}

adaattn_status_t adaattn_entropy_workspace_size(adaattn_context_t* context, const adaattn_attn_desc_t* attn,
                                                const adaattn_entropy_desc_t* desc, size_t* bytes) {
  return guarded([&] {
    capi::Running call(context);
    size_t& out = require(bytes, "bytes");
    const adaattn::Problem problem = capi::read_problem(attn);
    out = call.backend().entropy_workspace(problem, adaattn::entropy_from(read_struct(desc)));
  });
}

adaattn_status_t adaattn_entropy(adaattn_context_t* context, const adaattn_attn_desc_t* attn,
                                 const adaattn_entropy_desc_t* desc, const adaattn_io_t* io,
                                 const adaattn_tensor_t* head_entropy, void* workspace, size_t workspace_bytes,
                                 adaattn_stream_t stream) {
  return guarded([&] {
    capi::Running call(context);
    const adaattn::Problem problem = capi::read_problem(attn);
    const adaattn_entropy_desc_t settings = read_struct(desc);
    const adaattn_io_t tensors = read_struct(io);
    const size_t needed = call.backend().entropy_workspace(problem, adaattn::entropy_from(settings));
    const adaattn::EntropyParams params =
        adaattn::entropy_from(problem, settings, tensors, head_entropy, call->scope(), {workspace, workspace_bytes});
    capi::CallWorkspace memory(call.context(), workspace, workspace_bytes, needed, stream);
    call.backend().entropy(params, memory.acquire(), memory.bytes(), stream);
  });
}

adaattn_status_t adaattn_low_rank_workspace_size(adaattn_context_t* context, const adaattn_low_rank_desc_t* desc,
                                                 size_t* bytes) {
  return guarded([&] {
    capi::Running call(context);
    size_t& out = require(bytes, "bytes");
    out = call.backend().low_rank_workspace(adaattn::low_rank_from(read_struct(desc)));
  });
}

adaattn_status_t adaattn_low_rank(adaattn_context_t* context, const adaattn_low_rank_desc_t* desc,
                                  const adaattn_tensor_t* a, const adaattn_tensor_t* u, const adaattn_tensor_t* s,
                                  const adaattn_tensor_t* v, void* workspace, size_t workspace_bytes,
                                  adaattn_stream_t stream) {
  return guarded([&] {
    capi::Running call(context);
    const adaattn_low_rank_desc_t settings = read_struct(desc);
    const size_t needed = call.backend().low_rank_workspace(adaattn::low_rank_from(settings));
    const adaattn::LowRankParams params = adaattn::low_rank_from(settings, require(a, "a"), u, require(s, "s"), v,
                                                                 call->scope(), {workspace, workspace_bytes});
    capi::CallWorkspace memory(call.context(), workspace, workspace_bytes, needed, stream);
    call.backend().low_rank(params, memory.acquire(), memory.bytes(), stream);
  });
}

adaattn_status_t adaattn_low_rank_project(adaattn_context_t* context, const adaattn_tensor_t* a,
                                          const adaattn_tensor_t* basis, const adaattn_tensor_t* mean,
                                          const adaattn_tensor_t* y, const adaattn_tensor_t* row_residual,
                                          const adaattn_tensor_t* residual, adaattn_stream_t stream) {
  return guarded([&] {
    capi::Running call(context);
    const adaattn::ProjectParams params =
        adaattn::project_from(require(a, "a"), require(basis, "basis"), mean, y, row_residual, residual, call->scope());
    call.backend().check_stream(stream, false);
    call.backend().low_rank_project(params, stream);
  });
}

adaattn_status_t adaattn_effective_rank_workspace_size(adaattn_context_t* context, const adaattn_tensor_t* a,
                                                       size_t* bytes) {
  return guarded([&] {
    capi::Running call(context);
    size_t& out = require(bytes, "bytes");
    out = call.backend().effective_rank_workspace(adaattn::effective_rank_from(require(a, "a")));
  });
}

adaattn_status_t adaattn_effective_rank(adaattn_context_t* context, const adaattn_tensor_t* a, double threshold,
                                        const adaattn_tensor_t* ranks, const adaattn_tensor_t* singular_values,
                                        void* workspace, size_t workspace_bytes, adaattn_stream_t stream) {
  return guarded([&] {
    capi::Running call(context);
    const adaattn::EffectiveRankParams params =
        adaattn::effective_rank_from(require(a, "a"), threshold, require(ranks, "ranks"), singular_values,
                                     call->scope(), {workspace, workspace_bytes});
    const size_t needed = call.backend().effective_rank_workspace(adaattn::effective_rank_from(*a));
    capi::CallWorkspace memory(call.context(), workspace, workspace_bytes, needed, stream);
    call.backend().effective_rank(params, memory.acquire(), memory.bytes(), stream);
  });
}

adaattn_status_t adaattn_spectral_norm_workspace_size(adaattn_context_t* context, const adaattn_tensor_t* a,
                                                      size_t* bytes) {
  return guarded([&] {
    capi::Running call(context);
    size_t& out = require(bytes, "bytes");
    out = call.backend().spectral_norm_workspace(adaattn::spectral_norm_from(require(a, "a")));
  });
}

adaattn_status_t adaattn_spectral_norm(adaattn_context_t* context, const adaattn_tensor_t* a, double tolerance,
                                       int64_t max_iterations, uint64_t seed, const adaattn_tensor_t* norms,
                                       void* workspace, size_t workspace_bytes, adaattn_stream_t stream) {
  return guarded([&] {
    capi::Running call(context);
    const adaattn::SpectralNormParams params =
        adaattn::spectral_norm_from(require(a, "a"), tolerance, max_iterations, seed, require(norms, "norms"),
                                    call->scope(), {workspace, workspace_bytes});
    const size_t needed = call.backend().spectral_norm_workspace(adaattn::spectral_norm_from(*a));
    capi::CallWorkspace memory(call.context(), workspace, workspace_bytes, needed, stream);
    call.backend().spectral_norm(params, memory.acquire(), memory.bytes(), stream);
  });
}

}  // extern "C"
