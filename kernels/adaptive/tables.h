// What analyze and decide leave in device memory, and the mask-walking attend kernels read. A tile is 128 queries x 128
// keys, anchored at the sequence's start; a unit is a (sequence, KV head) with the query heads that share it. All
// arrays are 16-byte aligned and dense in the order of their dimensions; nothing grows faster than the sequences, for
// masks exist for `wave_tiles` query tiles of each head at a time.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "core/host_device.h"
#include "decide/choose.h"

namespace adaattn::cuda {

// Floats of AdaptiveTables::remainder for a query tile of 128 columns.
inline constexpr int kRemainderWidth = 128 + 4;
inline constexpr int kFarKeys = 128;  // keys behind one centroid of the far field
// Work lists: one for each rank class, and that of the heads in 8 bits.
inline constexpr int kByteList = decide::kRankClasses, kWorkLists = kByteList + 1;
ADAATTN_HD inline int list_of(const decide::HeadChoice& choice) { return choice.bytes ? kByteList : choice.rank_class; }

// Sizes that the problem fixes; lengths are those of the longest sequence.
struct TableShape {
  int32_t batch = 0, heads_q = 0, heads_kv = 0, group = 1;  // group: heads_q / heads_kv
  int32_t d_qk = 0, d_v = 0;
  int32_t query_tiles = 0, key_tiles = 0;
  int32_t max_rank = 0;      // columns of v_low, group_v_low and basis: 32, 64 or 96; 0: V is not projected
  int32_t mask_words = 0;    // of one query tile: ceil(key_tiles / 64)
  bool by_shares = false;    // shares of cells keep tiles, and of mass levels there is but the first
  bool needles = false;      // finer cells keep tiles beside them: decide/needles.h
  bool compensates = false;  // rows get the mean of what their tile leaves out: AdaptiveTables::remainder
  bool bytes = false;        // heads may be computed in 8 bits; then without a far field, and with V as it is
  int32_t wave_tiles = 0;    // query tiles of a head whose masks exist at a time
  // Columns of probe_q and probe_k, 32 or 64; 0: no probe, or one by Q and K themselves.
  int32_t probe_columns = 0;
  ADAATTN_HD int64_t key_rows() const { return int64_t{key_tiles} * decide::kTileK; }
  ADAATTN_HD int64_t query_rows() const { return int64_t{query_tiles} * decide::kTileQ; }
  ADAATTN_HD int64_t key_groups() const { return int64_t{key_tiles} * (decide::kTileK / kFarKeys); }
};

// The schedule of the query tiles [first_tile, first_tile + wave_tiles) of every head, and the statistics it stands on.
struct AdaptiveTables {
  TableShape shape;
  int32_t first_tile = 0;

  // [batch, heads_q]. dense: the head's mask has a bit for every tile with a visible key and its rank_class is 0.
  const decide::HeadChoice* choice = nullptr;

  // [batch, heads_q, wave_tiles, mask_words]: bit t % 64 of word t / 64 is set where key tile t is computed exactly. Of
  // the others, those that every row of the query tile sees whole (tile_range) may enter as their centroids; no bit is
  // set for a tile without a visible key.
  const uint64_t* mask = nullptr;
  // [batch, heads_q, wave_tiles]: bits set in the mask.
  const int32_t* kept = nullptr;
  // [batch, heads_q, query_tiles]: the key tiles that a query tile sees.
  const decide::TileRow* tile_range = nullptr;

  // Work lists: items (b * heads_q + head) * wave_tiles + (query tile - first_tile), in sections
  // of heads whose K and V share the L2 cache, within each those first that keep most tiles; query tiles without a
  // visible key are in the list too, their rows are 0. Items of list c stand in work[c * batch * heads_q * wave_tiles
  // + ...], work_count[c] of them.
  const uint32_t* work = nullptr;
  const uint32_t* work_count = nullptr;  // [kWorkLists]

  // [batch, heads_kv, key_rows, max_rank]: (V - v_mean) basis in the order of energy, so that a class of lower rank
  // reads the first columns. Rows from the sequence's end to the end of its last tile are 0.
  const __nv_bfloat16* v_low = nullptr;
  // [batch, heads_kv, d_v, max_rank]; o = (o' basis^T) / l + v_mean, for o' = sum of p v_low and l = sum of p.
  const __nv_bfloat16* basis = nullptr;
  const float* v_mean = nullptr;  // [batch, heads_kv, d_v]

  // Far field, a row per kFarKeys keys; groups of tiles that may be skipped are whole, those beyond the sequence are 0.
  // [batch, heads_kv, key_groups, 2 d_qk]: the mean k of the group's keys, then c (ln 2 / 2) times their variance, with
  // c = scale log2(e). log2 of the group's weight for a query q is 7 + c (q, q^2) . row: 7 = log2 of its 128 keys.
  const __nv_bfloat16* group_k = nullptr;
  const __nv_bfloat16* group_v = nullptr;      // [batch, heads_kv, key_groups, d_v]: mean of V
  const __nv_bfloat16* group_v_low = nullptr;  // [batch, heads_kv, key_groups, max_rank]: (group_v - v_mean) basis

  // For a probe: in columns a basis of its own, [batch, heads_q, query_rows] and [batch, heads_kv, key_rows] of them. A
  // row of one times one of the other, and probe_base of the query, is the score as the probe sees it.
  const __nv_bfloat16 *probe_q = nullptr, *probe_k = nullptr;
  const float* probe_base = nullptr;  // [batch, heads_q, query_rows]: q times the mean of K

  // [batch, heads_q, wave_tiles, kRemainderWidth], without a far field and for V as it is: the rows of a query tile
  // have one more key, with the values of columns 0 to 127. Its logit, in log2 units, is column 128 + i for rows 32 i
  // to 32 i + 31 and the row's score of K's mean; -inf and zeros where no tile is left out. Null: none.
  const float* remainder = nullptr;
  // [batch, heads_kv, d_qk / 8, 2, 8]: the mean of K, and what its rounding to bf16 leaves; with a remainder.
  const __nv_bfloat16* mean_k = nullptr;

  ADAATTN_HD int64_t unit_of(int64_t b, int64_t head) const { return b * shape.heads_kv + head / shape.group; }
  ADAATTN_HD const uint64_t* mask_of(int64_t b, int64_t head, int64_t tile) const {
    return mask + ((b * shape.heads_q + head) * shape.wave_tiles + tile - first_tile) * shape.mask_words;
  }
};

}  // namespace adaattn::cuda
