// Attention over the key tiles that a mask keeps, and those that a probe finds among the others, with the rest as
// centroids: one launch per class.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "adaptive/int8_tables.h"
#include "adaptive/tables.h"
#include "core/attn_params.h"

namespace adaattn::cuda::sm90 {

// Each warp of a query tile leaves the sum over its rows of the share that the far field has in them.
constexpr int kWalkShares = 8;

struct WalkCall {
  AttnParams
      p;  // bf16, d_qk 128, d_v 128; 16-byte aligned rows, windows cut to 2^30, scale > 0; no softcap, bias, ALiBi
  AdaptiveTables tables;       // of these tensors
  int32_t rank_class = 0;      // whose work list is computed
  bool far_field = false;      // centroids of the tiles that are not kept
  float* far_share = nullptr;  // [batch, heads_q, wave_tiles, kWalkShares], with far_field; null: not wanted
  // [batch, heads_q, wave_tiles]: key tiles that the probe found, whose bits are set in `mask`, the tables' own. Of the
  // tiles that are not kept, those in which some key has at least the share of a needle in some row, of what that row
  // has been given so far; they are computed exactly. Null: no probe.
  int32_t* found = nullptr;  // by the tables' probe_q and probe_k, where they are there
  uint64_t* mask = nullptr;
  float log2_needle = 0;
  Int8Tables bytes;              // not null: the list of the heads in 8 bits is computed, from these K and V
  uint32_t* counters = nullptr;  // [2], zero before and after a launch
  int32_t multiprocessors = 0;
};

// Once per device, before the first launch.
void prepare_walk();

// Capture-safe. Returns at once where the work list is empty. Throws Error where the driver refuses a tensor.
cudaError_t launch_walk(const WalkCall& call, cudaStream_t stream);

}  // namespace adaattn::cuda::sm90
