#include "cpu_fallback/tools/linalg.h"

#include <cmath>

#include "cpu_fallback/tools/tool_fixture.h"

namespace adaattn::cpu::test {
namespace {

Matrix product(Runner& runner, const ConstMatrix& a, const ConstMatrix& b, Precision precision) {
  Matrix c(a.rows, b.cols, std::nan(""));
  const Exec exec = runner.exec();
  Arena counting;
  take_gemm_scratch(counting, exec.lanes, gemm_partial_size(a.rows, b.cols, a.cols));
  Arena arena(runner.workspace(Arena::size_for(counting.used())));
  const GemmScratch scratch = take_gemm_scratch(arena, exec.lanes, gemm_partial_size(a.rows, b.cols, a.cols));
  gemm(exec, scratch, a, b, c.data.data(), b.cols, precision);
  runner.check_workspace();
  return c;
}

TEST(CpuGemm, EveryShapeStrideAndInstructionSetMatchesPlainLoops) {
  const int64_t shapes[][3] = {{1, 1, 1},      {5, 7, 3},     {6, 64, 16},     {97, 257, 300},
                               {96, 256, 256}, {3, 5, 20000}, {200, 31, 4100}, {2, 700, 1}};
  for (const auto& shape : shapes)
    for (adaattn_isa_t isa : isas())
      for (Order order : {Order::kRowMajor, Order::kColMajor, Order::kScattered})
        for (Precision precision : {Precision::kF32, Precision::kF64}) {
          SCOPED_TRACE(testing::Message() << shape[0] << " x " << shape[1] << " depth " << shape[2] << " isa " << isa);
          Random random(adaattn::test::run_seed());
          const Batch a(random_matrix(random, shape[0], shape[2]), order);
          const Matrix b = random_matrix(random, shape[2], shape[1]);
          Runner runner(2, isa);
          const MatrixBatch& v = a.view();
          const ConstMatrix view{v.data, v.rows, v.cols, v.stride_row, v.stride_col, false};
          const Matrix c = product(runner, view, row_major(b.data.data(), b.rows, b.cols), precision);
          const Matrix expected = reference::multiply(a.get(), b);
          // f32: rounding of the operands and of sums of 256 products. f64: that of running sums, which grow as the
          // root of their length, here and in the oracle.
          const double depth = static_cast<double>(shape[2]);
          const double bound =
              precision == Precision::kF32 ? 0x1p-24 * 160 * std::sqrt(depth) : 0x1p-53 * (10 * depth + 160);
          for (size_t i = 0; i < c.data.size(); ++i) ASSERT_NEAR(c.data[i], expected.data[i], bound);
        }
}

TEST(CpuGemm, ThreadsDoNotChangeABit) {
  Random random(adaattn::test::run_seed());
  for (int64_t depth : {40, 9000}) {
    const Matrix a = random_matrix(random, 50, depth), b = random_matrix(random, depth, 300);
    Runner one(1);
    const Matrix expected =
        product(one, row_major(a.data.data(), 50, depth), row_major(b.data.data(), depth, 300), Precision::kF32);
    for (int32_t threads : {2, 5}) {
      Runner runner(threads);
      EXPECT_EQ(
          product(runner, row_major(a.data.data(), 50, depth), row_major(b.data.data(), depth, 300), Precision::kF32)
              .data,
          expected.data);
    }
  }
}

TEST(CpuCholesky, FactorMultipliesBackAndItsInverseIsOne) {
  Random random(adaattn::test::run_seed());
  for (int64_t n : {1, 2, 9, 40}) {
    const Matrix x = random_matrix(random, 2 * n, n);
    const Matrix a = reference::multiply(reference::transpose(x), x);
    Matrix r = a;
    ASSERT_TRUE(cholesky(n, r.data.data(), 1e-12));
    const Matrix back = reference::multiply(reference::transpose(r), r);
    for (size_t i = 0; i < a.data.size(); ++i) EXPECT_NEAR(back.data[i], a.data[i], 1e-11 * a(0, 0));
    Matrix inverse = r;
    invert_upper(n, inverse.data.data());
    const Matrix one = reference::multiply(r, inverse);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) EXPECT_NEAR(one(i, j), i == j, 1e-9);
  }
}

TEST(CpuCholesky, SingularMatrixIsRefused) {
  Matrix a(3, 3, 1);
  EXPECT_FALSE(cholesky(3, a.data.data(), 1e-12));
  Matrix not_a_number(2, 2, std::nan(""));
  EXPECT_FALSE(cholesky(2, not_a_number.data.data(), 1e-12));
}

void expect_eigen(const Matrix& a, const ToolKernels& kernels) {
  const int64_t n = a.rows;
  Matrix copy = a, vectors(n, n);
  std::vector<double> values(static_cast<size_t>(n)), work(static_cast<size_t>(symmetric_eigen_work_size(n, true)));
  ASSERT_TRUE(symmetric_eigen(kernels, n, copy.data.data(), values.data(), vectors.data.data(), n, work.data()));
  const Matrix v = reference::transpose(vectors);
  EXPECT_LT(reference::orthogonality_error(v), 1e-12);
  const Matrix av = reference::multiply(a, v);
  const double norm = reference::frobenius_norm(a);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) EXPECT_NEAR(av(i, j), values[static_cast<size_t>(j)] * v(i, j), 1e-13 * norm);
  for (int64_t j = 1; j < n; ++j) EXPECT_LE(values[static_cast<size_t>(j)], values[static_cast<size_t>(j - 1)]);
}

