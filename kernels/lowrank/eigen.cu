// Eigen-decompositions of Gram matrices by Hestenes' one-sided Jacobi: pairs of columns of G are rotated until they are
// orthogonal, G V = U diag(lambda), and for a positive semi-definite G the columns of V are eigenvectors. Pairs of a
// round are disjoint (round-robin tournament), one warp per pair.
#include <algorithm>

#include "attend/launch.h"
#include "common/warp.cuh"
#include "lowrank/eigen.h"
#include "lowrank/libraries.h"
#include "lowrank/subspace.h"
#include "runtime.h"

namespace adaattn::cuda {
namespace {

constexpr int kJacobiThreads = 1024;
constexpr int kRoundThreads = 256;
constexpr int kMaxSweeps = 40;
constexpr int kMaxLaunchedSweeps = 40;
constexpr int64_t kOneCtaDim = 256;     // up to here one CTA decomposes a matrix
constexpr int64_t kSolverBatch = 8;     // cuSOLVER takes one matrix after the other
constexpr size_t kStaticShared = 4096;  // more than the kernel declares
// Columns count as orthogonal below this cosine: float64 rounding of sums of a few hundred terms.
constexpr double kOrthogonal = 1e-14;
// Columns shorter than this share of the trace are rounding noise, which no rotation makes orthogonal.
constexpr double kNoise = 2e-16;

// One pair of a round, by one warp; false if nothing was to be done.
__device__ __forceinline__ bool rotate_pair(double* g, int64_t ld, double* v, int n, int round, int pair,
                                            double noise) {
  const int lane = threadIdx.x % 32, players = n + (n & 1), rounds = players - 1;
  // Player 0 stays, the others walk around the table.
  const int p = pair == 0 ? 0 : 1 + (pair - 1 + round) % rounds;
  const int q = 1 + (players - 2 - pair + round) % rounds;
  if (p >= n || q >= n) return false;
  double* gp = g + p * ld;
  double* gq = g + q * ld;
  double alpha = 0, beta = 0, gamma = 0;
  for (int i = lane; i < n; i += 32) {
    const double x = gp[i], y = gq[i];
    alpha = fma(x, x, alpha);
    beta = fma(y, y, beta);
    gamma = fma(x, y, gamma);
  }
  alpha = warp_sum(alpha);
  beta = warp_sum(beta);
  gamma = warp_sum(gamma);
  if (!(fabs(gamma) > kOrthogonal * sqrt(alpha) * sqrt(beta)) || fmin(alpha, beta) <= noise)
    return false;  // NaN ends the sweeps too
  const double zeta = (beta - alpha) / (2 * gamma);
  const double t = copysign(1.0, zeta) / (fabs(zeta) + sqrt(fma(zeta, zeta, 1.0)));
  const double c = rsqrt(fma(t, t, 1.0)), s = c * t;
  double* vp = v + static_cast<int64_t>(p) * n;
  double* vq = v + static_cast<int64_t>(q) * n;
  for (int i = lane; i < n; i += 32) {
    const double x = gp[i], y = gq[i], a = vp[i], b = vq[i];
    gp[i] = c * x - s * y;
    gq[i] = s * x + c * y;
    vp[i] = c * a - s * b;
    vq[i] = s * a + c * b;
  }
  return true;
}

// The largest squared length that is noise.
__device__ __forceinline__ double noise_of(const double* g, int64_t ld, int n) {
  double trace = 0;
  for (int i = 0; i < n; ++i) trace += g[i * (ld + 1)];
  return kNoise * trace * (kNoise * trace);
}

// Lengths of the rotated columns, in descending order, by one CTA. value: n doubles of shared memory.
__device__ __forceinline__ void write_values(const double* g, int64_t ld, int n, double* value, double* values,
                                             int* order) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, threads = blockDim.x;
  for (int j = warp; j < n; j += threads / 32) {
    double sum = 0;
    for (int i = lane; i < n; i += 32) sum = fma(g[j * ld + i], g[j * ld + i], sum);
    sum = warp_sum(sum);
    if (lane == 0) value[j] = sqrt(sum);
  }
  __syncthreads();
  for (int j = thread; j < n; j += threads) {
    int place = 0;
    for (int i = 0; i < n; ++i) place += value[i] > value[j] || (!(value[i] < value[j]) && i < j);
    if (!isfinite(value[j])) place = j;
    values[place] = value[j];
    order[place] = j;
  }
}

__global__ __launch_bounds__(kJacobiThreads) void jacobi_kernel(int n, int64_t ld, double* grams, double* all_vectors,
                                                                double* all_values, int* all_order, bool in_shared) {
  extern __shared__ double gram_copy[];
  __shared__ int rotated;
  __shared__ double value[kOneCtaDim];
  double* g = grams + static_cast<int64_t>(blockIdx.x) * ld * ld;
  double* v = all_vectors + static_cast<int64_t>(blockIdx.x) * n * n;
  if (in_shared) {
    for (int i = threadIdx.x; i < n * n; i += kJacobiThreads) gram_copy[i] = g[i / n * ld + i % n];
    g = gram_copy;
    ld = n;
    __syncthreads();
  }
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, warps = kJacobiThreads / 32;
  for (int i = thread; i < n * n; i += kJacobiThreads) v[i] = i / n == i % n ? 1.0 : 0.0;
  const double noise = noise_of(g, ld, n);
  const int players = n + (n & 1), rounds = players - 1;
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    __syncthreads();
    if (thread == 0) rotated = 0;
    __syncthreads();
    for (int round = 0; round < rounds; ++round) {
      for (int pair = warp; pair < players / 2; pair += warps) {
        if (rotate_pair(g, ld, v, n, round, pair, noise) && lane == 0) rotated = 1;
      }
      __syncthreads();
    }
    if (rotated == 0) break;
  }
  const int64_t first = static_cast<int64_t>(blockIdx.x) * n;
  write_values(g, ld, n, value, all_values + first, all_order + first);
}

