// Frozen adaptive plans on a CUDA device: the first call that runs decides, also where it is a replay.
#include <cmath>
#include <limits>

#include "gpu/tile_plans.h"

namespace adaattn::test {
namespace {

class FrozenPlans : public TilePlans {};

constexpr int64_t kSeqlen = 2000;

adaattn_adaptive_desc_t frozen(adaattn_adaptive_desc_t adaptive) {
  adaptive.freeze = ADAATTN_SWITCH_ON;
  return adaptive;
}

// A policy by shares, and levels of mass with the far field and feedback.
std::vector<adaattn_adaptive_desc_t> frozen_descs() {
  adaattn_adaptive_desc_t custom = custom_desc(0.7);
  custom.rank_mode = ADAATTN_RANK_OFF;  // a rank that other input does not have gives way to the exact products
  return {frozen(adaptive_desc(ADAATTN_POLICY_SPEED)), frozen(custom)};
}

// Heads that keep few tiles, and those of which a plan of its own keeps all.
AttentionData selective() { return structured(causal_case(kSeqlen)); }
AttentionData diffuse() { return structured(causal_case(kSeqlen), {.topic = 0}, 10); }

// Of every head what does not depend on the input once it is chosen.
struct Choices {
  std::vector<double> predicted;
  std::vector<int64_t> ranks;
  std::vector<int32_t> dense;
  bool operator==(const Choices&) const = default;
};
Choices choices_of(const AdaptivePlan& plan) {
  Choices out;
  for (const adaattn_head_stats_t& head : plan.heads()) {
    out.predicted.push_back(head.predicted_error);
    out.ranks.push_back(head.rank_v);
    out.dense.push_back(head.dense);
  }
  return out;
}

// What a plan whose first call is on `first` gives on some input.
struct Frozen {
  Frozen(const Context& context, const adaattn_adaptive_desc_t& adaptive, AttentionData first)
      : plan(context, first.desc, adaptive) {
    execute(plan, first);
    choices = choices_of(plan);
  }
  void expect(const AttentionData& data, const Choices& got) {
    AttentionData own = with_own_outputs(data);
    ASSERT_NO_FATAL_FAILURE(execute(plan, own));
    EXPECT_TRUE(choices_of(plan) == choices);
    EXPECT_TRUE(got == choices);
    EXPECT_TRUE(same_outputs(data, own));
  }
  AdaptivePlan plan;
  Choices choices;
};

TEST_F(FrozenPlans, RepeatThemselvesBitForBit) {
  const Context context(kCuda);
  for (const adaattn_adaptive_desc_t& adaptive : frozen_descs()) {
    AttentionData data = selective(), other = diffuse();
    const AdaptivePlan plan(context, data.desc, adaptive);
    ASSERT_NO_FATAL_FAILURE(execute(plan, data));
    const Choices choices = choices_of(plan);
    AttentionData again = with_own_outputs(data);
    for (int call = 0; call < 3; ++call) {
      ASSERT_NO_FATAL_FAILURE(execute(plan, other));
      EXPECT_TRUE(choices_of(plan) == choices) << call;
      ASSERT_NO_FATAL_FAILURE(execute(plan, again));
      EXPECT_TRUE(choices_of(plan) == choices) << call;
      EXPECT_TRUE(same_outputs(data, again)) << call;
    }
    // Without the first call the other input is decided otherwise.
    const AdaptivePlan own(context, other.desc, adaptive);
    ASSERT_NO_FATAL_FAILURE(execute(own, other));
    EXPECT_FALSE(choices_of(own) == choices);
  }
}

TEST_F(FrozenPlans, OfWhichTheFirstCallIsCapturedDecideInTheFirstReplay) {
  const Context context(kCuda);
  for (const adaattn_adaptive_desc_t& adaptive : frozen_descs()) {
    AttentionData data = diffuse();
    const AdaptivePlan plan(context, data.desc, adaptive);
    ReplayedCall replay(plan, data);  // the input of the capture is not that of the first replay
    Frozen eager(context, adaptive, selective());
    for (const AttentionData& next : {selective(), diffuse(), selective()}) {
      copy_inputs(next, data);
      replay.run();
      eager.expect(data, choices_of(plan));
    }
    AttentionData called = selective();
    ASSERT_NO_FATAL_FAILURE(execute(plan, called));
    eager.expect(called, choices_of(plan));
    EXPECT_TRUE(same_outputs(called, data));
  }
}

TEST_F(FrozenPlans, ACallBetweenCaptureAndReplayDecides) {
  const Context context(kCuda);
  for (const adaattn_adaptive_desc_t& adaptive : frozen_descs()) {
    AttentionData data = diffuse(), between = selective();
    const AdaptivePlan plan(context, data.desc, adaptive);
    ReplayedCall replay(plan, data);
    ASSERT_NO_FATAL_FAILURE(execute(plan, between));
    Frozen eager(context, adaptive, selective());
    eager.expect(between, choices_of(plan));
    for (int round = 0; round < 2; ++round) {
      replay.run();
      eager.expect(data, choices_of(plan));
    }
    copy_inputs(between, data);
    replay.run();
    EXPECT_TRUE(same_outputs(data, between));
  }
}

TEST_F(FrozenPlans, ReplaysAfterACallKeepItsChoices) {
  const Context context(kCuda);
  for (const adaattn_adaptive_desc_t& adaptive : frozen_descs()) {
    AttentionData first = selective(), data = diffuse();
    const AdaptivePlan plan(context, data.desc, adaptive);
    ASSERT_NO_FATAL_FAILURE(execute(plan, first));
    ReplayedCall replay(plan, data);
    Frozen eager(context, adaptive, selective());
    replay.run();
    eager.expect(data, choices_of(plan));
    copy_inputs(first, data);
    replay.run();
    EXPECT_TRUE(same_outputs(data, first));
  }
}

// A sequence that the first call lacked decides when it comes.
TEST_F(FrozenPlans, SequencesThatComeLaterDecideThen) {
  const Context context(kCuda);
  AttentionCase one_case = causal_case(kSeqlen);
  one_case.batch = 1;
  AttentionData one = structured(one_case), both = selective();
  for (const adaattn_adaptive_desc_t& adaptive : frozen_descs()) {
    const AdaptivePlan plan(context, both.desc, adaptive);
    ASSERT_NO_FATAL_FAILURE(execute(plan, one));
    const Choices first = choices_of(plan);
    ASSERT_NO_FATAL_FAILURE(execute(plan, both));
    const Choices then = choices_of(plan);
    const AdaptivePlan own(context, both.desc, adaptive);
    AttentionData own_data = with_own_outputs(both);
    ASSERT_NO_FATAL_FAILURE(execute(own, own_data));
    const Choices alone = choices_of(own);
    ASSERT_EQ(first.predicted.size(), 4u);
    ASSERT_EQ(then.predicted.size(), 8u);
    for (size_t h = 0; h < 8; ++h) {
      EXPECT_EQ(then.predicted[h], h < 4 ? first.predicted[h] : alone.predicted[h]) << h;
      EXPECT_EQ(then.dense[h], h < 4 ? first.dense[h] : alone.dense[h]) << h;
    }
  }
}

// Input that block statistics cannot hold is computed exactly, and the choices outlast it.
TEST_F(FrozenPlans, InputThatIsNotFinite) {
  const Context context(kCuda);
  AttentionData data = selective();
  constexpr int64_t kRow = 700, kColumn = 5;
  const auto infinite = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  const struct {
    const char* name;
    Tensor& tensor;
    std::vector<int64_t> at;
    double value;
  } broken[] = {{"q", data.q, data.query_index(1, kRow, 0, kColumn), nan},
                {"k", data.k, data.key_index(1, kRow, 0, kColumn), nan},
                {"k", data.k, data.key_index(1, kRow, 0, kColumn), infinite},
                {"v", data.v, data.key_index(1, kRow, 0, kColumn), infinite}};
  for (const adaattn_adaptive_desc_t& adaptive : frozen_descs()) {
    const AdaptivePlan plan(context, data.desc, adaptive);
    ASSERT_NO_FATAL_FAILURE(execute(plan, data));
    const Choices choices = choices_of(plan);
    ASSERT_EQ(choices.dense, std::vector<int32_t>(8, 0));
    for (const auto& [name, tensor, at, value] : broken) {
      SCOPED_TRACE(testing::Message() << name << " " << value);
      const double before = tensor.get(at);
      tensor.set(at, value);
      AttentionData got = with_own_outputs(data), exact = with_own_outputs(data);
      ASSERT_NO_FATAL_FAILURE(execute(plan, got));
      const Choices then = choices_of(plan);
      // The query heads 0 and 1 of the second sequence read it.
      for (size_t h = 0; h < 8; ++h) EXPECT_EQ(then.dense[h], h / 2 == 2 ? 1 : 0) << h;
      run(context, exact);
      tensor.set(at, before);
      for (int64_t h = 0; h < 2; ++h)
        for (int64_t i = 0; i < kSeqlen; ++i)
          for (int64_t c = 0; c < 128; ++c) {
            const double o = got.o.get(got.query_index(1, i, h, c)), want = exact.o.get(exact.query_index(1, i, h, c));
            ASSERT_TRUE(o == want || (std::isnan(o) && std::isnan(want)))
                << "head " << h << " row " << i << " column " << c << ": " << o << " for " << want;
          }
      AttentionData again = with_own_outputs(data);
      ASSERT_NO_FATAL_FAILURE(execute(plan, again));
      EXPECT_TRUE(choices_of(plan) == choices);
      EXPECT_TRUE(same_outputs(data, again));
    }
  }
}

}  // namespace
}  // namespace adaattn::test
