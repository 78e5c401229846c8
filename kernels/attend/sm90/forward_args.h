// What a Hopper forward kernel is built from and launched with.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "core/attn_params.h"

namespace adaattn::cuda::sm90 {

// How one instance is built. A CTA holds one producer warpgroup and `groups` consumer warpgroups of 64 query rows each.
struct ForwardConfig {
  int d_qk = 128;
  int d_v = 128;
  int tile_n = 128;             // keys per block
  int groups = 2;               // consumer warpgroups
  bool masked = false;          // causal and window masks; otherwise only the length of K is respected
  bool softcap = false;         // at run time it would split the basic blocks of every softmax
  bool dynamic = false;         // tiles from a counter, longest first; otherwise a static stride over the grid
  bool ordered = true;          // warpgroups take turns in issuing matrix products
  int k_stages = 2;             // buffers of K: quick steps hold one until the vote
  int v_stages = 2;             // buffers of V
  int early_columns = 0;        // of tile_n / 8 column groups, those whose exponentials run under the PV before
  bool quick = false;           // blocks without a mask take the maxima of earlier ones for granted
  bool load_ahead = false;      // a tile is announced and its first K loaded before the last V of the one before
  bool q_in_registers = false;  // Q is read once and stays in registers
  bool pass_unseen = false;     // a warpgroup passes by the blocks at a tile's end that only later rows see
  bool from_end = false;        // tiles are counted from a sequence's last warpgroup; its first tile is the ragged one
  bool rescale_early = false;   // O is rescaled while QK runs instead of after PV
  bool split = false;           // parts of the keys, and the query heads of a group in the rows of one tile
};

struct ForwardArgs {
  CUtensorMap q_map, k_map, v_map, o_map;
  AttnParams p;
  float scale_log2;                                              // from the (softcapped) score to base-2 logits
  float softcap_log2;                                            // 2 * scale / softcap * log2(e)
  int32_t batch, heads_q, seqlen_q, seqlen_k, total_q, total_k;  // those of p; an instance takes no larger ones
  int32_t window_left, window_right;                             // -1: open
  int32_t group_size;                                            // query heads per key head
  int32_t k_head_step, k_batch_step, v_head_step, v_batch_step;  // 0: broadcast or packed, the coordinate stays 0
  int32_t m_blocks;                                              // query tiles per sequence (not packed)
  int32_t num_tiles;                                             // in all (not packed)
  int32_t section_heads;  // (sequence, head) pairs walked together so that their K and V stay in L2
  bool zero_v_tail;       // V beyond a sequence's end is readable memory and may hold NaN
  uint32_t* counters;     // [2]: next tile, finished CTAs; zero before and after a launch; null: one tile per CTA

  // Of split instances. Rows of a tile are position * 2^pack_shift + head in its group; heads_q and group_size count
  // such groups as one head.
  int32_t pack_shift;
  int32_t splits;      // parts of a tile's key blocks; 1 in other instances
  float* partial_o;    // [splits, partial_rows, d_v], as AttendArgs
  float* partial_lse;  // [splits, partial_rows]
  int64_t partial_rows;

  // Of instances that count from the end, not packed: so many tiles, the shortest, of each of so many pairs, the last,
  // are drawn after all others.
  int32_t late_tiles, late_heads;
};

struct ForwardInstance {
  const char* name;
  Dtype dtype;
  ForwardConfig config;
  int shared_bytes;
  const void* kernel;  // __global__ void(const __grid_constant__ ForwardArgs)
};

}  // namespace adaattn::cuda::sm90
