// Tensor maps: what TMA needs to know about an operand.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "core/attn_params.h"

namespace adaattn::cuda::sm90 {

struct Extents {
  int64_t dim, tokens, heads, batch;
};

// A [batch, token, head, dim] operand as TMA's (dim, token, head, batch), in boxes of box_rows tokens by one swizzle
// width. A dimension of stride 0 gets extent 1: its coordinate stays 0. Throws Error, naming the operand, where the
// driver refuses it.
CUtensorMap make_map(const Operand& operand, Extents extents, int width, int box_rows, const char* name);

// The same where a box brings every step-th of its box_rows tokens.
CUtensorMap make_sampled_map(const Operand& operand, Extents extents, int width, int box_rows, int step,
                             const char* name);

// As make_map, as (dim, head, token, batch), in boxes of box_rows rows: `heads` adjacent heads at box_rows / heads
// positions.
CUtensorMap make_rows_map(const Operand& operand, Extents extents, int width, int box_rows, int heads,
                          const char* name);

}  // namespace adaattn::cuda::sm90
