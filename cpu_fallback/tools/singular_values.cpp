#include <algorithm>
#include <functional>

#include "cpu_fallback/tools/linalg.h"
#include "cpu_fallback/tools/reflector.h"

namespace adaattn::cpu {

int64_t qr_append_work_size(int64_t count, int64_t n) { return count + 1 + n; }

void qr_append(const ToolKernels& kernels, int64_t n, double* r, int64_t count, double* rows, double* work) {
  double *const v = work, *const w = work + count + 1;
  for (int64_t j = 0; j < n; ++j) {
    v[0] = r[j * n + j];
    for (int64_t i = 0; i < count; ++i) v[i + 1] = rows[i * n + j];
    const Reflector h = make_reflector(kernels, count + 1, v);
    r[j * n + j] = h.norm;
    const int64_t rest = n - 1 - j;
    if (h.beta == 0 || rest == 0) continue;
    double* const head = r + j * n + j + 1;
    for (int64_t k = 0; k < rest; ++k) w[k] = h.beta * v[0] * head[k];
    for (int64_t i = 0; i < count; ++i) kernels.axpy(rest, h.beta * v[i + 1], rows + i * n + j + 1, w);
    kernels.axpy(rest, -v[0], w, head);
    for (int64_t i = 0; i < count; ++i) kernels.axpy(rest, -v[i + 1], w, rows + i * n + j + 1);
  }
}

int64_t singular_values_work_size(int64_t p, int64_t n) { return p + 6 * n; }

bool singular_values(const ToolKernels& kernels, int64_t p, int64_t n, double* m, double* values, double* work) {
  // The eigenvalues of the symmetric tridiagonal matrix with zero diagonal and off-diagonal d0, f0, d1, f1, .. are
  // plus and minus the singular values of the bidiagonal one (d, f): no squares are formed.
  double *const column = work, *const w = column + p, *const u = w + n;
  double *const diagonal = u + n, *const off = diagonal + 2 * n;
  for (int64_t k = 0; k < n; ++k) {
    const int64_t rest = n - 1 - k;
    for (int64_t i = k; i < p; ++i) column[i] = m[i * n + k];
    const Reflector left = make_reflector(kernels, p - k, column + k);
    off[2 * k] = left.norm;
    if (rest == 0) break;
    std::fill_n(w, rest, 0.0);
    if (left.beta != 0)
      for (int64_t i = k; i < p; ++i) kernels.axpy(rest, left.beta * column[i], m + i * n + k + 1, w);
    else
      std::fill_n(column + k, p - k, 0.0);
    kernels.axpy(rest, -column[k], w, m + k * n + k + 1);
    std::copy_n(m + k * n + k + 1, rest, u);
    const Reflector right = make_reflector(kernels, rest, u);
    off[2 * k + 1] = right.norm;
    for (int64_t i = k + 1; i < p; ++i) {
      double* const row = m + i * n + k + 1;
      kernels.axpy(rest, -column[i], w, row);
      if (right.beta != 0) kernels.axpy(rest, -right.beta * kernels.dot(rest, row, u), u, row);
    }
  }
  std::fill_n(diagonal, 2 * n, 0.0);
  if (!tridiagonal_qr(kernels, 2 * n, diagonal, off, nullptr)) return false;
  std::sort(diagonal, diagonal + 2 * n, std::greater<>());
  for (int64_t i = 0; i < n; ++i) values[i] = std::max(diagonal[i], 0.0);
  return true;
}

}  // namespace adaattn::cpu
