// The one exception of the engine: a sentence for the person at the terminal.
#pragma once

#include <stdexcept>
#include <string>

namespace generate {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// printf-style.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace generate
