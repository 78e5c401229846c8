// What the two Householder reductions share.
#pragma once

#include <cstdint>

#include "cpu_fallback/tools/tool_kernels.h"

namespace adaattn::cpu {

// H = I - beta v v^T with H x = (norm, 0, ..); beta 0: x is already so.
struct Reflector {
  double beta = 0, norm = 0;
};

// Overwrites x by v.
Reflector make_reflector(const ToolKernels& kernels, int64_t n, double* x);

// Implicit QR steps with Wilkinson's shift on the symmetric tridiagonal matrix (d, e) until e vanishes, unordered; the
// rotations are applied to the rows, of length n, of z (null: values only). False: no convergence, or not finite.
bool tridiagonal_qr(const ToolKernels& kernels, int64_t n, double* d, double* e, double* z);

}  // namespace adaattn::cpu
