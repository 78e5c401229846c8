#include "engine/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <vector>

namespace {

using generate::ThreadPool;

TEST(EngineThreadPool, RunsEachIndexOnceForAnyNumberOfThreadsAndTasks) {
  for (const int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.threads(), threads);
    for (const int64_t n : {0, 1, 2, 3, 64, 1000}) {
      std::vector<std::atomic<int>> runs(n);
      pool.parallel_for(n, [&](int64_t i) { ++runs[i]; });
      for (int64_t i = 0; i < n; ++i) ASSERT_EQ(runs[i], 1) << threads << " threads, task " << i << " of " << n;
    }
  }
}

TEST(EngineThreadPool, ManyShortRunsFollowEachOther) {
  ThreadPool pool(4);
  std::vector<int64_t> sums(4);
  for (int run = 0; run < 2000; ++run) pool.parallel_for(4, [&](int64_t i) { sums[i] += i; });
  for (int64_t i = 0; i < 4; ++i) EXPECT_EQ(sums[i], 2000 * i);
}

TEST(EngineThreadPool, ZeroThreadsMeansAllOfThem) { EXPECT_GE(ThreadPool(0).threads(), 1); }

}  // namespace
