// A line on stderr that says how far a run is; nothing where stderr is no terminal.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace generate {

class Progress {
 public:
  explicit Progress(std::string label);
  ~Progress();  // takes the line away

  void operator()(int64_t done, int64_t total);

 private:
  std::string label_;
  bool terminal_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace generate
