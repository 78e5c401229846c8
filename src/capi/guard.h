// The C boundary: every public function runs its body through guarded(), so that no exception leaves the library.
#pragma once

#include <exception>
#include <new>

#include "adaattn/adaattn.h"
#include "core/error.h"

namespace adaattn::capi {

// The calling thread's error text, in static storage: this must work without memory.
void set_last_text(const char* text) noexcept;
// Logs the failure and keeps its text; returns status.
adaattn_status_t record_failure(adaattn_status_t status, const char* text) noexcept;
const char* last_failure() noexcept;

template <typename Body>
adaattn_status_t guarded(Body&& body) noexcept {
  try {
    body();
    return ADAATTN_SUCCESS;
  } catch (const Error& e) {
    return record_failure(e.status(), e.what());
  } catch (const std::bad_alloc&) {
    return record_failure(ADAATTN_ERROR_OUT_OF_MEMORY, "the host is out of memory");
  } catch (const std::exception& e) {
    return record_failure(ADAATTN_ERROR_INTERNAL, e.what());
  } catch (...) {
    return record_failure(ADAATTN_ERROR_INTERNAL, "an exception of unknown type, perhaps of a caller's hook");
  }
}

template <typename T>
T& require(T* pointer, const char* argument) {
  if (pointer == nullptr) fail(ADAATTN_ERROR_NULL_POINTER, "%s is NULL; accepted: a valid pointer", argument);
  return *pointer;
}

}  // namespace adaattn::capi
