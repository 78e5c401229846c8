// Contexts shared by threads, and use on both sides of a fork.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "attention/fixture.h"

namespace adaattn::test {
namespace {

// gtest's own assertions are not for other threads: each thread counts its disagreements.
template <class Work>
int failures_of_threads(int threads, const Work& work) {
  std::atomic<int> failures{0};
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t)
    pool.emplace_back([&, t] {
      if (!work(t)) ++failures;
    });
  for (std::thread& thread : pool) thread.join();
  return failures;
}

TEST(Concurrent, PlansOfOneContextOnManyThreads) {
  const Context context({}, 3);
  constexpr int kThreads = 4, kRounds = 6;
  const int failures = failures_of_threads(kThreads, [&](int t) {
    const AttentionCase c = invariant_cases()[t % 2];
    AttentionData data(c, kF32All, static_cast<uint64_t>(t));
    const auto expected = reference::attention(data.desc, data.io());
    const Plan plan(context, data.desc);
    for (int round = 0; round < kRounds; ++round) {
      data.poison_outputs();
      if (plan.execute(data) != ADAATTN_SUCCESS || !matches(data, expected)) return false;
    }
    return plan.stats().calls == kRounds && plan.stats().score_pairs == kRounds * expected.score_pairs;
  });
  EXPECT_EQ(failures, 0);
}

TEST(Concurrent, OneCallApiFromManyThreadsWithTheSameDescriptor) {
  const Context context({}, 2);
  const int failures = failures_of_threads(4, [&](int t) {
    AttentionCase c = invariant_cases()[0];
    c.seqlen_q = 40;
    AttentionData data(c, kBf16All, static_cast<uint64_t>(t));
    const auto expected = reference::attention(data.desc, data.io());
    for (int round = 0; round < 6; ++round) {
      data.poison_outputs();
      if (attention(context, data) != ADAATTN_SUCCESS || !matches(data, expected)) return false;
    }
    return true;
  });
  EXPECT_EQ(failures, 0);
}

TEST(Concurrent, ContextsAreCreatedAndDestroyedOnManyThreads) {
  const int failures = failures_of_threads(4, [&](int t) {
    AttentionCase c = invariant_cases()[t % 2];
    c.seqlen_q = std::min<int64_t>(c.seqlen_q, 20);
    AttentionData data(c, kF32All, static_cast<uint64_t>(t));
    const auto expected = reference::attention(data.desc, data.io());
    for (int round = 0; round < 4; ++round) {
      const Context context({}, 1 + t);
      data.poison_outputs();
      if (attention(context, data) != ADAATTN_SUCCESS || !matches(data, expected)) return false;
    }
    return true;
  });
  EXPECT_EQ(failures, 0);
}

TEST(Concurrent, ErrorTextBelongsToItsThread) {
  const Context context;
  const int failures = failures_of_threads(4, [&](int t) {
    for (int round = 0; round < 50; ++round) {
      AttentionCase c = {.name = "Wrong", .heads_q = 100 + t, .heads_kv = 7};  // 100 + t is no multiple of 7
      const adaattn_attn_desc_t desc = make_desc(c, kF32All);
      adaattn_plan_t* plan = nullptr;
      const adaattn_status_t status = adaattn_plan_create(context.get(), &desc, nullptr, &plan);
      if (status == ADAATTN_SUCCESS || last_error().find(std::to_string(100 + t)) == std::string::npos) return false;
    }
    return true;
  });
  EXPECT_EQ(failures, 0);
}

#if defined(__SANITIZE_THREAD__)
#define ADAATTN_TEST_NO_FORK 1  // TSan does not follow a fork of a process that has threads
#endif

TEST(Fork, ChildAndParentBothWorkAfterwards) {
#ifdef ADAATTN_TEST_NO_FORK
  GTEST_SKIP() << "ThreadSanitizer does not support threads after a fork";
#endif
  const Context context({}, 3);
  AttentionData data(invariant_cases()[0], kF32All, run_seed());
  const Plan plan(context, data.desc);
  ASSERT_TRUE(succeeded(plan.execute(data)));  // the pool's threads exist now

  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(60);  // a child that waits for threads it does not have
    AttentionData mine = with_own_outputs(data);
    const bool planned = plan.execute(mine) == ADAATTN_SUCCESS && same_outputs(mine, data);
    AttentionData other = with_own_outputs(data);
    const bool one_call = attention(context, other) == ADAATTN_SUCCESS && same_outputs(other, data);
    _exit(planned && one_call ? 0 : 1);
  }
  AttentionData again = with_own_outputs(data);
  EXPECT_TRUE(succeeded(plan.execute(again)));
  EXPECT_TRUE(same_outputs(again, data));
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status)) << "ended by signal " << WTERMSIG(status);
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

TEST(Fork, ChildMayDestroyWhatItsParentMade) {
#ifdef ADAATTN_TEST_NO_FORK
  GTEST_SKIP() << "ThreadSanitizer does not support threads after a fork";
#endif
  auto* context = new Context({}, 3);
  AttentionData data(invariant_cases()[1], kF32All, run_seed());
  run(*context, data);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(60);
    delete context;
    _exit(testing::Test::HasFailure() ? 1 : 0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  delete context;
}

}  // namespace
}  // namespace adaattn::test
