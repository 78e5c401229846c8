// What stands for skipped tiles: nothing, or the centroids of their groups of 32 keys, against float64 sums over the
// tiles that the library says it skipped.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "adaptive/structured.h"
#include "support/cases.h"
#include "support/compare.h"
#include "support/random.h"

namespace adaattn::test {
namespace {

constexpr int64_t kTile = 128, kGroup = 32, kSeqlen = 2048, kDim = 64;

AttentionData causal_data() {
  AttentionCase c = {.name = "Causal", .heads_q = 2, .heads_kv = 1, .seqlen_q = kSeqlen, .seqlen_k = kSeqlen};
  c.d_qk = kDim;
  c.mask = ADAATTN_MASK_CAUSAL;
  AttentionData data(c, uniform_dtypes()[0], run_seed(), ADAATTN_OUTPUT_LSE);
  make_structured(data, {}, run_seed() + 1);
  return data;
}

adaattn_adaptive_desc_t skipping() {
  adaattn_adaptive_desc_t adaptive = adaptive_desc(ADAATTN_POLICY_CUSTOM);
  adaptive.tolerance = 10;
  adaptive.tile_mass = 0.7;
  adaptive.probe = ADAATTN_PROBE_OFF;
  adaptive.rank_mode = ADAATTN_RANK_OFF;
  return adaptive;
}

// Sums of weights and of weighted values, relative to exp(reference).
struct Part {
  double weight = 0;
  std::vector<double> sum = std::vector<double>(kDim);
  void add(double w, const std::vector<double>& v) {
    weight += w;
    for (size_t c = 0; c < sum.size(); ++c) sum[c] += w * v[c];
  }
  double mean(int64_t c) const { return weight > 0 ? sum[static_cast<size_t>(c)] / weight : 0; }
};

struct RowParts {
  Part kept, skipped, centroids;
  double reference = 0;  // added to the logarithms of the weights
};

struct Group {
  std::vector<double> k, variance, v;
};

class Oracle {
 public:
  explicit Oracle(const AttentionData& data) : data_(data) {
    for (int64_t j = 0; j < kSeqlen; ++j) {
      k_.push_back(vector(data.k, data.key_index(0, j, 0, 0)));
      v_.push_back(vector(data.v, data.key_index(0, j, 0, 0)));
    }
    for (int64_t first = 0; first < kSeqlen; first += kGroup) {
      Group g{std::vector<double>(kDim), std::vector<double>(kDim), std::vector<double>(kDim)};
      for (size_t c = 0; c < kDim; ++c) {
        for (int64_t j = first; j < first + kGroup; ++j) {
          g.k[c] += k_[static_cast<size_t>(j)][c] / kGroup;
          g.v[c] += v_[static_cast<size_t>(j)][c] / kGroup;
        }
        for (int64_t j = first; j < first + kGroup; ++j)
          g.variance[c] += std::pow(k_[static_cast<size_t>(j)][c] - g.k[c], 2) / kGroup;
      }
      groups_.push_back(g);
    }
  }

  RowParts row(const AdaptivePlan::TileMap& map, int64_t i, int64_t h) const {
    const std::vector<double> q = vector(data_.q, data_.query_index(0, i, h, 0));
    const double scale = 1 / std::sqrt(static_cast<double>(kDim));
    const auto dot = [](const std::vector<double>& a, const std::vector<double>& b) {
      double sum = 0;
      for (size_t c = 0; c < a.size(); ++c) sum += a[c] * b[c];
      return sum;
    };
    RowParts parts;
    for (int64_t j = 0; j <= i; ++j)
      parts.reference = std::max(parts.reference, scale * dot(q, k_[static_cast<size_t>(j)]));
    for (int64_t t = 0; t <= i / kTile; ++t) {
      const bool exact = map.at(i / kTile, t) == 2;
      for (int64_t j = t * kTile; j < std::min((t + 1) * kTile, i + 1); ++j) {
        const double w = std::exp(scale * dot(q, k_[static_cast<size_t>(j)]) - parts.reference);
        (exact ? parts.kept : parts.skipped).add(w, v_[static_cast<size_t>(j)]);
      }
      for (int64_t g = t * kTile / kGroup; !exact && g < (t + 1) * kTile / kGroup; ++g) {
        const Group& group = groups_[static_cast<size_t>(g)];
        double variance = 0;
        for (size_t c = 0; c < kDim; ++c) variance += std::pow(scale * q[c], 2) * group.variance[c];
        // v / 2 is the second-order term; it is bent down where 32 keys have no Gaussian tail.
        const double score = scale * dot(q, group.k) + variance / 2 / (1 + variance / 8);
        parts.centroids.add(kGroup * std::exp(score - parts.reference), group.v);
      }
    }
    return parts;
  }

