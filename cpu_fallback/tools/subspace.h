// The leading eigenvectors of symmetric positive semi-definite matrices (Gram matrices), from a warm or seeded start.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu_fallback/tools/linalg.h"

namespace adaattn::cpu {

// Ordered subspace iteration: basis <- orth(gram basis), `sweeps` times, then (unless rayleigh_ritz is off) a rotation
// to the eigenvectors of the projected matrix. A warm basis of a similar matrix needs one or two sweeps, and no
// rotation, for its columns come out ordered. With columns() >= 3/4 dim the eigen-decomposition costs no more, and is
// what runs.
struct SubspaceParams {
  int64_t dim = 0;
  int64_t rank = 0;  // vectors wanted
  int64_t oversampling = 8;
  int64_t sweeps = 3;
  const double* warm = nullptr;  // [columns(), dim], orthonormal rows; null: a seeded start
  uint64_t seed = 0;
  uint64_t stream = 0;  // tells apart the matrices of one seed
  bool rayleigh_ritz = true;
  // Vectors that are iterated.
  int64_t columns() const { return rank + oversampling < dim ? rank + oversampling : dim; }
};

struct SubspaceResult {
  double residual_energy = 0;  // trace(gram) minus the values of the first `rank` vectors, never negative
  bool finite = true;          // false: gram holds a NaN or an infinity; basis and values are NaN
};

size_t subspace_iteration_workspace(const SubspaceParams& params, int64_t lanes);

// gram [dim, dim]. basis [columns(), dim]: row i is the vector of the i-th largest value; the first `rank` rows are the
// result, all of them the next warm start (warm may be basis itself). values [columns()]: Ritz values, descending; with
// rayleigh_ritz off the Rayleigh quotients in the order of the rows. workspace: any alignment.
SubspaceResult subspace_iteration(const Exec& exec, const SubspaceParams& params, const double* gram, double* basis,
                                  double* values, void* workspace);

}  // namespace adaattn::cpu
