// Whole eigen-decompositions of many Gram matrices.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace adaattn::cuda {

class MathLibraries;

inline constexpr int64_t kMaxEigenDim = 1024;

struct Eigen {
  double* vectors;  // [batch, n, n], one per row in the order of rotation
  double* values;   // [batch, n], descending
  int* order;       // [batch, n]: row of vectors that belongs to the j-th value
};

size_t eigen_bytes(int64_t n, int64_t batch, MathLibraries* libraries);
// gram: [batch, ld, ld] with ld = subspace_ld(n), overwritten; n <= kMaxEigenDim. Up to 256 one CTA decomposes a
// matrix. Beyond it is cuSOLVER where there are few matrices and the stream is not being captured, and otherwise a grid
// for each round of rotations. libraries null: never cuSOLVER.
Eigen eigen_of(int64_t n, int64_t batch, double* gram, void* workspace, MathLibraries* libraries, cudaStream_t stream);

}  // namespace adaattn::cuda
