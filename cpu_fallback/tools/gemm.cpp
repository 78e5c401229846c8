#include <algorithm>

#include "cpu_fallback/tools/linalg.h"

namespace adaattn::cpu {
namespace {

constexpr int64_t kSplitDepth = 2048, kMaxSplits = 8, kMaxSplitTiles = 4;

int64_t tiles(int64_t n, int64_t tile) { return (n + tile - 1) / tile; }

}  // namespace

int64_t gemm_splits(int64_t rows, int64_t cols, int64_t depth) {
  if (tiles(rows, kGemmRows) * tiles(cols, kGemmCols) > kMaxSplitTiles) return 1;
  return std::clamp<int64_t>(depth / kSplitDepth, 1, kMaxSplits);
}

int64_t gemm_partial_size(int64_t rows, int64_t cols, int64_t depth) {
  const int64_t splits = gemm_splits(rows, cols, depth);
  return splits == 1 ? 0 : splits * rows * cols;
}

GemmScratch take_gemm_scratch(Arena& arena, int64_t lanes, int64_t partial_size) {
  GemmScratch scratch;
  scratch.packing = arena.take<uint8_t>(lanes * static_cast<int64_t>(kGemmScratchBytes));
  scratch.partial = arena.take<double>(partial_size);
  return scratch;
}

namespace {

void multiply(const Exec& exec, const GemmScratch& scratch, const ConstMatrix& a, const ConstMatrix& b, double* c,
              int64_t ldc, Precision precision, double alpha, bool accumulate, bool upper_only) {
  const int64_t rows = a.rows, cols = b.cols, depth = a.cols;
  const int64_t row_tiles = tiles(rows, kGemmRows), col_tiles = tiles(cols, kGemmCols);
  const int64_t splits = gemm_splits(rows, cols, depth);
  // Whole runs of kGemmDepth, so that every split but the last sums full runs.
  const int64_t split_depth = tiles(tiles(depth, splits), kGemmDepth) * kGemmDepth;
  const auto kernel = precision == Precision::kF32 ? exec.kernels->gemm_f32 : exec.kernels->gemm_f64;
  exec.for_each(row_tiles * col_tiles * splits, [&](int64_t lane, int64_t task) {
    GemmBlock block{.a = a, .b = b, .alpha = alpha, .upper_only = upper_only};
    const int64_t split = task % splits, tile = task / splits;
    block.row0 = tile / col_tiles * kGemmRows;
    block.col0 = tile % col_tiles * kGemmCols;
    block.rows = std::min(kGemmRows, rows - block.row0);
    block.cols = std::min(kGemmCols, cols - block.col0);
    block.k0 = std::min(depth, split * split_depth);
    block.k1 = std::min(depth, block.k0 + split_depth);
    block.c = splits == 1 ? c : scratch.partial + split * rows * cols;
    block.ldc = splits == 1 ? ldc : cols;
    block.accumulate = splits == 1 && accumulate;
    kernel(block, scratch.packing + lane * static_cast<int64_t>(kGemmScratchBytes));
  });
  if (splits == 1) return;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      double sum = accumulate ? c[i * ldc + j] : 0;
      for (int64_t split = 0; split < splits; ++split) sum += scratch.partial[(split * rows + i) * cols + j];
      c[i * ldc + j] = sum;
    }
}

}  // namespace

void gemm(const Exec& exec, const GemmScratch& scratch, const ConstMatrix& a, const ConstMatrix& b, double* c,
          int64_t ldc, Precision precision, double alpha, bool accumulate) {
  multiply(exec, scratch, a, b, c, ldc, precision, alpha, accumulate, false);
}

void gram_matrix(const Exec& exec, const GemmScratch& scratch, const ConstMatrix& x, double* gram,
                 Precision precision) {
  multiply(exec, scratch, x, x.transposed(), gram, x.rows, precision, 1, false, true);
  for (int64_t i = 0; i < x.rows; ++i)
    for (int64_t j = 0; j < i; ++j) gram[i * x.rows + j] = gram[j * x.rows + i];
}

}  // namespace adaattn::cpu
