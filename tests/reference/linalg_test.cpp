#include "reference/linalg.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

namespace adaattn::reference {
namespace {

Matrix random_matrix(int64_t m, int64_t n, uint64_t seed) {
  std::mt19937_64 rng(seed);
  std::normal_distribution<double> normal;
  Matrix a(m, n);
  for (double& x : a.data) x = normal(rng);
  return a;
}

TEST(ReferenceSvd, ThreeFourFiveMatrix) {
  Matrix a(2, 2);
  a.data = {3, 0, 4, 5};  // singular values sqrt(45) and sqrt(5)
  const Svd s = svd(a);
  EXPECT_NEAR(s.sigma[0], std::sqrt(45), 1e-12);
  EXPECT_NEAR(s.sigma[1], std::sqrt(5), 1e-12);
}

TEST(ReferenceSvd, FactorsAreOrthonormalAndMultiplyBack) {
  const int64_t shapes[][2] = {{1, 1}, {7, 7}, {20, 6}, {6, 20}};
  for (const auto& shape : shapes) {
    const Matrix a = random_matrix(shape[0], shape[1], 7);
    const Svd s = svd(a);
    EXPECT_LT(reconstruction_error(a, s.u, s.sigma, s.v), 1e-12 * frobenius_norm(a));
    EXPECT_LT(orthogonality_error(s.u), 1e-12);
    EXPECT_LT(orthogonality_error(s.v), 1e-12);
    for (size_t i = 1; i < s.sigma.size(); ++i) EXPECT_LE(s.sigma[i], s.sigma[i - 1]);
  }
}

TEST(ReferenceSvd, RankTwoMatrixHasTwoSingularValues) {
  const Matrix a = multiply(random_matrix(10, 2, 1), random_matrix(2, 8, 2));
  const Svd s = svd(a);
  EXPECT_GT(s.sigma[1], 1e-3);
  EXPECT_LT(s.sigma[2], 1e-12 * s.sigma[0]);
  EXPECT_LT(optimal_residual(s.sigma, 2), 1e-11);
}

TEST(ReferenceEffectiveRank, CountsEnergy) {
  const std::vector<double> sigma = {5, 3, 1};  // energies 25, 9, 1 of 35
  EXPECT_EQ(effective_rank(sigma, 0.7), 1);
  EXPECT_EQ(effective_rank(sigma, 0.72), 2);
  EXPECT_EQ(effective_rank(sigma, 0.98), 3);
  EXPECT_EQ(effective_rank(sigma, 1), 3);
  EXPECT_EQ(effective_rank({0, 0}, 0.5), 0);
}

TEST(ReferenceAttentionError, IsRelativeToTheSpreadOfTheValues) {
  Matrix o(2, 1), approx(2, 1), v(2, 1);
  o.data = {1, 2};
  approx.data = {1.5, 2.5};
  v.data = {10, 14};  // mean 12, both 2 away
  EXPECT_NEAR(attention_error(o, approx, v), 0.25, 1e-12);
}

}  // namespace
}  // namespace adaattn::reference
