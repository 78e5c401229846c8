#include <algorithm>

#include "cpu_fallback/tools/linalg.h"
#include "cpu_fallback/tools/reflector.h"

namespace adaattn::cpu {
namespace {

// q^T a q = tridiagonal (d, e); reflector k stays in row k of a behind its diagonal, its factor in beta[k].
void tridiagonalize(const ToolKernels& kernels, int64_t n, double* a, double* d, double* e, double* beta, double* w) {
  for (int64_t k = 0; k + 1 < n; ++k) {
    double* const v = a + k * n + k + 1;
    const int64_t size = n - 1 - k;
    const Reflector h = make_reflector(kernels, size, v);
    d[k] = a[k * n + k];
    e[k] = h.norm;
    beta[k] = h.beta;
    if (h.beta == 0) continue;
    double* const trailing = a + (k + 1) * n + k + 1;
    for (int64_t i = 0; i < size; ++i) w[i] = h.beta * kernels.dot(size, trailing + i * n, v);
    kernels.axpy(size, -h.beta / 2 * kernels.dot(size, v, w), v, w);
    for (int64_t i = 0; i < size; ++i) {
      kernels.axpy(size, -v[i], w, trailing + i * n);
      kernels.axpy(size, -w[i], v, trailing + i * n);
    }
  }
  d[n - 1] = a[n * n - 1];
}

}  // namespace

int64_t symmetric_eigen_work_size(int64_t n, bool vectors) { return 5 * n + (vectors ? n * n : 0); }

bool symmetric_eigen(const ToolKernels& kernels, int64_t n, double* a, double* values, double* vectors, int64_t wanted,
                     double* work) {
  double *const d = work, *const e = d + n, *const beta = e + n, *const w = beta + n, *const order = w + n;
  double* const z = vectors == nullptr ? nullptr : order + n;
  tridiagonalize(kernels, n, a, d, e, beta, w);
  if (z != nullptr) {
    std::fill_n(z, n * n, 0.0);
    for (int64_t i = 0; i < n; ++i) z[i * n + i] = 1;
  }
  if (!tridiagonal_qr(kernels, n, d, e, z)) return false;
  // Indices up to 2^53 are exact in the doubles of the work array.
  for (int64_t i = 0; i < n; ++i) order[i] = static_cast<double>(i);
  std::sort(order, order + n, [&](double i, double j) {
    const double x = d[static_cast<int64_t>(i)], y = d[static_cast<int64_t>(j)];
    return x > y || (x == y && i < j);
  });
  for (int64_t i = 0; i < wanted; ++i) values[i] = d[static_cast<int64_t>(order[i])];
  if (vectors == nullptr) return true;
  for (int64_t i = 0; i < wanted; ++i) {
    double* const x = vectors + i * n;
    std::copy_n(z + static_cast<int64_t>(order[i]) * n, n, x);
    for (int64_t k = n - 2; k >= 0; --k) {
      const double* const v = a + k * n + k + 1;
      if (beta[k] != 0) kernels.axpy(n - 1 - k, -beta[k] * kernels.dot(n - 1 - k, v, x + k + 1), v, x + k + 1);
    }
  }
  return true;
}

}  // namespace adaattn::cpu
