#include "cli/progress.h"

#include <unistd.h>

#include <cstdio>
#include <utility>

namespace generate {

Progress::Progress(std::string label)
    : label_(std::move(label)), terminal_(isatty(STDERR_FILENO) != 0), start_(std::chrono::steady_clock::now()) {}

Progress::~Progress() {
  if (terminal_) std::fputs("\r\x1b[K", stderr);
}

void Progress::operator()(int64_t done, int64_t total) {
  if (!terminal_) return;
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  std::fprintf(stderr, "\r\x1b[K%s  %3.0f %%  %lld of %lld tokens  %.0f tokens/s", label_.c_str(),
               100.0 * static_cast<double>(done) / static_cast<double>(total), static_cast<long long>(done),
               static_cast<long long>(total), static_cast<double>(done) / seconds);
  std::fflush(stderr);
}

}  // namespace generate
