// Runs independent items on the caller's parallel_for hook or on a small pool of the library's own. No state is shared
// between items, so results never depend on the number of threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "adaattn/adaattn.h"

namespace adaattn::cpu {

// Hardware threads that this process may run on.
int32_t available_threads();

class ThreadPool {
 public:
  // num_threads counts the calling thread; 0: available_threads(). hook null: threads of the pool's own, started by the
  // first call that can use them and asleep between calls.
  ThreadPool(int32_t num_threads, adaattn_parallel_for_fn hook, void* hook_user);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int32_t num_threads() const { return num_threads_; }
  // Only while no call is running.
  void set_num_threads(int32_t num_threads);

  // Calls body(lane, i) once for every i in [0, n) and returns when all are done; the first exception is rethrown.
  // A lane in [0, min(n, max_lanes, num_threads())) belongs to one thread at a time, so it may index scratch memory.
  // Any number of threads may call at once, and a body may call again.
  template <typename Body>
  void for_each(int64_t n, Body&& body, int64_t max_lanes = INT64_MAX) {
    using Plain = std::remove_reference_t<Body>;
    run(
        n, max_lanes, [](void* context, int64_t lane, int64_t i) { (*static_cast<Plain*>(context))(lane, i); },
        const_cast<void*>(static_cast<const void*>(&body)));
  }

 private:
  using ItemFn = void (*)(void* context, int64_t lane, int64_t i);
  struct Job;
  class Workers;

  void run(int64_t n, int64_t max_lanes, ItemFn item, void* context);
  Workers& workers();

  int32_t num_threads_;
  adaattn_parallel_for_fn hook_;
  void* hook_user_;
  std::atomic<Workers*> workers_{nullptr};
};

}  // namespace adaattn::cpu
