#include <algorithm>
#include <cmath>
#include <limits>

#include "core/sampling.h"
#include "cpu_fallback/tools/batch.h"
#include "cpu_fallback/tools/subspace.h"
#include "cpu_fallback/tools/tools.h"

namespace adaattn::cpu {
namespace {

// Up to this small dimension the Gram matrix is formed once, in float64, and iterated on instead of the matrix: every
// power step is then dim^2 columns instead of rows dim columns.
constexpr int64_t kGramDim = 256;
// Singular values below this share of the largest are rounding noise of float64 products of f32 data.
constexpr double kZeroShare = 1e-13;

// The problem with a tall matrix: `tall` rows, `small` columns; `left` vectors have length tall.
struct Shape {
  int64_t tall, small, rank, columns;
  bool transposed, gram;
  explicit Shape(const LowRankParams& p)
      : tall(std::max(p.a.rows, p.a.cols)),
        small(std::min(p.a.rows, p.a.cols)),
        rank(p.rank),
        columns(std::min(small, p.rank + p.oversampling)),
        transposed(p.a.cols > p.a.rows),
        gram(small <= kGramDim) {}
};

SubspaceParams subspace_of(const LowRankParams& p, int64_t matrix) {
  SubspaceParams s;
  s.dim = Shape(p).small;
  s.rank = p.rank;
  s.oversampling = p.oversampling;
  s.sweeps = 2 * p.power_iterations + 1;  // a sweep costs a small part of a power step on the matrix
  s.seed = p.seed;
  s.stream = static_cast<uint64_t>(matrix);
  return s;
}

struct Layout {
  Shape shape;
  GemmScratch gemm;
  OrthonormalScratch orthonormal;
  double *left, *right;    // [columns, tall], [columns, small], one vector per row
  double *values, *norms;  // [columns]
  double *square, *rotation = nullptr, *rotated = nullptr, *eigen_work = nullptr;
  uint8_t* subspace = nullptr;

