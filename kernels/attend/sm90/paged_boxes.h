// Keys that one copy of a paged kernel brings.
#pragma once

#include "core/host_device.h"

namespace adaattn::cuda::sm90 {

inline constexpr int kPageMultiple = 16;  // keys; shorter copies would not keep up with the products

// The largest power of two that divides pages and blocks: a box lies in one page and in one block.
ADAATTN_HD constexpr int box_rows(int page_size, int tile_n) {
  const int page = page_size & -page_size, block = tile_n & -tile_n;
  return page < block ? page : block;
}

}  // namespace adaattn::cuda::sm90
