#include "engine/thread_pool.h"

#include <algorithm>

namespace generate {
namespace {

// About 20 microseconds: the pause between two stages of a layer, so that decoding does not sleep in each of them.
constexpr int kSpins = 1000;

template <class Integer>
void wait_while_equal(const std::atomic<Integer>& value, Integer old) {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (value.load(std::memory_order_acquire) != old) return;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  value.wait(old, std::memory_order_acquire);
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
  if (threads == 0) threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
}

ThreadPool::~ThreadPool() {
  stop_.store(true);
  generation_.fetch_add(1);
  generation_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(int64_t n, Task task, void* user) {
  if (workers_.empty() || n <= 1) {
    for (int64_t i = 0; i < n; ++i) task(user, i);
    return;
  }
  task_ = task;
  user_ = user;
  count_ = n;
  next_.store(0, std::memory_order_relaxed);
  busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  take_tasks();
  for (int busy = busy_.load(std::memory_order_acquire); busy != 0; busy = busy_.load(std::memory_order_acquire))
    wait_while_equal(busy_, busy);
}

void ThreadPool::work() {
  uint32_t seen = 0;
  while (true) {
    wait_while_equal(generation_, seen);
    if (stop_.load()) return;
    // A run ends only when every worker has reported, so no generation is missed.
    ++seen;
    take_tasks();
    if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) busy_.notify_one();
  }
}

void ThreadPool::take_tasks() {
  for (int64_t i = next_.fetch_add(1, std::memory_order_relaxed); i < count_;
       i = next_.fetch_add(1, std::memory_order_relaxed))
    task_(user_, i);
}

}  // namespace generate
