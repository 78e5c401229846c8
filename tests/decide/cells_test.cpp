#include "decide/cells.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "decide/choose.h"
#include "decide/level_checks.h"
#include "support/random.h"

namespace adaattn::decide {
namespace {

TEST(Cells, ATileWithThePeakIsKeptAtEveryLevel) {
  std::mt19937 rng(static_cast<unsigned>(test::run_seed()));
  for (int trial = 0; trial < 200; ++trial) {
    const int tiles = 3 + static_cast<int>(rng() % 150);
    std::vector<uint32_t> mass(static_cast<size_t>(tiles)), peak(mass.size());
    for (uint32_t& m : mass) m = 1 + ((rng() % (1u << 22)) >> rng() % 20);
    for (uint32_t& p : peak) p = (rng() % (1u << 24)) >> rng() % 20;
    const uint32_t keep_peak = 1 + rng() % (1u << 20);
    TileLevels without, with;
    without.row = with.row = {0, tiles, 0, tiles};
    measure_cells(mass.data(), peak.data(), 0, 1000, &without);
    measure_cells(mass.data(), peak.data(), keep_peak, 1000, &with);
    expect_levels(
        with, mass,
        [&](int level, int t) {
          const auto i = static_cast<size_t>(t);
          return keeps_tile(without, level, t, mass[i], peak[i], 0) || peak[i] >= keep_peak;
        },
        [&](int level, int t) {
          const auto i = static_cast<size_t>(t);
          return keeps_tile(with, level, t, mass[i], peak[i], keep_peak);
        });
  }
}

// The scores of means of 32 normal rows have a deviation of log2(e) / 32, whatever head_dim. What a share keeps of them
// follows noise, and no level may count as selective.
TEST(Cells, OfRandomInputSelectNothing) {
  std::mt19937 rng(static_cast<unsigned>(test::run_seed()));
  std::normal_distribution<float> score(0, 0.045f);
  for (const bool causal : {true, false}) {
    for (const int tiles : {16, 64, 128}) {
      // From a fifth of the mean share of a cell in the longest row to five times that.
      for (double share = 0.05 / tiles; share < 1.3 / tiles; share *= 1.25) {
        HeadLevels head;
        for (int query = causal ? 0 : tiles - 4; query < tiles; ++query) {
          TileLevels levels;
          levels.row = {0, causal ? query + 1 : tiles, 0, causal ? query : tiles};
          const int seen = levels.row.end;
          std::vector<uint32_t> mass(static_cast<size_t>(seen)), peak(mass.size());
          for (int block = 0; block < kCellsOfTile; ++block) {
            std::vector<float> scores(static_cast<size_t>(seen * kCellsOfTile));
            for (float& x : scores) x = score(rng);
            CellRow row{*std::max_element(scores.begin(), scores.end()), 0};
            uint64_t total = 0;
            for (const float x : scores) total += integer_mass(x, row.top);
            row.inverse = 1.0f / static_cast<float>(total);
            for (size_t t = 0; t < mass.size(); ++t) {
              uint32_t of_tile = 0, top = 0;
              for (size_t i = 0; i < kCellsOfTile; ++i) {
                const uint32_t m = integer_mass(scores[t * kCellsOfTile + i], row.top);
                of_tile += m;
                top = std::max(top, m);
              }
              mass[t] += tile_share(of_tile, row.inverse);
              peak[t] = std::max(peak[t], cell_share(top, row.inverse));
            }
          }
          measure_cells(mass.data(), peak.data(), static_cast<uint32_t>(share * 0x1p24), 1000, &levels, 0, 1);
          add_block(levels, &head);
        }
        EXPECT_FALSE(is_selective(head, 0))
            << share * tiles * kCellsOfTile << " of the mean share, " << tiles << " tiles, causal " << causal << ": "
            << head.kept[0] << " of " << head.tiles << ", dropped " << dropped_rms(head, 0);
      }
    }
  }
}

// Shares are integers: what they lose to rounding is less than half a unit each.
TEST(Cells, SharesOfARowAddUpToOne) {
  std::mt19937 rng(7);
  std::normal_distribution<float> score(0, 4);
  for (int trial = 0; trial < 100; ++trial) {
    const int cells = 4 * (1 + static_cast<int>(rng() % 100));
    std::vector<float> scores(static_cast<size_t>(cells));
    CellRow row;
    for (float& s : scores) {
      s = score(rng);
      row.top = &s == scores.data() ? s : std::max(row.top, s);
    }
    uint64_t total = 0;
    for (const float s : scores) total += integer_mass(s, row.top);
    row.inverse = 1.0f / static_cast<float>(total);
    double cell_sum = 0, tile_sum = 0;
    for (size_t t = 0; t < scores.size(); t += kCellsOfTile) {
      uint32_t of_tile = 0;
      for (size_t i = t; i < t + kCellsOfTile; ++i) {
        const uint32_t m = integer_mass(scores[i], row.top);
        cell_sum += cell_share(m, row.inverse);
        of_tile += m;
      }
      tile_sum += tile_share(of_tile, row.inverse);
    }
    EXPECT_NEAR(cell_sum / 0x1p24, 1, 1e-5);
    EXPECT_NEAR(tile_sum / 0x1p20, 1, 1e-4);
  }
}

}  // namespace
}  // namespace adaattn::decide
