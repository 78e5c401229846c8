#include <algorithm>
#include <limits>

#include "cpu_fallback/tools/batch.h"
#include "cpu_fallback/tools/tools.h"

namespace adaattn::cpu {
namespace {

// Doubles of a chunk of rows that the streaming QR keeps in the second-level cache.
constexpr int64_t kChunkElements = 1 << 16;

// The matrix seen tall. Past 5/3 of square it is cheaper to reduce it to its triangle first (Chan, ACM TOMS 8, 1982),
// and that streams: the memory is then a function of the small dimension alone.
struct Layout {
  int64_t tall, small, chunk = 0;
  bool transposed, stream;
  double *matrix, *rows = nullptr, *values, *work;

  Layout(const EffectiveRankParams& p, int64_t, Arena& arena)
      : tall(std::max(p.a.rows, p.a.cols)),
        small(std::min(p.a.rows, p.a.cols)),
        transposed(p.a.cols > p.a.rows),
        stream(3 * tall > 5 * small) {
    int64_t work_size = singular_values_work_size(stream ? small : tall, small);
    matrix = arena.take<double>((stream ? small : tall) * small);
    if (stream) {
      chunk = std::clamp<int64_t>(kChunkElements / small, 32, 1024);
      rows = arena.take<double>(chunk * small);
      work_size = std::max(work_size, qr_append_work_size(chunk, small));
    }
    values = arena.take<double>(small);
    work = arena.take<double>(work_size);
  }
};

void copy_rows(const ConstMatrix& a, int64_t first, int64_t count, double* out) {
  const float* const data = static_cast<const float*>(a.data);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < a.cols; ++j) out[i * a.cols + j] = data[(first + i) * a.stride_row + j * a.stride_col];
}

int64_t rank_by_energy(const double* values, int64_t n, double threshold) {
  double total = 0, kept = 0;
  for (int64_t i = 0; i < n; ++i) total += values[i] * values[i];
  if (total == 0) return 0;
  for (int64_t r = 0; r < n; ++r) {
    kept += values[r] * values[r];
    if (kept >= threshold * total) return r + 1;
  }
  return n;
}

}  // namespace

size_t effective_rank_workspace(const ToolContext& context, const EffectiveRankParams& params) {
  return BatchShare(context, params.a.batch()).workspace<Layout>(params);
}

void effective_rank(const ToolContext& context, const EffectiveRankParams& params, void* workspace) {
  const BatchShare share(context, params.a.batch());
  share.run<Layout>(
      context, params, params.a.batch(), workspace, [&](const Exec& exec, const Layout& w, int64_t matrix) {
        ConstMatrix a = matrix_of(params.a, matrix);
        if (w.transposed) a = a.transposed();
        if (w.stream) {
          std::fill_n(w.matrix, w.small * w.small, 0.0);
          for (int64_t first = 0; first < w.tall; first += w.chunk) {
            const int64_t count = std::min(w.chunk, w.tall - first);
            copy_rows(a, first, count, w.rows);
            qr_append(*exec.kernels, w.small, w.matrix, count, w.rows, w.work);
          }
        } else {
          copy_rows(a, 0, w.tall, w.matrix);
        }
        if (!singular_values(*exec.kernels, w.stream ? w.small : w.tall, w.small, w.matrix, w.values, w.work))
          std::fill_n(w.values, w.small, std::numeric_limits<double>::quiet_NaN());
        // Below this a value is the rounding of the reduction: without it a threshold of 1 would count noise.
        const double noise = static_cast<double>(w.tall) * std::numeric_limits<double>::epsilon() * w.values[0];
        for (int64_t i = 0; i < w.small; ++i)
          if (w.values[i] <= noise) w.values[i] = 0;
        static_cast<int32_t*>(params.ranks.data)[params.ranks.offset(matrix)] =
            static_cast<int32_t>(rank_by_energy(w.values, w.small, params.threshold));
        if (params.singular_values.data == nullptr) return;
        float* const out = static_cast<float*>(params.singular_values.data) + params.singular_values.offset(matrix);
        for (int64_t i = 0; i < w.small; ++i)
          out[i * params.singular_values.stride_row] = static_cast<float>(w.values[i]);
      });
}

}  // namespace adaattn::cpu
