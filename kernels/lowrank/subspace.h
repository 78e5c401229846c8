// Leading eigenvectors of many symmetric positive semi-definite matrices (Gram matrices), one CTA each.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace adaattn::cuda {

// Ordered subspace iteration in float64: basis <- orth(gram basis), `sweeps` times, then a rotation to the eigenvectors
// of the projected matrix. A matrix that starts from the basis of a similar one needs one sweep and no rotation: its
// vectors come out in order.
struct SubspaceArgs {
  int64_t batch = 0;
  int32_t dim = 0;
  int32_t ld = 0;                // of gram: subspace_ld(dim)
  int32_t columns = 0;           // vectors iterated: subspace_columns(rank, oversampling), at most dim
  const double* gram = nullptr;  // [batch, ld, ld], 0 beyond dim
  double* basis = nullptr;       // [batch, columns, dim] on 16 bytes: a vector per row, of descending values
  // As basis, kept from call to call: where warm is set it holds the start, and it receives a copy of the result. Calls
  // that overlap may mix their vectors in it, which a start does not mind. Null: basis is its own start.
  double* state = nullptr;
  // [batch, columns]: Ritz values, not negative; NaN where gram is not finite. Of vectors that were not rotated the
  // lengths of their images under gram, each beyond the span of those before it.
  double* values = nullptr;
  double* trace = nullptr;  // [batch], null: not wanted. trace less the values is the exact residual energy
  // [batch], null: every matrix starts from its seed. Non-zero: there are vectors to start from; set by the kernel to
  // whether the basis is finite.
  int32_t* warm = nullptr;
  int32_t cold_sweeps = 3, warm_sweeps = 1;
  // Projections for statistics need no more than f32: vectors orthonormal to 1e-6, eigenvectors to 1e-2.
  bool fast = false;
  // With fast: warm vectors are rotated too. Otherwise they are only sorted by their values, and vectors of nearly
  // equal energy stay mixed as the start had them.
  bool rotate_warm = false;
  uint64_t seed = 0;
  double* scratch = nullptr;  // subspace_scratch_bytes()
};

inline constexpr int64_t subspace_ld(int64_t dim) { return (dim + 15) / 16 * 16; }
inline constexpr int64_t subspace_columns(int64_t rank, int64_t oversampling) {
  return (rank + oversampling + 7) / 8 * 8;
}
// Whether iteration is worth it: with nearly as many vectors as dimensions a whole decomposition is cheaper.
inline constexpr bool subspace_pays(int64_t dim, int64_t columns) { return 4 * columns < 3 * dim; }

// Global memory for matrices that do not fit the shared memory of the current device; 0 where they do.
size_t subspace_scratch_bytes(int64_t batch, int64_t dim, int64_t columns);
void subspace_iteration(const SubspaceArgs& args, cudaStream_t stream);

}  // namespace adaattn::cuda
