#include "cpu_fallback/thread_pool.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <numeric>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

namespace adaattn::cpu {
namespace {

// Every item once, whatever the number of threads.
void expect_each_item_once(ThreadPool& pool, int64_t n, int64_t max_lanes = INT64_MAX) {
  std::vector<std::atomic<int>> seen(static_cast<size_t>(n));
  std::atomic<bool> lane_in_range{true};
  const int64_t lanes = std::min<int64_t>({n, max_lanes, pool.num_threads()});
  pool.for_each(
      n,
      [&](int64_t lane, int64_t i) {
        if (lane < 0 || lane >= lanes) lane_in_range = false;
        ++seen[static_cast<size_t>(i)];
      },
      max_lanes);
  EXPECT_TRUE(lane_in_range);
  for (int64_t i = 0; i < n; ++i) ASSERT_EQ(seen[static_cast<size_t>(i)], 1) << "item " << i;
}

TEST(ThreadPool, RunsEveryItemOnce) {
  for (int32_t threads : {1, 2, 5}) {
    ThreadPool pool(threads, nullptr, nullptr);
    EXPECT_EQ(pool.num_threads(), threads);
    for (int64_t n : {0, 1, 2, 3, 7, 1000}) expect_each_item_once(pool, n);
    expect_each_item_once(pool, 100, 2);
    expect_each_item_once(pool, 100, 1);
  }
}

TEST(ThreadPool, ZeroMeansTheThreadsOfTheProcess) {
  ThreadPool pool(0, nullptr, nullptr);
  EXPECT_EQ(pool.num_threads(), available_threads());
}

TEST(ThreadPool, ALaneBelongsToOneThreadAtATime) {
  ThreadPool pool(4, nullptr, nullptr);
  std::vector<std::atomic<int>> busy(4);
  std::atomic<int> collisions{0};
  pool.for_each(2000, [&](int64_t lane, int64_t) {
    if (busy[static_cast<size_t>(lane)].fetch_add(1) != 0) ++collisions;
    busy[static_cast<size_t>(lane)].fetch_sub(1);
  });
  EXPECT_EQ(collisions, 0);
}

TEST(ThreadPool, WorkersTakePart) {
  ThreadPool pool(2, nullptr, nullptr);
  std::atomic<int> waiting{0};
  // Each of two items waits for the other to have started: only two threads at once can finish this.
  pool.for_each(2, [&](int64_t, int64_t) {
    ++waiting;
    while (waiting < 2) std::this_thread::yield();
  });
  EXPECT_EQ(waiting, 2);
}

TEST(ThreadPool, NestedCallsFinish) {
  ThreadPool pool(3, nullptr, nullptr);
  std::atomic<int64_t> total{0};
  pool.for_each(20, [&](int64_t, int64_t) { pool.for_each(30, [&](int64_t, int64_t i) { total += i; }); });
  EXPECT_EQ(total, 20 * 29 * 30 / 2);
}

TEST(ThreadPool, SeveralCallersAtOnce) {
  ThreadPool pool(3, nullptr, nullptr);
  std::vector<std::thread> callers;
  std::vector<int64_t> sums(4);
  for (size_t c = 0; c < sums.size(); ++c)
    callers.emplace_back([&, c] {
      for (int round = 0; round < 50; ++round) {
        std::vector<int64_t> items(64);
        pool.for_each(64, [&](int64_t, int64_t i) { items[static_cast<size_t>(i)] = i + 1; });
        sums[c] += std::accumulate(items.begin(), items.end(), int64_t{0});
      }
    });
  for (std::thread& caller : callers) caller.join();
  for (int64_t sum : sums) EXPECT_EQ(sum, 50 * 64 * 65 / 2);
}

TEST(ThreadPool, TheFirstExceptionReachesTheCallerAndThePoolStaysUsable) {
  ThreadPool pool(3, nullptr, nullptr);
  EXPECT_THROW(pool.for_each(100,
                             [](int64_t, int64_t i) {
                               if (i == 17) throw std::runtime_error("item 17");
                             }),
               std::runtime_error);
  expect_each_item_once(pool, 100);
}

TEST(ThreadPool, WorksInAForkedChild) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "ThreadSanitizer does not let a forked child start threads";
#endif
  ThreadPool pool(3, nullptr, nullptr);
  // Items that wait for each other need as many threads.
  const auto meet = [&pool](int items) {
    std::atomic<int> waiting{0};
    pool.for_each(items, [&](int64_t, int64_t) {
      ++waiting;
      while (waiting < items) std::this_thread::yield();
    });
    return waiting == items;
  };
  // Every worker has started before the fork: AddressSanitizer holds locks of its own while a thread starts, and a
  // child forked in that moment would find them locked for ever.
  EXPECT_TRUE(meet(3));
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    // The parent's threads do not exist here: without new ones this would hang.
    alarm(20);
    _exit(meet(2) ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "status " << status;
  expect_each_item_once(pool, 100);
}

TEST(ThreadPool, ANewNumberOfThreadsTakesEffect) {
  ThreadPool pool(1, nullptr, nullptr);
  for (int32_t threads : {4, 2, 1, 3}) {
    pool.set_num_threads(threads);
    EXPECT_EQ(pool.num_threads(), threads);
    expect_each_item_once(pool, 50);
  }
}

struct Hook {
  std::atomic<int> calls{0};
  static void run(void* user, int64_t n, void (*task)(void*, int64_t), void* task_user) {
    ++static_cast<Hook*>(user)->calls;
    for (int64_t i = n - 1; i >= 0; --i) task(task_user, i);  // any order, here on one thread
  }
};

TEST(ThreadPool, TheCallersHookRunsTheWork) {
  Hook hook;
  ThreadPool pool(4, Hook::run, &hook);
  std::set<std::thread::id> threads;
  std::vector<int> seen(100);
  pool.for_each(100, [&](int64_t, int64_t i) {
    threads.insert(std::this_thread::get_id());
    ++seen[static_cast<size_t>(i)];
  });
  EXPECT_EQ(hook.calls, 1);
  EXPECT_EQ(threads, std::set<std::thread::id>{std::this_thread::get_id()});
  EXPECT_EQ(std::count(seen.begin(), seen.end(), 1), 100);
}

}  // namespace
}  // namespace adaattn::cpu
