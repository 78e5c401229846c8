// For what adaptive plans do not serve.
#pragma once

#include "core/error.h"

namespace adaattn::cuda {

template <class... Arguments>
[[noreturn]] void refuse(const char* format, const Arguments&... arguments) {
  fail(ADAATTN_ERROR_NOT_SUPPORTED, format, arguments...);
}

}  // namespace adaattn::cuda
