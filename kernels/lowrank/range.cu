// Randomized range finder with power iterations (Halko, Martinsson and Tropp, SIAM Review 53(2), 2011, algorithms 4.4
// and 5.1), in float64 from the first product on. Sets of vectors are stored a vector per row, padded with zeros to
// whole tiles of 8 elements.
#include <algorithm>

#include "attend/launch.h"
#include "core/sampling.h"
#include "lowrank/eigen.h"
#include "lowrank/gram.cuh"
#include "lowrank/left.cuh"
#include "lowrank/libraries.h"
#include "lowrank/product.cuh"
#include "lowrank/range.h"
#include "lowrank/subspace.h"
#include "lowrank/subspace_steps.cuh"
#include "runtime.h"

namespace adaattn::cuda {
namespace {

using subspace::kThreads;
using subspace::kWarps;

constexpr int kColumns = 8 * kWarps;  // elements of every vector that a CTA works on
constexpr int kMaxColumns = static_cast<int>(kMaxEigenDim);
// Between power steps one pass leaves vectors orthonormal enough; a range takes a second, and a third where vectors had
// to be replaced.
constexpr int kFinalPasses = 3;
constexpr double kOrthonormal = 1e-13;

// Sets of vectors y [batch, columns, length] to be made orthonormal, and what a pass keeps.
struct OrthArgs {
  double* y;
  int64_t length, padded;  // elements, and the row stride
  int32_t columns, ldt;
  double* gram;     // [batch, ldt, ldt]
  double* scale;    // [batch, columns]
  uint16_t* marks;  // [batch, columns / 8]
  int32_t* done;    // [batch]
  uint64_t seed;
  int32_t pass;
};

// Factors one Gram matrix in place.
__global__ __launch_bounds__(kThreads) void factor_kernel(const __grid_constant__ OrthArgs args) {
  __shared__ uint16_t marks[kMaxColumns / 8];
  __shared__ unsigned long long excess;
  const int thread = threadIdx.x, n = args.columns;
  double* t = args.gram + int64_t{blockIdx.x} * args.ldt * args.ldt;
  double* scale = args.scale + int64_t{blockIdx.x} * n;
  if (thread == 0) excess = 0;
  __syncthreads();
  double worst = 0;
  for (int i = thread; i < n * n; i += kThreads) {
    const int r = i / n, c = i - r * n;
    const double distance = fabs(t[r * args.ldt + c] - (r == c ? 1.0 : 0.0));
    worst = distance > worst || distance != distance ? distance : worst;
  }
  atomicMax(&excess, static_cast<unsigned long long>(__double_as_longlong(worst)));
  for (int i = thread; i < n; i += kThreads) {
    const double square = t[int64_t{i} * (args.ldt + 1)];
    scale[i] = square > 0 ? rsqrt(square) : 0.0;
  }
  __syncthreads();
  const bool done = __longlong_as_double(static_cast<long long>(excess)) <= kOrthonormal;
  if (thread == 0) args.done[blockIdx.x] = done;
  if (done) return;
  for (int i = thread; i < n * n; i += kThreads) {
    const int r = i / n, c = i - r * n;
    if (c / 8 <= r / 8) t[r * args.ldt + c] *= scale[r] * scale[c];
  }
  __syncthreads();
  subspace::cholesky(t, args.ldt, n / 8, marks);
  for (int i = thread; i < n / 8; i += kThreads) args.marks[int64_t{blockIdx.x} * (n / 8) + i] = marks[i];
}

__global__ __launch_bounds__(kThreads) void solve_kernel(const __grid_constant__ OrthArgs args) {
  const int64_t matrix = blockIdx.x, first = int64_t{blockIdx.y} * kColumns;
  if (args.done[matrix] != 0) return;
  const int n = args.columns, width = static_cast<int>(min(static_cast<int64_t>(kColumns), args.padded - first));
  double* y = args.y + matrix * n * args.padded + first;
  subspace::solve(args.gram + matrix * args.ldt * args.ldt, args.ldt, n / 8, args.scale + matrix * n, y, args.padded,
                  width);
  __syncthreads();
  // Vectors that depend on those before them become seeded directions.
  for (int r = 0; r < n; ++r) {
    if ((args.marks[matrix * (n / 8) + r / 8] >> r % 8 & 1) == 0) continue;
    for (int c = threadIdx.x; c < width && first + c < args.length; c += kThreads)
      y[r * args.padded + c] =
          sketch_entry(args.seed + static_cast<uint64_t>(args.pass) + 1, static_cast<uint64_t>(matrix),
                       static_cast<uint64_t>(r * args.length + first + c));
  }
}

__global__ __launch_bounds__(kThreads) void sketch_kernel(double* x, int64_t columns, int64_t length, int64_t padded,
                                                          uint64_t seed) {
  const int64_t matrix = blockIdx.x;
  for (int64_t i = int64_t{blockIdx.y} * kThreads + threadIdx.x; i < columns * padded;
       i += int64_t{gridDim.y} * kThreads) {
    const int64_t r = i / padded, c = i % padded;
    x[matrix * columns * padded + i] =
        c < length ? sketch_entry(seed, static_cast<uint64_t>(matrix), static_cast<uint64_t>(r * length + c)) : 0.0;
  }
}

// out column j = sum over k of vectors[order[j]][k] y_k, and the squares of its elements over this CTA's.
struct RotateArgs {
  Eigen eigen;  // of dimension columns
  const double* y;
  int64_t length, padded;
  int32_t columns, rank;
  MatrixBatch out;      // data null: only the squares
  double* squares;      // [batch, blocks of kColumns, rank]; null: not wanted
  const double* norms;  // [batch, rank]: where the first is NaN the result is; null: not looked at
};

constexpr int kRotated = 32;  // vectors of a CTA

__global__ __launch_bounds__(kThreads) void rotate_kernel(const __grid_constant__ RotateArgs args) {
  __shared__ double parts[kRotated][kWarps + 1];
  const subspace::Lane l;
  const int64_t matrix = blockIdx.x, first = int64_t{blockIdx.y} * kColumns + 8 * l.warp;
  const int n = args.columns, vector0 = blockIdx.z * kRotated;
  const double* rows[kRotated / 8];
#pragma unroll
  for (int t = 0; t < kRotated / 8; ++t) {
    const int j = vector0 + 8 * t + l.row;
    rows[t] =
        j < args.rank ? args.eigen.vectors + (matrix * n + args.eigen.order[matrix * n + j]) * n + l.col : nullptr;
  }
  double sum[kRotated / 8][2] = {};
  if (first < args.padded) {
    const double* y = args.y + (matrix * n + l.col) * args.padded + first + l.row;
    for (int k = 0; k < n; k += 4) {
      const double b = y[k * args.padded];
#pragma unroll
      for (int t = 0; t < kRotated / 8; ++t) mma_f64(sum[t], rows[t] != nullptr ? rows[t][k] : 0.0, b);
    }
  }
  const bool spoilt = args.norms != nullptr && isnan(args.norms[matrix * args.rank]);
  float* out = args.out.data != nullptr ? static_cast<float*>(args.out.data) + args.out.offset(matrix) : nullptr;
#pragma unroll
  for (int t = 0; t < kRotated / 8; ++t) {
    const int j = vector0 + 8 * t + l.row;
    double square = 0;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t c = first + 2 * l.col + e;
      const double value = spoilt ? nan("") : sum[t][e];
      square = fma(value, value, square);
      if (out != nullptr && j < args.rank && c < args.length)
        out[c * args.out.stride_row + j * args.out.stride_col] = static_cast<float>(value);
    }
    square += __shfl_xor_sync(0xffffffffu, square, 1);
    square += __shfl_xor_sync(0xffffffffu, square, 2);
    if (l.col == 0) parts[8 * t + l.row][l.warp] = square;
  }
  if (args.squares == nullptr) return;
  __syncthreads();
  const int j = vector0 + static_cast<int>(threadIdx.x);
  if (threadIdx.x >= kRotated || j >= args.rank) return;
  double total = 0;
  for (int i = 0; i < kWarps; ++i) total += parts[threadIdx.x][i];
  args.squares[(matrix * gridDim.y + blockIdx.y) * args.rank + j] = total;
}

__global__ __launch_bounds__(kThreads) void to_f32_kernel(const double* from, float* to, int64_t elements) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < elements) to[i] = static_cast<float>(from[i]);
}

