// What analyze leaves on the device against float64.
#include "adaptive/sample.h"
#include "decide/needles.h"
#include "gpu/analysis.h"

namespace adaattn::test {
namespace {

class AdaptiveTables : public OnTheDevice {};

TEST_F(AdaptiveTables, StatisticsAreThoseOfFloat64) {
  for (const int64_t d : {64, 128}) {
    AttentionCase c = base_case();
    c.d_qk = c.d_v = d;
    AttentionData data(c, kBf16All, run_seed());
    make_structured(data, {.value_mean = 0.5}, run_seed());
    Analysis a(data, ADAATTN_POLICY_BALANCED);
    a.run();
    a.run();  // from the bases of the first
    const TableShape& s = a.args.shape;
    ASSERT_EQ(s.max_rank, d / 2);
    const auto k_mean = a.copy(a.args.tables.k_mean, a.units() * d),
               v_mean = a.copy(a.args.tables.v_mean, a.units() * d);
    const int64_t key_cells_each = cuda::key_cells_of_unit(s), query_cells_count = a.heads() * s.query_tiles * kCells;
    const auto key_cells = a.copy(a.args.tables.key_cells, a.units() * key_cells_each * d);
    const auto key_scales = a.copy(a.args.tables.key_scales, a.units() * key_cells_each);
    const auto query_cells = a.copy(a.args.tables.query_cells, query_cells_count * d);
    const auto query_scales = a.copy(a.args.tables.query_scales, query_cells_count);
    // The mean in bytes: right to half a step, and the largest element takes the whole range.
    const auto expect_cell = [&](const int8_t* bytes, float scale, const std::vector<double>& mean) {
      double top = 0;
      for (const double x : mean) top = std::max(top, std::fabs(x));
      EXPECT_NEAR(scale, top / 127, 1e-5 * top + 1e-7);
      for (int x = 0; x < static_cast<int>(d); ++x) {
        const auto column = static_cast<size_t>(cuda::table_column(x, static_cast<int>(d)));
        EXPECT_NEAR(bytes[x] * scale, mean[column], 0.51 * scale + 1e-5);
      }
    };
    const auto group_k = a.copy(a.args.tables.group_k, a.units() * s.key_groups() * 2 * d);
    const auto group_v = a.copy(a.args.tables.group_v, a.units() * s.key_groups() * d);
    const auto group_low = a.copy(a.args.tables.group_v_low, a.units() * s.key_groups() * s.max_rank);
    const auto v_low = a.copy(a.args.tables.v_low, a.units() * s.key_rows() * s.max_rank);
    const auto basis = a.copy(a.args.tables.basis, a.units() * d * s.max_rank);
    const auto stats = a.copy(a.args.tables.units, a.units());
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t h = 0; h < s.heads_kv; ++h) {
        const int64_t unit = b * s.heads_kv + h, n = c.seqlen_k, step = (n + cuda::kSampleRows - 1) / cuda::kSampleRows;
        const auto k = [&](int64_t j, int64_t x) { return data.k.get(data.key_index(b, j, h, x)); };
        const auto v = [&](int64_t j, int64_t x) { return data.v.get(data.key_index(b, j, h, x)); };
        for (int64_t x = 0; x < d; ++x) {
          double of_k = 0, of_v = 0, count = 0;
          for (int64_t j = 0; j < n; j += step, ++count) {
            of_k += k(j, x);
            of_v += v(j, x);
          }
          EXPECT_NEAR(k_mean[static_cast<size_t>(unit * d + x)], of_k / count, 1e-5);
          EXPECT_NEAR(v_mean[static_cast<size_t>(unit * d + x)], of_v / count, 1e-5);
        }
        // Tiles: the first, one within and the ragged last.
        for (const int64_t tile : {int64_t{0}, int64_t{5}, int64_t{s.key_tiles - 1}}) {
          const int64_t first = tile * kTileK, last = std::min(first + kTileK, n);
          for (int64_t g = tile * kCells; g < (tile + 1) * kCells; ++g) {
            const int64_t begin = g * decide::kCell, end = std::min(begin + decide::kCell, n);
            const auto at = static_cast<size_t>(unit * key_cells_each + g);
            std::vector<double> mean(static_cast<size_t>(d));
            for (int64_t x = 0; x < d && begin < end; ++x) {
              for (int64_t j = begin; j < end; ++j)
                mean[static_cast<size_t>(x)] += k(j, x) / static_cast<double>(end - begin);
              mean[static_cast<size_t>(x)] -= k_mean[static_cast<size_t>(unit * d + x)];
            }
            expect_cell(&key_cells[at * static_cast<size_t>(d)], key_scales[at], mean);
          }
          constexpr int64_t kGroup = cuda::kFarKeys, kGroups = kTileK / kGroup;
          for (int64_t g = tile * kGroups; g < (tile + 1) * kGroups && g * kGroup < n; ++g) {
            const int64_t end = std::min((g + 1) * kGroup, n);
            const auto rows = static_cast<double>(end - g * kGroup);
            std::vector<double> low(static_cast<size_t>(s.max_rank));
            for (int64_t x = 0; x < d; ++x) {
              double mean = 0, variance = 0, value = 0;
              for (int64_t j = g * kGroup; j < end; ++j) {
                mean += k(j, x) / rows;
                value += v(j, x) / rows;
              }
              for (int64_t j = g * kGroup; j < end; ++j) variance += (k(j, x) - mean) * (k(j, x) - mean) / rows;
              const size_t at = static_cast<size_t>((unit * s.key_groups() + g) * 2 * d + x);
              EXPECT_NEAR(group_k[at], mean, 4e-3 * std::fabs(mean) + 1e-6);
              const double scaled = a.args.scale_log2 * M_LN2 / 2 * variance;
              EXPECT_NEAR(group_k[at + static_cast<size_t>(d)], scaled, 4e-3 * scaled + 1e-6);
              EXPECT_NEAR(group_v[static_cast<size_t>((unit * s.key_groups() + g) * d + x)], value,
                          4e-3 * std::fabs(value) + 1e-6);
              for (int64_t r = 0; r < s.max_rank; ++r)
                low[static_cast<size_t>(r)] += (value - v_mean[static_cast<size_t>(unit * d + x)]) *
                                               basis[static_cast<size_t>((unit * d + x) * s.max_rank + r)];
            }
            for (int64_t r = 0; r < s.max_rank; ++r)
              EXPECT_NEAR(group_low[static_cast<size_t>((unit * s.key_groups() + g) * s.max_rank + r)],
                          low[static_cast<size_t>(r)], 4e-3 * std::fabs(low[static_cast<size_t>(r)]) + 2e-2);
          }
          for (const int64_t j : {first, last - 1})
            for (int64_t r = 0; r < s.max_rank; ++r) {
              double want = 0;
              for (int64_t x = 0; x < d; ++x)
                want += (v(j, x) - v_mean[static_cast<size_t>(unit * d + x)]) *
                        basis[static_cast<size_t>((unit * d + x) * s.max_rank + r)];
              EXPECT_NEAR(v_low[static_cast<size_t>((unit * s.key_rows() + j) * s.max_rank + r)], want,
                          4e-3 * std::fabs(want) + 2e-2);
            }
        }
        for (int64_t j = n; j < s.key_rows(); ++j)
          for (int64_t r = 0; r < s.max_rank; ++r)
            ASSERT_EQ(v_low[static_cast<size_t>((unit * s.key_rows() + j) * s.max_rank + r)], 0);
        // Spread, and what the rank keeps of it.
        double total = 0, captured = 0;
        const cuda::UnitStats& u = stats[static_cast<size_t>(unit)];
        ASSERT_GT(u.rank_class, 0);
        for (int64_t j = 0; j < n; ++j) {
          for (int64_t x = 0; x < d; ++x) total += std::pow(v(j, x) - v_mean[static_cast<size_t>(unit * d + x)], 2);
          for (int64_t r = 0; r < decide::rank_of_class(u.rank_class); ++r)
            captured += std::pow(v_low[static_cast<size_t>((unit * s.key_rows() + j) * s.max_rank + r)], 2);
        }
        EXPECT_NEAR(u.v_spread, std::sqrt(total / static_cast<double>(n)), 1e-4 * u.v_spread);
        EXPECT_NEAR(u.rank_energy, captured / total, 2e-3);
        EXPECT_GT(u.rank_energy, 0.9);
        EXPECT_NEAR(u.errors.rank_error[u.rank_class], std::sqrt(1 - u.rank_energy), 1e-4);
      }
    for (int64_t h = 0; h < s.heads_q; ++h)
      for (const int64_t tile : {int64_t{0}, int64_t{s.query_tiles - 1}})
        for (int64_t cell = tile * kCells; cell < (tile + 1) * kCells; ++cell) {
          const int64_t first = cell * decide::kCell, last = std::min(first + decide::kCell, c.seqlen_q);
          std::vector<double> mean(static_cast<size_t>(d));
          for (int64_t x = 0; x < d && first < last; ++x) {
            const auto count = static_cast<double>((last - first + cuda::kQueryStep - 1) / cuda::kQueryStep);
            for (int64_t i = first; i < last; i += cuda::kQueryStep)
              mean[static_cast<size_t>(x)] +=
                  static_cast<double>(a.args.scale_log2) * data.q.get(data.query_index(1, i, h, x)) / count;
          }
          const auto at = static_cast<size_t>((s.heads_q + h) * s.query_tiles * kCells + cell);
          expect_cell(&query_cells[at * static_cast<size_t>(d)], query_scales[at], mean);
        }
  }
}

// Blocks of `each` tokens from first on in a table of means: right to half a step of the scale, whose `scaled` blocks
// share the largest element.
struct Means {
  std::vector<int8_t> bytes;
  std::vector<float> scales;
  int64_t each = 0, step = 1, scaled = 1;
};

TEST_F(AdaptiveTables, StatisticsOfNamedPoliciesAreThoseOfFloat64) {
  AttentionCase ragged = base_case(), packed = base_case(), other = base_case();
  ragged.used_k = {1500, 1037};
  ragged.seqlen_q = 1301;
  packed.layout_q = packed.layout_kv = ADAATTN_LAYOUT_THD;
  packed.batch = 3;
  packed.lens_q = {703, 0, 1290};
  packed.lens_k = {1101, 640, 1290};
  other.layout_q = other.layout_kv = ADAATTN_LAYOUT_BHSD;
  for (const AttentionCase& c : {ragged, packed, other})
    for (const Rules rules : {Rules::kTiles, Rules::kNeedles}) {
      SCOPED_TRACE(describe(c) + (rules == Rules::kTiles ? " tiles" : " needles"));
      AttentionData data(c, kBf16All, run_seed());
      make_structured(data, {.value_mean = 0.5}, run_seed());
      Analysis a(data, ADAATTN_POLICY_BALANCED, 0, false, rules);
      a.run();
      ASSERT_TRUE(cuda::streams(a.args));
      const TableShape& s = a.args.shape;
      const cuda::AnalyzeTables& t = a.args.tables;
      const bool needles = rules == Rules::kNeedles;
      constexpr int64_t kD = 128;
      const auto k_mean = a.copy(t.k_mean, a.units() * kD), v_mean = a.copy(t.v_mean, a.units() * kD);
      const auto energy = a.copy(t.energy, a.units() * s.key_tiles);
      const int64_t cells = a.units() * cuda::key_cells_of_unit(s), blocks = a.heads() * s.query_tiles * kCells;
      const auto means = [&](const int8_t* bytes, const float* scales, int64_t count, int64_t each, int64_t step,
                             int64_t scaled) {
        return Means{a.copy(bytes, count * kD), a.copy(scales, count / scaled), each, step, scaled};
      };
      const auto expect = [&](const Means& table, int64_t block0, int64_t count, int64_t length, double factor,
                              const auto& at) {
        for (int64_t group = 0; group < count; group += table.scaled) {
          double top = 0;
          std::vector<std::vector<double>> mean(static_cast<size_t>(table.scaled), std::vector<double>(kD));
          for (int64_t i = 0; i < table.scaled; ++i) {
            const int64_t begin = (group + i) * table.each, end = std::min(begin + table.each, length);
            for (int64_t x = 0; x < kD && begin < end; ++x) {
              double sum = 0, rows = 0;
              for (int64_t j = begin; j < end; j += table.step, ++rows) sum += at(j, x);
              mean[static_cast<size_t>(i)][static_cast<size_t>(x)] = factor * sum / rows;
              top = std::max(top, std::fabs(factor * sum / rows));
            }
          }
          const auto scale = static_cast<double>(table.scales[static_cast<size_t>((block0 + group) / table.scaled)]);
          ASSERT_NEAR(scale, top / 127, 1e-4 * top + 1e-7) << group;
          for (int64_t i = 0; i < table.scaled; ++i)
            for (int x = 0; x < kD; ++x)
              ASSERT_NEAR(table.bytes[static_cast<size_t>((block0 + group + i) * kD + x)] * scale,
                          mean[static_cast<size_t>(i)][static_cast<size_t>(cuda::table_column(x, kD))],
                          0.52 * scale + 1e-5)
                  << group + i;
        }
      };
      const Means of_keys = means(t.key_cells, t.key_scales, cells, decide::kCell, 1, 1);
      const Means of_queries =
          means(t.query_cells, t.query_scales, blocks, decide::kCell, needles ? 1 : cuda::kQueryStep, 1);
      Means key_needles, query_needles;
      if (needles) {
        key_needles = means(t.needle_keys, t.needle_key_scales, cells * decide::kNeedlesOfCell, decide::kNeedleKeys, 1,
                            decide::kNeedlesOfCell);
        query_needles = means(t.needle_queries, t.needle_query_scales, 2 * blocks, decide::kNeedleRows, 1, 1);
      }
      for (int64_t b = 0; b < a.host.batch; ++b) {
        const Sequence seq = sequence_of(a.host, b);
        for (int64_t h = 0; h < s.heads_kv; ++h) {
          const int64_t unit = b * s.heads_kv + h, first = unit * cuda::key_cells_of_unit(s);
          const auto of_unit = [&](const std::vector<float>& mean, int64_t x) {
            return static_cast<double>(mean[static_cast<size_t>(unit * kD + x)]);
          };
          const auto key = [&](int64_t j, int64_t x) {
            return data.k.get(data.key_index(b, j, h, x)) - of_unit(k_mean, x);
          };
          expect(of_keys, first, s.key_tiles * kCells, seq.len_k, 1, key);
          const int64_t there = (seq.len_k + decide::kCell - 1) / decide::kCell * decide::kNeedlesOfCell;
          if (needles) expect(key_needles, first * decide::kNeedlesOfCell, there, seq.len_k, 1, key);
          for (int64_t tile = 0; tile * kTileK < seq.len_k; ++tile) {
            const int64_t begin = tile * kTileK, end = std::min(begin + kTileK, seq.len_k);
            double within = 0, between = 0;
            for (int64_t x = 0; x < kD; ++x) {
              double sum = 0, square = 0;
              for (int64_t j = begin; j < end; ++j) {
                const double v = data.v.get(data.key_index(b, j, h, x));
                sum += v;
                square += v * v;
              }
              const auto rows = static_cast<double>(end - begin);
              within += square - sum * sum / rows;
              between += rows * std::pow(sum / rows - of_unit(v_mean, x), 2);
            }
            const cuda::TileEnergy& e = energy[static_cast<size_t>(unit * s.key_tiles + tile)];
            EXPECT_NEAR(e.within, within, 1e-3 * within);
            EXPECT_NEAR(e.between, between, 1e-3 * between + 1e-6 * within);
            EXPECT_NE(e.finite, 0);
          }
        }
        for (int64_t h = 0; h < s.heads_q; ++h) {
          const int64_t first = (b * s.heads_q + h) * s.query_tiles * kCells;
          const auto query = [&](int64_t i, int64_t x) { return data.q.get(data.query_index(b, i, h, x)); };
          const auto factor = static_cast<double>(a.args.scale_log2);
          expect(of_queries, first, s.query_tiles * kCells, seq.len_q, factor, query);
          if (needles) expect(query_needles, 2 * first, s.query_tiles * 2 * kCells, seq.len_q, factor, query);
        }
      }
    }
}

TEST_F(AdaptiveTables, CentroidsBeyondASequenceAreZero) {
  AttentionCase c = base_case();
  c.used_k = {1500, 700};
  AttentionData data(c, kBf16All, run_seed());
  make_structured(data, {}, run_seed());
  Analysis a(data, ADAATTN_POLICY_SPEED);
  a.run();
  const TableShape& s = a.args.shape;
  const auto zero_beyond = [&](const __nv_bfloat16* table, int64_t width) {
    const auto rows = a.copy(table, a.units() * s.key_groups() * width);
    for (int64_t unit = s.heads_kv; unit < 2 * s.heads_kv; ++unit)  // of the second sequence
      for (int64_t g = 0; g < s.key_groups(); ++g)
        for (int64_t x = 0; x < width; ++x) {
          const float value = rows[static_cast<size_t>((unit * s.key_groups() + g) * width + x)];
          if (g * cuda::kFarKeys >= 700)
            ASSERT_EQ(value, 0) << g;
          else
            ASSERT_TRUE(std::isfinite(value)) << g;
        }
  };
  zero_beyond(a.args.tables.group_k, 2 * s.d_qk);
  zero_beyond(a.args.tables.group_v, s.d_v);
  zero_beyond(a.args.tables.group_v_low, s.max_rank);
}

TEST_F(AdaptiveTables, NotANumberLeavesItsUnitDense) {
  AttentionCase c = base_case();
  for (const bool in_query : {false, true}) {
    AttentionData data(c, kBf16All, run_seed());
    make_structured(data, {}, run_seed());
    if (in_query)
      data.q.set(data.query_index(0, 700, 1, 5), std::nan(""));
    else
      data.v.set(data.key_index(0, 700, 0, 5), std::nan(""));
    Analysis a(data, ADAATTN_POLICY_SPEED);
    a.run();
    const auto choice = a.copy(a.args.tables.choice, a.heads());
    for (int g = 0; g < 3; ++g) EXPECT_TRUE(choice[static_cast<size_t>(g)].dense) << g;
    bool skips = false;
    for (size_t h = 3; h < choice.size(); ++h) skips = skips || !choice[h].dense;
    EXPECT_TRUE(skips);
  }
}

}  // namespace
}  // namespace adaattn::test
