#include "core/allocator.h"

#include "core/error.h"

namespace adaattn {

ScopedBuffer::ScopedBuffer(const Allocator& allocator, size_t bytes, size_t alignment, adaattn_stream_t stream)
    : allocator_(allocator), bytes_(bytes), stream_(stream) {
  if (bytes == 0) return;
  data_ = allocator_.alloc(allocator_.user, bytes, alignment, stream);
  if (data_ == nullptr) fail(ADAATTN_ERROR_OUT_OF_MEMORY, "alloc returned NULL for %zu bytes", bytes);
}

ScopedBuffer::~ScopedBuffer() {
  if (data_ != nullptr) allocator_.free(allocator_.user, data_, bytes_, stream_);
}

}  // namespace adaattn