TEST(CpuSymmetricEigen, RandomMatricesOfEverySizeAndInstructionSet) {
  Random random(adaattn::test::run_seed());
  for (adaattn_isa_t isa : isas())
    for (int64_t n : {1, 2, 3, 4, 17, 64, 130}) {
      SCOPED_TRACE(n);
      Matrix a = random_matrix(random, n, n);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < i; ++j) a(i, j) = a(j, i);
      expect_eigen(a, tool_kernels(isa));
    }
}

TEST(CpuSymmetricEigen, DegenerateMatrices) {
  const ToolKernels& kernels = tool_kernels(isas().back());
  Matrix identity(20, 20), ones(20, 20, 1), graded(20, 20), pairs(20, 20);
  for (int64_t i = 0; i < 20; ++i) {
    identity(i, i) = 1;
    graded(i, i) = std::pow(10.0, static_cast<double>(-i));
    pairs(i, i ^ 1) = 1;  // eigenvalues +1 and -1, ten times each
  }
  for (const Matrix& a : {Matrix(20, 20), identity, ones, graded, pairs}) expect_eigen(a, kernels);
}

TEST(CpuSymmetricEigen, NotANumberIsRefusedWithoutHanging) {
  Matrix a(5, 5, 1);
  a(2, 3) = a(3, 2) = std::nan("");
  std::vector<double> values(5), work(static_cast<size_t>(symmetric_eigen_work_size(5, false)));
  EXPECT_FALSE(symmetric_eigen(tool_kernels(isas().back()), 5, a.data.data(), values.data(), nullptr, 5, work.data()));
}

