#include "cpu_fallback/tools/subspace.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/sampling.h"

namespace adaattn::cpu {
namespace {

struct Layout {
  bool direct = false;
  GemmScratch gemm;
  OrthonormalScratch orthonormal;
  double *image = nullptr, *projected = nullptr, *rotation = nullptr, *eigen_work = nullptr;

  Layout(const SubspaceParams& p, int64_t lanes, Arena& arena) {
    const int64_t columns = p.columns();
    direct = 4 * columns >= 3 * p.dim;
    const int64_t order = direct ? p.dim : columns;
    projected = arena.take<double>(order * order);
    eigen_work = arena.take<double>(symmetric_eigen_work_size(order, true));
    if (direct) return;
    gemm = take_gemm_scratch(
        arena, lanes, std::max(gemm_partial_size(columns, p.dim, p.dim), gemm_partial_size(columns, columns, p.dim)));
    orthonormal = take_orthonormal_scratch(arena, columns, p.dim);
    image = arena.take<double>(columns * p.dim);
    rotation = arena.take<double>(columns * columns);
  }
};

SubspaceResult not_finite(const SubspaceParams& p, double* basis, double* values) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  std::fill_n(basis, p.columns() * p.dim, nan);
  std::fill_n(values, p.columns(), nan);
  return {nan, false};
}

}  // namespace

size_t subspace_iteration_workspace(const SubspaceParams& params, int64_t lanes) {
  Arena arena;
  Layout(params, lanes, arena);
  return Arena::size_for(arena.used());
}

SubspaceResult subspace_iteration(const Exec& exec, const SubspaceParams& p, const double* gram, double* basis,
                                  double* values, void* workspace) {
  Arena arena(workspace);
  const Layout w(p, exec.lanes, arena);
  const int64_t columns = p.columns(), dim = p.dim;
  double trace = 0;
  for (int64_t i = 0; i < dim; ++i) trace += gram[i * dim + i];
  if (!std::isfinite(trace)) return not_finite(p, basis, values);

  if (w.direct) {
    std::copy_n(gram, dim * dim, w.projected);
    if (!symmetric_eigen(*exec.kernels, dim, w.projected, values, basis, columns, w.eigen_work))
      return not_finite(p, basis, values);
  } else {
    if (p.warm == nullptr) {
      for (int64_t i = 0; i < columns * dim; ++i) basis[i] = sketch_entry(p.seed, p.stream, static_cast<uint64_t>(i));
    } else if (p.warm != basis) {
      std::copy_n(p.warm, columns * dim, basis);
    }
    const ConstMatrix matrix = row_major(gram, dim, dim), rows = row_major(basis, columns, dim);
    for (int64_t sweep = 0; sweep < p.sweeps; ++sweep) {
      gemm(exec, w.gemm, rows, matrix, w.image, dim, Precision::kF64);
      std::copy_n(w.image, columns * dim, basis);
      if (sweep + 1 < p.sweeps) orthonormalize(exec, w.gemm, w.orthonormal, columns, dim, basis, nullptr, 0, p.seed, 1);
    }
    orthonormalize(exec, w.gemm, w.orthonormal, columns, dim, basis, nullptr, 0, p.seed);
    gemm(exec, w.gemm, rows, matrix, w.image, dim, Precision::kF64);
    if (p.rayleigh_ritz) {
      gemm(exec, w.gemm, row_major(w.image, columns, dim), rows.transposed(), w.projected, columns, Precision::kF64);
      for (int64_t i = 0; i < columns; ++i)
        for (int64_t j = 0; j < i; ++j) w.projected[i * columns + j] = w.projected[j * columns + i];
      if (!symmetric_eigen(*exec.kernels, columns, w.projected, values, w.rotation, columns, w.eigen_work))
        return not_finite(p, basis, values);
      std::copy_n(basis, columns * dim, w.image);
      gemm(exec, w.gemm, row_major(w.rotation, columns, columns), row_major(w.image, columns, dim), basis, dim,
           Precision::kF64);
    } else {
      for (int64_t i = 0; i < columns; ++i) values[i] = exec.kernels->dot(dim, w.image + i * dim, basis + i * dim);
    }
  }
  double kept = 0;
  for (int64_t i = 0; i < columns; ++i) values[i] = std::max(values[i], 0.0);
  for (int64_t i = 0; i < p.rank; ++i) kept += values[i];
  return {std::max(trace - kept, 0.0), true};
}

}  // namespace adaattn::cpu
