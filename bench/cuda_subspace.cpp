// The subspace iteration of adaptive calls, below the C API: one launch for the Gram matrices of all heads. Warm calls
// alternate between two sets of matrices that differ a little.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <exception>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_call.h"
#include "harness.h"
#include "lowrank/subspace.h"
#include "reference/linalg.h"

namespace adaattn::bench {
namespace {

using cuda::SubspaceArgs;
using reference::Matrix;

constexpr int64_t kHeads = 64, kDistinct = 4, kOversampling = 8;
constexpr double kRatio = 0.95;  // of one singular value to the one before
constexpr double kChange = 0.03;

enum class Start { kCold, kColdExact, kWarmSorted, kWarmRotated };

const char* name_of(Start start) {
  switch (start) {
    case Start::kCold:
      return "subspace-cold";
    case Start::kColdExact:
      return "subspace-cold-f64";
    case Start::kWarmSorted:
      return "subspace-warm-sorted";
    default:
      return "subspace-warm-rotated";
  }
}

// x diag(energies) x^T after the columns of x were made orthonormal.
Matrix gram_from(const Matrix& columns, const std::vector<double>& energies) {
  const Matrix x = reference::orthonormal_columns(columns);
  const int64_t n = x.rows;
  Matrix scaled = x;
  for (int64_t r = 0; r < n; ++r)
    for (int64_t j = 0; j < n; ++j) scaled(r, j) *= energies[static_cast<size_t>(j)];
  return reference::multiply(scaled, reference::transpose(x));
}

class Grams {
 public:
  explicit Grams(int64_t dim) : ld_(cuda::subspace_ld(dim)) {
    for (int64_t i = 0; i < dim; ++i) energies.push_back(std::pow(kRatio, 2.0 * static_cast<double>(i)));
    std::mt19937_64 engine(7);
    std::normal_distribution<double> normal;
    for (int64_t m = 0; m < kDistinct; ++m) {
      Matrix x(dim, dim);
      for (auto& set : host) {
        for (double& e : x.data) e = &set == &host[0] ? normal(engine) : e + kChange * normal(engine);
        set.push_back(gram_from(x, energies));
      }
    }
    for (size_t s = 0; s < 2; ++s) {
      std::vector<double> padded(static_cast<size_t>(ld_ * ld_));
      device[s] = std::make_unique<CudaBuffer>(static_cast<size_t>(kHeads * ld_ * ld_) * 8);
      for (int64_t i = 0; i < kHeads; ++i) {
        for (int64_t r = 0; r < dim; ++r)
          for (int64_t c = 0; c < dim; ++c)
            padded[static_cast<size_t>(r * ld_ + c)] = host[s][static_cast<size_t>(i % kDistinct)](r, c);
        check(cudaMemcpy(static_cast<double*>(device[s]->data()) + i * ld_ * ld_, padded.data(), padded.size() * 8,
                         cudaMemcpyHostToDevice));
      }
    }
  }

  std::vector<Matrix> host[2];
  std::unique_ptr<CudaBuffer> device[2];  // [heads, ld, ld]
  std::vector<double> energies;

 private:
  int64_t ld_;
};

// Energy of the first matrix that its first `rank` vectors leave, relatively above the least possible.
double excess(const Grams& grams, size_t set, const CudaBuffer& basis, int64_t dim, int64_t rank) {
  std::vector<double> host(static_cast<size_t>(rank * dim));
  check(cudaMemcpy(host.data(), basis.data(), host.size() * 8, cudaMemcpyDeviceToHost));
  const Matrix& gram = grams.host[set][0];
  double left = 0, best = 0;
  for (int64_t i = 0; i < dim; ++i) left += gram(i, i);
  for (int64_t j = 0; j < rank; ++j)
    for (int64_t r = 0; r < dim; ++r)
      for (int64_t c = 0; c < dim; ++c)
        left -= host[static_cast<size_t>(j * dim + r)] * gram(r, c) * host[static_cast<size_t>(j * dim + c)];
  for (int64_t j = rank; j < dim; ++j) best += grams.energies[static_cast<size_t>(j)];
  return left / best - 1;
}

void run(Report& report, const Grams& grams, Start start, int64_t dim, int64_t rank) {
  Row row;
  row.name = std::string(name_of(start)) + "/d" + std::to_string(dim) + "/b" + std::to_string(kHeads) + "/r" +
             std::to_string(rank);
  if (!report.wants(row.name)) return;
  const int64_t columns = cuda::subspace_columns(rank, kOversampling);
  const CudaBuffer basis(static_cast<size_t>(kHeads * columns * dim) * 8), state(basis.bytes());
  const CudaBuffer values(static_cast<size_t>(kHeads * columns) * 8), trace(static_cast<size_t>(kHeads) * 8);
  const CudaBuffer warm(static_cast<size_t>(kHeads) * 4);
  const CudaBuffer scratch(cuda::subspace_scratch_bytes(kHeads, dim, columns));
  SubspaceArgs args;
  args.batch = kHeads;
  args.dim = static_cast<int32_t>(dim);
  args.ld = static_cast<int32_t>(cuda::subspace_ld(dim));
  args.columns = static_cast<int32_t>(columns);
  args.basis = static_cast<double*>(basis.data());
  args.state = static_cast<double*>(state.data());
  args.values = static_cast<double*>(values.data());
  args.trace = static_cast<double*>(trace.data());
  args.scratch = static_cast<double*>(scratch.data());
  args.fast = start != Start::kColdExact;
  args.rotate_warm = start == Start::kWarmRotated;
  args.seed = 3;
  if (start == Start::kWarmSorted || start == Start::kWarmRotated) args.warm = static_cast<int32_t*>(warm.data());
  size_t calls = 0;
  row.time = measure_on_device(
      [&](cudaStream_t stream) {
        args.gram = static_cast<const double*>(grams.device[calls++ % 2]->data());
        cuda::subspace_iteration(args, stream);
      },
      false);
  row.error = excess(grams, (calls - 1) % 2, basis, dim, rank);
  row.unit = "head/us";
  row.rate = static_cast<double>(kHeads) / row.time.us;
  report.add(row);
}

void run_all(Report& report) {
  const CudaContext context(report);
  for (const int64_t dim : {64, 128, 256}) {
    const Grams grams(dim);
    for (const int64_t rank : {32, 64, 96}) {
      if (!cuda::subspace_pays(dim, cuda::subspace_columns(rank, kOversampling))) continue;
      for (const Start start : {Start::kWarmSorted, Start::kWarmRotated, Start::kCold, Start::kColdExact})
        run(report, grams, start, dim, rank);
    }
  }
}

}  // namespace
}  // namespace adaattn::bench

// [JSON file to write [only rows whose name contains one of these...]]
int main(int argc, char** argv) {
  try {
    adaattn::bench::Report report(std::vector<std::string>(argv + std::min(argc, 2), argv + argc));
    adaattn::bench::run_all(report);
    if (argc > 1) report.write(argv[1]);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
