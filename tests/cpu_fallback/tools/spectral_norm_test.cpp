#include <cmath>

#include "cpu_fallback/tools/tool_fixture.h"

namespace adaattn::cpu::test {
namespace {

std::vector<double> norms_of(Runner& runner, const Batch& a, double tolerance = 0, int64_t max_iterations = 0,
                             uint64_t seed = 3) {
  const MatrixBatch& shape = a.view();
  const Batch norms(shape.batch0, shape.batch1, 1, 1);
  SpectralNormParams params;
  params.a = a.view();
  params.norms = norms.view();
  params.tolerance = tolerance;
  params.max_iterations = max_iterations;
  params.seed = seed;
  spectral_norm(runner.context(), params, runner.workspace(spectral_norm_workspace(runner.context(), params)));
  runner.check_workspace();
  std::vector<double> values;
  for (int64_t i = 0; i < shape.batch(); ++i) values.push_back(norms.get(i)(0, 0));
  return values;
}

TEST(CpuSpectralNorm, DiagonalFiveThreeOneHasFive) {
  Matrix m(3, 3);
  m(0, 0) = 5;
  m(1, 1) = 3;
  m(2, 2) = 1;
  Runner runner;
  for (uint64_t seed = 0; seed < 100; ++seed) EXPECT_NEAR(norms_of(runner, Batch(m), 0, 0, seed)[0], 5, 1e-3);
}

TEST(CpuSpectralNorm, MatchesTheOracleForEveryShapeStrideAndInstructionSet) {
  const int64_t shapes[][2] = {{1, 1}, {1, 20}, {20, 1}, {30, 30}, {200, 40}, {40, 200}};
  for (const auto& shape : shapes)
    for (Order order : {Order::kRowMajor, Order::kColMajor, Order::kPadded, Order::kScattered})
      for (adaattn_isa_t isa : isas()) {
        Random random(adaattn::test::run_seed());
        const Batch a(random_matrix(random, shape[0], shape[1]), order);
        Runner runner(2, isa);
        const double sigma = reference::svd(a.get()).sigma[0];
        EXPECT_NEAR(norms_of(runner, a, 1e-9, 100000)[0], sigma, 1e-4 * sigma) << shape[0] << " x " << shape[1];
      }
}

TEST(CpuSpectralNorm, IsNeverAboveTheNorm) {
  Random random(adaattn::test::run_seed());
  const Batch a(random_matrix(random, 60, 60));
  const double sigma = reference::svd(a.get()).sigma[0];
  Runner runner;
  double previous = 0;
  for (int64_t iterations : {1, 2, 5, 50}) {
    const double norm = norms_of(runner, a, 1e-12, iterations)[0];
    EXPECT_GE(norm, previous);
    EXPECT_LE(norm, sigma * (1 + 1e-6));
    previous = norm;
  }
}

TEST(CpuSpectralNorm, ZeroMatrixHasZero) {
  Runner runner;
  EXPECT_EQ(norms_of(runner, Batch(Matrix(5, 7)))[0], 0);
}

TEST(CpuSpectralNorm, ThreadsAndRepetitionDoNotChangeABit) {
  Random random(adaattn::test::run_seed());
  Batch one_matrix(random_matrix(random, 3000, 50)), batch(2, 3, 40, 30);
  for (int64_t i = 0; i < 6; ++i) batch.set(i, random_matrix(random, 40, 30));
  for (const Batch* a : {&one_matrix, &batch}) {
    Runner one(1), five(5);
    const std::vector<double> expected = norms_of(one, *a);
    EXPECT_EQ(norms_of(five, *a), expected);
    EXPECT_EQ(norms_of(five, *a), expected);
  }
}

}  // namespace
}  // namespace adaattn::cpu::test
