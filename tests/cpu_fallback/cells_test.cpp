// Estimates of the key tiles' masses: every instruction set's are those of the shared code, bit for bit.
#include "decide/cells.h"

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

using decide::kCell;
using decide::kCellsOfTile;

constexpr int64_t kTiles = 21;

// A head's keys and one tile of queries by their block means.
struct Means {
  int64_t d, len, blocks;
  std::vector<float> k, k_mean, q;

  Means(int64_t width, int64_t keys, int64_t query_blocks, std::mt19937& rng)
      : d(width), len(keys), blocks(query_blocks) {
    std::normal_distribution<float> normal;
    for (auto* x : {&k, &k_mean, &q}) {
      x->resize(static_cast<size_t>((x == &k ? kTiles * kCellsOfTile : x == &q ? blocks : 1) * d));
      for (float& e : *x) e = normal(rng);
    }
  }
};

struct Quantized {
  std::vector<float> key_cells, key_scales, query_cells, query_scales;

  Quantized(const AdaptiveKernels& kernels, const Means& m) {
    const int64_t cells = kTiles * kCellsOfTile, padded = (cells + kCellBlock - 1) / kCellBlock * kCellBlock;
    key_cells.resize(static_cast<size_t>(padded * m.d));
    key_scales.resize(static_cast<size_t>(padded));
    query_cells.resize(static_cast<size_t>(m.blocks * m.d));
    query_scales.resize(static_cast<size_t>(m.blocks));
    kernels.quantize_cells(m.k.data(), cells, m.d, m.d, m.k_mean.data(), 1.0f, kCellBlock, key_cells.data(),
                           key_scales.data());
    kernels.quantize_cells(m.q.data(), m.blocks, m.d, m.d, nullptr, 0.7f, 1, query_cells.data(), query_scales.data());
  }

  float key(int64_t cell, int64_t c, int64_t d) const {
    return key_cells[static_cast<size_t>((cell / kCellBlock * d + c) * kCellBlock + cell % kCellBlock)];
  }
};

struct Masses {
  std::vector<uint32_t> mass, peak;
  std::vector<float> scores;
  CellArgs args;
  bool finite = false;

  Masses(const AdaptiveKernels& kernels, const Means& m, const Quantized& x, int64_t begin, int64_t end) {
    mass.assign(static_cast<size_t>(end - begin), 1);
    peak = mass;
    scores.assign(static_cast<size_t>(kCellsOfTile * cell_pitch(end - begin)), std::numeric_limits<float>::quiet_NaN());
    args.query_cells = x.query_cells.data();
    args.query_scales = x.query_scales.data();
    args.blocks = m.blocks;
    args.key_cells = x.key_cells.data();
    args.key_scales = x.key_scales.data();
    args.d = m.d;
    args.len = m.len;
    args.last_log2 = decide::fixed_log2(static_cast<float>(m.len % kCell) * (1.0f / kCell));
    args.tile_begin = begin;
    args.tile_end = end;
    args.scores = scores.data();
    args.mass = mass.data();
    args.peak = peak.data();
    finite = kernels.weigh_cells(args);
  }
};

// The rule as src/decide has it.
void expect_shared_rule(const Means& m, const Quantized& x, int64_t begin, int64_t end, const Masses& got) {
  std::vector<uint32_t> mass(static_cast<size_t>(end - begin)), peak(mass.size());
  const auto keys_of = [&](int64_t cell) { return std::clamp<int64_t>(m.len - cell * kCell, 0, kCell); };
  for (int64_t b = 0; b < m.blocks; ++b) {
    std::vector<float> score(static_cast<size_t>((end - begin) * kCellsOfTile));
    decide::CellRow row;
    row.top = -std::numeric_limits<float>::infinity();
    const auto at = [&](int64_t cell) { return static_cast<size_t>(cell - begin * kCellsOfTile); };
    for (int64_t cell = begin * kCellsOfTile; cell < end * kCellsOfTile; ++cell) {
      if (keys_of(cell) == 0) continue;
      int32_t dot = 0;
      for (int64_t c = 0; c < m.d; ++c)
        dot += static_cast<int32_t>(x.query_cells[static_cast<size_t>(b * m.d + c)]) *
               static_cast<int32_t>(x.key(cell, c, m.d));
      score[at(cell)] = decide::cell_score(dot, x.query_scales[static_cast<size_t>(b)],
                                           x.key_scales[static_cast<size_t>(cell)], static_cast<int>(keys_of(cell)));
      row.top = std::max(row.top, score[at(cell)]);
    }
    const auto mass_of = [&](int64_t cell) {
      return keys_of(cell) == 0 ? 0 : decide::integer_mass(score[at(cell)], row.top);
    };
    uint64_t sum = 0;
    for (int64_t cell = begin * kCellsOfTile; cell < end * kCellsOfTile; ++cell) sum += mass_of(cell);
    row.inverse = 1.0f / static_cast<float>(sum);
    for (int64_t t = begin; t < end; ++t) {
      uint32_t of_tile = 0, largest = 0;
      for (int64_t cell = t * kCellsOfTile; cell < (t + 1) * kCellsOfTile; ++cell) {
        of_tile += mass_of(cell);
        largest = std::max(largest, mass_of(cell));
      }
      const auto i = static_cast<size_t>(t - begin);
      mass[i] += decide::tile_share(of_tile, row.inverse);
      peak[i] = std::max(peak[i], decide::cell_share(largest, row.inverse));
    }
  }
  EXPECT_EQ(got.mass, mass);
  EXPECT_EQ(got.peak, peak);
}

class Cells : public testing::TestWithParam<adaattn_isa_t> {
 protected:
  void SetUp() override {
    if (available_isas().find(isa_name(GetParam())) == std::string::npos) GTEST_SKIP() << "not on this processor";
  }
};