// Matrices that one CTA would take too long for: a grid per round. turned: [kMaxLaunchedSweeps, batch], 0 before.
struct RoundArgs {
  int n;
  int64_t ld, batch;
  double *grams, *vectors, *noise, *values;
  int *order, *turned;
};

__global__ __launch_bounds__(kRoundThreads) void start_kernel(const __grid_constant__ RoundArgs args) {
  const int64_t matrix = blockIdx.x, n = args.n;
  for (int64_t i = int64_t{blockIdx.y} * kRoundThreads + threadIdx.x; i < n * n;
       i += int64_t{gridDim.y} * kRoundThreads)
    args.vectors[matrix * n * n + i] = i / n == i % n ? 1.0 : 0.0;
  if (blockIdx.y != 0 || threadIdx.x != 0) return;
  args.noise[matrix] = noise_of(args.grams + matrix * args.ld * args.ld, args.ld, args.n);
  for (int sweep = 0; sweep < kMaxLaunchedSweeps; ++sweep) args.turned[sweep * args.batch + matrix] = 0;
}

__global__ __launch_bounds__(kRoundThreads) void round_kernel(const __grid_constant__ RoundArgs args, int sweep,
                                                              int round) {
  const int64_t matrix = blockIdx.x;
  const int pair = blockIdx.y * (kRoundThreads / 32) + threadIdx.x / 32;
  if (pair >= (args.n + 1) / 2) return;
  if (sweep > 0 && args.turned[(sweep - 1) * args.batch + matrix] == 0) return;
  const bool turned = rotate_pair(args.grams + matrix * args.ld * args.ld, args.ld,
                                  args.vectors + matrix * args.n * args.n, args.n, round, pair, args.noise[matrix]);
  if (turned && threadIdx.x % 32 == 0) args.turned[sweep * args.batch + matrix] = 1;
}

__global__ __launch_bounds__(kJacobiThreads) void finish_kernel(const __grid_constant__ RoundArgs args) {
  __shared__ double value[kMaxEigenDim];
  const int64_t matrix = blockIdx.x;
  write_values(args.grams + matrix * args.ld * args.ld, args.ld, args.n, value, args.values + matrix * args.n,
               args.order + matrix * args.n);
}

// What cuSOLVER left, as the rounds of rotations leave it: a vector per row, values descending and not negative.
__global__ __launch_bounds__(kRoundThreads) void solved_kernel(const __grid_constant__ RoundArgs args,
                                                               const double* ascending, const int* info) {
  const int64_t matrix = blockIdx.x, n = args.n;
  const double* from = args.grams + matrix * args.ld * args.ld;
  const bool spoilt = info[matrix] != 0;
  for (int64_t i = int64_t{blockIdx.y} * kRoundThreads + threadIdx.x; i < n * n;
       i += int64_t{gridDim.y} * kRoundThreads)
    args.vectors[matrix * n * n + i] = spoilt ? nan("") : from[i / n * args.ld + i % n];
  if (blockIdx.y != 0) return;
  for (int64_t j = threadIdx.x; j < n; j += kRoundThreads) {
    const double value = ascending[matrix * n + n - 1 - j];
    args.values[matrix * n + j] = spoilt ? nan("") : value < 0 ? 0.0 : value;
    args.order[matrix * n + j] = static_cast<int>(n - 1 - j);
  }
}

