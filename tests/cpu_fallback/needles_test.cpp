// Needles: every instruction set finds the tiles that the shared code finds.
#include "decide/needles.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "cpu_fallback/adaptive/kernels.h"
#include "cpu_fallback/isa/registry.h"
#include "support/random.h"

namespace adaattn::cpu {
namespace {

using decide::kCellsOfTile;
using decide::kNeedleRowsOfTile;
using decide::kNeedlesOfCell;

constexpr int64_t kTiles = 70;  // more than a word of mask

class Needles : public testing::TestWithParam<adaattn_isa_t> {
 protected:
  void SetUp() override {
    if (available_isas().find(isa_name(GetParam())) == std::string::npos) GTEST_SKIP() << "not on this processor";
  }
};

// What the tables should hold, one row after another.
struct Bytes {
  std::vector<int32_t> bytes;
  std::vector<float> scales;
};

// Of means less `shift`, `share` neighbours with a scale in common.
Bytes quantize(const std::vector<float>& means, const std::vector<float>& shift, int64_t d, int64_t share,
               float factor) {
  Bytes x;
  const auto rows = static_cast<int64_t>(means.size()) / d;
  const auto at = [&](int64_t row, int64_t c) {
    const float mean = means[static_cast<size_t>(row * d + c)];
    return shift.empty() ? mean : mean - shift[static_cast<size_t>(c)];
  };
  for (int64_t first = 0; first < rows; first += share) {
    float top = 0;
    for (int64_t row = first; row < first + share; ++row) {
      for (int64_t c = 0; c < d; ++c) top = std::max(top, std::fabs(at(row, c)));
    }
    x.scales.push_back(factor * top * (1.0f / 127.0f));
    for (int64_t row = first; row < first + share; ++row) {
      for (int64_t c = 0; c < d; ++c)
        x.bytes.push_back(static_cast<int32_t>(std::nearbyint(at(row, c) * (top > 0 ? 127.0f / top : 0.0f))));
    }
  }
  return x;
}

std::vector<float> random_means(int64_t n, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(n));
  for (float& e : x) e = normal(rng);
  return x;
}

TEST_P(Needles, TilesAreThoseOfTheSharedCode) {
  std::mt19937 rng(static_cast<unsigned>(test::run_seed()));
  for (int64_t i = 0; i < 14; ++i) {
    constexpr int64_t kWidths[] = {1, 40, 64, 65, 100, 128, 512};
    const int64_t d = kWidths[i / 2];
    const AdaptiveKernels& kernels = *adaptive_kernels_of(GetParam(), i % 2 == 1);
    const int64_t there = 1 + static_cast<int64_t>(rng() % kNeedleRowsOfTile);  // rows; the others are beyond the end
    const std::vector<float> keys = random_means(kTiles * kNeedleLanes * d, rng), shift = random_means(d, rng);
    const std::vector<float> queries = random_means(there * d, rng);
    const Bytes k = quantize(keys, shift, d, kNeedlesOfCell, 1.0f), q = quantize(queries, {}, d, 1, 0.7f);

    const auto block_bytes = static_cast<int64_t>(kernels.needle_block_bytes(d));
    std::vector<char> blocks(static_cast<size_t>(kTiles * block_bytes) + 64);
    char* const aligned = blocks.data() + (64 - reinterpret_cast<uintptr_t>(blocks.data()) % 64) % 64;
    std::vector<float> key_scales(kTiles * kCellsOfTile), query_scales(kNeedleRowsOfTile);
    for (int64_t t = 0; t < kTiles; ++t)
      kernels.quantize_needles(keys.data() + t * kNeedleLanes * d, d, d, shift.data(), aligned + t * block_bytes,
                               key_scales.data() + t * kCellsOfTile);
    std::vector<char> rows(kNeedleRowsOfTile * kernels.needle_row_bytes(d));
    kernels.quantize_needle_rows(queries.data(), there, d, d, 0.7f, rows.data(), query_scales.data());
    EXPECT_EQ(key_scales, k.scales);
    EXPECT_TRUE(std::equal(q.scales.begin(), q.scales.end(), query_scales.begin()));

    // Limits that a fraction of the tiles reaches, and of each row's largest score exactly.
    std::vector<std::vector<float>> scores(static_cast<size_t>(there));
    std::vector<int32_t> dots;
    std::vector<float> limits(kNeedleRowsOfTile, std::numeric_limits<float>::infinity());
    for (int64_t r = 0; r < there; ++r) {
      for (int64_t needle = 0; needle < kTiles * kNeedleLanes; ++needle) {
        int32_t dot = 0;
        for (int64_t c = 0; c < d; ++c)
          dot += q.bytes[static_cast<size_t>(r * d + c)] * k.bytes[static_cast<size_t>(needle * d + c)];
        dots.push_back(dot);
        scores[static_cast<size_t>(r)].push_back(static_cast<float>(dot) *
                                                 k.scales[static_cast<size_t>(needle / kNeedlesOfCell)]);
      }
      std::vector<float> sorted = scores[static_cast<size_t>(r)];
      std::sort(sorted.begin(), sorted.end(), std::greater<>());
      limits[static_cast<size_t>(r)] = sorted[rng() % 8];
    }
    constexpr int64_t kBegin = 3, kEnd = kTiles - 2;
    std::vector<uint64_t> want = {1, uint64_t{1} << 5}, got = want;
    for (int64_t t = kBegin; t < kEnd; ++t) {
      for (int64_t r = 0; r < there; ++r) {
        for (int64_t needle = t * kNeedleLanes; needle < (t + 1) * kNeedleLanes; ++needle) {
          if (decide::is_needle(dots[static_cast<size_t>(r * kTiles * kNeedleLanes + needle)],
                                k.scales[static_cast<size_t>(needle / kNeedlesOfCell)], limits[static_cast<size_t>(r)]))
            want[static_cast<size_t>(t / 64)] |= uint64_t{1} << t % 64;
        }
      }
    }
    NeedleArgs args;
    args.query_rows = rows.data();
    args.limits = limits.data();
    args.key_blocks = aligned;
    args.key_scales = key_scales.data();
    args.d = d;
    args.tile_begin = kBegin;
    args.tile_end = kEnd;
    args.mask = got.data();
    kernels.find_needles(args);
    EXPECT_EQ(got, want) << "d " << d << ", " << there << " rows";
  }
}

TEST_P(Needles, MeansOfRowsWithAShortEnd) {
  const AdaptiveKernels& kernels = *adaptive_kernels_of(GetParam(), false);
  std::mt19937 rng(5);
  constexpr int64_t kRows = 37, kWidth = 70, kStride = 200, kCount = 16;
  const std::vector<float> rows = random_means(kRows * kStride, rng);
  std::vector<float> means(3 * kWidth, std::numeric_limits<float>::quiet_NaN());
  const Operand operand = {const_cast<float*>(rows.data()), 0, kStride, 0, Dtype::kF32};
  kernels.row_means(operand, 1, 0, kRows, kWidth, kCount, means.data());
  for (int64_t b = 0; b < 3; ++b) {
    const int64_t last = std::min(kRows, (b + 1) * kCount);
    for (int64_t c = 0; c < kWidth; ++c) {
      double sum = 0;
      for (int64_t i = b * kCount; i < last; ++i) sum += rows[static_cast<size_t>(i * kStride + c)];
      EXPECT_NEAR(means[static_cast<size_t>(b * kWidth + c)], sum / static_cast<double>(last - b * kCount), 1e-6);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, Needles, testing::ValuesIn(compiled_isa_list()),
                         [](const auto& isa) { return std::string(isa_name(isa.param)); });

}  // namespace
}  // namespace adaattn::cpu
