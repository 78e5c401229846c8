// The cost table of a back-end from the widths of its products. Host code: the table is an argument of every decision.
#pragma once

#include "decide/choose.h"

namespace adaattn::decide {

// Costs in units of one exact tile of 128 x 128 scores. score_cost: exponential, masking and bookkeeping of one score,
// in multiply-adds. probe_width: multiply-adds of one probed score.
inline CostTable product_costs(float d_qk, float d_v, float score_cost, float probe_width) {
  const float whole = d_qk + d_v + score_cost;
  CostTable c;
  for (int rank_class = 0; rank_class < kRankClasses; ++rank_class) {
    const float width = rank_class == 0 ? d_v : static_cast<float>(rank_of_class(rank_class));
    c.tile[rank_class] = (d_qk + width + score_cost) / whole;
    // O' U^T: d_v times rank for each query.
    c.per_query_tile[rank_class] = rank_class == 0 ? 0 : d_v * width / (kTileK * whole);
  }
  c.far_tile = (2 * d_qk + d_v + score_cost) / (kGroupK * whole);
  c.probe_tile = probe_width / whole;
  // (V - mean) U for the keys of a tile.
  c.rank_setup = d_v * 64 / (kTileQ * whole);
  return c;
}

}  // namespace adaattn::decide
