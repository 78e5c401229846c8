#include <algorithm>
#include <cmath>

#include "core/sampling.h"
#include "cpu_fallback/tools/batch.h"
#include "cpu_fallback/tools/tools.h"

namespace adaattn::cpu {
namespace {

constexpr double kDefaultTolerance = 1e-6;
constexpr int64_t kDefaultIterations = 1000;
constexpr int64_t kChunkRows = 64, kMaxChunks = 16;

// Rows are read as the kernels want them, adjacent elements, from whichever side of the matrix has them; without such
// a side each row is gathered first.
struct Layout {
  int64_t rows, cols, stride_row, stride_col, chunks;
  double *x, *images;  // [cols], [chunks, cols]
  double* energies;    // [chunks]
  float* gathered = nullptr;

  Layout(const SpectralNormParams& p, int64_t lanes, Arena& arena)
      : rows(p.a.rows), cols(p.a.cols), stride_row(p.a.stride_row), stride_col(p.a.stride_col) {
    if (stride_col != 1 && stride_row == 1) {
      std::swap(rows, cols);
      std::swap(stride_row, stride_col);
    }
    chunks = std::clamp<int64_t>(rows / kChunkRows, 1, kMaxChunks);
    x = arena.take<double>(cols);
    images = arena.take<double>(chunks * cols);
    energies = arena.take<double>(chunks);
    if (stride_col != 1) gathered = arena.take<float>(lanes * cols);
  }
};

// One step: images = partial sums of a^T a x over the rows of each chunk, energies those of |a x|^2.
void apply(const Exec& exec, const Layout& w, const float* a) {
  exec.for_each(w.chunks, [&](int64_t lane, int64_t chunk) {
    double* const image = w.images + chunk * w.cols;
    std::fill_n(image, w.cols, 0.0);
    double energy = 0;
    for (int64_t i = chunk * w.rows / w.chunks; i < (chunk + 1) * w.rows / w.chunks; ++i) {
      const float* row = a + i * w.stride_row;
      if (w.gathered != nullptr) {
        float* const copy = w.gathered + lane * w.cols;
        for (int64_t j = 0; j < w.cols; ++j) copy[j] = row[j * w.stride_col];
        row = copy;
      }
      const double y = exec.kernels->dot_f32(w.cols, row, w.x);
      energy += y * y;
      exec.kernels->axpy_f32(w.cols, y, row, image);
    }
    w.energies[chunk] = energy;
  });
}

double norm_of(const Exec& exec, const Layout& w, const SpectralNormParams& p, int64_t matrix) {
  const float* const a = static_cast<const float*>(p.a.data) + p.a.offset(matrix);
  const double tolerance = p.tolerance > 0 ? p.tolerance : kDefaultTolerance;
  const int64_t iterations = p.max_iterations > 0 ? p.max_iterations : kDefaultIterations;
  for (int64_t j = 0; j < w.cols; ++j)
    w.x[j] = sketch_entry(p.seed, static_cast<uint64_t>(matrix), static_cast<uint64_t>(j));
  double estimate = 0;
  for (int64_t iteration = 0; iteration < iterations; ++iteration) {
    const double length = std::sqrt(exec.kernels->dot(w.cols, w.x, w.x));
    for (int64_t j = 0; j < w.cols; ++j) w.x[j] /= length;
    apply(exec, w, a);
    double energy = 0;
    std::fill_n(w.x, w.cols, 0.0);
    for (int64_t chunk = 0; chunk < w.chunks; ++chunk) {
      energy += w.energies[chunk];
      exec.kernels->axpy(w.cols, 1, w.images + chunk * w.cols, w.x);
    }
    if (energy == 0) return 0;
    // |a^T a x| / |a x|: never above the norm, and nearer to it than |a x|.
    const double next = std::sqrt(exec.kernels->dot(w.cols, w.x, w.x) / energy);
    const bool converged = std::abs(next - estimate) <= tolerance * next;
    estimate = next;
    if (converged || !std::isfinite(next)) break;
  }
  return estimate;
}

}  // namespace

size_t spectral_norm_workspace(const ToolContext& context, const SpectralNormParams& params) {
  return BatchShare(context, params.a.batch()).workspace<Layout>(params);
}

void spectral_norm(const ToolContext& context, const SpectralNormParams& params, void* workspace) {
  const BatchShare share(context, params.a.batch());
  share.run<Layout>(context, params, params.a.batch(), workspace,
                    [&](const Exec& exec, const Layout& w, int64_t matrix) {
                      static_cast<float*>(params.norms.data)[params.norms.offset(matrix)] =
                          static_cast<float>(norm_of(exec, w, params, matrix));
                    });
}

}  // namespace adaattn::cpu
