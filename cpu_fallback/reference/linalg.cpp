#include "linalg.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace adaattn::reference {

Svd svd(const Matrix& a) {
  if (a.rows < a.cols) {
    Svd t = svd(transpose(a));
    std::swap(t.u, t.v);
    return t;
  }
  const int64_t m = a.rows, n = a.cols;
  Matrix w = a, v(n, n);
  for (int64_t j = 0; j < n; ++j) v(j, j) = 1;
  const auto rotate = [](Matrix& x, int64_t i, int64_t j, double c, double s) {
    for (int64_t r = 0; r < x.rows; ++r) {
      const double xi = x(r, i), xj = x(r, j);
      x(r, i) = c * xi - s * xj;
      x(r, j) = s * xi + c * xj;
    }
  };
  constexpr int kMaxSweeps = 60;
  bool rotated = true;
  for (int sweep = 0; rotated && sweep < kMaxSweeps; ++sweep) {
    rotated = false;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = i + 1; j < n; ++j) {
        double ii = 0, jj = 0, ij = 0;
        for (int64_t r = 0; r < m; ++r) {
          ii += w(r, i) * w(r, i);
          jj += w(r, j) * w(r, j);
          ij += w(r, i) * w(r, j);
        }
        if (std::fabs(ij) <= 1e-15 * std::sqrt(ii * jj)) continue;
        rotated = true;
        const double zeta = (jj - ii) / (2 * ij);
        const double t = (zeta >= 0 ? 1 : -1) / (std::fabs(zeta) + std::sqrt(1 + zeta * zeta));
        const double c = 1 / std::sqrt(1 + t * t);
        rotate(w, i, j, c, c * t);
        rotate(v, i, j, c, c * t);
      }
    }
  }
  std::vector<double> norm(static_cast<size_t>(n));
  for (int64_t j = 0; j < n; ++j) {
    double square = 0;
    for (int64_t r = 0; r < m; ++r) square += w(r, j) * w(r, j);
    norm[j] = std::sqrt(square);
  }
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return norm[x] > norm[y]; });
  Svd result{Matrix(m, n), {}, Matrix(n, n)};
  for (int64_t p = 0; p < n; ++p) {
    const int64_t j = order[p];
    result.sigma.push_back(norm[j]);
    for (int64_t r = 0; r < m; ++r) result.u(r, p) = norm[j] > 0 ? w(r, j) / norm[j] : 0;
    for (int64_t r = 0; r < n; ++r) result.v(r, p) = v(r, j);
  }
  return result;
}

double optimal_residual(const std::vector<double>& sigma, int64_t rank) {
  double square = 0;
  for (size_t i = static_cast<size_t>(rank); i < sigma.size(); ++i) square += sigma[i] * sigma[i];
  return std::sqrt(square);
}

int64_t effective_rank(const std::vector<double>& sigma, double threshold) {
  double total = 0;
  for (double s : sigma) total += s * s;
  if (total == 0) return 0;
  double sum = 0;
  for (size_t i = 0; i < sigma.size(); ++i) {
    sum += sigma[i] * sigma[i];
    if (sum >= threshold * total) return static_cast<int64_t>(i) + 1;
  }
  return static_cast<int64_t>(sigma.size());
}

double frobenius_norm(const Matrix& a) {
  double square = 0;
  for (double x : a.data) square += x * x;
  return std::sqrt(square);
}

Matrix multiply(const Matrix& a, const Matrix& b) {
  Matrix c(a.rows, b.cols);
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t k = 0; k < a.cols; ++k)
      for (int64_t j = 0; j < b.cols; ++j) c(i, j) += a(i, k) * b(k, j);
  return c;
}

Matrix transpose(const Matrix& a) {
  Matrix t(a.cols, a.rows);
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t j = 0; j < a.cols; ++j) t(j, i) = a(i, j);
  return t;
}

Matrix orthonormal_columns(Matrix a) {
  for (int64_t j = 0; j < a.cols; ++j) {
    for (int pass = 0; pass < 2; ++pass)
      for (int64_t k = 0; k < j; ++k) {
        double dot = 0;
        for (int64_t i = 0; i < a.rows; ++i) dot += a(i, k) * a(i, j);
        for (int64_t i = 0; i < a.rows; ++i) a(i, j) -= dot * a(i, k);
      }
    double square = 0;
    for (int64_t i = 0; i < a.rows; ++i) square += a(i, j) * a(i, j);
    for (int64_t i = 0; i < a.rows; ++i) a(i, j) /= std::sqrt(square);
  }
  return a;
}

double reconstruction_error(const Matrix& a, const Matrix& u, const std::vector<double>& s, const Matrix& v) {
  Matrix us = u;
  for (int64_t i = 0; i < us.rows; ++i)
    for (int64_t j = 0; j < us.cols; ++j) us(i, j) *= s[j];
  Matrix difference = multiply(us, transpose(v));
  for (size_t i = 0; i < a.data.size(); ++i) difference.data[i] -= a.data[i];
  return frobenius_norm(difference);
}

double orthogonality_error(const Matrix& q) {
  const Matrix gram = multiply(transpose(q), q);
  double worst = 0;
  for (int64_t i = 0; i < gram.rows; ++i)
    for (int64_t j = 0; j < gram.cols; ++j) worst = std::max(worst, std::fabs(gram(i, j) - (i == j ? 1 : 0)));
  return worst;
}

double attention_error(const Matrix& o, const Matrix& approx, const Matrix& v) {
  double difference = 0, spread = 0;
  for (size_t i = 0; i < o.data.size(); ++i) difference += (o.data[i] - approx.data[i]) * (o.data[i] - approx.data[i]);
  for (int64_t c = 0; c < v.cols; ++c) {
    double mean = 0;
    for (int64_t j = 0; j < v.rows; ++j) mean += v(j, c) / static_cast<double>(v.rows);
    for (int64_t j = 0; j < v.rows; ++j) spread += (v(j, c) - mean) * (v(j, c) - mean);
  }
  return std::sqrt(difference / static_cast<double>(o.rows)) / std::sqrt(spread / static_cast<double>(v.rows));
}

}  // namespace adaattn::reference
