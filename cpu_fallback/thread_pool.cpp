#include "cpu_fallback/thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace adaattn::cpu {

int32_t available_threads() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(CPU_COUNT(&set), 1);
  return static_cast<int32_t>(std::max(sysconf(_SC_NPROCESSORS_ONLN), 1L));
}

// Threads that wait look this often before they sleep: calls come in stages a few microseconds apart, and waking a
// thread takes tens of them.
constexpr int kLooks = 512;

inline void pause_thread() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// One for_each call. It lives on the caller's stack; workers reach it only between claiming a lane and finishing it.
struct ThreadPool::Job {
  ItemFn item;
  void* context;
  int64_t n;
  std::atomic<int64_t> next_item{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error = nullptr;  // written by the thread that set `failed`, read after all lanes are done

  // Guarded by Workers::mutex_.
  int64_t lanes = 0;
  int64_t claimed = 0;
  std::atomic<int64_t> finished{0};
  Job* next_job = nullptr;

  // Items are handed out one by one, so an uneven load (a causal mask) balances itself.
  void run_lane(int64_t lane) noexcept {
    try {
      for (;;) {
        const int64_t i = next_item.fetch_add(1, std::memory_order_relaxed);
        if (i >= n) return;
        item(context, lane, i);
      }
    } catch (...) {
      next_item.store(n, std::memory_order_relaxed);
      if (!failed.exchange(true)) error = std::current_exception();
    }
  }
};

// The threads of one process. After a fork the child has none of them, and its copy of the mutex may be locked for
// ever, so the pool abandons the object and makes a new one.
class ThreadPool::Workers {
 public:
  Workers(int32_t count, pid_t pid) : pid_(pid), count_(count) {}

  ~Workers() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  pid_t pid() const { return pid_; }

  void run(Job& job) {
    std::unique_lock<std::mutex> lock(mutex_);
    start_threads(job.lanes - 1);
    job.next_job = jobs_;
    jobs_ = &job;
    posted_.fetch_add(1, std::memory_order_release);
    if (job.lanes == 2) {
      wake_.notify_one();
    } else {
      wake_.notify_all();
    }
    // The caller works too and waits only for lanes that a worker is already running: nested calls cannot deadlock.
    while (job.claimed < job.lanes) run_claimed_lane(job, lock);
    const auto finished = [&] { return job.finished.load(std::memory_order_acquire) == job.lanes; };
    if (!finished()) {
      lock.unlock();
      for (int i = 0; i < kLooks && !finished(); ++i) pause_thread();
      lock.lock();
    }
    done_.wait(lock, finished);
  }

 private:
  void run_claimed_lane(Job& job, std::unique_lock<std::mutex>& lock) {
    const int64_t lane = job.claimed++;
    if (job.claimed == job.lanes) unlink(job);
    lock.unlock();
    job.run_lane(lane);
    lock.lock();
    if (++job.finished == job.lanes) done_.notify_all();
  }

  void unlink(Job& job) {
    Job** link = &jobs_;
    while (*link != &job) link = &(*link)->next_job;
    *link = job.next_job;
  }

  void start_threads(int64_t wanted) {
    wanted = std::min<int64_t>(wanted, count_);
    if (static_cast<int64_t>(threads_.size()) >= wanted || exhausted_) return;
    // Signals belong to the application's threads.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      while (static_cast<int64_t>(threads_.size()) < wanted) threads_.emplace_back([this] { work(); });
    } catch (const std::system_error&) {
      exhausted_ = true;  // the system gives no more threads: the caller runs the remaining lanes itself
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      if (jobs_ == nullptr && !stopping_) {
        const uint64_t seen = posted_.load(std::memory_order_relaxed);
        lock.unlock();
        for (int i = 0; i < kLooks && posted_.load(std::memory_order_acquire) == seen; ++i) pause_thread();
        lock.lock();
      }
      wake_.wait(lock, [this] { return stopping_ || jobs_ != nullptr; });
      if (stopping_) return;
      run_claimed_lane(*jobs_, lock);
    }
  }

  const pid_t pid_;
  const int32_t count_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::atomic<uint64_t> posted_{0};  // jobs
  Job* jobs_ = nullptr;              // those with unclaimed lanes
  bool stopping_ = false, exhausted_ = false;
  std::vector<std::thread> threads_;
};

ThreadPool::ThreadPool(int32_t num_threads, adaattn_parallel_for_fn hook, void* hook_user)
    : num_threads_(num_threads > 0 ? num_threads : available_threads()), hook_(hook), hook_user_(hook_user) {}

ThreadPool::~ThreadPool() { set_num_threads(num_threads_); }

void ThreadPool::set_num_threads(int32_t num_threads) {
  Workers* old = workers_.exchange(nullptr);
  if (old != nullptr && old->pid() == getpid()) delete old;
  num_threads_ = num_threads > 0 ? num_threads : available_threads();
}

ThreadPool::Workers& ThreadPool::workers() {
  const pid_t pid = getpid();
  Workers* current = workers_.load(std::memory_order_acquire);
  while (current == nullptr || current->pid() != pid) {
    auto fresh = std::make_unique<Workers>(num_threads_ - 1, pid);
    if (workers_.compare_exchange_strong(current, fresh.get(), std::memory_order_acq_rel)) current = fresh.release();
  }
  return *current;
}

void ThreadPool::run(int64_t n, int64_t max_lanes, ItemFn item, void* context) {
  if (n <= 0) return;
  Job job{.item = item, .context = context, .n = n};
  job.lanes = std::max<int64_t>(std::min({n, max_lanes, static_cast<int64_t>(num_threads_)}), 1);
  if (job.lanes == 1) {
    job.run_lane(0);
  } else if (hook_ != nullptr) {
    hook_(
        hook_user_, job.lanes, [](void* user, int64_t lane) { static_cast<Job*>(user)->run_lane(lane); }, &job);
  } else {
    workers().run(job);
  }
  if (job.failed.load()) std::rethrow_exception(job.error);
}

}  // namespace adaattn::cpu
