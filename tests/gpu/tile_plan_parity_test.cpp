// The statistics of adaptive plans on a CUDA device beside those of the same call on the CPU.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "gpu/tile_plans.h"

namespace adaattn::test {
namespace {

// In how many tiles of a head two plans differ.
int64_t tiles_apart(const AdaptivePlan& one, const AdaptivePlan& two, const adaattn_head_stats_t& head) {
  const AdaptivePlan::TileMap a = one.tile_map(head.batch, head.head), b = two.tile_map(head.batch, head.head);
  EXPECT_EQ(a.tiles.size(), b.tiles.size());
  int64_t apart = 0;
  for (size_t i = 0; i < a.tiles.size() && i < b.tiles.size(); ++i) apart += a.tiles[i] != b.tiles[i];
  return apart;
}

// Sums of a plan's first call are those of its heads.
void expect_sums(const adaattn_plan_stats_t& sum, const std::vector<adaattn_head_stats_t>& heads) {
  double entropy = 0, predicted = 0, dropped = 0, measured = 0, most = 0, least_entropy = 1, most_entropy = 0, rank = 0;
  for (const adaattn_head_stats_t& head : heads) {
    entropy += head.entropy;
    least_entropy = std::min(least_entropy, head.entropy);
    most_entropy = std::max(most_entropy, head.entropy);
    predicted += head.predicted_error;
    dropped += head.dropped_mass;
    rank += static_cast<double>(head.rank_v);
    if (head.dense) continue;  // not measured
    measured += head.measured_error;
    most = std::max(most, head.measured_error);
  }
  EXPECT_EQ(sum.heads, heads.size());
  EXPECT_NEAR(sum.entropy_sum, entropy, 1e-6);
  EXPECT_NEAR(sum.entropy_min, least_entropy, 1e-7);
  EXPECT_NEAR(sum.entropy_max, most_entropy, 1e-7);
  EXPECT_NEAR(sum.predicted_error_sum, predicted, 1e-6);
  EXPECT_NEAR(sum.dropped_mass_sum, dropped, 1e-6);
  EXPECT_NEAR(sum.measured_error_sum, measured, 1e-6);
  EXPECT_NEAR(sum.measured_error_max, most, 1e-7);
  EXPECT_GE(sum.measured_row_error_max, most);
  EXPECT_EQ(sum.rank_v_sum, rank);
}

// Every field that a call fills in, beside the same call on the CPU. Its statistics are rounded in other places: a tile
// at the edge of a mass level may be kept there and not here, and the head's errors are as far apart then as what the
// tile holds.
TEST_F(TilePlans, StatisticsAreThoseOfTheCpu) {
  const Context host, context(kCuda);
  AttentionCase packed = causal_case(1500);
  packed.name = "Packed";
  packed.layout_q = packed.layout_kv = ADAATTN_LAYOUT_THD;
  packed.lens_q = {1500, 900};
  packed.lens_k = {1500, 1290};
  for (const AttentionCase& c : {causal_case(2048), packed})
    for (const auto& [far_field, probe] : {std::pair{false, ADAATTN_PROBE_OFF},
                                           {true, ADAATTN_PROBE_OFF},
                                           {false, ADAATTN_PROBE_FULL},
                                           {true, ADAATTN_PROBE_FULL},
                                           {false, ADAATTN_PROBE_RANK},
                                           {true, ADAATTN_PROBE_RANK}}) {
      SCOPED_TRACE(testing::Message() << describe(c) << " far field " << far_field << " probe " << probe);
      AttentionData data = structured(c);
      adaattn_adaptive_desc_t adaptive = custom_desc(0.9);
      adaptive.far_field = far_field ? ADAATTN_SWITCH_ON : ADAATTN_SWITCH_OFF;
      adaptive.probe = probe;
      adaptive.needle_share = probe == ADAATTN_PROBE_OFF ? 0 : 0.05;
      adaptive.rank_mode = ADAATTN_RANK_OFF;  // it may choose by what a rank costs on a device
      adaptive.verify_rows = 4096;            // every row
      const AdaptivePlan theirs(host, data.desc, adaptive), ours(context, data.desc, adaptive);
      AttentionData on_cpu = with_own_outputs(data);
      ASSERT_TRUE(succeeded(theirs.execute(on_cpu)));
      ASSERT_NO_FATAL_FAILURE(execute(ours, data));
      const std::vector<adaattn_head_stats_t> want = theirs.heads(), got = ours.heads();
      ASSERT_EQ(got.size(), want.size());
      int64_t all_apart = 0;
      for (size_t i = 0; i < got.size(); ++i) {
        SCOPED_TRACE(i);
        EXPECT_EQ(got[i].batch, want[i].batch);
        EXPECT_EQ(got[i].head, want[i].head);
        EXPECT_EQ(got[i].dense, want[i].dense);
        EXPECT_EQ(got[i].rank_v, want[i].rank_v);
        EXPECT_EQ(got[i].rank_energy, want[i].rank_energy);
        EXPECT_EQ(got[i].precision, want[i].precision);
        EXPECT_NEAR(got[i].entropy, want[i].entropy, 0.01);
        const int64_t apart = tiles_apart(ours, theirs, got[i]);
        all_apart += apart;
        // Of the rows of a query tile, a tile that is dropped has up to a tenth of the mass. Errors add in quadrature.
        const auto rows_of = [&](int64_t tiles) {
          return 128.0 * static_cast<double>(tiles) / static_cast<double>(data.len_q(got[i].batch));
        };
        const auto expect_near = [](double mine, double other, double rounding, double rows) {
          EXPECT_NEAR(mine, other, 0.1 * other + rounding + std::sqrt(other * other + 0.1 * rows) - other);
        };
        // What decide leaves out on one side alone a probe may find there: then the maps are the same, its estimates
        // not.
        const double decided = rows_of(apart + (probe == ADAATTN_PROBE_OFF ? 0 : 2));
        EXPECT_NEAR(got[i].dropped_mass, want[i].dropped_mass, 0.1 * want[i].dropped_mass + 0.002 + 0.1 * decided);
        expect_near(got[i].predicted_error, want[i].predicted_error, 0.002, decided);
        if (got[i].dense) continue;
        expect_near(got[i].measured_error, want[i].measured_error, 0.004, rows_of(apart));
        // Of errors that are little more than rounding a multiplier says nothing.
        if (apart == 0 && probe == ADAATTN_PROBE_OFF && want[i].measured_error > 0.01) {
          EXPECT_NEAR(got[i].feedback, want[i].feedback, 0.2 * want[i].feedback);
        }
      }
      const adaattn_plan_stats_t a = ours.stats(), b = theirs.stats();
      expect_sums(a, got);
      expect_sums(b, want);
      EXPECT_LT(static_cast<double>(all_apart), 0.04 * static_cast<double>(b.tiles));
      EXPECT_EQ(a.calls, b.calls);
      EXPECT_EQ(a.query_rows, b.query_rows);
      EXPECT_EQ(a.score_pairs, b.score_pairs);
      EXPECT_EQ(a.flops, b.flops);
      EXPECT_EQ(a.heads_dense, b.heads_dense);
      EXPECT_EQ(a.heads_low_rank, b.heads_low_rank);
      EXPECT_EQ(a.heads_bf16, b.heads_bf16);
      EXPECT_EQ(a.heads_f32 + a.heads_f16 + a.heads_i8, b.heads_f32 + b.heads_f16 + b.heads_i8);
      EXPECT_EQ(a.tiles, b.tiles);
      EXPECT_LE(std::abs(static_cast<int64_t>(a.tiles_kept - b.tiles_kept)), all_apart);
      // There a tile that is taken in raises the threshold of those after it, here that of the next sweep.
      const auto found = static_cast<double>(a.tiles_probed_in), on_host = static_cast<double>(b.tiles_probed_in);
      EXPECT_NEAR(found, on_host, 0.2 * on_host + static_cast<double>(all_apart) + 2);
      EXPECT_EQ(a.tiles_probed_in > 0, probe != ADAATTN_PROBE_OFF);
      // A centroid stands for 128 keys here and for 32 on the CPU.
      EXPECT_NEAR(a.flops_done / b.flops_done, 1, far_field ? 0.06 : 0.02);
      EXPECT_EQ(a.verified_heads, b.verified_heads);
      EXPECT_EQ(a.verified_rows, b.verified_rows);
      if (all_apart == 0) {
        EXPECT_NEAR(a.measured_row_error_max, b.measured_row_error_max, 0.2 * b.measured_row_error_max);
      }
      EXPECT_EQ(a.heads_over_tolerance, b.heads_over_tolerance);
      EXPECT_EQ(a.heads_recomputed, b.heads_recomputed);
      for (const double seconds : {a.seconds_analyze, a.seconds_decide, a.seconds_attend, a.seconds_verify})
        EXPECT_GT(seconds, 0);
    }
}

// What block statistics cannot see: lengths that the host knows and lengths that the device does, a few rows, several
// calls.
TEST_F(TilePlans, StatisticsOfExactPlansAreThoseOfTheCpu) {
  const Context host, context(kCuda);
  AttentionCase softcap = causal_case(700), used = causal_case(450), decode = causal_case(900);
  softcap.name = "Softcap";
  softcap.softcap = 20;
  used.name = "Used";
  used.used_k = {450, 301};
  decode.name = "Decode";
  decode.seqlen_q = 3;
  for (const AttentionCase& c : {causal_case(300), softcap, used, decode}) {
    SCOPED_TRACE(describe(c));
    AttentionData data(c, kBf16All, run_seed(), ADAATTN_OUTPUT_LSE);
    AttentionData on_cpu = with_own_outputs(data);
    const adaattn_adaptive_desc_t adaptive = adaptive_desc(ADAATTN_POLICY_BALANCED);
    const AdaptivePlan theirs(host, data.desc, adaptive), ours(context, data.desc, adaptive);
    EXPECT_TRUE(ours.info().exact);
    for (int call = 1; call <= 2; ++call) {
      ASSERT_TRUE(succeeded(theirs.execute(on_cpu)));
      ASSERT_NO_FATAL_FAILURE(execute(ours, data));
      adaattn_plan_stats_t a = ours.stats(), b = theirs.stats();
      EXPECT_EQ(a.heads_dense, 8u * static_cast<uint64_t>(call));
      EXPECT_GT(a.tiles, 0u);
      EXPECT_EQ(a.tiles, b.tiles);
      EXPECT_EQ(a.tiles_kept, b.tiles_kept);
      EXPECT_NEAR(a.flops_done, b.flops_done, 1e-12 * b.flops_done);
      a.flops_done = b.flops_done;  // summed in another order
      EXPECT_EQ(std::memcmp(&a, &b, sizeof a), 0) << "another field";
    }
    const std::vector<adaattn_head_stats_t> want = theirs.heads(), got = ours.heads();
    ASSERT_EQ(want.size(), 8u);
    ASSERT_EQ(got.size(), 8u);
    for (size_t i = 0; i < got.size(); ++i) {
      SCOPED_TRACE(i);
      EXPECT_TRUE(std::isnan(got[i].measured_error));
      adaattn_head_stats_t a = got[i], b = want[i];
      a.measured_error = b.measured_error = 0;
      EXPECT_EQ(std::memcmp(&a, &b, sizeof a), 0);
    }
    EXPECT_EQ(ours.stats(ADAATTN_STATS_WAIT | ADAATTN_STATS_RESET).calls, 2u);
    EXPECT_EQ(ours.stats().tiles + ours.stats().heads + ours.stats().query_rows, 0u);
  }
}

}  // namespace
}  // namespace adaattn::test
