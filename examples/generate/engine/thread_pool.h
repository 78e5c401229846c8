// One pool for the whole engine: weights, element-wise work and, through the library's parallel_for hook, attention.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace generate {

class ThreadPool {
 public:
  using Task = void (*)(void* user, int64_t index);

  // threads counts the calling one; 0: as many as this process may run on.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Runs task(user, i) for every i in [0, n) and returns when all are done. Tasks must not throw or call run().
  void run(int64_t n, Task task, void* user);

  template <class Function>
  void parallel_for(int64_t n, const Function& function) {
    run(
        n, [](void* user, int64_t i) { (*static_cast<const Function*>(user))(i); }, const_cast<Function*>(&function));
  }

 private:
  void work();
  void take_tasks();

  std::vector<std::thread> workers_;
  Task task_ = nullptr;
  void* user_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};
  std::atomic<int> busy_{0};             // workers that have not finished the current run
  std::atomic<uint32_t> generation_{0};  // one more for each run
  std::atomic<bool> stop_{false};
};

}  // namespace generate
