// What the opaque handles of the C ABI are.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <shared_mutex>

#include "backend.h"
#include "capi/plan_cache.h"
#include "core/validate.h"

struct adaattn_context {
  explicit adaattn_context(std::unique_ptr<adaattn::Backend> backend_in);

  adaattn::DeviceScope scope() const {
    return {backend->device(), backend->device_id(),
            check_pointers.load(std::memory_order_relaxed) ? backend.get() : nullptr};
  }

  const std::unique_ptr<adaattn::Backend> backend;
  std::atomic<bool> check_pointers;
  std::atomic<int64_t> live_plans{0};
  // Shared by running calls, exclusive for changes of threads or instruction set and for destruction.
  std::shared_mutex running;
  adaattn::capi::PlanCache plan_cache;
};

struct adaattn_plan {
  adaattn_plan(adaattn_context& owner, const adaattn::Problem& problem_in)
      : context(owner), problem(problem_in), impl(owner.backend->make_plan(problem_in)) {
    context.live_plans.fetch_add(1, std::memory_order_relaxed);
  }
  ~adaattn_plan() { context.live_plans.fetch_sub(1, std::memory_order_release); }

  adaattn_context& context;
  const adaattn::Problem problem;
  const std::unique_ptr<adaattn::AttentionPlan> impl;
  std::atomic<bool> busy{false};
};

namespace adaattn::capi {

// One call that runs on a context.
class Running {
 public:
  explicit Running(adaattn_context* context);
  adaattn_context& context() const { return context_; }
  Backend& backend() const { return *context_.backend; }
  adaattn_context* operator->() const { return &context_; }

 private:
  adaattn_context& context_;
  std::shared_lock<std::shared_mutex> lock_;
};

// The caller's workspace or one from the allocator hook, of the exact size that the call needs.
class CallWorkspace {
 public:
  // Refuses a wrong size, pointer, stream or capture state, before anything runs.
  CallWorkspace(adaattn_context& context, void* workspace, size_t workspace_bytes, size_t needed,
                adaattn_stream_t stream);
  // Allocates if the caller brought none.
  void* acquire();
  size_t bytes() const { return bytes_; }

 private:
  adaattn_context& context_;
  void* data_;
  size_t bytes_;
  adaattn_stream_t stream_;
  std::optional<ScopedBuffer> own_;
};

}  // namespace adaattn::capi
