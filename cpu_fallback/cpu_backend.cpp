#include "cpu_fallback/cpu_backend.h"

#include <cstdlib>
#include <cstring>

#include "core/error.h"
#include "core/log.h"
#include "cpu_fallback/adaptive/plan.h"
#include "cpu_fallback/attend/e4m3.h"
#include "cpu_fallback/attend/plan.h"
#include "cpu_fallback/cpu_features.h"
#include "cpu_fallback/isa/registry.h"
#include "cpu_fallback/tools/tools.h"

namespace adaattn::cpu {
namespace {

void* default_alloc(void*, size_t bytes, size_t alignment, adaattn_stream_t) {
  void* data = nullptr;
  return posix_memalign(&data, alignment < sizeof(void*) ? sizeof(void*) : alignment, bytes) == 0 ? data : nullptr;
}

void default_free(void*, void* data, size_t, adaattn_stream_t) { std::free(data); }

}  // namespace

CpuBackend::CpuBackend(const BackendConfig& config)
    : allocator_(config.allocator),
      pool_(config.num_threads, config.parallel_for, config.parallel_for_user),
      isa_(resolve_isa(config.isa)) {
  if (allocator_.alloc == nullptr) allocator_ = {default_alloc, default_free, nullptr};
  log_message(ADAATTN_LOG_INFO, "cpu: isa %s of %s, %d threads%s", isa_name(isa_), available_isas().c_str(),
              static_cast<int>(pool_.num_threads()), config.parallel_for != nullptr ? " of the caller's" : "");
}

void CpuBackend::check_stream(adaattn_stream_t stream, bool) const {
  if (stream != nullptr)
    fail(ADAATTN_ERROR_INVALID_ARGUMENT, "stream is %p; accepted on the CPU: NULL", static_cast<void*>(stream));
}

void CpuBackend::set_option(adaattn_option_t option, int64_t value) {
  switch (option) {
    case ADAATTN_OPTION_NUM_THREADS:
      if (value < 0 || value > 4096)
        fail(ADAATTN_ERROR_INVALID_ARGUMENT, "num_threads is %lld; accepted: 0 (all available) to 4096",
             static_cast<long long>(value));
      pool_.set_num_threads(static_cast<int32_t>(value));
      return;
    case ADAATTN_OPTION_ISA:
      isa_ = resolve_isa(value);
      log_message(ADAATTN_LOG_INFO, "cpu: isa %s", isa_name(isa_));
      return;
    default:
      fail(ADAATTN_ERROR_NOT_SUPPORTED, "option is %d; accepted by the CPU back-end: 2 (NUM_THREADS), 3 (ISA)",
           static_cast<int>(option));
  }
}

int64_t CpuBackend::get_option(adaattn_option_t option) const {
  switch (option) {
    case ADAATTN_OPTION_NUM_THREADS:
      return pool_.num_threads();
    case ADAATTN_OPTION_ISA:
      return isa_;
    default:
      fail(ADAATTN_ERROR_NOT_SUPPORTED, "option is %d; accepted by the CPU back-end: 2 (NUM_THREADS), 3 (ISA)",
           static_cast<int>(option));
  }
}

PlanInfo CpuBackend::select(const Problem& problem) const {
  if (problem.dtype_kv == Dtype::kE4M3)
    return e4m3_info(problem, select_attention(widened(problem), isa_, pool_.num_threads()));
  if (problem.adaptive.policy != decide::Policy::kExact) return select_adaptive(problem, isa_, pool_.num_threads());
  return select_attention(problem, isa_, pool_.num_threads());
}

std::unique_ptr<AttentionPlan> CpuBackend::make_plan(const Problem& problem) {
  if (problem.dtype_kv == Dtype::kE4M3)
    return make_e4m3_plan(problem, make_attention_plan(widened(problem), isa_, pool_), pool_);
  if (problem.adaptive.policy != decide::Policy::kExact) return make_adaptive_plan(problem, isa_, pool_);
  return make_attention_plan(problem, isa_, pool_);
}

// Kernels of the instruction set in use, on the back-end's threads. The queries only read the number of threads.
ToolContext CpuBackend::tools() const {
  return {const_cast<ThreadPool&>(pool_), tool_kernels(isa_), *kernels_of(isa_)};
}

void CpuBackend::merge(const MergeParams& params, adaattn_stream_t) { cpu::merge(tools(), params); }
size_t CpuBackend::entropy_workspace(const Problem& problem, const EntropyParams& params) const {
  return cpu::entropy_workspace(tools(), problem, params);
}
void CpuBackend::entropy(const EntropyParams& params, void* workspace, size_t, adaattn_stream_t) {
  cpu::entropy(tools(), params, workspace);
}
size_t CpuBackend::low_rank_workspace(const LowRankParams& params) const {
  return cpu::low_rank_workspace(tools(), params);
}
void CpuBackend::low_rank(const LowRankParams& params, void* workspace, size_t, adaattn_stream_t) {
  cpu::low_rank(tools(), params, workspace);
}
void CpuBackend::low_rank_project(const ProjectParams& params, adaattn_stream_t stream) {
  const size_t bytes = low_rank_project_workspace(tools(), params);
  const ScopedBuffer workspace(allocator_, bytes, 64, stream);
  cpu::low_rank_project(tools(), params, workspace.data());
}
size_t CpuBackend::effective_rank_workspace(const EffectiveRankParams& params) const {
  return cpu::effective_rank_workspace(tools(), params);
}
void CpuBackend::effective_rank(const EffectiveRankParams& params, void* workspace, size_t, adaattn_stream_t) {
  cpu::effective_rank(tools(), params, workspace);
}
size_t CpuBackend::spectral_norm_workspace(const SpectralNormParams& params) const {
  return cpu::spectral_norm_workspace(tools(), params);
}
void CpuBackend::spectral_norm(const SpectralNormParams& params, void* workspace, size_t, adaattn_stream_t) {
  cpu::spectral_norm(tools(), params, workspace);
}

}  // namespace adaattn::cpu
