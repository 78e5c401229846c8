// The tools of the public API on the CPU. Parameters are validated by src/capi. Nothing allocates: a workspace has at
// least the bytes that the query gives for the same shapes and the same pool. Results do not depend on the number of
// threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/problem.h"
#include "core/tool_params.h"
#include "cpu_fallback/attend/kernels.h"
#include "cpu_fallback/thread_pool.h"
#include "cpu_fallback/tools/tool_kernels.h"

namespace adaattn::cpu {

struct ToolContext {
  ThreadPool& pool;
  const ToolKernels& kernels;
  const KernelTable& attention;
};

void merge(const ToolContext& context, const MergeParams& params);

size_t entropy_workspace(const ToolContext& context, const Problem& problem, const EntropyParams& params);
void entropy(const ToolContext& context, const EntropyParams& params, void* workspace);

size_t low_rank_workspace(const ToolContext& context, const LowRankParams& params);
void low_rank(const ToolContext& context, const LowRankParams& params, void* workspace);

// The public call has no workspace: the back-end takes this one from its allocator.
size_t low_rank_project_workspace(const ToolContext& context, const ProjectParams& params);
void low_rank_project(const ToolContext& context, const ProjectParams& params, void* workspace);

size_t effective_rank_workspace(const ToolContext& context, const EffectiveRankParams& params);
void effective_rank(const ToolContext& context, const EffectiveRankParams& params, void* workspace);

size_t spectral_norm_workspace(const ToolContext& context, const SpectralNormParams& params);
void spectral_norm(const ToolContext& context, const SpectralNormParams& params, void* workspace);

}  // namespace adaattn::cpu
