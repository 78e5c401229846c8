// The one exception type of the library and the helper that raises it. The C boundary turns it into a status.
#pragma once

#include <exception>
#include <string>
#include <utility>

#include "adaattn/adaattn.h"

namespace adaattn {

class Error : public std::exception {
 public:
  Error(adaattn_status_t status, std::string text) : status_(status), text_(std::move(text)) {}
  adaattn_status_t status() const noexcept { return status_; }
  const char* what() const noexcept override { return text_.c_str(); }

 private:
  adaattn_status_t status_;
  std::string text_;
};

// printf-style. The text names the field, the value found and what would be accepted.
[[noreturn]] void fail(adaattn_status_t status, const char* format, ...) __attribute__((format(printf, 2, 3)));

}  // namespace adaattn
