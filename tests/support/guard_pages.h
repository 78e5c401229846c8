// Memory with unmapped pages on both sides: a single byte read or written outside stops the process.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>

namespace adaattn::test {

class GuardedMemory {
 public:
  enum class Edge { kEnd, kBegin };  // which end touches its guard page exactly

  GuardedMemory(size_t bytes, Edge edge) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t inner = (bytes + page - 1) / page * page;
    mapped_bytes_ = inner + 2 * page;
    mapping_ = static_cast<char*>(mmap(nullptr, mapped_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (mapping_ == MAP_FAILED) std::abort();
    if (inner > 0 && mprotect(mapping_ + page, inner, PROT_READ | PROT_WRITE) != 0) std::abort();
    data_ = mapping_ + page + (edge == Edge::kEnd ? inner - bytes : 0);
    if (inner > 0) std::memset(mapping_ + page, 0xff, inner);
  }
  ~GuardedMemory() { munmap(mapping_, mapped_bytes_); }
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;
  void* data() const { return data_; }
  // Makes the inside read-only; for inputs.
  void protect() const {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    if (mapped_bytes_ > 2 * page) mprotect(mapping_ + page, mapped_bytes_ - 2 * page, PROT_READ);
  }

 private:
  char* mapping_;
  size_t mapped_bytes_;
  char* data_;
};

}  // namespace adaattn::test
