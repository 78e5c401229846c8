// How a batch of matrices shares the threads: several matrices at once on one lane each, or one matrix on all lanes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cpu_fallback/tools/arena.h"
#include "cpu_fallback/tools/linalg.h"
#include "cpu_fallback/tools/tools.h"

namespace adaattn::cpu {

// Lanes beyond this gain little on one matrix and each costs its packing buffers.
inline constexpr int64_t kMaxLanes = 64;

struct BatchShare {
  int64_t slots = 1;  // matrices at once
  int64_t lanes = 1;  // threads per matrix

  BatchShare(const ToolContext& context, int64_t batch) {
    const int64_t threads = std::min<int64_t>(context.pool.num_threads(), kMaxLanes);
    if (batch > 1) {
      slots = std::min(threads, batch);
    } else {
      lanes = threads;
    }
  }

  // Layout: constructed from (params, lanes, arena), takes what one matrix needs.
  template <typename Layout, typename Params>
  size_t slot_bytes(const Params& params) const {
    Arena arena;
    Layout(params, lanes, arena);
    return arena.used();
  }
  template <typename Layout, typename Params>
  size_t workspace(const Params& params) const {
    return Arena::size_for(static_cast<size_t>(slots) * slot_bytes<Layout>(params));
  }

  // body(exec, layout, matrix) for every matrix of the batch.
  template <typename Layout, typename Params, typename Body>
  void run(const ToolContext& context, const Params& params, int64_t batch, void* workspace, Body&& body) const {
    Arena arena(workspace);
    const size_t bytes = slot_bytes<Layout>(params);
    uint8_t* const base = arena.take<uint8_t>(static_cast<int64_t>(bytes) * slots);
    const Exec outer{&context.pool, &context.kernels, slots}, inner{&context.pool, &context.kernels, lanes};
    outer.for_each(batch, [&](int64_t slot, int64_t matrix) {
      Arena mine(base + static_cast<size_t>(slot) * bytes);
      const Layout layout(params, lanes, mine);
      body(inner, layout, matrix);
    });
  }
};

// Matrix `index` of a batch, as the kernels read it.
inline ConstMatrix matrix_of(const MatrixBatch& batch, int64_t index) {
  return {static_cast<const float*>(batch.data) + batch.offset(index),
          batch.rows,
          batch.cols,
          batch.stride_row,
          batch.stride_col,
          false};
}

}  // namespace adaattn::cpu
