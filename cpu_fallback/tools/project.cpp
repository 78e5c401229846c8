#include <algorithm>
#include <cmath>

#include "cpu_fallback/tools/batch.h"
#include "cpu_fallback/tools/tools.h"

namespace adaattn::cpu {
namespace {

constexpr int64_t kBlockElements = 1 << 16;  // doubles of a block of rows

struct Layout {
  int64_t rows, cols, rank, lanes, block_rows, blocks;
  size_t lane_bytes = 0;
  uint8_t* lane_memory;
  double* sums;  // [matrices, blocks, 2]: energies of the residual and of the rows

  struct Lane {
    GemmScratch gemm;
    double *x, *y;
    Lane(const Layout& w, Arena& arena) {
      gemm = take_gemm_scratch(
          arena, 1,
          std::max(gemm_partial_size(w.block_rows, w.rank, w.cols), gemm_partial_size(w.block_rows, w.cols, w.rank)));
      x = arena.take<double>(w.block_rows * w.cols);
      y = arena.take<double>(w.block_rows * w.rank);
    }
  };

  Layout(const ToolContext& context, const ProjectParams& p, Arena& arena)
      : rows(p.a.rows),
        cols(p.a.cols),
        rank(p.basis.cols),
        block_rows(std::clamp<int64_t>(kBlockElements / std::max<int64_t>(cols, 1), 8, 256)),
        blocks((rows + block_rows - 1) / block_rows) {
    lanes = std::min<int64_t>({context.pool.num_threads(), kMaxLanes, std::max<int64_t>(blocks * p.a.batch(), 1)});
    Arena counting;
    Lane(*this, counting);
    lane_bytes = counting.used();
    lane_memory = arena.take<uint8_t>(static_cast<int64_t>(lane_bytes) * lanes);
    sums = arena.take<double>(2 * blocks * p.a.batch());
  }
  Lane lane(int64_t index) const {
    Arena arena(lane_memory + static_cast<size_t>(index) * lane_bytes);
    return Lane(*this, arena);
  }
};

void copy_centred(const ProjectParams& p, int64_t matrix, int64_t first, int64_t count, double* x) {
  const float* const a = static_cast<const float*>(p.a.data) + p.a.offset(matrix) + first * p.a.stride_row;
  const float* const mean =
      p.mean.data == nullptr ? nullptr : static_cast<const float*>(p.mean.data) + p.mean.offset(matrix);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < p.a.cols; ++j)
      x[i * p.a.cols + j] = static_cast<double>(a[i * p.a.stride_row + j * p.a.stride_col]) -
                            (mean == nullptr ? 0.0 : static_cast<double>(mean[j * p.mean.stride_row]));
}

}  // namespace

size_t low_rank_project_workspace(const ToolContext& context, const ProjectParams& params) {
  Arena arena;
  Layout(context, params, arena);
  return Arena::size_for(arena.used());
}

void low_rank_project(const ToolContext& context, const ProjectParams& p, void* workspace) {
  Arena arena(workspace);
  const Layout w(context, p, arena);
  const Exec exec{&context.pool, &context.kernels, w.lanes};
  const bool measured = p.row_residual.data != nullptr || p.residual.data != nullptr;
  exec.for_each(w.blocks * p.a.batch(), [&](int64_t lane_index, int64_t task) {
    const Layout::Lane lane = w.lane(lane_index);
    const int64_t matrix = task / w.blocks, first = task % w.blocks * w.block_rows;
    const int64_t count = std::min(w.block_rows, w.rows - first);
    const ConstMatrix basis = matrix_of(p.basis, matrix);
    copy_centred(p, matrix, first, count, lane.x);
    gemm(exec.serial(), lane.gemm, row_major(lane.x, count, w.cols), basis, lane.y, w.rank, Precision::kF64);
    if (p.y.data != nullptr) {
      float* const y = static_cast<float*>(p.y.data) + p.y.offset(matrix) + first * p.y.stride_row;
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < w.rank; ++j)
          y[i * p.y.stride_row + j * p.y.stride_col] = static_cast<float>(lane.y[i * w.rank + j]);
    }
    if (!measured) return;
    double* const sums = w.sums + 2 * task;
    sums[1] = context.kernels.dot(count * w.cols, lane.x, lane.x);
    // The difference itself, not a difference of energies, which would lose small residuals.
    gemm(exec.serial(), lane.gemm, row_major(lane.y, count, w.rank), basis.transposed(), lane.x, w.cols,
         Precision::kF64, -1, true);
    sums[0] = 0;
    for (int64_t i = 0; i < count; ++i) {
      const double energy = context.kernels.dot(w.cols, lane.x + i * w.cols, lane.x + i * w.cols);
      sums[0] += energy;
      if (p.row_residual.data != nullptr)
        static_cast<float*>(
            p.row_residual.data)[p.row_residual.offset(matrix) + (first + i) * p.row_residual.stride_row] =
            static_cast<float>(std::sqrt(energy));
    }
  });
  if (p.residual.data == nullptr) return;
  for (int64_t matrix = 0; matrix < p.a.batch(); ++matrix) {
    double lost = 0, total = 0;
    for (int64_t block = 0; block < w.blocks; ++block) {
      lost += w.sums[2 * (matrix * w.blocks + block)];
      total += w.sums[2 * (matrix * w.blocks + block) + 1];
    }
    static_cast<float*>(p.residual.data)[p.residual.offset(matrix)] =
        total == 0 ? 0.0f : static_cast<float>(std::sqrt(lost / total));
  }
}

}  // namespace adaattn::cpu
