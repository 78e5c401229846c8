// Memory over many calls. Free memory is the whole device's: nothing else may run on it meanwhile.
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "attention/fixture.h"
#include "gpu/device.h"

namespace adaattn::test {
namespace {

class Soak : public OnTheDevice {};

// ADAATTN_SOAK_SECONDS=60 makes this a soak; by default it only proves that it runs.
TEST_F(Soak, MemoryStaysConstantOverManyCalls) {
  const char* text = std::getenv("ADAATTN_SOAK_SECONDS");
  const double seconds = text != nullptr ? std::atof(text) : 1;
  const auto start = std::chrono::steady_clock::now();
  const Context context(kCuda);
  std::vector<AttentionData> data;
  for (const AttentionCase& c :
       {AttentionCase{
            .name = "Small", .batch = 2, .heads_q = 4, .heads_kv = 2, .seqlen_q = 40, .seqlen_k = 90, .d_qk = 64},
        AttentionCase{.name = "Split", .heads_q = 8, .heads_kv = 2, .seqlen_q = 1, .seqlen_k = 3000, .d_qk = 128}})
    for (const Dtypes& dtypes : uniform_dtypes()) data.emplace_back(c, dtypes, run_seed());
  size_t free_then = 0, free_now = 0, total = 0;
  uint64_t rounds = 0;
  do {
    for (AttentionData& d : data) {
      const Plan plan(context, d.desc);
      ASSERT_TRUE(succeeded(plan.execute(d)));
      ASSERT_TRUE(succeeded(attention(context, d)));
    }
    require(cudaDeviceSynchronize());
    if (++rounds == 5) require(cudaMemGetInfo(&free_then, &total));
    require(cudaMemGetInfo(&free_now, &total));
  } while (rounds < 10 || std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds);
  EXPECT_GE(free_now, free_then) << "after " << rounds << " rounds";
  std::printf("%llu rounds, %zu bytes free before and %zu after\n", static_cast<unsigned long long>(rounds), free_then,
              free_now);
}

}  // namespace
}  // namespace adaattn::test
