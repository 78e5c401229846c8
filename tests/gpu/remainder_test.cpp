// What rows get for the key tiles that are left out, against float64 on the same tables.
#include "gpu/analysis.h"

namespace adaattn::test {
namespace {

class Remainder : public OnTheDevice {};

TEST_F(Remainder, IsTheMassAndTheMeanOfTheTilesLeftOut) {
  constexpr int64_t kD = 128;
  constexpr float kFactor = 3;
  const AttentionCase c = base_case();
  AttentionData data(c, kBf16All, run_seed());
  make_structured(data, {.value_mean = 0.5}, run_seed());
  Analysis a(data, ADAATTN_POLICY_QUALITY, 0, false, Rules::kRemainder);
  a.args.keep_peak = static_cast<uint32_t>(0x1p24 * 0.05);
  a.args.compensation = kFactor;
  a.run();
  a.schedule(0);
  const TableShape& s = a.args.shape;
  const auto& t = a.args.tables;
  const int64_t cells_each = cuda::key_cells_of_unit(s), tiles = s.query_tiles;
  const auto key_cells = a.copy(t.key_cells, a.units() * cells_each * kD);
  const auto key_scales = a.copy(t.key_scales, a.units() * cells_each);
  const auto query_cells = a.copy(t.query_cells, a.heads() * tiles * kCells * kD);
  const auto query_scales = a.copy(t.query_scales, a.heads() * tiles * kCells);
  const auto k_mean = a.copy(t.k_mean, a.units() * kD);
  const auto mean_k = a.copy(t.mean_k, a.units() * 2 * kD);
  const auto group_v = a.copy(t.group_v, a.units() * s.key_tiles * kD);
  const auto range = a.copy(t.tile_range, a.heads() * tiles);
  const auto mask = a.copy(t.mask, a.heads() * tiles * s.mask_words);
  const auto remainder = a.copy(t.remainder, a.heads() * tiles * cuda::kRemainderWidth);
  for (int64_t unit = 0; unit < a.units(); ++unit)
    for (int64_t x = 0; x < kD; ++x) {
      const auto at = static_cast<size_t>(unit * 2 * kD + x / 8 * 16 + x % 8);
      const double want = k_mean[static_cast<size_t>(unit * kD + x)];
      EXPECT_NEAR(static_cast<double>(mean_k[at]) + mean_k[at + 8], want, 0x1p-17 * std::fabs(want))
          << unit << " " << x;
    }
  int64_t some = 0;
  for (int64_t head = 0; head < a.heads(); ++head)
    for (int64_t tile = 0; tile < tiles; ++tile) {
      SCOPED_TRACE(testing::Message() << "head " << head << " query tile " << tile);
      const int64_t unit = head / s.heads_q * s.heads_kv + head % s.heads_q / s.group, item = head * tiles + tile;
      const decide::TileRow& row = range[static_cast<size_t>(item)];
      const int64_t blocks = std::min(kCells, (c.seqlen_q - tile * kTileQ + decide::kCell - 1) / decide::kCell);
      std::vector<double> share(static_cast<size_t>(s.key_tiles)), log2_mass(static_cast<size_t>(blocks));
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t query = item * kCells + block;
        std::vector<double> mass(static_cast<size_t>(s.key_tiles));
        double all = 0;
        for (int64_t cell = row.begin * kCells; cell < row.end * kCells && cell * decide::kCell < c.seqlen_k; ++cell) {
          int64_t dot = 0;
          for (int64_t x = 0; x < kD; ++x)
            dot += query_cells[static_cast<size_t>(query * kD + x)] *
                   key_cells[static_cast<size_t>((unit * cells_each + cell) * kD + x)];
          const double keys = static_cast<double>(std::min<int64_t>(decide::kCell, c.seqlen_k - cell * decide::kCell));
          const double weight = keys * std::exp2(static_cast<double>(dot) * query_scales[static_cast<size_t>(query)] *
                                                 key_scales[static_cast<size_t>(unit * cells_each + cell)]);
          mass[static_cast<size_t>(cell / kCells)] += weight;
          all += weight;
        }
        for (size_t i = 0; i < mass.size(); ++i) share[i] += mass[i] / all / static_cast<double>(blocks);
        log2_mass[static_cast<size_t>(block)] = std::log2(all);
      }
      double left_out = 0;
      std::vector<double> mean(kD);
      for (int64_t key = row.begin; key < row.end; ++key) {
        if (mask[static_cast<size_t>(item * s.mask_words + key / 64)] >> key % 64 & 1) continue;
        left_out += share[static_cast<size_t>(key)];
        for (int64_t x = 0; x < kD; ++x)
          mean[static_cast<size_t>(x)] +=
              share[static_cast<size_t>(key)] * group_v[static_cast<size_t>((unit * s.key_tiles + key) * kD + x)];
      }
      const float* const got = &remainder[static_cast<size_t>(item * cuda::kRemainderWidth)];
      if (left_out == 0) {
        for (int64_t block = 0; block < kCells; ++block) EXPECT_EQ(got[kD + block], -INFINITY);
        continue;
      }
      // Shares are kept in units of 2^-16.
      const double step = 0x1p-16 * s.key_tiles;
      if (left_out < 4 * step) continue;
      ++some;
      for (int64_t block = 0; block < blocks; ++block)
        EXPECT_NEAR(std::exp2(got[kD + block] - log2_mass[static_cast<size_t>(block)]) / kFactor, left_out,
                    step + 1e-3 * left_out);
      for (int64_t x = 0; x < kD; ++x)
        EXPECT_NEAR(got[x] * left_out, mean[static_cast<size_t>(x)],
                    8 * step + 1e-3 * std::fabs(mean[static_cast<size_t>(x)]));
    }
  EXPECT_GT(some, 0);
}

}  // namespace
}  // namespace adaattn::test
