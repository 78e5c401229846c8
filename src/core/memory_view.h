// Which bytes a strided tensor view touches, and whether two views share one.
#pragma once

#include <cstdint>

#include "adaattn/adaattn.h"

namespace adaattn {

// Dimensions of extent 1 are dropped; an empty view has span 0. Strides are bytes and not negative.
struct MemoryView {
  struct Dimension {
    int64_t stride = 0, extent = 0;
  };
  uintptr_t begin = 0;
  int64_t span = 0;   // bytes from begin to the end of the last element
  int64_t width = 0;  // bytes of one element
  int count = 0;
  Dimension dims[4];
};

// Of a tensor whose extents, strides and address range are valid.
MemoryView memory_view(const adaattn_tensor_t& tensor, int64_t element_size);
MemoryView memory_view(const void* data, int64_t bytes);

// True when some byte belongs to both. Exact, interleaved views included (the slices of a fused q-k-v buffer), but for
// views so intertwined that the search would be long: those count as overlapping.
bool overlap(const MemoryView& a, const MemoryView& b);

// True when two index tuples may name the same byte: some stride is below the span of the dimensions inside it.
bool overlaps_itself(const MemoryView& view);

}  // namespace adaattn
