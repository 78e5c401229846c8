#include "core/log.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <mutex>

#include "core/error.h"

namespace adaattn {
namespace {

struct Sink {
  adaattn_log_fn fn = nullptr;
  void* user = nullptr;
};

std::mutex sink_mutex;
Sink sink;                          // guarded by sink_mutex
std::atomic<int32_t> threshold{0};  // of sink; read without the lock to make silence free
thread_local bool inside_callback = false;

}  // namespace

void set_log_callback(adaattn_log_fn fn, void* user, adaattn_log_level_t level) {
  if (inside_callback)
    fail(ADAATTN_ERROR_IN_USE, "fn is set from inside a call of the log callback; accepted: from outside");
  const std::lock_guard lock(sink_mutex);
  sink = {fn, user};
  threshold.store(fn != nullptr ? level : ADAATTN_LOG_OFF, std::memory_order_relaxed);
}

bool log_enabled(adaattn_log_level_t level) noexcept { return level <= threshold.load(std::memory_order_relaxed); }

void log_message(adaattn_log_level_t level, const char* format, ...) noexcept {
  if (!log_enabled(level) || inside_callback) return;
  char text[1024];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  try {
    const std::lock_guard lock(sink_mutex);
    if (sink.fn == nullptr || !log_enabled(level)) return;
    inside_callback = true;
    sink.fn(sink.user, level, text);
  } catch (...) {  // a caller's callback may throw; a message is not worth a failure
  }
  inside_callback = false;
}

}  // namespace adaattn