// Vectors [count, padded], of which the elements behind `length` stay.
__global__ __launch_bounds__(kThreads) void to_f64_kernel(const float* from, double* to, int64_t length,
                                                          int64_t padded) {
  const int64_t i = int64_t{blockIdx.y} * kThreads + threadIdx.x;
  if (i < length) to[blockIdx.x * padded + i] = static_cast<double>(from[blockIdx.x * padded + i]);
}

int64_t align(int64_t bytes) { return (bytes + 255) / 256 * 256; }
int64_t padded(int64_t length) { return (length + 7) / 8 * 8; }
int64_t blocks_of(int64_t length) { return (padded(length) + kColumns - 1) / kColumns; }

// Seen from the other side.
TallView transpose(TallView a) {
  std::swap(a.rows, a.cols);
  std::swap(a.stride_row, a.stride_col);
  return a;
}

// Products with a in f32 by cuBLAS: exact to f32's rounding, which for a large matrix is what its elements are worth.
// Small ones gain nothing over our own in float64.
bool blas_pays(const TallView& a, MathLibraries* libraries) {
  constexpr int64_t kLarge = int64_t{1} << 21;
  return a.rows * a.cols >= kLarge && libraries != nullptr && libraries->has_blas();
}

// Whether cuBLAS can read a.
bool blas_reads(const TallView& a) {
  const bool rows_adjacent = a.stride_row == 1 && a.stride_col >= a.rows;
  const bool columns_adjacent = a.stride_col == 1 && a.stride_row >= a.cols;
  const bool even_batch = a.batch == 1 || a.batch1 == 1 || a.batch1 == a.batch;
  return (rows_adjacent || columns_adjacent) && even_batch && a.batch0_stride >= 0 && a.batch1_stride >= 0;
}

