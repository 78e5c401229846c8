// adaattn_plan_get_tile_map: what it says agrees with the mask and with the statistics, and bad arguments are refused.
#include <gtest/gtest.h>

#include <algorithm>

#include "adaptive/structured.h"
#include "support/cases.h"
#include "support/compare.h"
#include "support/random.h"

namespace adaattn::test {
namespace {

constexpr int64_t kTile = 128;

AttentionCase base_case() {
  AttentionCase c = {.name = "Causal", .heads_q = 4, .heads_kv = 2, .seqlen_q = 2100, .seqlen_k = 2100, .d_qk = 64};
  c.mask = ADAATTN_MASK_CAUSAL;
  return c;
}

TEST(TileMap, AgreesWithTheMaskAndTheStatistics) {
  const Context context;
  std::vector<AttentionCase> cases(3, base_case());
  cases[1].name = "Window";
  cases[1].window_left = 1000;
  cases[2].name = "Packed";
  cases[2].layout_q = cases[2].layout_kv = ADAATTN_LAYOUT_THD;
  cases[2].batch = 2;
  cases[2].lens_q = {1700, 1300};
  cases[2].lens_k = {1700, 2100};
  for (const AttentionCase& c : cases) {
    SCOPED_TRACE(c.name);
    AttentionData data(c, uniform_dtypes()[0], run_seed());
    make_structured(data, {}, run_seed());
    // Without the probe, and with one that brings tiles in.
    for (const adaattn_probe_t probe : {ADAATTN_PROBE_OFF, ADAATTN_PROBE_FULL}) {
      adaattn_adaptive_desc_t adaptive = adaptive_desc(ADAATTN_POLICY_CUSTOM);
      adaptive.tile_mass = 0.7;
      adaptive.tolerance = 0.5;
      adaptive.probe = probe;
      const AdaptivePlan plan(context, data.desc, adaptive);
      for (int call = 0; call < 2; ++call) {
        const auto before = plan.stats();
        ASSERT_TRUE(succeeded(plan.execute(data)));
        const int64_t skipped = check_maps(plan, data);
        EXPECT_GT(skipped, 0);
        const auto after = plan.stats();
        EXPECT_EQ(static_cast<uint64_t>(skipped), after.tiles - before.tiles - (after.tiles_kept - before.tiles_kept));
      }
    }
  }
}

TEST(TileMap, DenseHeadsComputeEveryVisibleTile) {
  const Context context;
  AttentionData data(base_case(), uniform_dtypes()[0], run_seed(), 0);
  make_structured(data, {.topic = 0}, run_seed());
  const AdaptivePlan plan(context, data.desc, adaptive_desc(ADAATTN_POLICY_QUALITY));
  // The second call does not look at heads that the first one found dense.
  for (int call = 0; call < 2; ++call) {
    ASSERT_TRUE(succeeded(plan.execute(data)));
    for (const adaattn_head_stats_t& head : plan.heads()) EXPECT_TRUE(head.dense);
    EXPECT_EQ(check_maps(plan, data), 0);
  }
}

TEST(TileMap, IsEmptyBeforeTheFirstCall) {
  const Context context;
  const AttentionData data(base_case(), uniform_dtypes()[0], run_seed(), 0);
  const AdaptivePlan plan(context, data.desc, adaptive_desc(ADAATTN_POLICY_BALANCED));
  const AdaptivePlan::TileMap map = plan.tile_map(0, 0);
  EXPECT_EQ(map.query_tiles, 0);
  EXPECT_EQ(map.key_tiles, 0);
}

TEST(TileMap, BadArgumentsAreRefusedByName) {
  const Context context;
  AttentionData data(base_case(), uniform_dtypes()[0], run_seed(), 0);
  const AdaptivePlan plan(context, data.desc, adaptive_desc(ADAATTN_POLICY_BALANCED));
  ASSERT_TRUE(succeeded(plan.execute(data)));
  std::vector<uint8_t> map(17 * 17, 0x5a);
  int64_t rows = -1, columns = -1;
  const auto refused = [&](adaattn_status_t status, adaattn_status_t expected, const char* text) {
    EXPECT_EQ(status, expected);
    EXPECT_NE(last_error().find(text), std::string::npos) << last_error();
    EXPECT_EQ(rows, -1);
    EXPECT_EQ(columns, -1);
    EXPECT_EQ(std::count(map.begin(), map.end(), 0x5a), 17 * 17);
  };
  adaattn_plan_t* p = plan.get();
  const auto call = adaattn_plan_get_tile_map;
  refused(call(nullptr, 0, 0, map.data(), map.size(), &rows, &columns), ADAATTN_ERROR_NULL_POINTER, "plan");
  refused(call(p, 0, 0, nullptr, map.size(), &rows, &columns), ADAATTN_ERROR_NULL_POINTER, "map");
  refused(call(p, 0, 0, map.data(), map.size(), nullptr, &columns), ADAATTN_ERROR_NULL_POINTER, "query_tiles");
  refused(call(p, 0, 0, map.data(), map.size(), &rows, nullptr), ADAATTN_ERROR_NULL_POINTER, "key_tiles");
  refused(call(p, 1, 0, map.data(), map.size(), &rows, &columns), ADAATTN_ERROR_INVALID_ARGUMENT, "batch is 1");
  refused(call(p, -1, 0, map.data(), map.size(), &rows, &columns), ADAATTN_ERROR_INVALID_ARGUMENT, "batch is -1");
  refused(call(p, 0, 4, map.data(), map.size(), &rows, &columns), ADAATTN_ERROR_INVALID_ARGUMENT, "head is 4");
  refused(call(p, 0, -1, map.data(), map.size(), &rows, &columns), ADAATTN_ERROR_INVALID_ARGUMENT, "head is -1");
  refused(call(p, 0, 0, map.data(), 288, &rows, &columns), ADAATTN_ERROR_INVALID_ARGUMENT, "cap is 288");
  EXPECT_TRUE(succeeded(call(p, 0, 0, map.data(), map.size(), &rows, &columns)));
  EXPECT_EQ(rows, 17);
  EXPECT_EQ(columns, 17);
}

TEST(TileMap, ExactPlansAndTooManyTilesAreNotSupported) {
  const Context context;
  AttentionCase c = base_case();
  AttentionData data(c, uniform_dtypes()[0], run_seed(), 0);
  int64_t rows = -1, columns = -1;
  const auto refused = [&](const adaattn_attn_desc_t& desc, adaattn_policy_t policy, const char* text) {
    const AdaptivePlan plan(context, desc, adaptive_desc(policy));
    EXPECT_EQ(adaattn_plan_get_tile_map(plan.get(), 0, 0, nullptr, 0, &rows, &columns), ADAATTN_ERROR_NOT_SUPPORTED);
    EXPECT_NE(last_error().find(text), std::string::npos) << last_error();
  };
  refused(data.desc, ADAATTN_POLICY_EXACT, "every tile exactly");
  adaattn_attn_desc_t capped = data.desc;
  capped.softcap = 20;  // served by the exact plan under any policy
  refused(capped, ADAATTN_POLICY_BALANCED, "every tile exactly");
  // 1024 tiles of 16 words for each of 128 heads are 16 MiB.
  adaattn_attn_desc_t large = data.desc;
  large.heads_q = 128;
  large.max_seqlen_q = large.max_seqlen_k = 1024 * kTile;
  const AdaptivePlan kept(context, large, adaptive_desc(ADAATTN_POLICY_BALANCED));
  EXPECT_EQ(adaattn_plan_get_tile_map(kept.get(), 0, 127, nullptr, 0, &rows, &columns), ADAATTN_SUCCESS);
  ++large.max_seqlen_q;
  refused(large, ADAATTN_POLICY_BALANCED,
          "; accepted: one whose maps of all heads at its maxima take at most 16777216");
}

}  // namespace
}  // namespace adaattn::test
