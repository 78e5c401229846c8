// Compiled once per instruction set with ADAATTN_ISA naming the namespace and ADAATTN_HWY_TARGET the Highway target
// that the flags must select. No standard containers here: their weak symbols would carry this instruction set's code
// into the baseline parts of the library.
#define HWY_COMPILE_ONLY_STATIC
#include <hwy/highway.h>

#include "cpu_fallback/tools/half_float.h"
#include "cpu_fallback/tools/tool_kernels.h"

static_assert(HWY_STATIC_TARGET == ADAATTN_HWY_TARGET, "the compiler flags select another Highway target");

namespace adaattn::cpu::ADAATTN_ISA {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

constexpr int64_t kTileRows = 6;
// Accumulators of a tile: 24 of 32 registers with AVX-512 and NEON, 12 of 16 elsewhere.
constexpr int64_t kTileVectors = HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_NEON ? 4 : 2;

// Writes `lines` strided lines of the operand as panels of kWidth interleaved lines, zero-padded:
// packed[panel][k][line in panel].
template <typename T, typename Source>
void pack_panels(const Source* source, int64_t lines, int64_t depth, int64_t stride_line, int64_t stride_k,
                 int64_t width, T* HWY_RESTRICT packed) {
  for (int64_t first = 0; first < lines; first += width) {
    const int64_t count = lines - first < width ? lines - first : width;
    const Source* panel = source + first * stride_line;
    if (stride_line == 1 && count == width) {
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t i = 0; i < width; ++i) packed[k * width + i] = static_cast<T>(panel[k * stride_k + i]);
    } else {
      // Line by line in short runs: the writes of one run stay in the first-level cache.
      constexpr int64_t kRun = 16;
      for (int64_t k0 = 0; k0 < depth; k0 += kRun) {
        const int64_t k1 = k0 + kRun < depth ? k0 + kRun : depth;
        for (int64_t i = 0; i < count; ++i)
          for (int64_t k = k0; k < k1; ++k)
            packed[k * width + i] = static_cast<T>(panel[i * stride_line + k * stride_k]);
        for (int64_t i = count; i < width; ++i)
          for (int64_t k = k0; k < k1; ++k) packed[k * width + i] = T{0};
      }
    }
    packed += depth * width;
  }
}

template <typename T>
void pack(const ConstMatrix& m, int64_t line0, int64_t lines, int64_t k0, int64_t depth, bool lines_are_rows,
          int64_t width, T* packed) {
  const int64_t stride_line = lines_are_rows ? m.stride_row : m.stride_col;
  const int64_t stride_k = lines_are_rows ? m.stride_col : m.stride_row;
  const int64_t start = line0 * stride_line + k0 * stride_k;
  if (m.is_f64) {
    pack_panels(static_cast<const double*>(m.data) + start, lines, depth, stride_line, stride_k, width, packed);
  } else {
    pack_panels(static_cast<const float*>(m.data) + start, lines, depth, stride_line, stride_k, width, packed);
  }
}

// One register tile, kTileRows x kVectors vectors of a panel that is kTileVectors wide; written to out row by row.
template <typename T, int64_t kVectors>
HWY_INLINE void multiply_tile(int64_t depth, const T* HWY_RESTRICT a, const T* HWY_RESTRICT b, T* HWY_RESTRICT out) {
  const hn::ScalableTag<T> d;
  constexpr int64_t kLanes = static_cast<int64_t>(hn::MaxLanes(d)), kWidth = kTileVectors * kLanes;
  hn::Vec<decltype(d)> sum[kTileRows][kVectors];
  for (auto& row : sum)
    for (auto& v : row) v = hn::Zero(d);
  for (int64_t k = 0; k < depth; ++k) {
    hn::Vec<decltype(d)> columns[kVectors];
#pragma GCC unroll 4
    for (int64_t j = 0; j < kVectors; ++j) columns[j] = hn::Load(d, b + k * kWidth + j * kLanes);
#pragma GCC unroll 6
    for (int64_t i = 0; i < kTileRows; ++i) {
      const auto broadcast = hn::Set(d, a[k * kTileRows + i]);
#pragma GCC unroll 4
      for (int64_t j = 0; j < kVectors; ++j) sum[i][j] = hn::MulAdd(broadcast, columns[j], sum[i][j]);
    }
  }
#pragma GCC unroll 6
  for (int64_t i = 0; i < kTileRows; ++i)
#pragma GCC unroll 4
    for (int64_t j = 0; j < kVectors; ++j) hn::Store(sum[i][j], d, out + i * kWidth + j * kLanes);
}

