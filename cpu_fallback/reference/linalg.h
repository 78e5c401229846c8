// Matrix decompositions in float64 for judging the low-rank tools, and the error metric of adaptive attention.
#pragma once

#include <cstdint>
#include <vector>

#include "matrix.h"

namespace adaattn::reference {

struct Svd {
  Matrix u;                   // [m, p], p = min(m, n)
  std::vector<double> sigma;  // descending
  Matrix v;                   // [n, p]
};

// One-sided Jacobi (Hestenes): rotates pairs of columns until all are orthogonal.
Svd svd(const Matrix& a);

// Frobenius norm of what the best approximation of rank r leaves (Eckart and Young).
double optimal_residual(const std::vector<double>& sigma, int64_t rank);

// Smallest r with sum_{i<=r} sigma_i^2 >= threshold * sum_i sigma_i^2; 0 for a zero matrix.
int64_t effective_rank(const std::vector<double>& sigma, double threshold);

double frobenius_norm(const Matrix& a);
Matrix multiply(const Matrix& a, const Matrix& b);
Matrix transpose(const Matrix& a);
// Columns made orthonormal in their order (Gram-Schmidt, twice); they must be independent.
Matrix orthonormal_columns(Matrix a);
// ||a - u diag(s) v^T||_F
double reconstruction_error(const Matrix& a, const Matrix& u, const std::vector<double>& s, const Matrix& v);
// Largest |q^T q - identity| entry.
double orthogonality_error(const Matrix& q);

// Error of an approximate output for one head: sqrt(mean_i ||o_i - approx_i||^2) / sqrt(mean_j ||v_j - mean(v)||^2).
double attention_error(const Matrix& o, const Matrix& approx, const Matrix& v);

}  // namespace adaattn::reference