  Layout(const LowRankParams& p, int64_t lanes, Arena& arena) : shape(p) {
    const auto [tall, small, rank, columns, transposed, gram] = shape;
    const int64_t square_dim = gram ? small : columns;
    int64_t partial = std::max({gemm_partial_size(square_dim, square_dim, gram ? tall : small),
                                gemm_partial_size(columns, small, tall), gemm_partial_size(columns, tall, small),
                                gemm_partial_size(columns, columns, tall), gemm_partial_size(rank, rank, tall)});
    this->gemm = take_gemm_scratch(arena, lanes, partial);
    orthonormal = take_orthonormal_scratch(arena, columns, tall);
    left = arena.take<double>(columns * tall);
    right = arena.take<double>(columns * small);
    values = arena.take<double>(columns);
    norms = arena.take<double>(columns);
    square = arena.take<double>(square_dim * square_dim);
    if (gram) {
      subspace = arena.take<uint8_t>(static_cast<int64_t>(subspace_iteration_workspace(subspace_of(p, 0), lanes)));
    } else {
      rotation = arena.take<double>(columns * columns);
      rotated = arena.take<double>(rank * tall);
      eigen_work = arena.take<double>(symmetric_eigen_work_size(columns, true));
    }
  }
};

// Right vectors from the Gram matrix, then left = A right, whose lengths are the singular values.
bool decompose_by_gram(const Exec& exec, const Layout& w, const LowRankParams& p, const ConstMatrix& a,
                       int64_t matrix) {
  const Shape& s = w.shape;
  gram_matrix(exec, w.gemm, a.transposed(), w.square);
  if (!subspace_iteration(exec, subspace_of(p, matrix), w.square, w.right, w.values, w.subspace).finite) return false;
  gemm(exec, w.gemm, row_major(w.right, s.rank, s.small), a.transposed(), w.left, s.tall, Precision::kF64);
  orthonormalize(exec, w.gemm, w.orthonormal, s.rank, s.tall, w.left, w.norms, kZeroShare * std::sqrt(w.values[0]),
                 p.seed);
  return true;
}

// Halko, Martinsson and Tropp, algorithms 4.4 (range finder with power iterations) and 5.1. The iterations run in f32
// products; the last range, its image and everything small in float64.
bool decompose_by_range(const Exec& exec, const Layout& w, const LowRankParams& p, const ConstMatrix& a,
                        int64_t matrix) {
  const Shape& s = w.shape;
  const ConstMatrix left = row_major(w.left, s.columns, s.tall), right = row_major(w.right, s.columns, s.small);
  const int64_t iterations = s.columns == s.small ? 0 : p.power_iterations;
  for (int64_t i = 0; i < s.columns * s.small; ++i)
    w.right[i] = sketch_entry(p.seed, static_cast<uint64_t>(matrix), static_cast<uint64_t>(i));
  for (int64_t i = 0; i < iterations; ++i) {
    gemm(exec, w.gemm, right, a.transposed(), w.left, s.tall, Precision::kF32);
    orthonormalize(exec, w.gemm, w.orthonormal, s.columns, s.tall, w.left, nullptr, 0, p.seed, 1);
    gemm(exec, w.gemm, left, a, w.right, s.small, Precision::kF32);
    orthonormalize(exec, w.gemm, w.orthonormal, s.columns, s.small, w.right, nullptr, 0, p.seed, 1);
  }
  gemm(exec, w.gemm, right, a.transposed(), w.left, s.tall, Precision::kF64);
  orthonormalize(exec, w.gemm, w.orthonormal, s.columns, s.tall, w.left, nullptr, 0, p.seed);
  gemm(exec, w.gemm, left, a, w.right, s.small, Precision::kF64);

  gram_matrix(exec, w.gemm, right, w.square);
  if (!symmetric_eigen(*exec.kernels, s.columns, w.square, w.values, w.rotation, s.rank, w.eigen_work)) return false;
  const ConstMatrix rotation = row_major(w.rotation, s.rank, s.columns);
  gemm(exec, w.gemm, rotation, left, w.rotated, s.tall, Precision::kF64);
  std::copy_n(w.rotated, s.rank * s.tall, w.left);
  gemm(exec, w.gemm, rotation, right, w.rotated, s.small, Precision::kF64);
  std::copy_n(w.rotated, s.rank * s.small, w.right);
  orthonormalize(exec, w.gemm, w.orthonormal, s.rank, s.small, w.right, w.norms,
                 kZeroShare * std::sqrt(std::max(w.values[0], 0.0)), p.seed);
  return true;
}

// vectors [rank, length], one per row, into the columns of a matrix of the batch.
void write_columns(const MatrixBatch& out, int64_t matrix, int64_t rank, int64_t length, const double* vectors) {
  if (out.data == nullptr) return;
  float* const data = static_cast<float*>(out.data) + out.offset(matrix);
  for (int64_t i = 0; i < length; ++i)
    for (int64_t j = 0; j < rank; ++j)
      data[i * out.stride_row + j * out.stride_col] = static_cast<float>(vectors[j * length + i]);
}

}  // namespace

size_t low_rank_workspace(const ToolContext& context, const LowRankParams& params) {
  return BatchShare(context, params.a.batch()).workspace<Layout>(params);
}

void low_rank(const ToolContext& context, const LowRankParams& params, void* workspace) {
  const BatchShare share(context, params.a.batch());
  share.run<Layout>(
      context, params, params.a.batch(), workspace, [&](const Exec& exec, const Layout& w, int64_t matrix) {
        const Shape& s = w.shape;
        ConstMatrix a = matrix_of(params.a, matrix);
        if (s.transposed) a = a.transposed();
        const bool finite =
            s.gram ? decompose_by_gram(exec, w, params, a, matrix) : decompose_by_range(exec, w, params, a, matrix);
        if (!finite) {
          const double nan = std::numeric_limits<double>::quiet_NaN();
          std::fill_n(w.left, s.rank * s.tall, nan);
          std::fill_n(w.right, s.rank * s.small, nan);
          std::fill_n(w.norms, s.rank, nan);
        }
        write_columns(params.u, matrix, s.rank, s.transposed ? s.small : s.tall, s.transposed ? w.right : w.left);
        write_columns(params.v, matrix, s.rank, s.transposed ? s.tall : s.small, s.transposed ? w.left : w.right);
        // The order of nearly equal values may have changed by rounding.
        float* const out = static_cast<float*>(params.s.data) + params.s.offset(matrix);
        for (int64_t i = 1; i < s.rank; ++i) w.norms[i] = std::min(w.norms[i], w.norms[i - 1]);
        for (int64_t i = 0; i < s.rank; ++i) out[i * params.s.stride_row] = static_cast<float>(w.norms[i]);
      });
}

}  // namespace adaattn::cpu