template <typename T>
void gemm(const GemmBlock& block, void* scratch) {
  constexpr int64_t kLanes = static_cast<int64_t>(hn::MaxLanes(hn::ScalableTag<T>()));
  constexpr int64_t kWidth = kTileVectors * kLanes;
  static_assert(kGemmCols % kWidth == 0 && kGemmRows % kTileRows == 0);
  T* const packed_a = static_cast<T*>(scratch);
  T* const packed_b = packed_a + kGemmRows * kGemmDepth;
  alignas(64) T tile[kTileRows * kWidth];
  double* const c0 = block.c + block.row0 * block.ldc + block.col0;
  bool accumulate = block.accumulate;
  if (block.k0 >= block.k1 && !accumulate)
    for (int64_t i = 0; i < block.rows; ++i)
      for (int64_t j = 0; j < block.cols; ++j) c0[i * block.ldc + j] = 0;
  for (int64_t k0 = block.k0; k0 < block.k1; k0 += kGemmDepth) {
    const int64_t depth = block.k1 - k0 < kGemmDepth ? block.k1 - k0 : kGemmDepth;
    pack<T>(block.a, block.row0, block.rows, k0, depth, true, kTileRows, packed_a);
    pack<T>(block.b, block.col0, block.cols, k0, depth, false, kWidth, packed_b);
    for (int64_t j0 = 0; j0 < block.cols; j0 += kWidth) {
      const int64_t width = block.cols - j0 < kWidth ? block.cols - j0 : kWidth;
      for (int64_t i0 = 0; i0 < block.rows; i0 += kTileRows) {
        const int64_t height = block.rows - i0 < kTileRows ? block.rows - i0 : kTileRows;
        if (block.upper_only && block.col0 + j0 + width <= block.row0 + i0) continue;
        const T *const a = packed_a + i0 * depth, *const b = packed_b + j0 * depth;
        if (width <= kLanes) {
          multiply_tile<T, 1>(depth, a, b, tile);
        } else if (width <= 2 * kLanes) {
          multiply_tile<T, 2>(depth, a, b, tile);
        } else {
          multiply_tile<T, kTileVectors>(depth, a, b, tile);
        }
        for (int64_t i = 0; i < height; ++i) {
          double* const c = c0 + (i0 + i) * block.ldc + j0;
          const T* const t = tile + i * kWidth;
          if (accumulate) {
            for (int64_t j = 0; j < width; ++j) c[j] += block.alpha * t[j];
          } else {
            for (int64_t j = 0; j < width; ++j) c[j] = block.alpha * t[j];
          }
        }
      }
    }
    accumulate = true;
  }
}

using D64 = hn::ScalableTag<double>;
using V64 = hn::Vec<D64>;
constexpr int64_t kLanes64 = static_cast<int64_t>(hn::MaxLanes(D64()));

HWY_INLINE V64 load64(const double* x) { return hn::LoadU(D64(), x); }
HWY_INLINE V64 load64(const float* x) { return hn::PromoteTo(D64(), hn::LoadU(hn::Rebind<float, D64>(), x)); }

template <typename X>
double dot_of(int64_t n, const X* x, const double* y) {
  const D64 d;
  V64 sum[4] = {hn::Zero(d), hn::Zero(d), hn::Zero(d), hn::Zero(d)};
  int64_t i = 0;
  for (; i + 4 * kLanes64 <= n; i += 4 * kLanes64)
#pragma GCC unroll 4
    for (int64_t u = 0; u < 4; ++u)
      sum[u] = hn::MulAdd(load64(x + i + u * kLanes64), load64(y + i + u * kLanes64), sum[u]);
  for (; i + kLanes64 <= n; i += kLanes64) sum[0] = hn::MulAdd(load64(x + i), load64(y + i), sum[0]);
  double total = hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(sum[0], sum[1]), hn::Add(sum[2], sum[3]))));
  for (; i < n; ++i) total += static_cast<double>(x[i]) * y[i];
  return total;
}

