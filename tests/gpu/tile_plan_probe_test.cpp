// The probe of adaptive plans on a CUDA device: keys that matter by themselves, in tiles that decide would drop.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>

#include "gpu/tile_plans.h"
#include "support/random.h"

namespace adaattn::test {
namespace {

class Probes : public TilePlans {};

adaattn_adaptive_desc_t probing(double needle_share, bool far_field = false,
                                adaattn_probe_t probe = ADAATTN_PROBE_FULL) {
  adaattn_adaptive_desc_t adaptive = custom_desc(0.7);
  adaptive.probe = probe;
  adaptive.needle_share = needle_share;
  adaptive.far_field = far_field ? ADAATTN_SWITCH_ON : ADAATTN_SWITCH_OFF;
  return adaptive;
}

// Single queries point at single keys, at random places, of any sequence and head; what the keys get of their rows goes
// from nothing to all.
void plant_needles(AttentionData& data, uint64_t seed, int count) {
  Random random(seed);
  const int64_t group = data.desc.heads_q / data.desc.heads_kv;
  for (int n = 0; n < count; ++n) {
    const int64_t b = random.between(0, data.batch() - 1), h = random.between(0, data.desc.heads_q - 1);
    if (data.len_q(b) == 0 || data.len_k(b) == 0) continue;
    const int64_t i = random.between(0, data.len_q(b) - 1), j = random.between(0, data.len_k(b) - 1);
    const double strength = random.uniform();
    for (int64_t c = 0; c < 128; ++c) {
      const double x = random.normal();
      data.k.set(data.key_index(b, j, h / group, c), 2 * x);
      data.q.set(data.query_index(b, i, h, c), strength * x);
    }
  }
}

// The largest share that a key of each tile has in a row of the query tile, by float64 scores; -1: none is visible.
std::vector<double> largest_shares(const AttentionData& data, int64_t b, int64_t h, int64_t key_tiles) {
  const int64_t group = data.desc.heads_q / data.desc.heads_kv, len_q = data.len_q(b), len_k = data.len_k(b);
  const auto load = [](const Tensor& x, const auto& index, int64_t rows) {
    std::vector<float> out(static_cast<size_t>(rows * 128));
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < 128; ++c) out[static_cast<size_t>(i * 128 + c)] = static_cast<float>(x.get(index(i, c)));
    return out;
  };
  const std::vector<float> q = load(
      data.q, [&](int64_t i, int64_t c) { return data.query_index(b, i, h, c); }, len_q);
  const std::vector<float> k = load(
      data.k, [&](int64_t j, int64_t c) { return data.key_index(b, j, h / group, c); }, len_k);
  std::vector<double> largest(static_cast<size_t>((len_q + 127) / 128 * key_tiles), -1), score;
  for (int64_t i = 0; i < len_q; ++i) {
    const adaattn_attn_desc_t& d = data.desc;
    const int64_t at = i + (d.mask == ADAATTN_MASK_CAUSAL ? len_k - len_q : 0);
    const int64_t begin = d.window_left >= 0 ? std::max<int64_t>(0, at - d.window_left) : 0;
    const int64_t end = d.mask == ADAATTN_MASK_CAUSAL ? std::min(len_k, at + 1) : len_k;
    if (begin >= end) continue;
    score.assign(static_cast<size_t>(end - begin), 0);
    double top = -std::numeric_limits<double>::infinity(), sum = 0;
    for (int64_t j = begin; j < end; ++j) {
      double& s = score[static_cast<size_t>(j - begin)];
      for (int64_t c = 0; c < 128; ++c)
        s += static_cast<double>(q[static_cast<size_t>(i * 128 + c)]) * k[static_cast<size_t>(j * 128 + c)];
      s /= std::sqrt(128.0);
      top = std::max(top, s);
    }
    for (const double s : score) sum += std::exp(s - top);
    for (int64_t j = begin; j < end; ++j) {
      double& most = largest[static_cast<size_t>(i / 128 * key_tiles + j / 128)];
      most = std::max(most, std::exp(score[static_cast<size_t>(j - begin)] - top) / sum);
    }
  }
  return largest;
}

// What the header promises: no key that holds needle_share of a row or more is dropped, short of rounding.
TEST_F(Probes, NoKeyThatHoldsTheShareIsDropped) {
  const Context context(kCuda);
  AttentionCase window = causal_case(1500), packed = causal_case(1300), full = causal_case(1100),
                used = causal_case(1200), chunk = causal_case(1700);
  window.name = "Window";
  window.window_left = 900;
  packed.name = "Packed";
  packed.layout_q = packed.layout_kv = ADAATTN_LAYOUT_THD;
  packed.lens_q = {1300, 411};
  packed.lens_k = {1300, 1001};
  full.name = "Full";
  full.mask = ADAATTN_MASK_NONE;
  full.heads_q = 6;
  used.name = "UsedKeys";
  used.used_k = {1200, 777};
  chunk.name = "LastQueries";
  chunk.seqlen_q = 500;
  for (const AttentionCase& c : {causal_case(1400), window, packed, full, used, chunk})
    for (const bool far_field : {false, true}) {
      const double needle_share = far_field ? 0.1 : 0.05;
      SCOPED_TRACE(testing::Message() << c.name << ", share " << needle_share << ", far field " << far_field);
      AttentionData data = structured(c);
      plant_needles(data, run_seed() + 3, 60);
      const AdaptivePlan plan(context, data.desc, probing(needle_share, far_field));
      ASSERT_NO_FATAL_FAILURE(execute(plan, data));
      EXPECT_GT(check_maps(plan, data), 0);
      const adaattn_plan_stats_t stats = plan.stats();
      EXPECT_GT(stats.tiles_probed_in, 0u);
      EXPECT_LT(stats.tiles_probed_in, stats.tiles_kept);
      int64_t heavy = 0;
      for (int64_t b = 0; b < data.batch(); ++b)
        for (int64_t h = 0; h < data.desc.heads_q; ++h) {
          const AdaptivePlan::TileMap map = plan.tile_map(b, h);
          const std::vector<double> largest = largest_shares(data, b, h, map.key_tiles);
          ASSERT_EQ(largest.size(), map.tiles.size());
          for (size_t t = 0; t < largest.size(); ++t) {
            heavy += largest[t] >= needle_share;
            if (largest[t] >= needle_share * 1.001) {
              EXPECT_EQ(map.tiles[t], 2) << "b " << b << " head " << h << " tile " << t << " share " << largest[t];
            }
          }
        }
      EXPECT_GT(heavy, 0);
    }
}

// A share that hardly any key has of what is computed anyway: the bits of the heads in which none is found.
TEST_F(Probes, AProbeThatFindsNothingLeavesTheResult) {
  const Context context(kCuda);
  AttentionData data = structured(causal_case(2048));
  adaattn_adaptive_desc_t adaptive = probing(1);
  adaptive.tile_mass = 0.9;
  adaptive.rank_mode = ADAATTN_RANK_OFF;
  const AdaptivePlan with(context, data.desc, adaptive);
  adaptive.probe = ADAATTN_PROBE_OFF;
  const AdaptivePlan without(context, data.desc, adaptive);
  AttentionData again = with_own_outputs(data);
  ASSERT_NO_FATAL_FAILURE(execute(with, data));
  ASSERT_NO_FATAL_FAILURE(execute(without, again));
  EXPECT_EQ(with.stats().heads_dense, 0u);
  EXPECT_EQ(with.stats().tiles_kept, without.stats().tiles_kept + with.stats().tiles_probed_in);
  EXPECT_LT(with.stats().tiles_kept, with.stats().tiles);
  int64_t same = 0;
  for (int64_t b = 0; b < data.batch(); ++b)
    for (int64_t h = 0; h < data.desc.heads_q; ++h) {
      if (with.tile_map(b, h).tiles != without.tile_map(b, h).tiles) continue;
      ++same;
      int64_t differ = 0;
      for (int64_t i = 0; i < data.len_q(b); ++i)
        for (int64_t c = 0; c < 128; ++c) {
          const auto at = data.query_index(b, i, h, c);
          differ += data.o.get(at) != again.o.get(at);
        }
      EXPECT_EQ(differ, 0) << "b " << b << " head " << h;
    }
  EXPECT_GE(same, 4);
}

// Keys that differ in 20 directions alone: in 32 of them, well chosen, scores are those in all 128, but for the
// rounding of what is projected.
TEST_F(Probes, OfRankSeesScoresThatHaveNoMoreDimensions) {
  const Context context(kCuda);
  AttentionData data = structured(causal_case(1400));
  plant_needles(data, run_seed() + 3, 60);
  Random random(run_seed() + 4);
  constexpr int kDirections = 20;
  std::array<std::array<double, 128>, kDirections> directions;
  std::array<double, 128> mean;
  for (double& x : mean) x = random.normal();
  const auto product = [](const auto& a, const auto& b) {
    return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
  };
  for (size_t i = 0; i < kDirections; ++i) {
    auto& own = directions[i];
    for (double& x : own) x = random.normal();
    for (size_t before = 0; before < i; ++before) {
      const double along = product(own, directions[before]);
      for (size_t c = 0; c < 128; ++c) own[c] -= along * directions[before][c];
    }
    const double length = std::sqrt(product(own, own));
    for (double& x : own) x /= length;
  }
  for (int64_t b = 0; b < data.batch(); ++b)
    for (int64_t h = 0; h < data.desc.heads_kv; ++h)
      for (int64_t j = 0; j < data.len_k(b); ++j) {
        std::array<double, 128> key, within = mean;
        for (int64_t c = 0; c < 128; ++c) key[static_cast<size_t>(c)] = data.k.get(data.key_index(b, j, h, c));
        for (const auto& direction : directions) {
          const double along = product(key, direction) * 128 / kDirections;  // scores of topics stay what they are
          for (size_t c = 0; c < 128; ++c) within[c] += along * direction[c];
        }
        for (int64_t c = 0; c < 128; ++c) data.k.set(data.key_index(b, j, h, c), within[static_cast<size_t>(c)]);
      }
  const AdaptivePlan plan(context, data.desc, probing(0.05, false, ADAATTN_PROBE_RANK));
  for (int call = 0; call < 2; ++call) {  // the second starts from the first's basis
    ASSERT_NO_FATAL_FAILURE(execute(plan, data));
    EXPECT_GT(check_maps(plan, data), 0);
    EXPECT_GT(plan.stats().tiles_probed_in, 0u);
    int64_t heavy = 0, missed = 0;
    for (int64_t b = 0; b < data.batch(); ++b)
      for (int64_t h = 0; h < data.desc.heads_q; ++h) {
        const AdaptivePlan::TileMap map = plan.tile_map(b, h);
        const std::vector<double> largest = largest_shares(data, b, h, map.key_tiles);
        for (size_t t = 0; t < largest.size(); ++t) {
          heavy += largest[t] >= 0.075;
          missed += largest[t] >= 0.075 && map.tiles[t] != 2;
        }
      }
    EXPECT_GT(heavy, 0);
    EXPECT_LE(missed, heavy / 200) << heavy;
  }
}

// Of directions that nothing else points at, what a basis of 32 of 128 holds.
TEST_F(Probes, OfRankFindsNineNeedlesOfTen) {
  const Context context(kCuda);
  for (const int64_t rank : {32, 64, 100}) {
    SCOPED_TRACE(rank);
    double seen[2] = {}, all = 0;
    for (uint64_t trial = 0; trial < 4; ++trial) {
      AttentionCase c = causal_case(2048);
      AttentionData data = structured(c, {}, trial);
      Random random(run_seed() + trial);
      std::vector<std::array<int64_t, 3>> pairs;  // KV head of sequence 0, query, key
      for (int64_t h = 0; h < 2; ++h)
        for (int64_t n = 0; n < 6; ++n) {
          const int64_t j = 128 * (2 + 2 * n) + random.between(5, 120), i = 2047 - random.between(0, 300);
          for (int64_t x = 0; x < 128; ++x) {
            const double direction = random.normal();
            data.k.set(data.key_index(0, j, h, x), 4 * direction);
            data.q.set(data.query_index(0, i, 2 * h, x), 1.2 * direction);
          }
          pairs.push_back({h, i, j});
        }
      for (const bool probe : {false, true}) {
        adaattn_adaptive_desc_t adaptive = probing(0.1, false, probe ? ADAATTN_PROBE_RANK : ADAATTN_PROBE_OFF);
        adaptive.probe_rank = probe ? rank : 0;
        adaptive.tolerance = 10;
        const AdaptivePlan plan(context, data.desc, adaptive);
        ASSERT_NO_FATAL_FAILURE(execute(plan, data));
        for (const auto& [h, i, j] : pairs) seen[probe] += plan.tile_map(0, 2 * h).at(i / 128, j / 128) == 2;
      }
      all += static_cast<double>(pairs.size());
    }
    EXPECT_GE(seen[1], 0.9 * all);
    EXPECT_LT(seen[0], seen[1]);
  }
}

// Eager, replayed on other numbers, frozen and in waves, with and without a far field and a projected V.
TEST_F(Probes, ReplaysAndWavesGiveWhatCallsGive) {
  const Context context(kCuda);
  for (const adaattn_probe_t probe : {ADAATTN_PROBE_FULL, ADAATTN_PROBE_RANK})
    for (const auto& [far_field, rank] : {std::pair{false, false}, {true, false}, {true, true}}) {
      SCOPED_TRACE(testing::Message() << "far " << far_field << " rank " << rank << " probe " << probe);
      const auto input = [](uint64_t round) {
        AttentionData data = structured(causal_case(1500), {.value_mean = 1.0}, 10 + round);
        plant_needles(data, run_seed() + round, 40);
        return data;
      };
      AttentionData data = input(0);
      adaattn_adaptive_desc_t adaptive = probing(0.05, far_field, probe);
      adaptive.rank_mode = rank ? ADAATTN_RANK_ENERGY : ADAATTN_RANK_OFF;
      const AdaptivePlan captured(context, data.desc, adaptive), eager(context, data.desc, adaptive);
      adaptive.max_workspace_bytes = workspace_size(eager) - 1;
      const AdaptivePlan waves(context, data.desc, adaptive);
      ReplayedCall replay(captured, data);
      for (uint64_t round = 0; round < 3; ++round) {
        AttentionData fresh = input(round);
        copy_inputs(fresh, data);
        replay.run();
        ASSERT_NO_FATAL_FAILURE(execute(eager, fresh));
        EXPECT_TRUE(same_outputs(data, fresh)) << round;
        AttentionData again = with_own_outputs(fresh);
        ASSERT_NO_FATAL_FAILURE(execute(waves, again));
        EXPECT_TRUE(same_outputs(fresh, again)) << round;
        for (int64_t h = 0; h < 4; ++h) {
          const AdaptivePlan::TileMap map = eager.tile_map(1, h);
          EXPECT_EQ(map.tiles, captured.tile_map(1, h).tiles);
          EXPECT_EQ(map.tiles, waves.tile_map(1, h).tiles);
        }
      }
      const adaattn_plan_stats_t stats = eager.stats();
      EXPECT_GT(stats.tiles_probed_in, 0u);
      EXPECT_EQ(stats.heads_low_rank > 0, rank);
      EXPECT_EQ(captured.stats().tiles_probed_in, stats.tiles_probed_in);
      EXPECT_EQ(waves.stats().tiles_probed_in, stats.tiles_probed_in);
      EXPECT_EQ(captured.stats().tiles_kept, stats.tiles_kept);
      EXPECT_EQ(waves.stats().tiles_kept, stats.tiles_kept);
      EXPECT_DOUBLE_EQ(waves.stats().flops_done, stats.flops_done);
    }
}

TEST_F(Probes, FrozenPlansRepeatThemselves) {
  const Context context(kCuda);
  AttentionData data = structured(causal_case(1500));
  plant_needles(data, run_seed() + 3, 40);
  for (const adaattn_probe_t probe : {ADAATTN_PROBE_FULL, ADAATTN_PROBE_RANK}) {
    adaattn_adaptive_desc_t adaptive = probing(0.05, false, probe);
    adaptive.freeze = ADAATTN_SWITCH_ON;
    const AdaptivePlan plan(context, data.desc, adaptive);
    ASSERT_NO_FATAL_FAILURE(execute(plan, data));
    const uint64_t found = plan.stats().tiles_probed_in;
    EXPECT_GT(found, 0u);
    AttentionData other = structured(causal_case(1500), {}, 7), again = with_own_outputs(data);
    ASSERT_NO_FATAL_FAILURE(execute(plan, other));
    plan.stats(ADAATTN_STATS_WAIT | ADAATTN_STATS_RESET);
    ASSERT_NO_FATAL_FAILURE(execute(plan, again));
    EXPECT_TRUE(same_outputs(data, again));
    EXPECT_EQ(plan.stats().tiles_probed_in, found);
  }
}

// What block statistics cannot see (HeadsThatMissANeedle...), without computing anything twice.
TEST_F(Probes, AnIsolatedNeedleIsFound) {
  const Context host, context(kCuda);
  const AttentionCase c = causal_case(1500);
  AttentionData data = structured(c);
  plant_lone_key(data, c.seqlen_q);
  const Tensor exact = exact_output(host, data);
  adaattn_adaptive_desc_t adaptive = probing(0.05);
  adaptive.tolerance = 0.5;
  adaptive.rank_mode = ADAATTN_RANK_OFF;
  const AdaptivePlan plan(context, data.desc, adaptive);
  ASSERT_NO_FATAL_FAILURE(execute(plan, data));
  EXPECT_EQ(plan.stats().heads_over_tolerance, 0u);
  EXPECT_EQ(plan.stats().heads_dense, 0u);
  for (const adaattn_head_stats_t& head : plan.heads())
    EXPECT_LE(head_error(data, exact, head.batch, head.head), 0.5) << "b " << head.batch << " head " << head.head;
}

// For the sanitizers.
TEST_F(TilePlans, ASmallCallThatProbes) {
  const Context context(kCuda);
  AttentionData data = structured(small_case(), {.value_mean = 1.0});
  plant_needles(data, run_seed() + 3, 10);
  for (const bool far_field : {false, true}) {
    adaattn_adaptive_desc_t adaptive = probing(0.05, far_field, far_field ? ADAATTN_PROBE_RANK : ADAATTN_PROBE_FULL);
    adaptive.on_exceed = ADAATTN_ON_EXCEED_RECOMPUTE;
    adaptive.tolerance = far_field ? 0.5 : 0.02;
    const AdaptivePlan plan(context, data.desc, adaptive);
    AttentionData again = with_own_outputs(data);
    ASSERT_NO_FATAL_FAILURE(execute(plan, data));
    adaptive.max_workspace_bytes = workspace_size(plan) - 1;
    const AdaptivePlan waves(context, data.desc, adaptive);
    ASSERT_NO_FATAL_FAILURE(execute(waves, again));
    EXPECT_TRUE(same_outputs(data, again));
    EXPECT_EQ(plan.stats().tiles_probed_in, waves.stats().tiles_probed_in);
  }
}

}  // namespace
}  // namespace adaattn::test
