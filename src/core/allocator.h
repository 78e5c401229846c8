// The caller's memory hook or the back-end's default, behind one face.
#pragma once

#include <cstddef>

#include "adaattn/adaattn.h"

namespace adaattn {

struct Allocator {
  adaattn_alloc_fn alloc = nullptr;
  adaattn_free_fn free = nullptr;
  void* user = nullptr;
};

// Owns one allocation for the length of a scope; throws ADAATTN_ERROR_OUT_OF_MEMORY naming the size.
class ScopedBuffer {
 public:
  ScopedBuffer(const Allocator& allocator, size_t bytes, size_t alignment, adaattn_stream_t stream);
  ~ScopedBuffer();
  ScopedBuffer(const ScopedBuffer&) = delete;
  ScopedBuffer& operator=(const ScopedBuffer&) = delete;
  void* data() const { return data_; }
  size_t size() const { return bytes_; }

 private:
  Allocator allocator_;
  void* data_ = nullptr;
  size_t bytes_ = 0;
  adaattn_stream_t stream_ = nullptr;
};

}  // namespace adaattn
