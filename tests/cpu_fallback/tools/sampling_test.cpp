#include "core/sampling.h"

#include <gtest/gtest.h>

#include <set>
#include <vector>

namespace adaattn {
namespace {

TEST(Sampling, EveryStratumGivesOneRowOfItsOwn) {
  for (int64_t rows : {1, 2, 7, 100, 4097})
    for (int64_t sample_rows : {1, 2, 7, 64, 256}) {
      const int64_t strata = number_of_strata(sample_rows, rows);
      EXPECT_EQ(strata, std::min(sample_rows, rows));
      int64_t previous = -1;
      for (int64_t s = 0; s < strata; ++s) {
        const int64_t row = sampled_row(7, 1, 2, 4, s, strata, rows);
        EXPECT_GT(row, previous);
        EXPECT_GE(row, s * rows / strata);
        EXPECT_LT(row, (s + 1) * rows / strata);
        previous = row;
      }
    }
}

TEST(Sampling, AsManyStrataAsRowsGiveEveryRow) {
  for (int64_t s = 0; s < 50; ++s) EXPECT_EQ(sampled_row(3, 0, 0, 1, s, 50, 50), s);
}

TEST(Sampling, HeadsSequencesAndSeedsDrawDifferentRows) {
  std::set<std::vector<int64_t>> draws;
  for (uint64_t seed : {1, 2})
    for (int64_t batch : {0, 1})
      for (int64_t head : {0, 1}) {
        std::vector<int64_t> rows;
        for (int64_t s = 0; s < 32; ++s) rows.push_back(sampled_row(seed, batch, head, 2, s, 32, 100000));
        draws.insert(rows);
      }
  EXPECT_EQ(draws.size(), 8u);
}

TEST(Sampling, RowsAreFixedForAllDevices) {
  EXPECT_EQ(sampled_row(42, 3, 5, 8, 11, 64, 8192), 1437);
  EXPECT_EQ(sampled_row(0, 0, 0, 1, 0, 1, int64_t{1} << 40), 968142196070);
}

TEST(Sampling, StrataOfHugeSequencesDoNotOverflow) {
  const int64_t rows = int64_t{1} << 60, strata = 1 << 20;
  const int64_t row = sampled_row(1, 0, 0, 1, strata - 1, strata, rows);
  EXPECT_LT(row, rows);
  EXPECT_GE(row, rows - rows / strata);
}

TEST(Sampling, SketchEntriesAreExactOddMultiplesInsideTheInterval) {
  double sum = 0, squares = 0;
  for (uint64_t i = 0; i < 100000; ++i) {
    const double x = sketch_entry(5, 2, i), scaled = x * 16777216;
    EXPECT_LT(std::abs(x), 1);
    EXPECT_EQ(scaled, static_cast<double>(static_cast<int64_t>(scaled)));
    EXPECT_EQ(std::abs(static_cast<int64_t>(scaled)) % 2, 1);
    sum += x;
    squares += x * x;
  }
  EXPECT_NEAR(sum / 100000, 0, 0.01);
  EXPECT_NEAR(squares / 100000, 1.0 / 3, 0.01);
}

}  // namespace
}  // namespace adaattn