template <typename X>
void axpy_of(int64_t n, double alpha, const X* x, double* y) {
  const D64 d;
  const V64 factor = hn::Set(d, alpha);
  int64_t i = 0;
  for (; i + kLanes64 <= n; i += kLanes64) hn::StoreU(hn::MulAdd(factor, load64(x + i), load64(y + i)), d, y + i);
  for (; i < n; ++i) y[i] += alpha * x[i];
}

void rotate(int64_t n, double c, double s, double* x, double* y) {
  const D64 d;
  const V64 vc = hn::Set(d, c), vs = hn::Set(d, s);
  int64_t i = 0;
  for (; i + kLanes64 <= n; i += kLanes64) {
    const V64 a = load64(x + i), b = load64(y + i);
    hn::StoreU(hn::MulAdd(vc, a, hn::Mul(vs, b)), d, x + i);
    hn::StoreU(hn::NegMulAdd(vs, a, hn::Mul(vc, b)), d, y + i);
  }
  for (; i < n; ++i) {
    const double a = x[i], b = y[i];
    x[i] = c * a + s * b;
    y[i] = c * b - s * a;
  }
}

constexpr int64_t kMergeBlock = 64;

HWY_INLINE void load_floats(const void* source, Dtype dtype, int64_t first, int64_t n, float* HWY_RESTRICT out) {
  if (dtype == Dtype::kF32) {
    const float* const x = static_cast<const float*>(source) + first;
    for (int64_t i = 0; i < n; ++i) out[i] = x[i];
  } else if (dtype == Dtype::kBF16) {
    const uint16_t* const x = static_cast<const uint16_t*>(source) + first;
    for (int64_t i = 0; i < n; ++i) out[i] = float_of_bf16(x[i]);
  } else {
    const uint16_t* const x = static_cast<const uint16_t*>(source) + first;
    for (int64_t i = 0; i < n; ++i) out[i] = float_of_f16(x[i]);
  }
}

HWY_INLINE void store_floats(const float* HWY_RESTRICT x, Dtype dtype, int64_t first, int64_t n, void* out) {
  if (dtype == Dtype::kF32) {
    float* const o = static_cast<float*>(out) + first;
    for (int64_t i = 0; i < n; ++i) o[i] = x[i];
  } else if (dtype == Dtype::kBF16) {
    uint16_t* const o = static_cast<uint16_t*>(out) + first;
    for (int64_t i = 0; i < n; ++i) o[i] = bf16_of_float(x[i]);
  } else {
    uint16_t* const o = static_cast<uint16_t*>(out) + first;
    for (int64_t i = 0; i < n; ++i) o[i] = f16_of_float(x[i]);
  }
}

void merge_row(const MergeRow& row) {
  float a[kMergeBlock], b[kMergeBlock];
  for (int64_t first = 0; first < row.n; first += kMergeBlock) {
    const int64_t n = row.n - first < kMergeBlock ? row.n - first : kMergeBlock;
    for (int64_t i = 0; i < n; ++i) a[i] = b[i] = 0;
    // An operand of weight 0 may hold anything, NaN included.
    if (row.weight_a != 0) load_floats(row.a, row.dtype_a, first, n, a);
    if (row.weight_b != 0) load_floats(row.b, row.dtype_b, first, n, b);
    if (row.weight_a == 0) {
      for (int64_t i = 0; i < n; ++i) a[i] = row.weight_b * b[i];
    } else if (row.weight_b == 0) {
      for (int64_t i = 0; i < n; ++i) a[i] = row.weight_a * a[i];
    } else {
      for (int64_t i = 0; i < n; ++i) a[i] = row.weight_a * a[i] + row.weight_b * b[i];
    }
    store_floats(a, row.dtype_o, first, n, row.o);
  }
}

}  // namespace

extern const ToolKernels kToolKernels;
const ToolKernels kToolKernels = {gemm<float>, gemm<double>,  dot_of<double>, axpy_of<double>,
                                  rotate,      dot_of<float>, axpy_of<float>, merge_row};

}  // namespace adaattn::cpu::ADAATTN_ISA
