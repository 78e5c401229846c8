// The inner loops of the tools, compiled once per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "adaattn/adaattn.h"
#include "core/attn_params.h"

namespace adaattn::cpu {

// Element (i, j) at data[i * stride_row + j * stride_col].
struct ConstMatrix {
  const void* data = nullptr;
  int64_t rows = 0, cols = 0, stride_row = 0, stride_col = 1;
  bool is_f64 = false;  // f32 otherwise
  ConstMatrix transposed() const { return {data, cols, rows, stride_col, stride_row, is_f64}; }
};

// The largest part of a product that one call of a kernel computes, the same on every instruction set so that
// workspaces do not depend on it; depth is the run of products summed before they reach the f64 result.
inline constexpr int64_t kGemmRows = 96, kGemmCols = 256, kGemmDepth = 256;
inline constexpr size_t kGemmScratchBytes = (kGemmRows + kGemmCols) * kGemmDepth * sizeof(double);

// c[row0.., col0..] (+)= alpha * a[row0.., k0..k1) b[k0..k1, col0..), c row-major with leading dimension ldc.
struct GemmBlock {
  ConstMatrix a, b;
  double* c = nullptr;
  int64_t ldc = 0;
  int64_t row0 = 0, rows = 0;  // at most kGemmRows
  int64_t col0 = 0, cols = 0;  // at most kGemmCols
  int64_t k0 = 0, k1 = 0;
  double alpha = 1;
  bool accumulate = false;
  bool upper_only = false;  // elements below the diagonal of c need not be right
};

struct MergeRow {
  const void *a = nullptr, *b = nullptr;
  void* o = nullptr;                 // may be a or b
  float weight_a = 0, weight_b = 0;  // 0 means that the operand is not read
  int64_t n = 0;
  Dtype dtype_a = Dtype::kF32, dtype_b = Dtype::kF32, dtype_o = Dtype::kF32;
};

struct ToolKernels {
  // scratch: kGemmScratchBytes, 64-byte aligned. f32 rounds f64 operands to f32 first.
  void (*gemm_f32)(const GemmBlock& block, void* scratch);
  void (*gemm_f64)(const GemmBlock& block, void* scratch);
  double (*dot)(int64_t n, const double* x, const double* y);
  void (*axpy)(int64_t n, double alpha, const double* x, double* y);  // y += alpha x
  // (x, y) <- (c x + s y, c y - s x)
  void (*rotate)(int64_t n, double c, double s, double* x, double* y);
  double (*dot_f32)(int64_t n, const float* x, const double* y);
  void (*axpy_f32)(int64_t n, double alpha, const float* x, double* y);
  void (*merge_row)(const MergeRow& row);
};

// isa is a resolved one (never AUTO); AMX has no tile kernels here and uses those of AVX-512.
const ToolKernels& tool_kernels(adaattn_isa_t isa);

}  // namespace adaattn::cpu
