#include "cpu_fallback/tools/linalg.h"

#include <algorithm>
#include <cmath>

#include "core/sampling.h"

namespace adaattn::cpu {
namespace {

// Below this ratio of a pivot to its diagonal the Gram matrix has lost the row's direction to rounding; above it two
// passes reach orthonormality to rounding.
constexpr double kPivotTolerance = 1e-11;
constexpr double kDependent = 1e-14;

// One pass of row_i -= (q_j . row_i) q_j over the rows before i.
void remove_projections(const ToolKernels& kernels, int64_t i, int64_t length, double* y) {
  double* const row = y + i * length;
  for (int64_t j = 0; j < i; ++j) kernels.axpy(length, -kernels.dot(length, y + j * length, row), y + j * length, row);
}

// Norm of row i after projecting it off the rows before it; repeated while a pass takes more than half of it away.
double project_off(const ToolKernels& kernels, int64_t i, int64_t length, double* y) {
  double* const row = y + i * length;
  double norm = std::sqrt(kernels.dot(length, row, row));
  for (int pass = 0; pass < 4; ++pass) {
    const double before = norm;
    remove_projections(kernels, i, length, y);
    norm = std::sqrt(kernels.dot(length, row, row));
    if (norm > 0.5 * before && pass > 0) break;
  }
  return norm;
}

void scale(int64_t n, double factor, double* x) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

void gram_schmidt(const ToolKernels& kernels, int64_t count, int64_t length, double* y, double* norms,
                  double zero_below, uint64_t seed) {
  for (int64_t i = 0; i < count; ++i) {
    double* const row = y + i * length;
    const double before = std::sqrt(kernels.dot(length, row, row));
    double norm = before > zero_below ? project_off(kernels, i, length, y) : 0;
    const bool dependent = norm <= std::max(zero_below, kDependent * before);
    if (norms != nullptr) norms[i] = dependent ? 0 : norm;
    for (uint64_t attempt = 0; dependent && attempt < 16; ++attempt) {
      for (int64_t k = 0; k < length; ++k)
        row[k] = sketch_entry(seed, attempt * static_cast<uint64_t>(count) + static_cast<uint64_t>(i),
                              static_cast<uint64_t>(k));
      const double random_norm = std::sqrt(kernels.dot(length, row, row));
      norm = project_off(kernels, i, length, y);
      if (norm > 1e-8 * random_norm) break;
    }
    scale(length, 1 / norm, row);
  }
}

}  // namespace

bool cholesky(int64_t n, double* a, double tolerance) {
  for (int64_t k = 0; k < n; ++k) {
    double* const row = a + k * n;
    const double diagonal = row[k];
    for (int64_t i = 0; i < k; ++i) {
      const double factor = a[i * n + k];
      for (int64_t j = k; j < n; ++j) row[j] -= factor * a[i * n + j];
    }
    if (!(row[k] > tolerance * diagonal) || !(row[k] > 0)) return false;
    const double inverse_root = 1 / std::sqrt(row[k]);
    for (int64_t j = k; j < n; ++j) row[j] *= inverse_root;
  }
  for (int64_t i = 1; i < n; ++i) std::fill_n(a + i * n, i, 0.0);
  return true;
}

void invert_upper(int64_t n, double* r) {
  // inverse_i = (e_i - sum_{k>i} r_ik inverse_k) / r_ii, from the last row up; the unused lower triangle keeps r_ik
  // while row i is overwritten.
  for (int64_t i = n - 1; i >= 0; --i) {
    double* const row = r + i * n;
    const double inverse_diagonal = 1 / row[i];
    for (int64_t k = i + 1; k < n; ++k) {
      r[k * n + i] = row[k] * -inverse_diagonal;
      row[k] = 0;
    }
    for (int64_t k = i + 1; k < n; ++k) {
      const double factor = r[k * n + i];
      for (int64_t j = k; j < n; ++j) row[j] += factor * r[k * n + j];
    }
    row[i] = inverse_diagonal;
  }
  for (int64_t i = 1; i < n; ++i) std::fill_n(r + i * n, i, 0.0);
}

OrthonormalScratch take_orthonormal_scratch(Arena& arena, int64_t count, int64_t length) {
  OrthonormalScratch scratch;
  scratch.spare = arena.take<double>(count * length);
  scratch.gram = arena.take<double>(count * count);
  return scratch;
}

void orthonormalize(const Exec& exec, const GemmScratch& gemm_scratch, const OrthonormalScratch& scratch, int64_t count,
                    int64_t length, double* y, double* norms, double zero_below, uint64_t seed, int passes) {
  double* from = y;
  double* to = scratch.spare;
  for (int pass = 0; pass < passes; ++pass) {
    gram_matrix(exec, gemm_scratch, row_major(from, count, length), scratch.gram);
    bool regular = cholesky(count, scratch.gram, kPivotTolerance);
    for (int64_t i = 0; regular && i < count; ++i) {
      const double pivot = scratch.gram[i * count + i];
      if (pass == 0) regular = pivot > zero_below;
      if (norms != nullptr) norms[i] = pass == 0 ? pivot : norms[i] * pivot;
    }
    if (!regular) {
      if (from != y) std::copy_n(from, count * length, y);
      return gram_schmidt(*exec.kernels, count, length, y, norms, zero_below, seed);
    }
    invert_upper(count, scratch.gram);
    gemm(exec, gemm_scratch, row_major(scratch.gram, count, count).transposed(), row_major(from, count, length), to,
         length, Precision::kF64);
    std::swap(from, to);
  }
  if (from != y) std::copy_n(from, count * length, y);
}

}  // namespace adaattn::cpu
