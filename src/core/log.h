// Messages to the caller's log callback; nothing is ever printed.
#pragma once

#include "adaattn/adaattn.h"

namespace adaattn {

// Replaces the callback. On return no other thread is inside the old one. Throws IN_USE when called from a callback.
void set_log_callback(adaattn_log_fn fn, void* user, adaattn_log_level_t level);

bool log_enabled(adaattn_log_level_t level) noexcept;

// printf-style. Never throws; a message raised inside the callback is dropped.
void log_message(adaattn_log_level_t level, const char* format, ...) noexcept __attribute__((format(printf, 2, 3)));

}  // namespace adaattn
