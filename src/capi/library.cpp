#include <algorithm>
#include <cinttypes>
#include <cstring>
#include <string>

#include "backend.h"
#include "capi/guard.h"
#include "capi/structs.h"
#include "core/log.h"
#include "core/validate.h"

#define ADAATTN_STRING_(x) #x
#define ADAATTN_STRING(x) ADAATTN_STRING_(x)

namespace adaattn::capi {
namespace {

thread_local char failure_text[1024];

struct StatusText {
  adaattn_status_t status;
  const char* name;
  const char* sentence;
};

#define ADAATTN_STATUS(status, sentence) \
  { status, #status, sentence }
constexpr StatusText kStatuses[] = {
    ADAATTN_STATUS(ADAATTN_SUCCESS, "The call succeeded."),
    ADAATTN_STATUS(ADAATTN_ERROR_INVALID_ARGUMENT, "An argument or field is out of its range."),
    ADAATTN_STATUS(ADAATTN_ERROR_NULL_POINTER, "A pointer or tensor that the call needs is missing."),
    ADAATTN_STATUS(ADAATTN_ERROR_INVALID_SHAPE, "A tensor's number of dimensions or extents do not fit the call."),
    ADAATTN_STATUS(ADAATTN_ERROR_INVALID_DTYPE, "A data type is unknown or does not fit the call."),
    ADAATTN_STATUS(ADAATTN_ERROR_INVALID_STRIDE, "A tensor's strides cannot be used here."),
    ADAATTN_STATUS(ADAATTN_ERROR_OVERLAP, "An output shares memory with another tensor or with itself."),
    ADAATTN_STATUS(ADAATTN_ERROR_SIZE_OVERFLOW, "A size or address does not fit 64 bits."),
    ADAATTN_STATUS(ADAATTN_ERROR_STRUCT_SIZE, "A struct has a size or fields that this version does not know."),
    ADAATTN_STATUS(ADAATTN_ERROR_WRONG_DEVICE, "A tensor, pointer or stream belongs to another device."),
    ADAATTN_STATUS(ADAATTN_ERROR_WORKSPACE_TOO_SMALL, "The workspace has fewer bytes than the call needs."),
    ADAATTN_STATUS(ADAATTN_ERROR_IN_USE, "The object is in use by another object or a running call."),
    ADAATTN_STATUS(ADAATTN_ERROR_CAPTURE, "The call cannot be made while its stream is being captured."),
    ADAATTN_STATUS(ADAATTN_ERROR_NOT_SUPPORTED, "This version or device does not offer what the call asks for."),
    ADAATTN_STATUS(ADAATTN_ERROR_NOT_BUILT, "This build of the library lacks the back-end that the call needs."),
    ADAATTN_STATUS(ADAATTN_ERROR_OUT_OF_MEMORY, "The host, the device or the caller's hook is out of memory."),
    ADAATTN_STATUS(ADAATTN_ERROR_DEVICE, "The device or its driver reported a failure."),
    ADAATTN_STATUS(ADAATTN_ERROR_NO_DEVICE, "There is no such device."),
    ADAATTN_STATUS(ADAATTN_ERROR_DRIVER_TOO_OLD, "The device's driver is older than this build needs."),
    ADAATTN_STATUS(ADAATTN_ERROR_LIBRARY_NOT_FOUND, "A library that is opened on first use was not found."),
    ADAATTN_STATUS(ADAATTN_ERROR_INTERNAL, "A defect of the library."),
};
#undef ADAATTN_STATUS

const StatusText* find_status(adaattn_status_t status) {
  for (const StatusText& row : kStatuses)
    if (row.status == status) return &row;
  return nullptr;
}

constexpr const char* kVersion = ADAATTN_STRING(ADAATTN_VERSION_MAJOR) "." ADAATTN_STRING(
    ADAATTN_VERSION_MINOR) "." ADAATTN_STRING(ADAATTN_VERSION_PATCH);

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

std::string describe_build() {
  std::string text = std::string("libadaattn ") + kVersion + "; " + cpu_build_info();
#if defined(ADAATTN_WITH_CUDA)
  text += "; " + cuda_build_info();
#else
  text += "; no CUDA";
#endif
  return text + "; " + kCompiler;
}

}  // namespace

void set_last_text(const char* text) noexcept { std::strncpy(failure_text, text, sizeof failure_text - 1); }

adaattn_status_t record_failure(adaattn_status_t status, const char* text) noexcept {
  // Logged first: a callback that makes failing calls of its own must not replace this text.
  log_message(ADAATTN_LOG_ERROR, "%s: %s", adaattn_status_name(status), text);
  set_last_text(text);
  return status;
}

const char* last_failure() noexcept { return failure_text; }

}  // namespace adaattn::capi

namespace capi = adaattn::capi;
using adaattn::fail;
using capi::guarded;

extern "C" {

uint32_t adaattn_version(void) { return ADAATTN_VERSION; }

const char* adaattn_build_info(void) {
  // Never destroyed: a caller may hold the text through process exit.
  static const std::string* const text = []() -> const std::string* {
    try {
      return new std::string(capi::describe_build());
    } catch (...) {
      return nullptr;
    }
  }();
  return text != nullptr ? text->c_str() : "libadaattn (out of memory)";
}

const char* adaattn_status_name(adaattn_status_t status) {
  const capi::StatusText* row = capi::find_status(status);
  return row != nullptr ? row->name : "ADAATTN_ERROR_UNKNOWN";
}

const char* adaattn_status_string(adaattn_status_t status) {
  const capi::StatusText* row = capi::find_status(status);
  return row != nullptr ? row->sentence : "This version knows no status of that number.";
}

size_t adaattn_last_error(char* buf, size_t cap) {
  const char* text = capi::last_failure();
  const size_t length = std::strlen(text);
  if (buf != nullptr && cap > 0) {
    const size_t copied = std::min(length, cap - 1);
    std::memcpy(buf, text, copied);
    buf[copied] = '\0';
  }
  return length;
}

adaattn_status_t adaattn_set_log_callback(adaattn_log_fn fn, void* user, adaattn_log_level_t level) {
  return guarded([&] {
    if (level < ADAATTN_LOG_OFF || level > ADAATTN_LOG_DEBUG)
      fail(ADAATTN_ERROR_INVALID_ARGUMENT, "level is %" PRId32 "; accepted: 0 (OFF) to 4 (DEBUG)", level);
    adaattn::set_log_callback(fn, user, level);
  });
}

adaattn_status_t adaattn_device_count(adaattn_device_t device, int32_t* count) {
  return guarded([&] {
    adaattn::check_device(device, "device");
    int32_t& out = capi::require(count, "count");
    if (device == ADAATTN_DEVICE_CPU) {
      out = 1;
      return;
    }
#if defined(ADAATTN_WITH_CUDA)
    std::string reason;
    adaattn_status_t why = ADAATTN_SUCCESS;
    out = adaattn::cuda_device_count(&reason, &why);
    if (out == 0) capi::set_last_text(reason.c_str());
#else
    out = 0;
    capi::set_last_text("this build of libadaattn has no CUDA back-end");
#endif
  });
}

adaattn_status_t adaattn_device_info(adaattn_device_t device, int32_t device_id, adaattn_device_info_t* info) {
  return guarded([&] {
    adaattn::check_device(device, "device");
    const size_t size = capi::struct_size_of(info, "info");
    adaattn_device_info_t found = {};
    if (device == ADAATTN_DEVICE_CPU) {
      if (device_id != 0)
        fail(ADAATTN_ERROR_NO_DEVICE, "device_id is %" PRId32 "; accepted: 0, the only CPU device", device_id);
      adaattn::cpu_device_info(&found);
    } else {
#if defined(ADAATTN_WITH_CUDA)
      std::string reason;
      adaattn_status_t why = ADAATTN_ERROR_NO_DEVICE;
      const int32_t count = adaattn::cuda_device_count(&reason, &why);
      if (count == 0) fail(why, "%s", reason.c_str());
      if (device_id < 0 || device_id >= count)
        fail(ADAATTN_ERROR_NO_DEVICE, "device_id is %" PRId32 "; accepted: 0 to %" PRId32, device_id, count - 1);
      adaattn::cuda_device_info(device_id, &found);
#else
      fail(ADAATTN_ERROR_NOT_BUILT,
           "device is 2 (CUDA); accepted: 1 (CPU), as this build of libadaattn has no CUDA back-end");
#endif
    }
    capi::write_bytes(info, size, found);
  });
}

}  // extern "C"
