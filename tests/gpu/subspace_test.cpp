// The subspace iteration of kernels/lowrank from the inside: cold, warm, in shared and in global memory.
#include "lowrank/subspace.h"

#include <cuda_runtime_api.h>

#include <cmath>

#include "gpu/device.h"
#include "reference/linalg.h"
#include "support/random.h"

namespace adaattn::test {
namespace {

using cuda::SubspaceArgs;
using reference::Matrix;

class SubspaceIteration : public OnTheDevice {};

Matrix normal(Random& random, int64_t rows, int64_t cols) {
  Matrix m(rows, cols);
  for (double& x : m.data) x = random.normal();
  return m;
}

std::vector<double> decaying(int64_t n, double ratio) {
  std::vector<double> sigma(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) sigma[static_cast<size_t>(i)] = std::pow(ratio, static_cast<double>(i));
  return sigma;
}

// q diag(sigma^2) q^T for a random orthogonal q.
Matrix gram_with(const Matrix& q, const std::vector<double>& sigma) {
  Matrix scaled = q;
  for (int64_t i = 0; i < q.rows; ++i)
    for (int64_t j = 0; j < q.cols; ++j) scaled(i, j) *= sigma[static_cast<size_t>(j)] * sigma[static_cast<size_t>(j)];
  return reference::multiply(scaled, reference::transpose(q));
}

double energy_after(const std::vector<double>& sigma, int64_t rank) {
  double energy = 0;
  for (size_t i = static_cast<size_t>(rank); i < sigma.size(); ++i) energy += sigma[i] * sigma[i];
  return energy;
}

// Device arrays of one batch, in the kernel's shapes.
class Batch {
 public:
  Batch(int64_t dim, int64_t rank, const std::vector<Matrix>& grams)
      : count_(static_cast<int64_t>(grams.size())),
        dim_(dim),
        columns_(cuda::subspace_columns(rank, 8)),
        gram_(static_cast<size_t>(count_ * ld() * ld()) * 8),
        basis_(static_cast<size_t>(count_ * columns_ * dim) * 8),
        values_(static_cast<size_t>(count_ * columns_) * 8),
        trace_(static_cast<size_t>(count_) * 8),
        warm_(static_cast<size_t>(count_) * 4),
        scratch_(cuda::subspace_scratch_bytes(count_, dim, columns_)) {
    set(grams);
    require(cudaMemset(warm_.data(), 0, warm_.bytes()));
    args.batch = count_;
    args.dim = static_cast<int32_t>(dim);
    args.ld = static_cast<int32_t>(ld());
    args.columns = static_cast<int32_t>(columns_);
    args.gram = static_cast<const double*>(gram_.data());
    args.basis = static_cast<double*>(basis_.data());
    args.values = static_cast<double*>(values_.data());
    args.trace = static_cast<double*>(trace_.data());
    args.warm = static_cast<int32_t*>(warm_.data());
    args.scratch = static_cast<double*>(scratch_.data());
    args.seed = run_seed();
  }

  void set(const std::vector<Matrix>& grams) {
    std::vector<double> padded(static_cast<size_t>(count_ * ld() * ld()));
    for (int64_t i = 0; i < count_; ++i)
      for (int64_t r = 0; r < dim_; ++r)
        for (int64_t c = 0; c < dim_; ++c)
          padded[static_cast<size_t>((i * ld() + r) * ld() + c)] = grams[static_cast<size_t>(i)](r, c);
    require(cudaMemcpy(gram_.data(), padded.data(), gram_.bytes(), cudaMemcpyHostToDevice));
  }

  void run() {
    cuda::subspace_iteration(args, nullptr);
    require(cudaDeviceSynchronize());
  }

  // The first `vectors` of matrix i as columns.
  Matrix vectors(int64_t i, int64_t vectors) const {
    std::vector<double> host(basis_.bytes() / 8);
    require(cudaMemcpy(host.data(), basis_.data(), basis_.bytes(), cudaMemcpyDeviceToHost));
    Matrix m(dim_, vectors);
    for (int64_t j = 0; j < vectors; ++j)
      for (int64_t r = 0; r < dim_; ++r) m(r, j) = host[static_cast<size_t>((i * columns_ + j) * dim_ + r)];
    return m;
  }
  std::vector<double> values(int64_t i) const {
    std::vector<double> host(static_cast<size_t>(columns_));
    require(cudaMemcpy(host.data(), args.values + i * columns_, host.size() * 8, cudaMemcpyDeviceToHost));
    return host;
  }
  double trace(int64_t i) const {
    double host = 0;
    require(cudaMemcpy(&host, args.trace + i, 8, cudaMemcpyDeviceToHost));
    return host;
  }
  int64_t columns() const { return columns_; }

  SubspaceArgs args;

