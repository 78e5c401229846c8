// Singular value decompositions, projections and norms of batches of f32 matrices. Everything between the input and
// the output is float64 but for what cuBLAS does with large matrices, and every sum has a fixed order.
#pragma once

#include <cuda_runtime_api.h>

#include "core/allocator.h"
#include "core/tool_params.h"

namespace adaattn::cuda {

class MathLibraries;

// Up to this smaller side a matrix is decomposed through its Gram matrix, beyond it through the range of a sketch.
inline constexpr int64_t kMaxGramDim = 256;

// libraries: null for our own kernels alone.
size_t low_rank_workspace(const LowRankParams& params, MathLibraries* libraries);
void low_rank(const LowRankParams& params, void* workspace, MathLibraries* libraries, cudaStream_t stream);

// The residual of a whole matrix takes a little memory from `allocator`.
void low_rank_project(const ProjectParams& params, const Allocator& allocator, cudaStream_t stream);

size_t effective_rank_workspace(const EffectiveRankParams& params, MathLibraries* libraries);
void effective_rank(const EffectiveRankParams& params, void* workspace, MathLibraries* libraries, cudaStream_t stream);

size_t spectral_norm_workspace(const SpectralNormParams& params);
void spectral_norm(const SpectralNormParams& params, void* workspace, cudaStream_t stream);

}  // namespace adaattn::cuda
