#include <cmath>

#include "cpu_fallback/tools/tool_fixture.h"

namespace adaattn::cpu::test {
namespace {

struct Decomposition {
  Batch u, s, v;
};

struct Options {
  int64_t rank = 1, oversampling = 8, power_iterations = 2;
  uint64_t seed = 1;
  Order out = Order::kRowMajor;
};

Decomposition decompose(Runner& runner, const Batch& a, const Options& options) {
  const MatrixBatch& shape = a.view();
  Decomposition d{Batch(shape.batch0, shape.batch1, shape.rows, options.rank, options.out),
                  Batch(shape.batch0, shape.batch1, options.rank, 1),
                  Batch(shape.batch0, shape.batch1, shape.cols, options.rank, options.out)};
  LowRankParams params;
  params.a = a.view();
  params.u = d.u.view();
  params.s = d.s.view();
  params.v = d.v.view();
  params.rank = options.rank;
  params.oversampling = options.oversampling;
  params.power_iterations = options.power_iterations;
  params.seed = options.seed;
  low_rank(runner.context(), params, runner.workspace(low_rank_workspace(runner.context(), params)));
  runner.check_workspace();
  return d;
}

// Orthonormal factors, descending values that are not negative, and a residual within `factor` of the best possible.
void expect_within(const Matrix& a, const Decomposition& d, double bound, int64_t index = 0) {
  const Matrix u = d.u.get(index), v = d.v.get(index);
  const std::vector<double> s = d.s.get(index).data;
  EXPECT_LT(reference::orthogonality_error(u), 2e-6);
  EXPECT_LT(reference::orthogonality_error(v), 2e-6);
  EXPECT_GE(s.back(), 0);
  for (size_t i = 1; i < s.size(); ++i) EXPECT_LE(s[i], s[i - 1]);
  EXPECT_LE(reference::reconstruction_error(a, u, s, v),
            bound + 1e-5 * std::max(1.0, reference::frobenius_norm(a) / 50));
}

void expect_good(const Matrix& a, const Decomposition& d, double factor, int64_t index = 0) {
  const double best = reference::optimal_residual(reference::svd(a).sigma, d.s.view().rows);
  expect_within(a, d, factor * best, index);
}

TEST(CpuLowRank, TenByFiveOfRankTwoIsReconstructed) {
  Random random(adaattn::test::run_seed());
  const Batch a(rounded(with_spectrum(random, 10, 5, {3, 1})));
  Runner runner;
  const Decomposition d = decompose(runner, a, {.rank = 2});
  expect_good(a.get(), d, 1.01);
  EXPECT_NEAR(d.s.get()(0, 0), 3, 1e-6);
  EXPECT_NEAR(d.s.get()(1, 0), 1, 1e-6);
}

TEST(CpuLowRank, BatchOfEightBySixAtRankThreeIsOptimal) {
  Random random(adaattn::test::run_seed());
  Batch a(4, 1, 8, 6);
  for (int64_t i = 0; i < 4; ++i) a.set(i, random_matrix(random, 8, 6));
  Runner runner;
  const Decomposition d = decompose(runner, a, {.rank = 3});
  for (int64_t i = 0; i < 4; ++i) expect_good(a.get(i), d, 1.01, i);
}

struct ShapeCase {
  int64_t rows, cols, rank;
};

TEST(CpuLowRank, EveryShapeIsWithinOnePercentOfTheOptimum) {
  const ShapeCase cases[] = {{1, 1, 1},     {1, 7, 1},      {7, 1, 1},    {5, 5, 5},      {40, 40, 10},  {300, 64, 16},
                             {64, 300, 16}, {128, 128, 96}, {700, 33, 4}, {400, 300, 12}, {300, 400, 12}};
  for (const ShapeCase& c : cases) {
    SCOPED_TRACE(testing::Message() << c.rows << " x " << c.cols << " rank " << c.rank);
    Random random(adaattn::test::run_seed());
    std::vector<double> sigma(static_cast<size_t>(std::min(c.rows, c.cols)));
    for (size_t i = 0; i < sigma.size(); ++i) sigma[i] = 10 * std::pow(0.9, static_cast<double>(i));
    const Batch a(rounded(with_spectrum(random, c.rows, c.cols, sigma)));
    Runner runner;
    expect_good(a.get(), decompose(runner, a, {.rank = c.rank}), 1.01);
  }
}

// The hardest spectrum for power iterations: two of them leave a few per cent, at most.
TEST(CpuLowRank, NormalMatrixWithoutDecayIsNearTheOptimum) {
  Random random(adaattn::test::run_seed());
  for (const ShapeCase& c : {ShapeCase{200, 120, 20}, ShapeCase{330, 270, 40}}) {
    const Batch a(random_matrix(random, c.rows, c.cols));
    Runner runner;
    expect_good(a.get(), decompose(runner, a, {.rank = c.rank}), 1.03);
  }
}

TEST(CpuLowRank, EveryInstructionSetFindsTheSameValues) {
  Random random(adaattn::test::run_seed());
  for (const ShapeCase& c : {ShapeCase{150, 70, 9}, ShapeCase{280, 290, 9}}) {
    std::vector<double> sigma(70);
    for (size_t i = 0; i < sigma.size(); ++i) sigma[i] = std::pow(0.7, static_cast<double>(i));
    const Batch a(rounded(with_spectrum(random, c.rows, c.cols, sigma)));
    for (adaattn_isa_t isa : isas()) {
      SCOPED_TRACE(isa);
      Runner runner(2, isa);
      const Decomposition d = decompose(runner, a, {.rank = c.rank});
      expect_within(a.get(), d, 1.01 * reference::optimal_residual(sigma, c.rank));
      for (int64_t i = 0; i < c.rank; ++i) EXPECT_NEAR(d.s.get()(i, 0), sigma[static_cast<size_t>(i)], 1e-6);
    }
  }
}

TEST(CpuLowRank, RankAboveTheNumericalRankStillGivesOrthonormalVectors) {
  Random random(adaattn::test::run_seed());
  for (const ShapeCase& c : {ShapeCase{30, 20, 12}, ShapeCase{20, 30, 20}, ShapeCase{300, 280, 24}}) {
    SCOPED_TRACE(c.rank);
    const Batch a(rounded(with_spectrum(random, c.rows, c.cols, {5, 2, 1})));
    Runner runner;
    const Decomposition d = decompose(runner, a, {.rank = c.rank});
    expect_good(a.get(), d, 1.01);
    for (int64_t i = 3; i < c.rank; ++i) EXPECT_LT(d.s.get()(i, 0), 1e-5);
  }
}

TEST(CpuLowRank, IntegerMatrixOfRankOneHasExactZeros) {
  Matrix m(12, 9);
  for (int64_t i = 0; i < 12; ++i)
    for (int64_t j = 0; j < 9; ++j) m(i, j) = static_cast<double>((i + 1) * (j - 4));
  const Batch a(m);
  Runner runner;
  const Decomposition d = decompose(runner, a, {.rank = 9});
  expect_good(m, d, 1.01);
  for (int64_t i = 1; i < 9; ++i) EXPECT_LT(d.s.get()(i, 0), 1e-9);
}

TEST(CpuLowRank, ZeroMatrixHasZeroValuesAndOrthonormalVectors) {
  for (const ShapeCase& c : {ShapeCase{9, 6, 4}, ShapeCase{290, 270, 10}}) {
    const Batch a(Matrix(c.rows, c.cols));
    Runner runner;
    const Decomposition d = decompose(runner, a, {.rank = c.rank});
    EXPECT_LT(reference::orthogonality_error(d.u.get()), 2e-6);
    EXPECT_LT(reference::orthogonality_error(d.v.get()), 2e-6);
    for (double s : d.s.get().data) EXPECT_EQ(s, 0);
  }
}

TEST(CpuLowRank, DifferenceOfTwoCoordinatesIsFoundFromEverySeed) {
  Matrix m(40, 30);
  m(3, 1) = 1;
  m(3, 2) = -1;
  const Batch a(m);
  Runner runner;
  for (uint64_t seed = 0; seed < 50; ++seed) {
    const Decomposition d = decompose(runner, a, {.rank = 1, .oversampling = 0, .power_iterations = 0, .seed = seed});
    EXPECT_NEAR(d.s.get()(0, 0), std::sqrt(2), 1e-6);
  }
}

TEST(CpuLowRank, StridedMatricesGiveTheBitsOfContiguousOnes) {
  Random random(adaattn::test::run_seed());
  for (const ShapeCase& c : {ShapeCase{50, 40, 6}, ShapeCase{280, 270, 6}}) {
    const Matrix m = random_matrix(random, c.rows, c.cols);
    Runner runner;
    const Decomposition expected = decompose(runner, Batch(m), {.rank = c.rank});
    for (Order order : {Order::kColMajor, Order::kPadded, Order::kScattered}) {
      const Decomposition d = decompose(runner, Batch(m, order), {.rank = c.rank, .out = order});
      EXPECT_EQ(d.u.get().data, expected.u.get().data);
      EXPECT_EQ(d.s.get().data, expected.s.get().data);
      EXPECT_EQ(d.v.get().data, expected.v.get().data);
    }
  }
}

TEST(CpuLowRank, BatchInTwoDimensionsMatchesItsShape) {
  Random random(adaattn::test::run_seed());
  Batch a(2, 3, 20, 14);
  for (int64_t i = 0; i < 6; ++i) a.set(i, random_matrix(random, 20, 14));
  Runner runner;
  const Decomposition d = decompose(runner, a, {.rank = 14});
  for (int64_t i = 0; i < 6; ++i) expect_good(a.get(i), d, 1.01, i);
}

TEST(CpuLowRank, ThreadsAndRepetitionDoNotChangeABit) {
  Random random(adaattn::test::run_seed());
  std::vector<Batch> inputs;
  inputs.emplace_back(random_matrix(random, 5000, 40));  // a split inner dimension
  inputs.emplace_back(random_matrix(random, 300, 600));
  inputs.emplace_back(3, 1, 290, 280);
  for (int64_t i = 0; i < 3; ++i) inputs.back().set(i, random_matrix(random, 290, 280));
  for (const Batch& a : inputs) {
    Runner one(1);
    const Decomposition expected = decompose(one, a, {.rank = 7, .seed = 5});
    for (int32_t threads : {1, 2, 5}) {
      Runner runner(threads);
      const Decomposition d = decompose(runner, a, {.rank = 7, .seed = 5});
      for (int64_t i = 0; i < a.view().batch(); ++i) {
        EXPECT_EQ(d.u.get(i).data, expected.u.get(i).data) << threads << " threads";
        EXPECT_EQ(d.s.get(i).data, expected.s.get(i).data) << threads << " threads";
        EXPECT_EQ(d.v.get(i).data, expected.v.get(i).data) << threads << " threads";
      }
    }
  }
}

TEST(CpuLowRank, PowerIterationsImproveAFlatSpectrum) {
  Random random(adaattn::test::run_seed());
  const Batch a(random_matrix(random, 320, 290));
  Runner runner;
  double previous = 1e30;
  for (int64_t iterations : {0, 1, 4}) {
    const Decomposition d = decompose(runner, a, {.rank = 10, .oversampling = 2, .power_iterations = iterations});
    const double error = reference::reconstruction_error(a.get(), d.u.get(), d.s.get().data, d.v.get());
    EXPECT_LT(error, previous);
    previous = error;
  }
}

TEST(CpuLowRank, HugeAndTinyScalesKeepTheirRelativeAccuracy) {
  Random random(adaattn::test::run_seed());
  for (double scale : {1e-30, 1e30})
    for (const ShapeCase& c : {ShapeCase{40, 30, 3}, ShapeCase{300, 270, 3}}) {
      const Batch a(with_spectrum(random, c.rows, c.cols, {4 * scale, 2 * scale, scale}));
      Runner runner;
      const Decomposition d = decompose(runner, a, {.rank = 3});
      EXPECT_NEAR(d.s.get()(0, 0) / scale, 4, 1e-5);
      EXPECT_NEAR(d.s.get()(2, 0) / scale, 1, 1e-5);
      EXPECT_LT(reference::orthogonality_error(d.u.get()), 2e-6);
      EXPECT_LT(reference::orthogonality_error(d.v.get()), 2e-6);
    }
}

TEST(CpuLowRank, NotANumberSpreadsToEveryOutputOfItsMatrixOnly) {
  Random random(adaattn::test::run_seed());
  for (const ShapeCase& c : {ShapeCase{20, 12, 3}, ShapeCase{290, 280, 3}}) {
    Batch a(2, 1, c.rows, c.cols);
    a.set(0, random_matrix(random, c.rows, c.cols));
    Matrix bad = random_matrix(random, c.rows, c.cols);
    bad(4, 5) = std::nan("");
    a.set(1, bad);
    Runner runner;
    const Decomposition d = decompose(runner, a, {.rank = c.rank});
    expect_good(a.get(0), d, 1.02);
    for (double x : d.u.get(1).data) EXPECT_TRUE(std::isnan(x));
    for (double x : d.s.get(1).data) EXPECT_TRUE(std::isnan(x));
    for (double x : d.v.get(1).data) EXPECT_TRUE(std::isnan(x));
  }
}

}  // namespace
}  // namespace adaattn::cpu::test
