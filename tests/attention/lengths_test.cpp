// Statistics against hand counts, and values in length and index arrays that lie outside what exists.
#include <limits>

#include "attention/fixture.h"
#include "support/guard_pages.h"

namespace adaattn::test {
namespace {

class Stats : public OnEveryTarget {};
ADAATTN_ON_EVERY_TARGET(Stats);

TEST_P(Stats, CountHandCountedPairs) {
  AttentionCase c = {.name = "Counted",
                     .batch = 2,
                     .heads_q = 4,
                     .heads_kv = 2,
                     .seqlen_q = 3,
                     .seqlen_k = 5,
                     .d_qk = 16,
                     .d_v = 8,
                     .mask = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT};
  const Context context(target());
  const Plan plan(context, make_desc(c, kF32All));
  EXPECT_EQ(plan.stats().calls, 0u);
  AttentionData data(c, kF32All, run_seed());
  ASSERT_TRUE(succeeded(plan.execute(data)));
  ASSERT_TRUE(succeeded(plan.execute(data)));
  const adaattn_plan_stats_t stats = plan.stats();
  EXPECT_EQ(stats.calls, 2u);
  EXPECT_EQ(stats.query_rows, 2u * 2 * 4 * 3);
  EXPECT_EQ(stats.score_pairs, 2u * 2 * 4 * (3 + 4 + 5));
  EXPECT_EQ(stats.flops, 2.0 * (16 + 8) * 2 * 2 * 4 * (3 + 4 + 5));
}

TEST_P(Stats, ResetAndRefusedCallsAreNotCounted) {
  AttentionCase c = {.name = "Counted", .seqlen_q = 1, .seqlen_k = 7};
  const Context context(target());
  const Plan plan(context, make_desc(c, kF32All));
  AttentionData data(c, kF32All, run_seed());
  ASSERT_TRUE(succeeded(plan.execute(data)));
  AttentionData wrong = data;
  wrong.v = Tensor(ADAATTN_DTYPE_F32, {1, 6, 1, 64});
  EXPECT_NE(plan.execute(wrong), ADAATTN_SUCCESS);
  EXPECT_EQ(plan.stats(ADAATTN_STATS_WAIT | ADAATTN_STATS_RESET).calls, 1u);
  EXPECT_EQ(plan.stats().calls, 0u);
  EXPECT_EQ(plan.stats().score_pairs, 0u);
  ASSERT_TRUE(succeeded(plan.execute(data)));
  EXPECT_EQ(plan.stats().score_pairs, 7u);
}

// ---- Values outside what exists. K and V end at a guard page, so that following one would stop the process.

class Violation : public OnEveryTarget {};
ADAATTN_ON_EVERY_TARGET(Violation);

struct Outcome {
  adaattn_plan_stats_t stats;
  AttentionData data;
};

Outcome execute_in_guarded_memory(const Target& target, AttentionData data) {
  std::vector<std::unique_ptr<GuardedMemory>> memory;
  if (kOnCpu) {
    for (Tensor* tensor : {&data.q, &data.k, &data.v}) {
      const size_t bytes = tensor->buffer()->bytes();
      memory.push_back(std::make_unique<GuardedMemory>(bytes, GuardedMemory::Edge::kEnd));
      Tensor moved(std::make_shared<Buffer>(memory.back()->data(), bytes), tensor->dtype(), tensor->shape(),
                   {tensor->host().stride, tensor->host().stride + tensor->shape().size()});
      moved.for_each([&](const auto& index, int64_t) { moved.set(index, tensor->get(index)); });
      *tensor = moved;
    }
  }
  const Context context(target);
  const Plan plan(context, data.desc);
  EXPECT_TRUE(succeeded(plan.execute(data)));
  const adaattn_plan_stats_t stats = plan.stats();
  // The report stays until a reset, also over a call in order.
  EXPECT_EQ(plan.stats(ADAATTN_STATS_WAIT | ADAATTN_STATS_RESET).violation_field, stats.violation_field);
  EXPECT_EQ(plan.stats().violation_field, ADAATTN_FIELD_NONE);
  return {stats, data};
}

void expect_violation(const adaattn_plan_stats_t& stats, adaattn_field_t field, int64_t index, int64_t value) {
  EXPECT_EQ(stats.violation_field, field);
  EXPECT_EQ(stats.violation_index, index);
  EXPECT_EQ(stats.violation_value, value);
}

AttentionCase packed_case() {
  return {.name = "Packed",
          .heads_q = 2,
          .heads_kv = 1,
          .layout_q = ADAATTN_LAYOUT_THD,
          .layout_kv = ADAATTN_LAYOUT_THD,
          .lens_q = {4, 4, 4},
          .lens_k = {6, 6, 6}};
}

AttentionCase paged_case(int64_t seqlen_q) {
  return {.name = "Paged",
          .batch = 3,
          .heads_q = 2,
          .heads_kv = 1,
          .seqlen_q = seqlen_q,
          .seqlen_k = 64,
          .layout_kv = ADAATTN_LAYOUT_PAGED,
          .page_size = 16,
          .used_k = {64, 20, 33}};
}

// The rows of sequences that hold no bad value are as if nothing had happened.
void expect_sequence_unharmed(const Outcome& outcome, const reference::AttentionResult& expected, int64_t b) {
  const AttentionData& data = outcome.data;
  const std::vector<double> lse = data.lse.values();
  const int64_t rows = static_cast<int64_t>(lse.size()) / data.batch();
  ASSERT_NE(data.desc.layout_q, ADAATTN_LAYOUT_THD);
  const double tolerance = data.desc.dtype_q == ADAATTN_DTYPE_F32 ? 1e-4 : 1e-3;
  for (int64_t row = b * rows; row < (b + 1) * rows; ++row) EXPECT_NEAR(lse[row], expected.lse[row], tolerance) << row;
}

TEST_P(Violation, KeyLengthBeyondTheKeys) {
  AttentionCase c = {
      .name = "Lengths", .batch = 3, .heads_q = 2, .heads_kv = 1, .seqlen_q = 2, .seqlen_k = 40, .used_k = {40, 40, 7}};
  AttentionData data(c, kF32All, run_seed());
  const auto expected = reference::attention(data.desc, data.io());
  data.seqused_k = Tensor(std::vector<int32_t>{40, 1000000, 7});
  const Outcome outcome = execute_in_guarded_memory(target(), data);
  expect_violation(outcome.stats, ADAATTN_FIELD_SEQUSED_K, 1, 1000000);
  for (int64_t b = 0; b < 3; ++b) expect_sequence_unharmed(outcome, expected, b);  // clamped to the 40 that exist
}

TEST_P(Violation, NegativeKeyLengthIsZero) {
  AttentionCase c = {.name = "Lengths", .batch = 2, .seqlen_q = 2, .seqlen_k = 40, .used_k = {0, 40}};
  AttentionData data(c, kF32All, run_seed());
  const auto expected = reference::attention(data.desc, data.io());
  data.seqused_k = Tensor(std::vector<int32_t>{std::numeric_limits<int32_t>::min(), 40});
  const Outcome outcome = execute_in_guarded_memory(target(), data);
  expect_violation(outcome.stats, ADAATTN_FIELD_SEQUSED_K, 0, std::numeric_limits<int32_t>::min());
  EXPECT_TRUE(matches(outcome.data, expected));
}

TEST_P(Violation, PrefixSumsThatRunPastTheTokens) {
  for (int32_t wild : {13, 1 << 30, std::numeric_limits<int32_t>::max()}) {
    AttentionData data(packed_case(), kF32All, run_seed());
    data.cu_seqlens_q = Tensor(std::vector<int32_t>{0, 4, 8, wild});
    const Outcome outcome = execute_in_guarded_memory(target(), data);
    expect_violation(outcome.stats, ADAATTN_FIELD_CU_SEQLENS_Q, 3, wild);
  }
}

TEST_P(Violation, PrefixSumsThatFallOrStartWrong) {
  const std::vector<std::vector<int32_t>> bad = {{0, 8, 4, 12}, {0, -5, 8, 12}, {-1, 4, 8, 12}, {3, 4, 8, 12}};
  for (const auto& sums : bad) {
    AttentionData data(packed_case(), kF32All, run_seed());
    data.cu_seqlens_q = Tensor(sums);
    const Outcome outcome = execute_in_guarded_memory(target(), data);
    EXPECT_EQ(outcome.stats.violation_field, ADAATTN_FIELD_CU_SEQLENS_Q) << sums[0] << ' ' << sums[1];
  }
}

TEST_P(Violation, KeyPrefixSumsOutsideTheTokens) {
  const std::vector<std::vector<int32_t>> bad = {{0, 6, 12, 19},           {0, 6, 12, 2000000000}, {0, 12, 6, 18},
                                                 {0, -2000000000, 12, 18}, {5, 6, 12, 18},         {0, 6, 40, 50}};
  for (const auto& sums : bad) {
    AttentionData data(packed_case(), kF32All, run_seed());
    data.cu_seqlens_k = Tensor(sums);
    const Outcome outcome = execute_in_guarded_memory(target(), data);
    EXPECT_EQ(outcome.stats.violation_field, ADAATTN_FIELD_CU_SEQLENS_K) << sums[1] << ' ' << sums[3];
  }
}

TEST_P(Violation, PagesThatDoNotExist) {
  for (const Dtypes& dtypes : {kF32All, kBf16All})
    for (int64_t seqlen_q : {1, 20})
      for (int32_t wild : {-1, 1 << 30, std::numeric_limits<int32_t>::min()}) {
        SCOPED_TRACE(std::string(dtypes.name) + ", " + std::to_string(seqlen_q) + " queries");
        AttentionData data(paged_case(seqlen_q), dtypes, run_seed());
        const auto expected = reference::attention(data.desc, data.io());
        data.block_table.set({1, 1}, wild);
        const Outcome outcome = execute_in_guarded_memory(target(), data);
        expect_violation(outcome.stats, ADAATTN_FIELD_BLOCK_TABLE, 1 * 4 + 1, wild);
        expect_sequence_unharmed(outcome, expected, 0);
        expect_sequence_unharmed(outcome, expected, 2);
      }
}

TEST_P(Violation, PagedLengthBeyondTheTable) {
  AttentionData data(paged_case(1), kF32All, run_seed());
  for (int64_t b = 0; b < 3; ++b)
    for (int64_t i = 0; i < 4; ++i) data.block_table.set({b, i}, static_cast<double>(b * 4 + i));
  data.seqused_k = Tensor(std::vector<int32_t>{64, 20, 65});
  const Outcome outcome = execute_in_guarded_memory(target(), data);
  expect_violation(outcome.stats, ADAATTN_FIELD_SEQUSED_K, 2, 65);
}

TEST_P(Violation, GarbageEverywhereNeverLeavesTheTensors) {
  Random random(run_seed());
  const auto garbage = [&](Tensor& tensor) {
    tensor = Tensor(tensor.dtype(), tensor.shape());
    tensor.fill([&] {
      return random.chance(0.5) ? static_cast<double>(random.between(-10, 40))
                                : static_cast<double>(static_cast<int32_t>(random.between(INT32_MIN, INT32_MAX)));
    });
  };
  for (int round = 0; round < 20; ++round) {
    SCOPED_TRACE(round);
    AttentionData packed(packed_case(), kF32All, run_seed());
    garbage(packed.cu_seqlens_q);
    garbage(packed.cu_seqlens_k);
    execute_in_guarded_memory(target(), packed);
    AttentionData paged(paged_case(round % 2 ? 1 : 20), kBf16All, run_seed());
    garbage(paged.block_table);
    garbage(paged.seqused_k);
    execute_in_guarded_memory(target(), paged);
  }
}

}  // namespace
}  // namespace adaattn::test
