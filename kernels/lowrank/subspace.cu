#include <cmath>
#include <type_traits>

#include "attend/launch.h"
#include "common/ptx.cuh"
#include "common/warp.cuh"
#include "core/sampling.h"
#include "lowrank/subspace.h"
#include "lowrank/subspace_steps.cuh"
#include "lowrank/systolic_jacobi.cuh"
#include "runtime.h"

namespace adaattn::cuda {
namespace {

using namespace subspace;

constexpr int kMaxColumns = 8 * kMaxTiles;
constexpr size_t kStaticShared = 14 << 10;  // more than the kernel declares
constexpr int kMaxPasses = 6;
// A basis this far from orthonormal is set right to first order, which squares the distance.
constexpr double kFirstOrder = 1e-7, kFirstOrderFast = 1e-3;
constexpr double kOrthonormal = 1e-13, kOrthonormalFast = 1e-6;
// In fast mode one sweep leaves a cold start's prefixes with 1 or 2 % more than the least energy left over; warm
// starts, whose projected matrix is nearly diagonal already, go on from there.
constexpr int kSweeps = 30, kSweepsFast = 1;
constexpr double kTolerance = 1e-15;
constexpr float kToleranceFast = 1e-3f;

constexpr size_t kFewColumns = systolic_floats(5) / 2;  // doubles

struct Layout {
  int width;   // of a vector, padded
  int stride;  // of a set of vectors
  int ldt;     // of small matrices
  size_t set, small;
  explicit __host__ __device__ Layout(int dim, int columns)
      : width(static_cast<int>(subspace_ld(dim))),
        stride(width + 4),
        ldt((columns + 15) / 16 * 16 + 8),
        set(static_cast<size_t>(columns) * stride),
        small(static_cast<size_t>(columns) * ldt) {
    // systolic_jacobi() exchanges its columns here; from 3 tiles on there is room enough.
    if (small < kFewColumns) small = kFewColumns;
  }
  __host__ __device__ size_t doubles() const { return 2 * set + small; }
};

struct Shared {
  double scale[kMaxColumns], values[kMaxColumns];
  Rotation rotations[kMaxColumns / 2];
  int place[kMaxColumns];
  uint16_t marks[kMaxTiles];
  unsigned long long excess;
  int turned;
};
static_assert(sizeof(Shared) < kStaticShared);

// Of values[i] in descending order.
__device__ __forceinline__ int place_of(const double* values, int n, int i) {
  int place = 0;
#pragma unroll 8
  for (int j = 0; j < n; ++j) place += values[j] > values[i] || (!(values[j] < values[i]) && j < i);
  return place;
}

// Runs `step` compiled for the least number of tiles from `tiles` <= kMostTiles on: the usual ranks of 32, 64 and 96
// with 8 vectors more, and whatever else there is.
constexpr int kMostTiles = 16;
template <typename Step>
__device__ __forceinline__ void with_tiles(int tiles, const Step& step) {
  if (tiles <= 5)
    step(std::integral_constant<int, 5>());
  else if (tiles <= 9)
    step(std::integral_constant<int, 9>());
  else if (tiles <= 13)
    step(std::integral_constant<int, 13>());
  else
    step(std::integral_constant<int, kMostTiles>());
}

__device__ __forceinline__ void solve_all(const Layout& w, int tiles, const double* t, const double* scale, double* y) {
  if (tiles == 5)
    solve_in_registers<5>(t, w.ldt, scale, y, w.stride, w.width);
  else if (tiles == 9)
    solve_in_registers<9>(t, w.ldt, scale, y, w.stride, w.width);
  else if (tiles == 13)
    solve_in_registers<13>(t, w.ldt, scale, y, w.stride, w.width);
  else
    solve(t, w.ldt, tiles, scale, y, w.stride, w.width);
}

// Makes the rows of y orthonormal in their order by Cholesky factors of their Gram matrix (CholeskyQR2; Yamamoto et
// al., ETNA 44, 2015). A row that depends on those before it is replaced by a seeded direction. `once` is enough
// between sweeps.
__device__ __forceinline__ void orthonormalize(const SubspaceArgs& args, const Layout& w, int64_t matrix, int tiles,
                                               double* y, double* t, Shared& shared, bool once) {
  const int columns = args.columns, thread = static_cast<int>(threadIdx.x);
  const double first_order = args.fast ? kFirstOrderFast : kFirstOrder;
  const double orthonormal = args.fast ? kOrthonormalFast : kOrthonormal;
  for (int pass = 0; pass < kMaxPasses; ++pass) {
    if (thread == 0) shared.excess = 0;
    __syncthreads();
    products(y, y, w.stride, w.width, tiles, t, w.ldt, pass == 0 ? nullptr : &shared.excess);
    __syncthreads();
    const double excess = __longlong_as_double(static_cast<long long>(shared.excess));
    if (pass > 0 && excess <= orthonormal) return;
    if (pass > 0 && excess <= first_order) {
      for (int i = thread; i < columns * 8; i += kThreads) {
        const int r = i / 8, c = r / 8 * 8 + i % 8;
        double& x = t[r * w.ldt + c];
        x = r == c ? 1.5 - 0.5 * x : r > c ? -x : 0.0;
        if (r == c) shared.scale[r] = 1.0;
      }
      __syncthreads();
      solve_all(w, tiles, t, shared.scale, y);
      __syncthreads();
      return;
    }
    for (int i = thread; i < columns; i += kThreads) {
      const double square = t[i * w.ldt + i];
      shared.scale[i] = square > 0 ? rsqrt(square) : 0.0;
    }
    __syncthreads();
    for (int r = thread / 32; r < columns; r += kWarps)
      for (int c = thread % 32; c < (r / 8 + 1) * 8; c += 32) t[r * w.ldt + c] *= shared.scale[r] * shared.scale[c];
    __syncthreads();
    cholesky(t, w.ldt, tiles, shared.marks);
    if (pass == 0)  // the lengths of the vectors beyond the span of those before them
      for (int i = thread; i < columns; i += kThreads) {
        const double inverse = t[i * (w.ldt + 1)] * shared.scale[i];
        shared.values[i] = inverse > 0 ? 1 / inverse : 0.0;
      }
    solve_all(w, tiles, t, shared.scale, y);
    unsigned marks = 0;
    for (int i = 0; i < tiles; ++i) marks |= shared.marks[i];
    __syncthreads();
    if ((marks & kDeadMask) != 0) {
      for (int i = thread; i < columns * args.dim; i += kThreads) {
        const int r = i / args.dim, c = i - r * args.dim;
        if (shared.marks[r / 8] >> r % 8 & 1)
          y[r * w.stride + c] = sketch_entry(args.seed + static_cast<uint64_t>(pass) + 1, static_cast<uint64_t>(matrix),
                                             static_cast<uint64_t>(i));
      }
      __syncthreads();
    } else if (once || (args.fast && (marks & kWeak) == 0)) {
      return;
    }
  }
}

// Rotates the vectors b to the eigenvectors of t, in descending order of their values, into args.basis.
__device__ __forceinline__ void rayleigh_ritz(const SubspaceArgs& args, const Layout& w, int64_t matrix, int tiles,
                                              double trace, const double* b, double* spare, double* t, Shared& shared) {
  const int n = args.columns, ld = n + 4, thread = static_cast<int>(threadIdx.x);
  const double inverse = trace > 0 ? 1 / trace : 0.0;
  if (args.fast && tiles <= kMostTiles) {
    with_tiles(tiles, [&](auto most) {
      systolic_jacobi<decltype(most)::value>(t, w.ldt, inverse, n, kSweepsFast, kToleranceFast, spare, ld,
                                             shared.values);
    });
  } else {
    for (int i = thread; i < n * n; i += kThreads) {
      const int r = i / n, c = i - r * n;
      spare[r * ld + c] = r == c ? 1.0 : 0.0;
      if (c > r) continue;
      t[r * w.ldt + c] = t[c * w.ldt + r] = t[r * w.ldt + c] * inverse;
    }
    jacobi(t, w.ldt, spare, ld, n, args.fast ? double{kToleranceFast} : kTolerance,
           args.fast ? 2 * kSweepsFast : kSweeps, shared.rotations, &shared.turned);
    __syncthreads();
    for (int i = thread; i < n; i += kThreads) shared.values[i] = t[i * (w.ldt + 1)];
  }
  __syncthreads();
  for (int i = thread; i < n; i += kThreads) {
    const int place = place_of(shared.values, n, i);
    shared.place[i] = place;
    args.values[matrix * n + place] = fmax(shared.values[i], 0.0) * trace;
  }
  __syncthreads();
  double* const basis = args.basis + matrix * n * args.dim;
  double* const copy = args.state != nullptr ? args.state + matrix * n * args.dim : basis;
  rotate(spare, ld, b, w.stride, tiles, w.width, shared.place, basis, copy, args.dim);
}

template <bool kInShared>
__global__ __launch_bounds__(kThreads, 1) void subspace_kernel(const __grid_constant__ SubspaceArgs args) {
  extern __shared__ __align__(16) double dynamic[];  // read in vectors
  __shared__ Shared shared;
  const Layout w(args.dim, args.columns);
  const int64_t matrix = blockIdx.x;
  double* memory;
  if constexpr (kInShared) {
    memory = dynamic;
  } else {
    memory = args.scratch + matrix * static_cast<int64_t>(w.doubles());
  }
  double *b = memory, *y = memory + w.set, *t = y + w.set;
  const double* gram = args.gram + matrix * args.ld * args.ld;
  double* basis = args.basis + matrix * args.columns * args.dim;
  double* state = args.state != nullptr ? args.state + matrix * args.columns * args.dim : basis;
  const int thread = static_cast<int>(threadIdx.x), columns = args.columns, tiles = columns / 8;

  const int32_t had_vectors = args.warm != nullptr ? args.warm[matrix] : 0;
  double trace = 0;
  for (int i = thread % 32; i < args.dim; i += 32) trace += gram[static_cast<int64_t>(i) * (args.ld + 1)];
  const bool warm = had_vectors != 0, in_pairs = args.dim % 2 == 0;
  if (kInShared && warm && in_pairs) {
    const int half = args.dim / 2, rest = w.width - args.dim;
    for (int i = thread; i < columns * half; i += kThreads) {
      const int r = i / half, c = i - r * half;
      cp_async16(shared_address(b + r * w.stride + 2 * c), state + 2 * i);
    }
    cp_async_commit();
    for (int i = thread; i < columns * rest; i += kThreads) b[i / rest * w.stride + args.dim + i % rest] = 0;
  } else {
    for (int r = thread / 32; r < columns; r += kWarps) {
#pragma unroll 4
      for (int c = thread % 32; c < w.width; c += 32) {
        const int entry = r * args.dim + c;
        double x = 0;
        if (c < args.dim)
          x = warm ? state[entry]
                   : sketch_entry(args.seed, static_cast<uint64_t>(matrix), static_cast<uint64_t>(entry));
        b[r * w.stride + c] = x;
      }
    }
  }
  trace = warp_sum(trace);
  cp_async_wait<0>();
  __syncthreads();
  if (thread == 0 && args.trace != nullptr) args.trace[matrix] = trace;
  if (thread == 0 && args.warm != nullptr) args.warm[matrix] = isfinite(trace);
  if (!isfinite(trace)) {
    for (int i = thread; i < columns * args.dim; i += kThreads) basis[i] = state[i] = nan("");
    for (int i = thread; i < columns; i += kThreads) args.values[matrix * columns + i] = nan("");
    return;
  }
  const int sweeps = warm ? args.warm_sweeps : args.cold_sweeps;
  for (int sweep = 0; sweep < sweeps; ++sweep) {
    multiply(gram, args.ld, b, y, w.stride, tiles);
    __syncthreads();
    orthonormalize(args, w, matrix, tiles, y, t, shared, sweep + 1 < sweeps);
    double* const swap = b;
    b = y;
    y = swap;
  }
  if (args.fast && warm && !args.rotate_warm) {
    for (int i = thread; i < columns; i += kThreads) {
      const int place = place_of(shared.values, columns, i);
      shared.place[i] = place;
      args.values[matrix * columns + place] = shared.values[i];
    }
    __syncthreads();
    if (in_pairs) {
      const int half = args.dim / 2;
      for (int i = thread; i < columns * half; i += kThreads) {
        const int r = i / half, c = i - r * half, entry = shared.place[r] * args.dim + 2 * c;
        const double2 pair = *reinterpret_cast<const double2*>(b + r * w.stride + 2 * c);
        *reinterpret_cast<double2*>(basis + entry) = *reinterpret_cast<double2*>(state + entry) = pair;
      }
    } else {
      for (int i = thread; i < columns * args.dim; i += kThreads) {
        const int r = i / args.dim, c = i - r * args.dim, entry = shared.place[r] * args.dim + c;
        basis[entry] = state[entry] = b[r * w.stride + c];
      }
    }
    return;
  }
  multiply(gram, args.ld, b, y, w.stride, tiles);
  __syncthreads();
  products(b, y, w.stride, w.width, tiles, t, w.ldt, nullptr);
  __syncthreads();
  rayleigh_ritz(args, w, matrix, tiles, trace, b, y, t, shared);
}

size_t shared_limit() {
  int device = 0, limit = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  return static_cast<size_t>(limit);
}

size_t bytes_of(int64_t dim, int64_t columns) {
  return Layout(static_cast<int>(dim), static_cast<int>(columns)).doubles() * sizeof(double);
}

}  // namespace

size_t subspace_scratch_bytes(int64_t batch, int64_t dim, int64_t columns) {
  const size_t bytes = bytes_of(dim, columns);
  return bytes + kStaticShared <= shared_limit() ? 0 : bytes * static_cast<size_t>(batch);
}

void subspace_iteration(const SubspaceArgs& args, cudaStream_t stream) {
  const size_t bytes = bytes_of(args.dim, args.columns), limit = shared_limit();
  const auto grid = dim3(static_cast<unsigned>(args.batch));
  if (bytes + kStaticShared > limit) {
    check(launch_grid(subspace_kernel<false>, grid, kThreads, 0, stream, args), "subspace_iteration");
    return;
  }
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(&subspace_kernel<true>),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(limit - kStaticShared)),
        "subspace_iteration");
  check(launch_grid(subspace_kernel<true>, grid, kThreads, bytes, stream, args), "subspace_iteration");
}

}  // namespace adaattn::cuda
