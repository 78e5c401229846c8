#include <cmath>

#include "cpu_fallback/tools/tool_fixture.h"

namespace adaattn::cpu::test {
namespace {

struct Projection {
  Batch y, rows, total;
};

Projection project(Runner& runner, const Batch& a, const Batch& basis, const Batch* mean) {
  const MatrixBatch& shape = a.view();
  Projection p{Batch(shape.batch0, shape.batch1, shape.rows, basis.view().cols, Order::kPadded),
               Batch(shape.batch0, shape.batch1, shape.rows, 1, Order::kScattered),
               Batch(shape.batch0, shape.batch1, 1, 1)};
  ProjectParams params;
  params.a = a.view();
  params.basis = basis.view();
  if (mean != nullptr) params.mean = mean->view();
  params.y = p.y.view();
  params.row_residual = p.rows.view();
  params.residual = p.total.view();
  low_rank_project(runner.context(), params, runner.workspace(low_rank_project_workspace(runner.context(), params)));
  runner.check_workspace();
  return p;
}

struct Expected {
  Matrix y, rows;
  double total = 0;
};

Expected expect(const Matrix& a, const Matrix& basis, const Matrix* mean) {
  Matrix x = a;
  for (int64_t i = 0; i < x.rows && mean != nullptr; ++i)
    for (int64_t j = 0; j < x.cols; ++j) x(i, j) -= (*mean)(j, 0);
  Expected e{reference::multiply(x, basis), Matrix(a.rows, 1)};
  const Matrix back = reference::multiply(e.y, reference::transpose(basis));
  double lost = 0;
  for (int64_t i = 0; i < x.rows; ++i) {
    double energy = 0;
    for (int64_t j = 0; j < x.cols; ++j) energy += (x(i, j) - back(i, j)) * (x(i, j) - back(i, j));
    e.rows(i, 0) = std::sqrt(energy);
    lost += energy;
  }
  const double norm = reference::frobenius_norm(x);
  e.total = norm == 0 ? 0 : std::sqrt(lost) / norm;
  return e;
}

TEST(CpuLowRankProject, ProjectionAndResidualsMatchTheOracle) {
  const int64_t shapes[][3] = {{1, 1, 1}, {5, 3, 2}, {700, 64, 20}, {33, 5000, 3}, {40, 40, 40}};
  for (const auto& shape : shapes)
    for (bool centred : {false, true})
      for (adaattn_isa_t isa : isas()) {
        SCOPED_TRACE(testing::Message() << shape[0] << " x " << shape[1] << " rank " << shape[2]);
        Random random(adaattn::test::run_seed());
        const Batch a(random_matrix(random, shape[0], shape[1]), Order::kScattered);
        const Batch basis(random_orthonormal(random, shape[1], shape[2]), Order::kColMajor);
        const Batch mean(random_matrix(random, shape[1], 1));
        Runner runner(2, isa);
        const Projection p = project(runner, a, basis, centred ? &mean : nullptr);
        const Matrix mean_values = mean.get();
        const Expected e = expect(a.get(), basis.get(), centred ? &mean_values : nullptr);
        // a - mean is rounded relative to the larger of the two.
        const double size = reference::frobenius_norm(a.get()) + (centred ? reference::frobenius_norm(mean_values) : 0);
        const Matrix y = p.y.get(), rows = p.rows.get();
        for (size_t i = 0; i < e.y.data.size(); ++i) ASSERT_NEAR(y.data[i], e.y.data[i], 1e-6 * size);
        for (size_t i = 0; i < e.rows.data.size(); ++i) ASSERT_NEAR(rows.data[i], e.rows.data[i], 1e-6 * size);
        EXPECT_NEAR(p.total.get()(0, 0), e.total, 1e-6);
      }
}

TEST(CpuLowRankProject, LargeMeanDoesNotHideASmallResidual) {
  Random random(adaattn::test::run_seed());
  const Matrix basis = rounded(random_orthonormal(random, 32, 4));
  Matrix a = reference::multiply(random_matrix(random, 50, 4), reference::transpose(basis));
  for (double& x : a.data) x = static_cast<float>(x + 4096);
  const Matrix mean(32, 1, 4096);
  Runner runner;
  const Batch mean_batch(mean);
  const Projection p = project(runner, Batch(a), Batch(basis), &mean_batch);
  const Expected e = expect(a, basis, &mean);
  EXPECT_NEAR(p.total.get()(0, 0), e.total, 1e-3 * e.total);
}

TEST(CpuLowRankProject, ZeroMatrixHasZeroResidual) {
  Random random(adaattn::test::run_seed());
  Runner runner;
  const Projection p = project(runner, Batch(Matrix(6, 5)), Batch(random_orthonormal(random, 5, 2)), nullptr);
  EXPECT_EQ(p.total.get()(0, 0), 0);
  for (double x : p.y.get().data) EXPECT_EQ(x, 0);
}

TEST(CpuLowRankProject, BatchInTwoDimensionsAndThreadsGiveTheSameBits) {
  Random random(adaattn::test::run_seed());
  Batch a(2, 3, 400, 24), basis(2, 3, 24, 5), mean(2, 3, 24, 1);
  for (int64_t i = 0; i < 6; ++i) {
    a.set(i, random_matrix(random, 400, 24));
    basis.set(i, random_orthonormal(random, 24, 5));
    mean.set(i, random_matrix(random, 24, 1));
  }
  Runner one(1), five(5);
  const Projection expected = project(one, a, basis, &mean), p = project(five, a, basis, &mean);
  for (int64_t i = 0; i < 6; ++i) {
    const Matrix m = mean.get(i);
    EXPECT_NEAR(p.total.get(i)(0, 0), expect(a.get(i), basis.get(i), &m).total, 1e-6);
    EXPECT_EQ(p.total.get(i).data, expected.total.get(i).data);
    EXPECT_EQ(p.rows.get(i).data, expected.rows.get(i).data);
    EXPECT_EQ(p.y.get(i).data, expected.y.get(i).data);
  }
}

TEST(CpuLowRankProject, EachOutputAloneIsEnough) {
  Random random(adaattn::test::run_seed());
  const Batch a(random_matrix(random, 30, 12)), basis(random_orthonormal(random, 12, 3));
  Runner runner;
  const Projection all = project(runner, a, basis, nullptr);
  for (int only = 0; only < 3; ++only) {
    const Batch y(1, 1, 30, 3), rows(1, 1, 30, 1), total(1, 1, 1, 1);
    ProjectParams params;
    params.a = a.view();
    params.basis = basis.view();
    if (only == 0) params.y = y.view();
    if (only == 1) params.row_residual = rows.view();
    if (only == 2) params.residual = total.view();
    low_rank_project(runner.context(), params, runner.workspace(low_rank_project_workspace(runner.context(), params)));
    if (only == 0) {
      EXPECT_EQ(y.get().data, all.y.get().data);
    }
    if (only == 1) {
      EXPECT_EQ(rows.get().data, all.rows.get().data);
    }
    if (only == 2) {
      EXPECT_EQ(total.get().data, all.total.get().data);
    }
  }
}

}  // namespace
}  // namespace adaattn::cpu::test
