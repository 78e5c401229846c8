// Hands out pieces of a workspace. Without memory it only counts, so a layout function gives the size and the pointers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace adaattn::cpu {

class Arena {
 public:
  static constexpr size_t kAlignment = 64;

  Arena() = default;
  // memory may have any alignment: size() includes what aligning it costs.
  explicit Arena(void* memory)
      : base_((reinterpret_cast<uintptr_t>(memory) + kAlignment - 1) / kAlignment * kAlignment) {}

  template <typename T>
  T* take(int64_t count) {
    const uintptr_t at = base_ + used_;
    used_ += (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return base_ == 0 ? nullptr : reinterpret_cast<T*>(at);
  }
  size_t used() const { return used_; }
  // Bytes to ask for so that `used` bytes fit behind any start address.
  static size_t size_for(size_t used) { return used == 0 ? 0 : used + kAlignment - 1; }

 private:
  uintptr_t base_ = 0;
  size_t used_ = 0;
};

}  // namespace adaattn::cpu
