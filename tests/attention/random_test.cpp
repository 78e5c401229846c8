// Problems drawn at random from everything the API offers. The seed is fresh on each run unless ADAATTN_TEST_SEED is
// set; a failure prints it with the problem.
#include "attention/fixture.h"

namespace adaattn::test {
namespace {

constexpr int kBatches = 16, kCasesPerBatch = 8;

class RandomAttention : public testing::TestWithParam<int> {};

TEST_P(RandomAttention, AgreesWithTheOracle) {
  const std::vector<Target> targets = available_targets(kDevice);
  if (targets.empty()) GTEST_SKIP() << missing(listed_targets(kDevice).front());
  const uint64_t seed = run_seed() + static_cast<uint64_t>(GetParam()) * 0x9e3779b97f4a7c15u;
  Random random(seed);
  int compared = 0;
  for (int n = 0; n < kCasesPerBatch; ++n) {
    const AttentionCase c = random_case(random);
    const Dtypes dtypes = random.chance(0.6)   ? random.pick(uniform_dtypes())
                          : random.chance(0.5) ? random.pick(mixed_dtypes())
                                               : random.pick(e4m3_cache_dtypes());
    SCOPED_TRACE("number " + std::to_string(n) + ", " + dtypes.name + ", " + describe(c));
    const auto outputs = random.pick({0u, ADAATTN_OUTPUT_LSE, ADAATTN_OUTPUT_ALL});
    AttentionData data(c, dtypes, static_cast<uint64_t>(random.between(0, 1 << 30)), outputs);
    const reference::AttentionResult expected = reference::attention(data.desc, data.io());
    for (const Target& target : targets) {
      SCOPED_TRACE(target.name);
      const Context context(target, static_cast<int32_t>(random.between(1, 3)));
      if (!unsupported(context, data.desc).empty()) continue;
      ++compared;
      run(context, data);
      EXPECT_TRUE(matches(data, expected, weights_of(target)));
    }
  }
  EXPECT_GT(compared, 0) << "no target serves any of these cases";
}

INSTANTIATE_TEST_SUITE_P(Batch, RandomAttention, testing::Range(0, kBatches));

}  // namespace
}  // namespace adaattn::test
