#include <cmath>

#include "cpu_fallback/tools/tool_fixture.h"

namespace adaattn::cpu::test {
namespace {

struct Ranks {
  std::vector<int32_t> ranks;
  Batch values;
};

Ranks ranks_of(Runner& runner, const Batch& a, double threshold) {
  const MatrixBatch& shape = a.view();
  Ranks r{std::vector<int32_t>(static_cast<size_t>(shape.batch()), -1),
          Batch(shape.batch0, shape.batch1, std::min(shape.rows, shape.cols), 1)};
  EffectiveRankParams params;
  params.a = a.view();
  params.singular_values = r.values.view();
  params.ranks.data = r.ranks.data();
  params.ranks.batch0 = shape.batch0;
  params.ranks.batch1 = shape.batch1;
  params.ranks.rows = 1;
  params.ranks.stride0 = shape.batch1;
  params.ranks.stride1 = 1;
  params.ranks.dtype = Dtype::kI32;
  params.threshold = threshold;
  effective_rank(runner.context(), params, runner.workspace(effective_rank_workspace(runner.context(), params)));
  runner.check_workspace();
  return r;
}

TEST(CpuEffectiveRank, RankTwoMatrixHasTwo) {
  Random random(adaattn::test::run_seed());
  const Batch a(rounded(with_spectrum(random, 10, 8, {2, 1})));
  Runner runner;
  EXPECT_EQ(ranks_of(runner, a, 0.99).ranks[0], 2);
}

TEST(CpuEffectiveRank, NormalTenByTenIsAboveSeven) {
  Random random(20);
  const Batch a(random_matrix(random, 10, 10));
  Runner runner;
  EXPECT_GT(ranks_of(runner, a, 0.99).ranks[0], 7);
}

TEST(CpuEffectiveRank, ThresholdOneCountsTheRankOfAnIntegerMatrix) {
  Matrix m(30, 8);
  for (int64_t i = 0; i < 30; ++i)
    for (int64_t j = 0; j < 8; ++j) m(i, j) = static_cast<double>((i + 1) * (j + 2) + (i % 5) * (j % 3));
  Runner runner;
  EXPECT_EQ(ranks_of(runner, Batch(m), 1).ranks[0], 2);
}

TEST(CpuEffectiveRank, ZeroMatrixHasNone) {
  Runner runner;
  const Ranks r = ranks_of(runner, Batch(Matrix(6, 4)), 0.5);
  EXPECT_EQ(r.ranks[0], 0);
  for (double s : r.values.get().data) EXPECT_EQ(s, 0);
}

TEST(CpuEffectiveRank, ValuesMatchTheOracleForEveryShapeAndStride) {
  const int64_t shapes[][2] = {{1, 1}, {1, 9}, {9, 1}, {6, 6}, {40, 30}, {30, 40}, {500, 20}, {20, 500}, {3000, 7}};
  for (const auto& shape : shapes)
    for (Order order : {Order::kRowMajor, Order::kColMajor, Order::kScattered})
      for (adaattn_isa_t isa : isas()) {
        SCOPED_TRACE(testing::Message() << shape[0] << " x " << shape[1] << " isa " << isa);
        Random random(adaattn::test::run_seed());
        const Batch a(random_matrix(random, shape[0], shape[1]), order);
        Runner runner(2, isa);
        const Ranks r = ranks_of(runner, a, 0.9);
        const std::vector<double> sigma = reference::svd(a.get()).sigma;
        for (size_t i = 0; i < sigma.size(); ++i) EXPECT_NEAR(r.values.get().data[i], sigma[i], 1e-7 * sigma[0]);
        EXPECT_EQ(r.ranks[0], reference::effective_rank(sigma, 0.9));
      }
}

TEST(CpuEffectiveRank, SmallValuesAreNotLostToSquaring) {
  Matrix m(64, 4);
  const double sigma[] = {1, 0x1p-20, 0x1p-30, 0x1p-40};  // 2^-40 squared is below float64 rounding of 1
  for (int64_t i = 0; i < 4; ++i) m(3 * i + 1, i) = sigma[i];
  Runner runner;
  const Ranks r = ranks_of(runner, Batch(m), 0.9);
  for (size_t i = 0; i < 4; ++i) EXPECT_NEAR(r.values.get().data[i] / sigma[i], 1, 1e-3);
}

TEST(CpuEffectiveRank, ThreadsDoNotChangeABit) {
  Random random(adaattn::test::run_seed());
  Batch a(2, 2, 90, 70);
  for (int64_t i = 0; i < 4; ++i) a.set(i, random_matrix(random, 90, 70));
  Runner one(1), five(5);
  const Ranks expected = ranks_of(one, a, 0.9), r = ranks_of(five, a, 0.9);
  for (int64_t i = 0; i < 4; ++i) EXPECT_EQ(r.values.get(i).data, expected.values.get(i).data);
  EXPECT_EQ(r.ranks, expected.ranks);
}

TEST(CpuEffectiveRank, NotANumberIsReportedAsValues) {
  Matrix m(8, 5, 1);
  m(2, 2) = std::nan("");
  Runner runner;
  const Ranks r = ranks_of(runner, Batch(m), 0.9);
  for (double s : r.values.get().data) EXPECT_TRUE(std::isnan(s));
  EXPECT_EQ(r.ranks[0], 5);
}

}  // namespace
}  // namespace adaattn::cpu::test
