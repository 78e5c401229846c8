// The CPU back-end: what src/backend.h asks for, over the thread pool and the kernels of the chosen instruction set.
#pragma once

#include <atomic>
#include <memory>

#include "backend.h"
#include "cpu_fallback/thread_pool.h"
#include "cpu_fallback/tools/tools.h"

namespace adaattn::cpu {

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(const BackendConfig& config);

  adaattn_device_t device() const override { return ADAATTN_DEVICE_CPU; }
  int32_t device_id() const override { return 0; }
  const Allocator& allocator() const override { return allocator_; }
  void check_stream(adaattn_stream_t stream, bool will_allocate) const override;
  void check_pointer(const void*, const char*) const override {}
  void set_option(adaattn_option_t option, int64_t value) override;
  int64_t get_option(adaattn_option_t option) const override;

  PlanInfo select(const Problem& problem) const override;
  std::unique_ptr<AttentionPlan> make_plan(const Problem& problem) override;

  void merge(const MergeParams& params, adaattn_stream_t stream) override;
  size_t entropy_workspace(const Problem& problem, const EntropyParams& params) const override;
  void entropy(const EntropyParams& params, void* workspace, size_t bytes, adaattn_stream_t stream) override;
  size_t low_rank_workspace(const LowRankParams& params) const override;
  void low_rank(const LowRankParams& params, void* workspace, size_t bytes, adaattn_stream_t stream) override;
  void low_rank_project(const ProjectParams& params, adaattn_stream_t stream) override;
  size_t effective_rank_workspace(const EffectiveRankParams& params) const override;
  void effective_rank(const EffectiveRankParams& params, void* workspace, size_t bytes,
                      adaattn_stream_t stream) override;
  size_t spectral_norm_workspace(const SpectralNormParams& params) const override;
  void spectral_norm(const SpectralNormParams& params, void* workspace, size_t bytes, adaattn_stream_t stream) override;

 private:
  ToolContext tools() const;

  Allocator allocator_;
  ThreadPool pool_;
  std::atomic<adaattn_isa_t> isa_;
};

}  // namespace adaattn::cpu