TEST(CpuOrthonormalize, KeepsTheOrderOfSpansAndMeasuresDistances) {
  Random random(adaattn::test::run_seed());
  for (int passes : {1, 2}) {
    Matrix y = random_matrix(random, 12, 500);
    const Matrix before = y;
    Runner runner;
    const Exec exec = runner.exec();
    std::vector<double> norms(12);
    Arena counting;
    take_gemm_scratch(counting, exec.lanes, 0);
    take_orthonormal_scratch(counting, 12, 500);
    Arena arena(runner.workspace(Arena::size_for(counting.used())));
    const GemmScratch gemm_scratch = take_gemm_scratch(arena, exec.lanes, 0);
    const OrthonormalScratch scratch = take_orthonormal_scratch(arena, 12, 500);
    orthonormalize(exec, gemm_scratch, scratch, 12, 500, y.data.data(), norms.data(), 0, 1, passes);
    runner.check_workspace();
    EXPECT_LT(reference::orthogonality_error(reference::transpose(y)), passes == 2 ? 1e-14 : 1e-5);
    for (int64_t i = 0; i < 12; ++i) {
      double rest = 0, along = 0;
      for (int64_t k = 0; k < 500; ++k) rest += before(i, k) * before(i, k);
      for (int64_t j = 0; j < i; ++j) {
        double dot = 0;
        for (int64_t k = 0; k < 500; ++k) dot += before(i, k) * y(j, k);
        rest -= dot * dot;
      }
      for (int64_t k = 0; k < 500; ++k) along += before(i, k) * y(i, k);
      EXPECT_NEAR(norms[static_cast<size_t>(i)], std::sqrt(rest), 1e-10 * std::sqrt(rest));
      EXPECT_NEAR(along, std::sqrt(rest), 1e-10 * std::sqrt(rest));
    }
  }
}

TEST(CpuOrthonormalize, DependentAndZeroRowsAreReplaced) {
  Random random(adaattn::test::run_seed());
  Matrix y = random_matrix(random, 6, 40);
  for (int64_t k = 0; k < 40; ++k) {
    y(2, k) = 0;
    y(4, k) = y(0, k) - 2 * y(1, k);
  }
  Runner runner;
  const Exec exec = runner.exec();
  std::vector<double> norms(6);
  Arena counting;
  take_gemm_scratch(counting, exec.lanes, 0);
  take_orthonormal_scratch(counting, 6, 40);
  Arena arena(runner.workspace(Arena::size_for(counting.used())));
  const GemmScratch gemm_scratch = take_gemm_scratch(arena, exec.lanes, 0);
  const OrthonormalScratch scratch = take_orthonormal_scratch(arena, 6, 40);
  orthonormalize(exec, gemm_scratch, scratch, 6, 40, y.data.data(), norms.data(), 0, 1);
  runner.check_workspace();
  EXPECT_LT(reference::orthogonality_error(reference::transpose(y)), 1e-13);
  for (int64_t i = 0; i < 6; ++i) EXPECT_EQ(norms[static_cast<size_t>(i)] == 0, i == 2 || i == 4) << i;
}

TEST(CpuSingularValues, MatchTheOracleThroughTheStreamingTriangleToo) {
  Random random(adaattn::test::run_seed());
  const ToolKernels& kernels = tool_kernels(isas().back());
  for (int64_t n : {1, 2, 13, 40}) {
    const Matrix a = random_matrix(random, 100, n);
    const std::vector<double> sigma = reference::svd(a).sigma;
    Matrix m = a, r(n, n);
    std::vector<double> values(static_cast<size_t>(n)), work(static_cast<size_t>(singular_values_work_size(100, n)));
    ASSERT_TRUE(singular_values(kernels, 100, n, m.data.data(), values.data(), work.data()));
    for (size_t i = 0; i < sigma.size(); ++i) EXPECT_NEAR(values[i], sigma[i], 1e-13 * sigma[0]);
    for (int64_t first = 0; first < 100; first += 30) {
      const int64_t count = std::min<int64_t>(30, 100 - first);
      Matrix rows(count, n);
      std::copy_n(a.row(first), count * n, rows.data.data());
      std::vector<double> append_work(static_cast<size_t>(qr_append_work_size(count, n)));
      qr_append(kernels, n, r.data.data(), count, rows.data.data(), append_work.data());
    }
    ASSERT_TRUE(singular_values(kernels, n, n, r.data.data(), values.data(), work.data()));
    for (size_t i = 0; i < sigma.size(); ++i) EXPECT_NEAR(values[i], sigma[i], 1e-13 * sigma[0]);
  }
}

}  // namespace
}  // namespace adaattn::cpu::test
