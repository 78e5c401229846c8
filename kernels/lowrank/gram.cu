#include <algorithm>

#include "attend/launch.h"
#include "lowrank/gram.cuh"
#include "lowrank/lowrank.h"
#include "lowrank/mma_f64.cuh"
#include "lowrank/subspace.h"
#include "runtime.h"

namespace adaattn::cuda {
namespace {

constexpr int kTile = 64;  // columns of a panel
constexpr int kStep = 16;  // rows of a step
constexpr int kPad = 8;    // rows of a fragment fall on distinct banks
constexpr int kGramThreads = 128;

// One 64 x 64 tile of A^T A, on or below the diagonal, over one part of the rows; products are exact in float64. Four
// warps, a quarter each.
template <typename View, typename Element>
__global__ __launch_bounds__(kGramThreads) void gram_kernel(View a, int splits, int64_t ld, double* partial) {
  __shared__ Element left[kStep][kTile + kPad], right[kStep][kTile + kPad];
  const int64_t matrix = blockIdx.x % a.batch, n = a.cols;
  int ti = 0, tj = static_cast<int>(blockIdx.x / a.batch);
  while (tj > ti) tj -= ++ti;
  const Element* data = a.matrix(matrix);
  const int64_t first = a.rows * blockIdx.y / splits, last = a.rows * (blockIdx.y + 1) / splits;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int m = warp / 2 * 32, c0 = warp % 2 * 32;
  constexpr int kEach = kStep * kTile / kGramThreads;
  Element next_left[kEach], next_right[kEach];
  const auto fetch = [&](int64_t row0) {
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int i = thread + e * kGramThreads;
      const int64_t r = row0 + i / kTile, cl = ti * kTile + i % kTile, cr = tj * kTile + i % kTile;
      next_left[e] = r < last && cl < n ? data[r * a.stride_row + cl * a.stride_col] : Element(0);
      next_right[e] = r < last && cr < n ? data[r * a.stride_row + cr * a.stride_col] : Element(0);
    }
  };
  double sum[4][4][2] = {};
  fetch(first);
  for (int64_t row0 = first; row0 < last; row0 += kStep) {
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int i = thread + e * kGramThreads;
      left[i / kTile][i % kTile] = next_left[e];
      right[i / kTile][i % kTile] = next_right[e];
    }
    __syncthreads();
    fetch(row0 + kStep);
#pragma unroll
    for (int k = 0; k < kStep; k += 4) {
      double x[4], y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] = left[k + lane % 4][m + 8 * i + lane / 4];
        y[i] = right[k + lane % 4][c0 + 8 * i + lane / 4];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) mma_f64(sum[i][j], x[i], y[j]);
    }
  }
  double* out = partial + (matrix * splits + blockIdx.y) * ld * ld;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int64_t r = ti * kTile + m + 8 * i + lane / 4, c = tj * kTile + c0 + 8 * j + 2 * (lane % 4) + e;
        if (r < ld && c < ld) out[r * ld + c] = sum[i][j][e];
      }
}

// Adds the parts in order and mirrors the lower triangle.
__global__ void gram_sum_kernel(int64_t ld, int splits, const double* partial, double* gram) {
  const int64_t matrix = blockIdx.x, i = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
  if (i >= ld * ld) return;
  const int64_t r = i / ld, c = i % ld, from = r / kTile >= c / kTile ? i : c * ld + r;
  double sum = 0;
  for (int s = 0; s < splits; ++s) sum += partial[(matrix * splits + s) * ld * ld + from];
  gram[matrix * ld * ld + i] = sum;
}

int64_t align(int64_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

TallView tall_view(const MatrixBatch& a) {
  TallView t{static_cast<const float*>(a.data),
             a.rows,
             a.cols,
             a.stride_row,
             a.stride_col,
             a.stride0,
             a.stride1,
             a.batch1,
             a.batch(),
             a.cols > a.rows};
  if (t.transposed) {
    std::swap(t.rows, t.cols);
    std::swap(t.stride_row, t.stride_col);
  }
  return t;
}

namespace {

// Parts that the rows of each matrix are split into, so that the partial sums fill the device.
int64_t splits_of(int64_t rows, int64_t cols, int64_t batch) {
  const int64_t tiles = cols <= kMaxGramDim ? 1 : (cols + kTile - 1) / kTile * ((cols + kTile - 1) / kTile + 1) / 2;
  const int64_t wanted = std::max<int64_t>(1, 512 / std::max<int64_t>(batch * tiles, 1));
  return std::clamp<int64_t>(rows / 256, 1, std::min<int64_t>(wanted, 64));
}

int64_t bytes_of(int64_t rows, int64_t cols, int64_t batch) {
  const int64_t ld = subspace_ld(cols), square = ld * ld * batch * 8;
  return align(square * splits_of(rows, cols, batch)) + align(square);
}

template <typename Element, typename View>
double* launch(const View& a, void* workspace, cudaStream_t stream) {
  const int64_t ld = subspace_ld(a.cols);
  const int splits = static_cast<int>(splits_of(a.rows, a.cols, a.batch));
  auto* partial = static_cast<double*>(workspace);
  auto* gram = reinterpret_cast<double*>(static_cast<char*>(workspace) + align(ld * ld * a.batch * 8 * splits));
  const auto tiles = static_cast<unsigned>((a.cols + kTile - 1) / kTile), batch = static_cast<unsigned>(a.batch);
  check(launch_grid(gram_kernel<View, Element>, dim3(tiles * (tiles + 1) / 2 * batch, splits), kGramThreads, 0, stream,
                    a, splits, ld, partial),
        "gram");
  check(launch_grid(gram_sum_kernel, dim3(batch, static_cast<unsigned>((ld * ld + 255) / 256)), 256, 0, stream, ld,
                    splits, static_cast<const double*>(partial), gram),
        "gram");
  return gram;
}

}  // namespace

size_t gram_bytes(const TallView& a) { return static_cast<size_t>(bytes_of(a.rows, a.cols, a.batch)); }
size_t gram_bytes(const VectorView& v) { return static_cast<size_t>(bytes_of(v.rows, v.cols, v.batch)); }

double* gram_of(const TallView& a, void* workspace, cudaStream_t stream) { return launch<float>(a, workspace, stream); }
double* gram_of(const VectorView& v, void* workspace, cudaStream_t stream) {
  return launch<double>(v, workspace, stream);
}

}  // namespace adaattn::cuda
