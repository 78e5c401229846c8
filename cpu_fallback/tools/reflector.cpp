#include "cpu_fallback/tools/reflector.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace adaattn::cpu {
namespace {

constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
constexpr int kMaxSteps = 60;  // of the QR algorithm per eigenvalue; two or three are usual

}  // namespace

Reflector make_reflector(const ToolKernels& kernels, int64_t n, double* x) {
  const double rest = n > 1 ? kernels.dot(n - 1, x + 1, x + 1) : 0;
  if (rest == 0) return {0, x[0]};
  const double length = std::sqrt(x[0] * x[0] + rest);
  const double norm = x[0] > 0 ? -length : length;
  x[0] -= norm;
  return {2 / (x[0] * x[0] + rest), norm};
}

bool tridiagonal_qr(const ToolKernels& kernels, int64_t n, double* d, double* e, double* z) {
  double norm = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double sum = std::abs(d[i]) + (i > 0 ? std::abs(e[i - 1]) : 0) + (i < n - 1 ? std::abs(e[i]) : 0);
    if (!std::isfinite(sum)) return false;
    norm = std::max(norm, sum);
  }
  const double negligible = kEpsilon * norm;
  int steps = 0;
  for (int64_t hi = n - 1; hi > 0;) {
    if (std::abs(e[hi - 1]) <= negligible) {
      --hi;
      steps = 0;
      continue;
    }
    if (++steps > kMaxSteps) return false;
    int64_t lo = hi - 1;
    while (lo > 0 && std::abs(e[lo - 1]) > negligible) --lo;

    const double half = (d[hi - 1] - d[hi]) / 2, off = e[hi - 1];
    const double shift = d[hi] - off * off / (half + std::copysign(std::hypot(half, off), half));
    double x = d[lo] - shift, bulge = e[lo];
    for (int64_t k = lo; k < hi; ++k) {
      const double r = std::hypot(x, bulge);
      const double c = r == 0 ? 1 : x / r, s = r == 0 ? 0 : bulge / r;
      if (k > lo) e[k - 1] = r;
      const double a = d[k], b = d[k + 1], f = e[k];
      d[k] = c * (c * a + s * f) + s * (c * f + s * b);
      d[k + 1] = s * (s * a - c * f) - c * (s * f - c * b);
      e[k] = c * s * (b - a) + (c - s) * (c + s) * f;
      if (k + 1 < hi) {
        x = e[k];
        bulge = s * e[k + 1];
        e[k + 1] *= c;
      }
      if (z != nullptr) kernels.rotate(n, c, s, z + k * n, z + (k + 1) * n);
    }
  }
  return true;
}

}  // namespace adaattn::cpu