TEST_P(Cells, MassesAreThoseOfTheSharedCodeBitForBit) {
  const AdaptiveKernels& kernels = *adaptive_kernels_of(GetParam(), false);
  std::mt19937 rng(static_cast<unsigned>(test::run_seed()));
  for (const int64_t d : {1, 40, 128, 512}) {
    for (int64_t blocks = 1; blocks <= kCellsOfTile; ++blocks) {
      const int64_t len = kTiles * decide::kTileK - static_cast<int64_t>(rng() % 127);
      const Means means(d, len, blocks, rng);
      const Quantized x(kernels, means);
      for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, kTiles}, {3, 4}, {5, 19}, {20, 21}}) {
        SCOPED_TRACE(testing::Message() << "d " << d << ", tiles " << begin << " to " << end << " of " << len
                                        << " keys");
        const Masses got(kernels, means, x, begin, end);
        ASSERT_TRUE(got.finite);
        expect_shared_rule(means, x, begin, end, got);
      }
    }
  }
}

TEST_P(Cells, QuantizedRowsAreWithinHalfAStep) {
  const AdaptiveKernels& kernels = *adaptive_kernels_of(GetParam(), false);
  std::mt19937 rng(7);
  const Means means(128, kTiles * decide::kTileK, 4, rng);
  const Quantized x(kernels, means);
  for (int64_t cell = 0; cell < kTiles * kCellsOfTile; ++cell) {
    const float scale = x.key_scales[static_cast<size_t>(cell)];
    for (int64_t c = 0; c < 128; ++c) {
      const float centred = means.k[static_cast<size_t>(cell * 128 + c)] - means.k_mean[static_cast<size_t>(c)];
      EXPECT_NEAR(x.key(cell, c, 128) * scale, centred, 0.5001f * scale);
    }
  }
}

TEST_P(Cells, AMeanThatIsNotFiniteIsReported) {
  const AdaptiveKernels& kernels = *adaptive_kernels_of(GetParam(), false);
  std::mt19937 rng(8);
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    Means of_key(64, kTiles * decide::kTileK, 2, rng), of_query = of_key;
    of_key.k[64 * 30 + 5] = bad;
    of_query.q[64 + 63] = bad;
    EXPECT_FALSE(Masses(kernels, of_key, Quantized(kernels, of_key), 0, kTiles).finite);
    EXPECT_FALSE(Masses(kernels, of_query, Quantized(kernels, of_query), 0, kTiles).finite);
  }
}

TEST_P(Cells, DroppedTilesLeaveTheirShareTheirWeightAndTheirMeanOfV) {
  const AdaptiveKernels& kernels = *adaptive_kernels_of(GetParam(), false);
  std::mt19937 rng(static_cast<unsigned>(test::run_seed()));
  constexpr int64_t kWidth = 40, kVStride = 64, kBegin = 2;
  std::normal_distribution<float> normal;
  std::vector<float> v(static_cast<size_t>(kTiles * kCellsOfTile * kVStride));
  for (float& e : v) e = normal(rng);
  for (int64_t blocks = 1; blocks <= kCellsOfTile; ++blocks) {
    const Means means(64, kTiles * decide::kTileK, blocks, rng);
    const Quantized x(kernels, means);
    const Masses cells(kernels, means, x, kBegin, kTiles);
    ASSERT_TRUE(cells.finite);
    const uint64_t mask = rng() | 1u << kBegin;
    std::vector<float> dropped(static_cast<size_t>(blocks * dropped_stride(kWidth)),
                               std::numeric_limits<float>::quiet_NaN());
    kernels.weigh_dropped({.cells = cells.args,
                           .mask = &mask,
                           .group_v = v.data(),
                           .v_stride = kVStride,
                           .d_v = kWidth,
                           .k_mean = means.k_mean.data(),
                           .dropped = dropped.data()});
    for (int64_t b = 0; b < blocks; ++b) {
      // Weights of 32 keys at a cell's mean, from the bytes.
      double all = 0, weight = 0;
      std::vector<double> sum(kWidth);
      for (int64_t cell = kBegin * kCellsOfTile; cell < kTiles * kCellsOfTile; ++cell) {
        double score = 0;
        for (int64_t c = 0; c < 64; ++c) {
          const double q = x.query_cells[static_cast<size_t>(b * 64 + c)] * x.query_scales[static_cast<size_t>(b)];
          score +=
              q * (x.key(cell, c, 64) * x.key_scales[static_cast<size_t>(cell)] + means.k_mean[static_cast<size_t>(c)]);
        }
        const double w = kCell * std::exp2(score);
        all += w;
        if (tile_bit(&mask, cell / kCellsOfTile)) continue;
        weight += w;
        for (int64_t c = 0; c < kWidth; ++c)
          sum[static_cast<size_t>(c)] += w * v[static_cast<size_t>(cell * kVStride + c)];
      }
      const float* got = dropped.data() + b * dropped_stride(kWidth);
      // Masses are rounded to 2^-22 of the heaviest cell's: what little of them is dropped has fewer bits.
      const double rounding = 1e-3 + 0x1p-22 * kTiles * kCellsOfTile * all / weight;
      EXPECT_NEAR(got[0], weight / all, 1e-4);
      EXPECT_NEAR(got[1], std::log2(weight), rounding);
      for (int64_t c = 0; c < kWidth; ++c)
        EXPECT_NEAR(got[kDroppedHead + c], sum[static_cast<size_t>(c)] / weight, 4 * rounding);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, Cells, testing::ValuesIn(compiled_isa_list()),
                         [](const auto& isa) { return std::string(isa_name(isa.param)); });

}  // namespace
}  // namespace adaattn::cpu
