// A forced instruction set is the one that runs; one that the processor lacks is refused, never replaced.
#include "attention/fixture.h"

namespace adaattn::test {
namespace {

class ForcedIsa : public testing::TestWithParam<Target> {};

TEST_P(ForcedIsa, RunsWhatWasAskedFor) {
  const Target& target = GetParam();
  if (const std::string why = missing(target); !why.empty()) GTEST_SKIP() << why;
  const Context context(target);
  int64_t isa = 0;
  ASSERT_TRUE(succeeded(adaattn_get_option(context.get(), ADAATTN_OPTION_ISA, &isa)));
  EXPECT_EQ(isa, target.isa);
  for (const AttentionCase& c : invariant_cases()) {
    // Tile kernels of AMX take bfloat16; for other types the AVX-512 kernels run and say so.
    const Plan plan(context, make_desc(c, target.isa == ADAATTN_ISA_AMX ? kBf16All : kF32All));
    const std::string ran = plan.info().isa;
    if (target.isa == ADAATTN_ISA_AMX)
      EXPECT_TRUE(ran == "amx" || ran == "avx512") << ran;
    else
      EXPECT_EQ(ran, target.name);
    EXPECT_STRNE(plan.info().kernel, "");
  }
}

TEST_P(ForcedIsa, IsRefusedWhereItIsMissing) {
  const Target& target = GetParam();
  adaattn_config_t config;
  ASSERT_EQ(adaattn_config_init(&config, sizeof config), ADAATTN_SUCCESS);
  config.isa = target.isa;
  adaattn_context_t* context = nullptr;
  const adaattn_status_t status = adaattn_create(&config, &context);
  if (missing(target).empty()) {
    EXPECT_TRUE(succeeded(status));
  } else {
    EXPECT_EQ(status, ADAATTN_ERROR_NOT_SUPPORTED);
    EXPECT_EQ(context, nullptr);
    EXPECT_NE(last_error().find("isa"), std::string::npos) << last_error();
  }
  adaattn_destroy(context);
}

INSTANTIATE_TEST_SUITE_P(Cpu, ForcedIsa, testing::ValuesIn(all_targets(ADAATTN_DEVICE_CPU)), target_name);

TEST(Isa, AutoTakesTheBestOneAndAPlanKeepsItsOwn) {
  const auto targets = available_targets(ADAATTN_DEVICE_CPU);
  ASSERT_FALSE(targets.empty());
  const Context context;
  int64_t isa = 0;
  ASSERT_TRUE(succeeded(adaattn_get_option(context.get(), ADAATTN_OPTION_ISA, &isa)));
  EXPECT_EQ(isa, targets.back().isa);

  const AttentionCase c = invariant_cases()[0];
  const Plan before(context, make_desc(c, kF32All));
  const std::string first = before.info().isa;
  ASSERT_TRUE(succeeded(adaattn_set_option(context.get(), ADAATTN_OPTION_ISA, targets.front().isa)));
  const Plan after(context, make_desc(c, kF32All));
  EXPECT_EQ(after.info().isa, targets.front().name);
  EXPECT_EQ(before.info().isa, first);
  ASSERT_TRUE(succeeded(adaattn_set_option(context.get(), ADAATTN_OPTION_ISA, ADAATTN_ISA_AUTO)));
  ASSERT_TRUE(succeeded(adaattn_get_option(context.get(), ADAATTN_OPTION_ISA, &isa)));
  EXPECT_EQ(isa, targets.back().isa);
}

TEST(Isa, InstructionSetsAgreeWithEachOther) {
  const auto targets = available_targets(ADAATTN_DEVICE_CPU);
  for (const AttentionCase& c : invariant_cases()) {
    AttentionData first(c, kF32All, run_seed());
    run(Context(targets.front()), first);
    for (const Target& target : targets) {
      AttentionData other = with_own_outputs(first);
      run(Context(target), other);
      EXPECT_TRUE(close(other.o.values(), first.o.values(), 3e-6, 1e-5, "o")) << target.name;
      EXPECT_TRUE(close(other.lse.values(), first.lse.values(), 2e-5, 0, "lse")) << target.name;
    }
  }
}

}  // namespace
}  // namespace adaattn::test
