#include "cpu_fallback/tools/subspace.h"

#include <cmath>

#include "cpu_fallback/tools/tool_fixture.h"

namespace adaattn::cpu::test {
namespace {

struct Subspace {
  std::vector<double> basis, values;
  SubspaceResult result;
  Matrix columns(int64_t rank, int64_t dim) const {
    Matrix q(dim, rank);
    for (int64_t i = 0; i < dim; ++i)
      for (int64_t j = 0; j < rank; ++j) q(i, j) = basis[static_cast<size_t>(j * dim + i)];
    return q;
  }
};

Subspace iterate(Runner& runner, const SubspaceParams& params, const Matrix& gram) {
  Subspace s;
  s.basis.assign(static_cast<size_t>(params.columns() * params.dim), std::nan(""));
  s.values.assign(static_cast<size_t>(params.columns()), std::nan(""));
  const Exec exec = runner.exec();
  s.result = subspace_iteration(exec, params, gram.data.data(), s.basis.data(), s.values.data(),
                                runner.workspace(subspace_iteration_workspace(params, exec.lanes)));
  runner.check_workspace();
  return s;
}

Matrix gram_of(const Matrix& a) { return reference::multiply(reference::transpose(a), a); }

std::vector<double> decaying(int64_t n, double ratio) {
  std::vector<double> sigma(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) sigma[static_cast<size_t>(i)] = std::pow(ratio, static_cast<double>(i));
  return sigma;
}

double energy_after(const std::vector<double>& sigma, int64_t rank) {
  double energy = 0;
  for (size_t i = static_cast<size_t>(rank); i < sigma.size(); ++i) energy += sigma[i] * sigma[i];
  return energy;
}

TEST(CpuSubspaceIteration, ColdStartFindsTheLeadingEnergy) {
  Random random(adaattn::test::run_seed());
  for (int64_t dim : {5, 32, 64, 128, 256})
    for (int64_t rank : {int64_t{1}, dim / 4 + 1, dim / 2, dim}) {
      SCOPED_TRACE(testing::Message() << dim << " rank " << rank);
      const std::vector<double> sigma = decaying(dim, 0.93);
      const Matrix gram = gram_of(with_spectrum(random, dim + 3, dim, sigma));
      SubspaceParams params;
      params.dim = dim;
      params.rank = rank;
      Runner runner;
      const Subspace s = iterate(runner, params, gram);
      EXPECT_LT(reference::orthogonality_error(s.columns(params.columns(), dim)), 1e-12);
      EXPECT_LE(s.result.residual_energy, 1.03 * energy_after(sigma, rank) + 1e-12);
      EXPECT_GE(s.result.residual_energy, energy_after(sigma, rank) - 1e-12);
      for (size_t i = 1; i < s.values.size(); ++i) EXPECT_LE(s.values[i], s.values[i - 1]);
    }
}

TEST(CpuSubspaceIteration, ResidualEnergyIsWhatTheBasisLeaves) {
  Random random(adaattn::test::run_seed());
  const Matrix a = random_matrix(random, 200, 64);
  SubspaceParams params;
  params.dim = 64;
  params.rank = 20;
  Runner runner;
  const Subspace s = iterate(runner, params, gram_of(a));
  const Matrix q = s.columns(20, 64);
  const Matrix y = reference::multiply(a, q);
  const double left = std::pow(reference::frobenius_norm(a), 2) - std::pow(reference::frobenius_norm(y), 2);
  EXPECT_NEAR(s.result.residual_energy, left, 1e-9 * left);
}

TEST(CpuSubspaceIteration, WarmBasisNeedsOneSweepAndStaysOrdered) {
  Random random(adaattn::test::run_seed());
  const std::vector<double> sigma = decaying(128, 0.93);
  const Matrix a = with_spectrum(random, 300, 128, sigma);
  SubspaceParams params;
  params.dim = 128;
  params.rank = 48;
  Runner runner;
  params.sweeps = 6;
  const Subspace before = iterate(runner, params, gram_of(a));
  Matrix drifted = a;
  for (double& x : drifted.data) x += 1e-4 * random.normal();
  const double best = reference::optimal_residual(reference::svd(drifted).sigma, 48);
  params.sweeps = 1;
  params.warm = before.basis.data();
  params.rayleigh_ritz = false;
  const Subspace warm = iterate(runner, params, gram_of(drifted));
  EXPECT_LE(warm.result.residual_energy, 1.02 * best * best);
  for (int64_t i = 1; i < 48; ++i)
    EXPECT_LE(warm.values[static_cast<size_t>(i)], 1.02 * warm.values[static_cast<size_t>(i - 1)]);
  params.warm = nullptr;
  EXPECT_GT(iterate(runner, params, gram_of(drifted)).result.residual_energy, warm.result.residual_energy);
}

TEST(CpuSubspaceIteration, ZeroAndRankDeficientMatricesKeepAnOrthonormalBasis) {
  Random random(adaattn::test::run_seed());
  SubspaceParams params;
  params.dim = 40;
  params.rank = 10;
  Runner runner;
  const Subspace zero = iterate(runner, params, Matrix(40, 40));
  EXPECT_LT(reference::orthogonality_error(zero.columns(18, 40)), 1e-12);
  EXPECT_EQ(zero.result.residual_energy, 0);
  const Subspace three = iterate(runner, params, gram_of(with_spectrum(random, 50, 40, {3, 2, 1})));
  EXPECT_LT(reference::orthogonality_error(three.columns(18, 40)), 1e-12);
  EXPECT_LT(three.result.residual_energy, 1e-12);
  EXPECT_NEAR(three.values[2], 1, 1e-12);
}

TEST(CpuSubspaceIteration, ThreadsDoNotChangeABitAndSeedsAgree) {
  Random random(adaattn::test::run_seed());
  const Matrix gram = gram_of(with_spectrum(random, 300, 256, decaying(256, 0.95)));
  SubspaceParams params;
  params.dim = 256;
  params.rank = 64;
  Runner one(1), five(5);
  EXPECT_EQ(iterate(one, params, gram).basis, iterate(five, params, gram).basis);
  const double first = iterate(one, params, gram).result.residual_energy;
  params.seed = 99;
  EXPECT_NEAR(iterate(one, params, gram).result.residual_energy / first, 1, 0.02);
}

TEST(CpuSubspaceIteration, NotFiniteMatrixIsReported) {
  Matrix gram(30, 30);
  for (int64_t i = 0; i < 30; ++i) gram(i, i) = 1;
  gram(3, 4) = gram(4, 3) = std::nan("");
  SubspaceParams params;
  params.dim = 30;
  params.rank = 4;
  Runner runner;
  const Subspace s = iterate(runner, params, gram);
  EXPECT_FALSE(s.result.finite);
  for (double x : s.basis) EXPECT_TRUE(std::isnan(x));
}

}  // namespace
}  // namespace adaattn::cpu::test
