#include "capi/context.h"

#include <cinttypes>
#include <mutex>

#include "capi/guard.h"
#include "capi/structs.h"
#include "core/log.h"

adaattn_context::adaattn_context(std::unique_ptr<adaattn::Backend> backend_in)
    : backend(std::move(backend_in)), check_pointers(backend->device() == ADAATTN_DEVICE_CUDA) {}

namespace adaattn::capi {
namespace {

constexpr int64_t kMaxThreads = 4096;
constexpr int64_t kMaxCachedPlans = 65536;
constexpr size_t kWorkspaceAlignment = 256;

void range(const char* field, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high)
    fail(ADAATTN_ERROR_INVALID_ARGUMENT, "%s is %" PRId64 "; accepted: %" PRId64 " to %" PRId64, field, value, low,
         high);
}

void check_config(const adaattn_config_t& config) {
  check_device(config.device, "config.device");
  range("config.device_id", config.device_id, 0, config.device == ADAATTN_DEVICE_CPU ? 0 : INT32_MAX);
  range("config.num_threads", config.num_threads, 0, kMaxThreads);
  range("config.isa", config.isa, ADAATTN_ISA_AUTO, ADAATTN_ISA_NEON);
  if ((config.alloc == nullptr) != (config.free == nullptr))
    fail(ADAATTN_ERROR_INVALID_ARGUMENT, "config.%s is NULL while config.%s is not; accepted: both or neither",
         config.alloc == nullptr ? "alloc" : "free", config.alloc == nullptr ? "free" : "alloc");
  if (config.device == ADAATTN_DEVICE_CPU) return;
  if (config.num_threads != 0)
    fail(ADAATTN_ERROR_INVALID_ARGUMENT, "config.num_threads is %" PRId32 "; accepted: 0 on CUDA", config.num_threads);
  if (config.isa != ADAATTN_ISA_AUTO)
    fail(ADAATTN_ERROR_INVALID_ARGUMENT, "config.isa is %" PRId32 "; accepted: 0 (AUTO) on CUDA", config.isa);
  if (config.parallel_for != nullptr)
    fail(ADAATTN_ERROR_INVALID_ARGUMENT, "config.parallel_for is set; accepted: NULL on CUDA");
}

std::unique_ptr<Backend> make_backend(const adaattn_config_t& config) {
  BackendConfig backend;
  backend.device_id = config.device_id;
  backend.num_threads = config.num_threads;
  backend.isa = config.isa;
  backend.parallel_for = config.parallel_for;
  backend.parallel_for_user = config.parallel_for_user;
  backend.allocator = {config.alloc, config.free, config.alloc_user};
  if (config.device == ADAATTN_DEVICE_CPU) return make_cpu_backend(backend);
#if defined(ADAATTN_WITH_CUDA)
  std::string reason;
  adaattn_status_t why = ADAATTN_ERROR_NO_DEVICE;
  const int32_t count = cuda_device_count(&reason, &why);
  if (count == 0) fail(why, "%s", reason.c_str());
  if (config.device_id >= count)
    fail(ADAATTN_ERROR_NO_DEVICE, "config.device_id is %" PRId32 "; accepted: 0 to %" PRId32, config.device_id,
         count - 1);
  return make_cuda_backend(backend);
#else
  fail(ADAATTN_ERROR_NOT_BUILT,
       "config.device is 2 (CUDA); accepted: 1 (CPU), as this build of libadaattn has no CUDA back-end");
#endif
}

// Exclusive access without waiting: a change under a running call would pull its threads away, and waiting could
// deadlock a caller's hook.
std::unique_lock<std::shared_mutex> lock_idle(adaattn_context& context, const char* what) {
  std::unique_lock lock(context.running, std::try_to_lock);
  if (!lock.owns_lock())
    fail(ADAATTN_ERROR_IN_USE, "context is in use by another call; accepted: %s while none is running on it", what);
  return lock;
}

void set_option(adaattn_context& context, adaattn_option_t option, int64_t value) {
  switch (option) {
    case ADAATTN_OPTION_CHECK_POINTERS:
      range("value of ADAATTN_OPTION_CHECK_POINTERS", value, 0, 1);
      context.check_pointers.store(value != 0, std::memory_order_relaxed);
      return;
    case ADAATTN_OPTION_NUM_THREADS:
    case ADAATTN_OPTION_ISA: {
      const bool threads = option == ADAATTN_OPTION_NUM_THREADS;
      if (context.backend->device() != ADAATTN_DEVICE_CPU)
        fail(ADAATTN_ERROR_NOT_SUPPORTED, "option is %" PRId32 " (%s); accepted on a CPU context only", option,
             threads ? "NUM_THREADS" : "ISA");
      if (threads)
        range("value of ADAATTN_OPTION_NUM_THREADS", value, 0, kMaxThreads);
      else
        range("value of ADAATTN_OPTION_ISA", value, ADAATTN_ISA_AUTO, ADAATTN_ISA_NEON);
      const auto lock = lock_idle(context, "setting the option");
      context.backend->set_option(option, value);
      context.plan_cache.clear();  // its plans keep what they were made with
      return;
    }
    case ADAATTN_OPTION_PLAN_CACHE_SIZE:
      range("value of ADAATTN_OPTION_PLAN_CACHE_SIZE", value, 0, kMaxCachedPlans);
      context.plan_cache.set_limit(static_cast<size_t>(value));
      return;
    default:
      fail(ADAATTN_ERROR_INVALID_ARGUMENT,
           "option is %" PRId32
           "; accepted: 1 (CHECK_POINTERS), 2 (NUM_THREADS), "
           "3 (ISA), 4 (PLAN_CACHE_SIZE)",
           option);
  }
}

int64_t get_option(adaattn_context& context, adaattn_option_t option) {
  switch (option) {
    case ADAATTN_OPTION_CHECK_POINTERS:
      return context.check_pointers.load(std::memory_order_relaxed) ? 1 : 0;
    case ADAATTN_OPTION_NUM_THREADS:
    case ADAATTN_OPTION_ISA:
      if (context.backend->device() != ADAATTN_DEVICE_CPU)
        fail(ADAATTN_ERROR_NOT_SUPPORTED, "option is %" PRId32 "; accepted on a CPU context only", option);
      return context.backend->get_option(option);
    case ADAATTN_OPTION_PLAN_CACHE_SIZE:
      return static_cast<int64_t>(context.plan_cache.limit());
    default:
      fail(ADAATTN_ERROR_INVALID_ARGUMENT,
           "option is %" PRId32
           "; accepted: 1 (CHECK_POINTERS), 2 (NUM_THREADS), "
           "3 (ISA), 4 (PLAN_CACHE_SIZE)",
           option);
  }
}

}  // namespace