 private:
  int64_t ld() const { return cuda::subspace_ld(dim_); }
  int64_t count_, dim_, columns_;
  DeviceMemory gram_, basis_, values_, trace_, warm_, scratch_;
};

// Energy of the Gram matrix that the vectors leave.
double left_over(const Matrix& gram, const Matrix& q) {
  double trace = 0;
  for (int64_t i = 0; i < gram.rows; ++i) trace += gram(i, i);
  const Matrix image = reference::multiply(gram, q);
  for (int64_t i = 0; i < q.rows; ++i)
    for (int64_t j = 0; j < q.cols; ++j) trace -= image(i, j) * q(i, j);
  return trace;
}

TEST_F(SubspaceIteration, ColdStartFindsTheLeadingEnergy) {
  Random random(run_seed());
  for (const int64_t dim : {40, 72, 128, 256})
    for (const int64_t rank : {int64_t{1}, dim / 4 + 1, dim / 2}) {
      if (!cuda::subspace_pays(dim, cuda::subspace_columns(rank, 8))) continue;
      const std::vector<double> sigma = decaying(dim, 0.93);
      const Matrix q = reference::svd(normal(random, dim, dim)).u;
      const Matrix gram = gram_with(q, sigma);
      for (const bool fast : {false, true}) {
        SCOPED_TRACE(testing::Message() << dim << " rank " << rank << (fast ? " fast" : ""));
        Batch batch(dim, rank, {gram, Matrix(dim, dim), gram});
        batch.args.fast = fast;
        batch.run();
        for (const int64_t i : {0, 2}) {
          const Matrix found = batch.vectors(i, batch.columns());
          EXPECT_LT(reference::orthogonality_error(found), fast ? 1e-4 : 1e-11);
          const double best = energy_after(sigma, rank), left = left_over(gram, batch.vectors(i, rank));
          EXPECT_LE(left, 1.03 * best + (fast ? 1e-4 : 1e-9));  // of a trace of about 7
          const std::vector<double> values = batch.values(i);
          double rest = batch.trace(i);
          for (int64_t j = 0; j < rank; ++j) rest -= values[static_cast<size_t>(j)];
          EXPECT_NEAR(rest, left, fast ? 1e-4 : 1e-10);
          for (size_t j = 1; j < values.size(); ++j) EXPECT_LE(values[j], values[j - 1]);
        }
        // The zero matrix between them has a basis all the same.
        EXPECT_LT(reference::orthogonality_error(batch.vectors(1, batch.columns())), fast ? 1e-4 : 1e-11);
        EXPECT_EQ(batch.values(1)[0], 0);
      }
    }
}

TEST_F(SubspaceIteration, WarmStartFollowsAMatrixThatChangesALittle) {
  Random random(run_seed());
  const int64_t dim = 128, rank = 64;
  const std::vector<double> sigma = decaying(dim, 0.95);
  Matrix turned = normal(random, dim, dim);
  const Matrix before = gram_with(reference::svd(turned).u, sigma);
  for (double& x : turned.data) x += 0.03 * random.normal();
  const Matrix after = gram_with(reference::svd(turned).u, sigma);
  for (const bool rotate : {false, true}) {
    SCOPED_TRACE(rotate ? "rotated" : "sorted");
    Batch batch(dim, rank, {before, before});
    batch.args.fast = true;
    batch.args.rotate_warm = rotate;
    batch.run();
    const double stale = left_over(after, batch.vectors(0, rank));
    batch.set({after, before});
    batch.run();
    for (const int64_t i : {0, 1}) {
      const Matrix& gram = i == 0 ? after : before;
      EXPECT_LT(reference::orthogonality_error(batch.vectors(i, batch.columns())), 1e-4);
      const std::vector<double> values = batch.values(i);
      for (size_t j = 1; j < values.size(); ++j) EXPECT_LE(values[j], values[j - 1]);
      for (const int64_t prefix : {32, 64})
        EXPECT_LE(left_over(gram, batch.vectors(i, prefix)), 1.05 * energy_after(sigma, prefix)) << prefix;
    }
    EXPECT_LT(left_over(after, batch.vectors(0, rank)), stale);
  }
}

TEST_F(SubspaceIteration, DependentVectorsAreReplaced) {
  Random random(run_seed());
  const int64_t dim = 96, rank = 40;
  std::vector<double> sigma(static_cast<size_t>(dim));
  for (size_t i = 0; i < 5; ++i) sigma[i] = 1.0 / static_cast<double>(i + 1);
  const Matrix gram = gram_with(reference::svd(normal(random, dim, dim)).u, sigma);
  Batch batch(dim, rank, {gram});
  batch.run();
  EXPECT_LT(reference::orthogonality_error(batch.vectors(0, batch.columns())), 1e-11);
  for (size_t i = 0; i < 5; ++i) EXPECT_NEAR(batch.values(0)[i], sigma[i] * sigma[i], 1e-12);
  EXPECT_LT(batch.values(0)[5], 1e-12);
}

TEST_F(SubspaceIteration, NotANumberStaysWithItsMatrix) {
  Random random(run_seed());
  const int64_t dim = 64, rank = 16;
  const Matrix gram = gram_with(reference::svd(normal(random, dim, dim)).u, decaying(dim, 0.9));
  Matrix bad = gram;
  bad(7, 7) = std::nan("");
  Batch batch(dim, rank, {bad, gram});
  batch.run();
  EXPECT_TRUE(std::isnan(batch.values(0)[0]));
  EXPECT_TRUE(std::isnan(batch.vectors(0, 1)(0, 0)));
  EXPECT_LT(reference::orthogonality_error(batch.vectors(1, rank)), 1e-11);
  // The next call starts that matrix anew.
  batch.set({gram, gram});
  batch.run();
  EXPECT_LT(reference::orthogonality_error(batch.vectors(0, rank)), 1e-11);
}

}  // namespace
}  // namespace adaattn::test