int64_t align(int64_t bytes) { return (bytes + 255) / 256 * 256; }

bool solver_pays(int64_t n, int64_t batch, MathLibraries* libraries) {
  return n > kOneCtaDim && batch <= kSolverBatch && libraries != nullptr && libraries->has_solver();
}

bool captured(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "stream");
  return status != cudaStreamCaptureStatusNone;
}

void solve(const RoundArgs& args, void* workspace, MathLibraries& libraries, cudaStream_t stream) {
  const int64_t n = args.n;
  char* at = static_cast<char*>(workspace);
  auto* ascending = reinterpret_cast<double*>(at);
  auto* info = reinterpret_cast<int*>(at += align(n * args.batch * 8));
  at += align(args.batch * 4);
  const size_t bytes = libraries.eigen_bytes(n, args.ld);
  for (int64_t i = 0; i < args.batch; ++i)
    libraries.eigen(n, args.ld, args.grams + i * args.ld * args.ld, ascending + i * n, at, bytes, info + i, stream);
  check(launch_grid(solved_kernel, dim3(static_cast<unsigned>(args.batch), 64), kRoundThreads, 0, stream, args,
                    static_cast<const double*>(ascending), static_cast<const int*>(info)),
        "eigenvectors");
}

}  // namespace

size_t eigen_bytes(int64_t n, int64_t batch, MathLibraries* libraries) {
  int64_t bytes = align(n * n * batch * 8) + align(n * batch * 8) + align(n * batch * 4);
  if (n <= kOneCtaDim) return static_cast<size_t>(bytes);
  int64_t more = align(batch * 8) + align(kMaxLaunchedSweeps * batch * 4);
  if (solver_pays(n, batch, libraries))
    more = std::max(more, align(n * batch * 8) + align(batch * 4) +
                              align(static_cast<int64_t>(libraries->eigen_bytes(n, subspace_ld(n)))));
  return static_cast<size_t>(bytes + more);
}

Eigen eigen_of(int64_t n, int64_t batch, double* gram, void* workspace, MathLibraries* libraries, cudaStream_t stream) {
  char* at = static_cast<char*>(workspace);
  Eigen e;
  e.vectors = reinterpret_cast<double*>(at);
  e.values = reinterpret_cast<double*>(at += align(n * n * batch * 8));
  e.order = reinterpret_cast<int*>(at += align(n * batch * 8));
  if (n > kOneCtaDim) {
    RoundArgs args{static_cast<int>(n), subspace_ld(n), batch, gram, e.vectors, nullptr, e.values, e.order, nullptr};
    at += align(n * batch * 4);
    if (solver_pays(n, batch, libraries) && !captured(stream)) {
      solve(args, at, *libraries, stream);
      return e;
    }
    args.noise = reinterpret_cast<double*>(at);
    args.turned = reinterpret_cast<int*>(at + align(batch * 8));
    const auto grid = [&](int64_t y) { return dim3(static_cast<unsigned>(batch), static_cast<unsigned>(y)); };
    check(launch_grid(start_kernel, grid(64), kRoundThreads, 0, stream, args), "jacobi");
    const int64_t blocks = ((n + 1) / 2 + kRoundThreads / 32 - 1) / (kRoundThreads / 32);
    const int rounds = static_cast<int>(n + (n & 1) - 1);
    for (int sweep = 0; sweep < kMaxLaunchedSweeps; ++sweep)
      for (int round = 0; round < rounds; ++round)
        check(launch_grid(round_kernel, grid(blocks), kRoundThreads, 0, stream, args, sweep, round), "jacobi");
    check(launch_grid(finish_kernel, grid(1), kJacobiThreads, 0, stream, args), "jacobi");
    return e;
  }
  int device = 0, limit = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  const auto bytes = static_cast<size_t>(n * n) * sizeof(double);
  const bool in_shared = bytes + kStaticShared <= static_cast<size_t>(limit);
  if (in_shared)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(&jacobi_kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, limit - static_cast<int>(kStaticShared)),
          "jacobi");
  check(launch_grid(jacobi_kernel, dim3(static_cast<unsigned>(batch)), kJacobiThreads, in_shared ? bytes : 0, stream,
                    static_cast<int>(n), subspace_ld(n), gram, e.vectors, e.values, e.order, in_shared),
        "jacobi");
  return e;
}

}  // namespace adaattn::cuda