  double diameter() const {
    double most = 0;
    for (size_t i = 0; i < v_.size(); i += 3) {
      for (size_t j = 0; j < i; ++j) {
        double sum = 0;
        for (size_t c = 0; c < kDim; ++c) sum += std::pow(v_[i][c] - v_[j][c], 2);
        most = std::max(most, sum);
      }
    }
    return std::sqrt(most);
  }

 private:
  static std::vector<double> vector(const Tensor& tensor, std::vector<int64_t> index) {
    std::vector<double> x;
    for (int64_t c = 0; c < kDim; ++c) {
      index.back() = c;
      x.push_back(tensor.get(index));
    }
    return x;
  }
  const AttentionData& data_;
  std::vector<std::vector<double>> k_, v_;
  std::vector<Group> groups_;
};

// T5 with nothing in their place: o - o' = mu_F (mean of the skipped - mean of the kept), at most mu_F diam(V).
TEST(Replacement, SkippedTilesAreLeftOutAndTheRestRenormalised) {
  const Context context;
  AttentionData data = causal_data();
  const Tensor exact = exact_output(context, data);
  adaattn_adaptive_desc_t adaptive = skipping();
  adaptive.far_field = ADAATTN_SWITCH_OFF;
  const AdaptivePlan plan(context, data.desc, adaptive);
  ASSERT_TRUE(succeeded(plan.execute(data)));
  const Oracle oracle(data);
  const double diameter = oracle.diameter();
  int64_t rows = 0;
  for (int64_t h = 0; h < 2; ++h) {
    const AdaptivePlan::TileMap map = plan.tile_map(0, h);
    for (int64_t i = h; i < kSeqlen; i += 23) {
      const RowParts parts = oracle.row(map, i, h);
      const double mass = parts.skipped.weight / (parts.skipped.weight + parts.kept.weight);
      rows += mass > 0;
      double shift = 0;
      for (int64_t c = 0; c < kDim; ++c) {
        const auto at = data.query_index(0, i, h, c);
        const double approximate = data.o.get(at), difference = exact.get(at) - approximate;
        ASSERT_NEAR(approximate, parts.kept.mean(c), 2e-5) << "head " << h << ", row " << i;
        ASSERT_NEAR(difference, mass * (parts.skipped.mean(c) - parts.kept.mean(c)), 4e-5) << "row " << i;
        shift += difference * difference;
      }
      EXPECT_LE(std::sqrt(shift), mass * diameter + 1e-4) << "row " << i;
      EXPECT_NEAR(data.lse.get(data.row_index(0, i, h)), parts.reference + std::log(parts.kept.weight), 2e-5);
    }
  }
  EXPECT_GT(rows, 50);
  for (const adaattn_head_stats_t& head : plan.heads()) {
    EXPECT_GT(head.dropped_mass, 0);
    EXPECT_LT(head.dropped_mass, 0.3);
  }
}

// T5 with estimates in their place: o - o' = mu_F (mean of the skipped - mean of the centroids) + (mu_F - share of the
// centroids) (mean of the centroids - mean of the kept).
TEST(Replacement, CentroidsStandForSkippedTilesWithTheirSecondOrderWeight) {
  const Context context;
  AttentionData data = causal_data();
  const Tensor exact = exact_output(context, data);
  const AdaptivePlan plan(context, data.desc, skipping());
  ASSERT_TRUE(succeeded(plan.execute(data)));
  const Oracle oracle(data);
  double share_sum[2] = {};
  for (int64_t h = 0; h < 2; ++h) {
    const AdaptivePlan::TileMap map = plan.tile_map(0, h);
    for (int64_t i = 0; i < kSeqlen; ++i) {
      const RowParts parts = oracle.row(map, i, h);
      const double far = parts.centroids.weight, near = parts.kept.weight, share = far / (far + near);
      share_sum[h] += share;
      if (i % 23 != 0) continue;
      const double mass = parts.skipped.weight / (parts.skipped.weight + near);
      for (int64_t c = 0; c < kDim; ++c) {
        const auto at = data.query_index(0, i, h, c);
        const double approximate = data.o.get(at), difference = exact.get(at) - approximate;
        const double kept = parts.kept.mean(c), centroid = parts.centroids.mean(c);
        ASSERT_NEAR(approximate, (1 - share) * kept + share * centroid, 2e-5) << "head " << h << ", row " << i;
        ASSERT_NEAR(difference, mass * (parts.skipped.mean(c) - centroid) + (mass - share) * (centroid - kept), 4e-5)
            << "head " << h << ", row " << i;
      }
      EXPECT_NEAR(data.lse.get(data.row_index(0, i, h)), parts.reference + std::log(far + near), 2e-5);
    }
  }
  for (const adaattn_head_stats_t& head : plan.heads()) {
    EXPECT_FALSE(head.dense);
    EXPECT_NEAR(head.dropped_mass, share_sum[head.head] / kSeqlen, 1e-4);
  }
}

// Multiply-adds of every stage, two operations each, from the tiles that the statistics name.
TEST(Replacement, FlopsOfEveryStageAreThoseOfAHandCount) {
  const Context context;
  AttentionData data = causal_data();
  for (const adaattn_probe_t probe : {ADAATTN_PROBE_OFF, ADAATTN_PROBE_RANK, ADAATTN_PROBE_FULL}) {
    adaattn_adaptive_desc_t adaptive = skipping();
    adaptive.probe = probe;
    adaptive.probe_rank = probe == ADAATTN_PROBE_RANK ? 24 : 0;
    adaptive.rank_mode = ADAATTN_RANK_FIXED;
    adaptive.rank_ratio = 0.5;
    const AdaptivePlan plan(context, data.desc, adaptive);
    ASSERT_TRUE(succeeded(plan.execute(data)));
    const adaattn_plan_stats_t stats = plan.stats();
    EXPECT_EQ(stats.heads_low_rank, 2u);
    EXPECT_EQ(stats.heads_dense, 0u);
    const int64_t rank = 32, probe_width = probe == ADAATTN_PROBE_RANK ? 24 + 1 : kDim;
    int64_t kept = 0, skipped = 0, query_tiles = 0;
    for (int64_t h = 0; h < 2; ++h) {
      const AdaptivePlan::TileMap map = plan.tile_map(0, h);
      query_tiles += map.query_tiles;
      for (const uint8_t state : map.tiles) {
        kept += state == 2;
        skipped += state == 1;
      }
    }
    EXPECT_EQ(static_cast<uint64_t>(kept), stats.tiles_kept);
    EXPECT_EQ(static_cast<uint64_t>(kept + skipped), stats.tiles);
    EXPECT_GT(skipped, 0);
    int64_t products = kept * kTile * (kDim + rank);                 // scores and values
    products += skipped * (kTile / kGroup) * (2 * kDim + 1 + rank);  // centroids: mean, log2(32), variance, value
    products += query_tiles * kDim * rank;                           // O back to head_dim_v columns
    const auto swept = skipped + static_cast<int64_t>(stats.tiles_probed_in);
    if (probe != ADAATTN_PROBE_OFF) products += swept * kTile * probe_width;
    EXPECT_EQ(stats.flops_done, 2.0 * kTile * static_cast<double>(products)) << "probe " << probe;
  }
}

}  // namespace
}  // namespace adaattn::test