struct Layout {
  TallView a;
  int64_t columns, long_padded, short_padded;
  bool blas;  // strides decide it, so that a query for shapes must leave room for either way
  int64_t left, right, left_f32, right_f32, partial, blas_space, gram, scale, marks, done, eigen, squares, norms, bytes;
  Layout(const LowRankParams& p, MathLibraries* libraries)
      : a(tall_view(p.a)), columns(subspace_columns(p.rank, p.oversampling)) {
    const bool large = blas_pays(a, libraries);
    blas = large && blas_reads(a);
    int64_t at = 0;
    const auto take = [&](int64_t size) {
      const int64_t here = at;
      at += align(size);
      return here;
    };
    long_padded = padded(a.rows);
    short_padded = padded(a.cols);
    left = take(a.batch * columns * long_padded * 8);
    right = take(a.batch * columns * short_padded * 8);
    left_f32 = take(large ? a.batch * columns * long_padded * 4 : 0);
    right_f32 = take(large ? a.batch * columns * short_padded * 4 : 0);
    blas_space = take(large ? static_cast<int64_t>(MathLibraries::kWorkspaceBytes) : 0);
    partial =
        take(a.batch * columns * 8 *
             std::max(product_splits(a, columns) * long_padded, product_splits(transpose(a), columns) * short_padded));
    gram = take(static_cast<int64_t>(std::max(gram_bytes(VectorView(nullptr, columns, long_padded, a.batch)),
                                              gram_bytes(VectorView(nullptr, columns, short_padded, a.batch)))));
    scale = take(a.batch * columns * 8);
    marks = take(a.batch * columns / 8 * 2);
    done = take(a.batch * 4);
    eigen = take(static_cast<int64_t>(eigen_bytes(columns, a.batch, libraries)));
    squares = take(a.batch * blocks_of(a.cols) * p.rank * 8);
    norms = take(a.batch * p.rank * 8);
    bytes = at;
  }
};

}  // namespace

