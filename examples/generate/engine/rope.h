// The angles of rotary embedding, the same on every device.
#pragma once

#include <cstdint>
#include <vector>

namespace generate {

class RopeTable {
 public:
  RopeTable(int64_t head_dim, double theta) : head_dim_(head_dim), theta_(theta) {}

  // Room for that many positions at least; true if entries were added.
  bool grow(int64_t positions);

  // [positions, head_dim / 2]
  const std::vector<float>& cos() const { return cos_; }
  const std::vector<float>& sin() const { return sin_; }

 private:
  int64_t head_dim_;
  double theta_;
  std::vector<float> cos_;
  std::vector<float> sin_;
};

}  // namespace generate