Running::Running(adaattn_context* context) : context_(require(context, "context")), lock_(context_.running) {}

CallWorkspace::CallWorkspace(adaattn_context& context, void* workspace, size_t workspace_bytes, size_t needed,
                             adaattn_stream_t stream)
    : context_(context), data_(workspace), bytes_(workspace_bytes), stream_(stream) {
  const bool will_allocate = workspace == nullptr && workspace_bytes == 0 && needed > 0;
  context.backend->check_stream(stream, will_allocate);
  if (workspace == nullptr) {
    if (workspace_bytes != 0)
      fail(ADAATTN_ERROR_NULL_POINTER,
           "workspace is NULL while workspace_bytes is %zu; accepted: NULL with 0, or an "
           "address",
           workspace_bytes);
    bytes_ = needed;
    return;
  }
  if (workspace_bytes < needed)
    fail(ADAATTN_ERROR_WORKSPACE_TOO_SMALL, "workspace_bytes is %zu; accepted: %zu or more", workspace_bytes, needed);
  if (context.backend->device() == ADAATTN_DEVICE_CUDA &&
      reinterpret_cast<uintptr_t>(workspace) % kWorkspaceAlignment != 0)
    fail(ADAATTN_ERROR_INVALID_ARGUMENT, "workspace is %p; accepted on CUDA: a multiple of %zu", workspace,
         kWorkspaceAlignment);
  const DeviceScope scope = context.scope();
  if (scope.pointer_check != nullptr && workspace_bytes != 0)
    scope.pointer_check->check_pointer(workspace, "workspace");
}

void* CallWorkspace::acquire() {
  if (data_ == nullptr && bytes_ > 0) {
    own_.emplace(context_.backend->allocator(), bytes_, kWorkspaceAlignment, stream_);
    data_ = own_->data();
  }
  return data_;
}

}  // namespace adaattn::capi

namespace capi = adaattn::capi;
using adaattn::fail;
using capi::guarded;

extern "C" {

adaattn_status_t adaattn_create(const adaattn_config_t* config, adaattn_context_t** context) {
  return guarded([&] {
    adaattn_context_t*& out = capi::require(context, "context");
    const adaattn_config_t settings =
        config != nullptr ? capi::read_struct(config) : capi::StructTraits<adaattn_config_t>::defaults();
    capi::check_config(settings);
    auto made = std::make_unique<adaattn_context>(capi::make_backend(settings));
    adaattn::log_message(ADAATTN_LOG_INFO, "context on %s device %" PRId32, adaattn::device_name(settings.device),
                         settings.device_id);
    out = made.release();
  });
}

adaattn_status_t adaattn_destroy(adaattn_context_t* context) {
  return guarded([&] {
    if (context == nullptr) return;
    const int64_t plans = context->live_plans.load(std::memory_order_acquire);
    if (plans != 0)
      fail(ADAATTN_ERROR_IN_USE, "context has %" PRId64 " live plans; accepted: one whose plans are destroyed", plans);
    capi::lock_idle(*context, "destroying the context").unlock();
    delete context;
  });
}

adaattn_status_t adaattn_set_option(adaattn_context_t* context, adaattn_option_t option, int64_t value) {
  return guarded([&] { capi::set_option(capi::require(context, "context"), option, value); });
}

adaattn_status_t adaattn_get_option(adaattn_context_t* context, adaattn_option_t option, int64_t* value) {
  return guarded([&] {
    adaattn_context& from = capi::require(context, "context");
    int64_t& out = capi::require(value, "value");
    out = capi::get_option(from, option);
  });
}

}  // extern "C"