size_t range_bytes(const LowRankParams& params, MathLibraries* libraries) {
  return static_cast<size_t>(Layout(params, libraries).bytes);
}

void low_rank_by_range(const LowRankParams& params, void* workspace, MathLibraries* libraries, cudaStream_t stream) {
  const Layout layout(params, libraries);
  const TallView& a = layout.a;
  const auto at = [&](int64_t offset) { return static_cast<char*>(workspace) + offset; };
  auto* const left = reinterpret_cast<double*>(at(layout.left));
  auto* const right = reinterpret_cast<double*>(at(layout.right));
  const auto batch = static_cast<unsigned>(a.batch);
  const int64_t columns = layout.columns;

  // left = A right, or right = A^T left, where cuBLAS takes them in f32.
  const auto multiply_f32 = [&](bool to_left) {
    const int64_t from_padded = to_left ? layout.short_padded : layout.long_padded;
    const int64_t to_padded = to_left ? layout.long_padded : layout.short_padded, length = to_left ? a.rows : a.cols;
    auto* const from = reinterpret_cast<float*>(at(to_left ? layout.right_f32 : layout.left_f32));
    auto* const to = reinterpret_cast<float*>(at(to_left ? layout.left_f32 : layout.right_f32));
    const int64_t elements = a.batch * columns * from_padded;
    check(launch_grid(to_f32_kernel, dim3(static_cast<unsigned>((elements + kThreads - 1) / kThreads)), kThreads, 0,
                      stream, static_cast<const double*>(to_left ? right : left), from, elements),
          "low_rank");
    ColumnProduct<float> p;
    p.transpose_a = (a.stride_col == 1) == to_left;  // adjacent columns are the transpose of a column-major matrix
    p.m = length;
    p.n = columns;
    p.k = to_left ? a.cols : a.rows;
    p.a = a.data;
    p.lda = a.stride_col == 1 ? a.stride_row : a.stride_col;
    p.stride_a = a.batch1 == 1 ? a.batch0_stride : a.batch1_stride;
    p.b = from;
    p.ldb = from_padded;
    p.stride_b = columns * from_padded;
    p.c = to;
    p.ldc = to_padded;
    p.stride_c = columns * to_padded;
    p.batch = a.batch;
    libraries->multiply(p, at(layout.blas_space), stream);
    check(launch_grid(
              to_f64_kernel,
              dim3(static_cast<unsigned>(a.batch * columns), static_cast<unsigned>((length + kThreads - 1) / kThreads)),
              kThreads, 0, stream, static_cast<const float*>(to), to_left ? left : right, length, to_padded),
          "low_rank");
  };
  const auto multiply = [&](bool to_left) {
    if (layout.blas) return multiply_f32(to_left);
    ProductArgs p;
    p.a = to_left ? a : transpose(a);
    p.partial = reinterpret_cast<double*>(at(layout.partial));
    p.x = to_left ? right : left;
    p.x_vectors = p.vectors = columns;
    p.x_stride = to_left ? layout.short_padded : layout.long_padded;
    p.y = to_left ? left : right;
    p.y_stride = to_left ? layout.long_padded : layout.short_padded;
    product(p, stream);
  };
  const auto gram_of_vectors = [&](const double* y, int64_t padded_length) {
    if (!layout.blas) return gram_of(VectorView(y, columns, padded_length, a.batch), at(layout.gram), stream);
    auto* const gram = reinterpret_cast<double*>(at(layout.gram));
    const int64_t ld = subspace_ld(columns);
    check(cudaMemsetAsync(gram, 0, static_cast<size_t>(a.batch * ld * ld) * 8, stream), "low_rank");
    libraries->multiply(
        ColumnProduct<double>{true, columns, columns, padded_length, y, padded_length, columns * padded_length, y,
                              padded_length, columns * padded_length, gram, ld, ld * ld, a.batch},
        at(layout.blas_space), stream);
    return gram;
  };
  const auto orthonormalize = [&](bool of_left, int passes) {
    OrthArgs o;
    o.y = of_left ? left : right;
    o.length = of_left ? a.rows : a.cols;
    o.padded = of_left ? layout.long_padded : layout.short_padded;
    o.columns = static_cast<int32_t>(columns);
    o.ldt = static_cast<int32_t>(subspace_ld(columns));
    o.scale = reinterpret_cast<double*>(at(layout.scale));
    o.marks = reinterpret_cast<uint16_t*>(at(layout.marks));
    o.done = reinterpret_cast<int32_t*>(at(layout.done));
    o.seed = params.seed;
    for (o.pass = 0; o.pass < passes; ++o.pass) {
      o.gram = gram_of_vectors(o.y, o.padded);
      check(launch_grid(factor_kernel, dim3(batch), kThreads, 0, stream, o), "low_rank");
      check(launch_grid(solve_kernel, dim3(batch, static_cast<unsigned>(blocks_of(o.length))), kThreads, 0, stream, o),
            "low_rank");
    }
  };

  check(cudaMemsetAsync(left, 0, static_cast<size_t>(a.batch * columns * layout.long_padded) * 8, stream), "low_rank");
  check(launch_grid(sketch_kernel, dim3(batch, 64), kThreads, 0, stream, right, columns, a.cols, layout.short_padded,
                    params.seed),
        "low_rank");
  for (int64_t i = 0; i < params.power_iterations; ++i) {
    multiply(true);
    orthonormalize(true, 1);
    multiply(false);
    orthonormalize(false, 1);
  }
  multiply(true);
  orthonormalize(true, kFinalPasses);
  multiply(false);
  // A = left^T right: the eigenvectors of right right^T turn both to singular vectors.
  double* const gram = gram_of_vectors(right, layout.short_padded);
  const Eigen eigen = eigen_of(columns, a.batch, gram, at(layout.eigen), libraries, stream);

  LeftArgs w{};
  w.rows = a.cols;
  w.rank = params.rank;
  w.blocks = blocks_of(a.cols);
  w.squares = reinterpret_cast<double*>(at(layout.squares));
  w.norms = reinterpret_cast<double*>(at(layout.norms));
  w.left = a.transposed ? params.u : params.v;
  w.values = params.s;
  w.seed = params.seed;
  RotateArgs r{eigen,
               right,
               a.cols,
               layout.short_padded,
               static_cast<int32_t>(columns),
               static_cast<int32_t>(params.rank),
               w.left,
               reinterpret_cast<double*>(at(layout.squares)),
               nullptr};
  const auto rotate = [&](int64_t length) {
    check(launch_grid(rotate_kernel,
                      dim3(batch, static_cast<unsigned>(blocks_of(length)),
                           static_cast<unsigned>((params.rank + kRotated - 1) / kRotated)),
                      kThreads, 0, stream, r),
          "low_rank");
  };
  rotate(a.cols);
  finish_left(w, a.batch, stream);
  r.y = left;
  r.length = a.rows;
  r.padded = layout.long_padded;
  r.out = a.transposed ? params.v : params.u;
  r.squares = nullptr;
  r.norms = w.norms;
  if (r.out.data != nullptr) rotate(a.rows);
}

}  // namespace adaattn::cuda
