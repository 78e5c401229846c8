// The adaptive descriptor: defaults, refusals, struct versions.
#include <gtest/gtest.h>

#include <cstring>
#include <limits>

#include "adaptive/structured.h"
#include "support/cases.h"
#include "support/compare.h"
#include "support/random.h"

namespace adaattn::test {
namespace {

struct BadOption {
  const char* name;
  void (*change)(adaattn_adaptive_desc_t& desc);
  const char* text;
};

void PrintTo(const BadOption& option, std::ostream* out) { *out << option.name; }

const BadOption kBadOptions[] = {
    {"PolicyUnknown", [](adaattn_adaptive_desc_t& d) { d.policy = 5; }, "adaptive.policy is 5"},
    {"PolicyNegative", [](adaattn_adaptive_desc_t& d) { d.policy = -1; }, "adaptive.policy is -1"},
    {"ToleranceNaN", [](adaattn_adaptive_desc_t& d) { d.tolerance = std::numeric_limits<double>::quiet_NaN(); },
     "adaptive.tolerance is nan"},
    {"ToleranceNegative", [](adaattn_adaptive_desc_t& d) { d.tolerance = -0.1; }, "adaptive.tolerance is -0.1"},
    {"ToleranceInfinite", [](adaattn_adaptive_desc_t& d) { d.tolerance = std::numeric_limits<double>::infinity(); },
     "adaptive.tolerance is inf"},
    {"TileMassAboveOne", [](adaattn_adaptive_desc_t& d) { d.tile_mass = 1.5; }, "adaptive.tile_mass is 1.5"},
    {"TileMassNaN", [](adaattn_adaptive_desc_t& d) { d.tile_mass = std::numeric_limits<double>::quiet_NaN(); },
     "adaptive.tile_mass is nan"},
    {"NeedleShareNegative", [](adaattn_adaptive_desc_t& d) { d.needle_share = -1; }, "adaptive.needle_share is -1"},
    {"ProbeUnknown", [](adaattn_adaptive_desc_t& d) { d.probe = 9; }, "adaptive.probe is 9"},
    {"ProbeRankAboveHeadDim", [](adaattn_adaptive_desc_t& d) { d.probe_rank = 65; }, "adaptive.probe_rank is 65"},
    {"FarFieldUnknown", [](adaattn_adaptive_desc_t& d) { d.far_field = 3; }, "adaptive.far_field is 3"},
    {"RankModeUnknown", [](adaattn_adaptive_desc_t& d) { d.rank_mode = 4; }, "adaptive.rank_mode is 4"},
    {"RankRatioAboveOne", [](adaattn_adaptive_desc_t& d) { d.rank_ratio = 2; }, "adaptive.rank_ratio is 2"},
    {"RankThresholdNegative", [](adaattn_adaptive_desc_t& d) { d.rank_threshold = -0.5; }, "adaptive.rank_threshold"},
    {"MinRankAboveHeadDim", [](adaattn_adaptive_desc_t& d) { d.min_rank = 100; }, "adaptive.min_rank is 100"},
    {"PrecisionsReversed",
     [](adaattn_adaptive_desc_t& d) {
       d.min_precision = ADAATTN_PRECISION_F32;
       d.max_precision = ADAATTN_PRECISION_BF16;
     },
     "adaptive.min_precision"},
    {"PrecisionUnknown", [](adaattn_adaptive_desc_t& d) { d.max_precision = 7; }, "adaptive.max_precision is 7"},
    {"VerifyRowsBelowMinusOne", [](adaattn_adaptive_desc_t& d) { d.verify_rows = -2; }, "adaptive.verify_rows is -2"},
    {"FeedbackUnknown", [](adaattn_adaptive_desc_t& d) { d.feedback = 3; }, "adaptive.feedback is 3"},
    {"OnExceedUnknown", [](adaattn_adaptive_desc_t& d) { d.on_exceed = 2; }, "adaptive.on_exceed is 2"},
    {"RecomputeWithoutVerify",
     [](adaattn_adaptive_desc_t& d) {
       d.on_exceed = ADAATTN_ON_EXCEED_RECOMPUTE;
       d.verify_rows = -1;
     },
     "adaptive.verify_rows is -1"},
    {"FreezeUnknown", [](adaattn_adaptive_desc_t& d) { d.freeze = 5; }, "adaptive.freeze is 5"},
    {"ReservedSet", [](adaattn_adaptive_desc_t& d) { d.reserved0 = 1; }, "adaptive.reserved0 is 1"},
    {"SizeZero", [](adaattn_adaptive_desc_t& d) { d.struct_size = 0; }, "adaptive.struct_size is 0"},
    {"NamedPolicyWithItsFieldsSet",
     [](adaattn_adaptive_desc_t& d) {
       d.policy = ADAATTN_POLICY_SPEED;
       d.tile_mass = 0.9;
     },
     "adaptive.tile_mass is 0.9; accepted: 0 with adaptive.policy 3 (SPEED)"},
};

class AdaptiveOptions : public testing::TestWithParam<BadOption> {
 protected:
  const AttentionCase c_ = {.name = "Small", .seqlen_q = 600, .seqlen_k = 600, .d_qk = 64};
};
INSTANTIATE_TEST_SUITE_P(Bad, AdaptiveOptions, testing::ValuesIn(kBadOptions),
                         [](const auto& info) { return info.param.name; });

TEST_P(AdaptiveOptions, AreRefusedByNameAndLeaveTheContextUsable) {
  const Context context;
  AttentionData data(c_, uniform_dtypes()[0], run_seed(), 0);
  adaattn_adaptive_desc_t adaptive = adaptive_desc(ADAATTN_POLICY_CUSTOM);
  GetParam().change(adaptive);
  char reason[512] = "";
  const adaattn_status_t status = adaattn_check_support(context.get(), &data.desc, &adaptive, reason, sizeof reason);
  EXPECT_GE(status, 1000);
  EXPECT_LT(status, 2000);
  EXPECT_NE(std::string(reason).find(GetParam().text), std::string::npos) << reason;
  EXPECT_NE(std::string(reason).find("; accepted"), std::string::npos) << reason;
  adaattn_plan_t* plan = nullptr;
  EXPECT_EQ(adaattn_plan_create(context.get(), &data.desc, &adaptive, &plan), status);
  EXPECT_EQ(plan, nullptr);
  const adaattn_io_t io = data.io();
  const std::vector<std::byte> before = data.o.bytes();
  EXPECT_EQ(adaattn_attention(context.get(), &data.desc, &adaptive, &io, nullptr), status);
  EXPECT_EQ(data.o.bytes(), before);
  EXPECT_TRUE(succeeded(attention(context, data)));
}

TEST(AdaptiveOptionsStruct, ShorterOneTakesTheDefaults) {
  const Context context;
  AttentionData data({.name = "Small", .seqlen_q = 600, .seqlen_k = 600, .d_qk = 64}, uniform_dtypes()[0], run_seed(),
                     0);
  adaattn_adaptive_desc_t adaptive;
  std::memset(&adaptive, 0x5a, sizeof adaptive);
  adaptive.struct_size = offsetof(adaattn_adaptive_desc_t, tolerance);
  adaptive.policy = ADAATTN_POLICY_QUALITY;
  adaptive.probe = ADAATTN_PROBE_DEFAULT;
  EXPECT_TRUE(succeeded(adaattn_check_support(context.get(), &data.desc, &adaptive, nullptr, 0)));
}

// Every length that a version of the header may have: fields behind it take their defaults, whatever lies there.
TEST(AdaptiveOptionsStruct, EveryShorterVersionIsReadUpToItsSize) {
  const Context context;
  const AttentionData data({.name = "Small", .seqlen_q = 600, .seqlen_k = 600, .d_qk = 64}, uniform_dtypes()[0],
                           run_seed(), 0);
  adaattn_adaptive_desc_t good = adaptive_desc(ADAATTN_POLICY_CUSTOM);
  for (size_t size = offsetof(adaattn_adaptive_desc_t, tolerance); size <= sizeof good; size += 8) {
    std::vector<unsigned char> bytes(sizeof good, 0x5a);
    good.struct_size = size;
    std::memcpy(bytes.data(), &good, size);
    const auto* desc = reinterpret_cast<const adaattn_adaptive_desc_t*>(bytes.data());
    EXPECT_TRUE(succeeded(adaattn_check_support(context.get(), &data.desc, desc, nullptr, 0))) << size;
  }
  good.struct_size = sizeof good - 4;
  EXPECT_EQ(adaattn_check_support(context.get(), &data.desc, &good, nullptr, 0), ADAATTN_ERROR_STRUCT_SIZE);
}

TEST(AdaptiveOptionsStruct, LongerOneIsAcceptedWhileItsTailIsZero) {
  const Context context;
  const AttentionData data({.name = "Small", .seqlen_q = 600, .seqlen_k = 600, .d_qk = 64}, uniform_dtypes()[0],
                           run_seed(), 0);
  struct {
    adaattn_adaptive_desc_t known;
    uint64_t later[3];
  } newer = {adaptive_desc(ADAATTN_POLICY_BALANCED), {}};
  newer.known.struct_size = sizeof newer;
  EXPECT_TRUE(succeeded(adaattn_check_support(context.get(), &data.desc, &newer.known, nullptr, 0)));
  newer.later[2] = 1;
  EXPECT_EQ(adaattn_check_support(context.get(), &data.desc, &newer.known, nullptr, 0), ADAATTN_ERROR_STRUCT_SIZE);
  EXPECT_NE(last_error().find("adaptive has a field at byte"), std::string::npos) << last_error();
}

TEST(AdaptiveOptionsStruct, ExactPolicyIsTheExactPlan) {
  const Context context;
  AttentionData data({.name = "Small", .seqlen_q = 600, .seqlen_k = 600, .d_qk = 64}, uniform_dtypes()[0], run_seed(),
                     0);
  const Tensor exact = exact_output(context, data);
  const AdaptivePlan plan(context, data.desc, adaptive_desc(ADAATTN_POLICY_EXACT));
  EXPECT_EQ(plan.info().exact, 1);
  data.poison_outputs();
  ASSERT_TRUE(succeeded(plan.execute(data)));
  EXPECT_TRUE(same_bits(exact, data.o));
  EXPECT_TRUE(plan.heads().empty());
}

TEST(AdaptiveOptionsStruct, OneCallAttentionTakesAPolicy) {
  const Context context;
  AttentionData data({.name = "Small", .seqlen_q = 900, .seqlen_k = 900, .d_qk = 64}, uniform_dtypes()[0], run_seed(),
                     0);
  make_structured(data, {}, run_seed());
  const Tensor exact = exact_output(context, data);
  const adaattn_adaptive_desc_t adaptive = adaptive_desc(ADAATTN_POLICY_BALANCED);
  const adaattn_io_t io = data.io();
  data.poison_outputs();
  ASSERT_TRUE(succeeded(adaattn_attention(context.get(), &data.desc, &adaptive, &io, nullptr)));
  EXPECT_LE(head_error(data, exact, 0, 0), 0.2);
}

TEST(HeadStats, BadArgumentsAreRefused) {
  const Context context;
  AttentionData data({.name = "Small", .seqlen_q = 600, .seqlen_k = 600, .d_qk = 64}, uniform_dtypes()[0], run_seed(),
                     0);
  const AdaptivePlan plan(context, data.desc, adaptive_desc(ADAATTN_POLICY_BALANCED));
  size_t count = 0;
  adaattn_head_stats_t head;
  EXPECT_EQ(adaattn_plan_get_head_stats(nullptr, &head, sizeof head, 1, &count), ADAATTN_ERROR_NULL_POINTER);
  EXPECT_EQ(adaattn_plan_get_head_stats(plan.get(), nullptr, sizeof head, 1, &count), ADAATTN_ERROR_NULL_POINTER);
  EXPECT_EQ(adaattn_plan_get_head_stats(plan.get(), &head, sizeof head, 1, nullptr), ADAATTN_ERROR_NULL_POINTER);
  EXPECT_EQ(adaattn_plan_get_head_stats(plan.get(), &head, 0, 1, &count), ADAATTN_ERROR_INVALID_ARGUMENT);
  EXPECT_EQ(adaattn_plan_get_head_stats(plan.get(), &head, 12, 1, &count), ADAATTN_ERROR_INVALID_ARGUMENT);
  EXPECT_TRUE(succeeded(adaattn_plan_get_head_stats(plan.get(), &head, sizeof head, 1, &count)));
  EXPECT_EQ(count, 0u);  // no call yet
}

// An older caller's shorter entries are cut, a newer one's longer ones are filled with zeros.
TEST(HeadStats, EntriesFollowTheCallersSize) {
  const Context context;
  AttentionData data({.name = "Small", .heads_q = 2, .seqlen_q = 600, .seqlen_k = 600, .d_qk = 64}, uniform_dtypes()[0],
                     run_seed(), 0);
  const AdaptivePlan plan(context, data.desc, adaptive_desc(ADAATTN_POLICY_BALANCED));
  ASSERT_TRUE(succeeded(plan.execute(data)));
  const auto whole = plan.heads();
  ASSERT_EQ(whole.size(), 2u);
  size_t count = 0;
  int64_t pairs[2][2];
  ASSERT_TRUE(succeeded(
      adaattn_plan_get_head_stats(plan.get(), reinterpret_cast<adaattn_head_stats_t*>(pairs), 16, 2, &count)));
  EXPECT_EQ(pairs[1][1], 1);
  struct Longer {
    adaattn_head_stats_t known;
    int64_t later;
  } longer[2];
  std::memset(longer, 0x5a, sizeof longer);
  ASSERT_TRUE(succeeded(adaattn_plan_get_head_stats(plan.get(), &longer[0].known, sizeof longer[0], 2, &count)));
  EXPECT_EQ(longer[1].known.head, 1);
  EXPECT_EQ(longer[1].later, 0);
}

}  // namespace
}  // namespace adaattn::test
