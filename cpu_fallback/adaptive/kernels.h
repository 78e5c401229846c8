// The border between the adaptive drivers and the units compiled once per instruction set; plain data, as in
// attend/kernels.h. Scores are in log2 units: queries carry scale * log2(e).
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu_fallback/attend/kernels.h"
#include "decide/cells.h"

namespace adaattn::cpu {

// What analyze leaves about the keys and values of one sequence and KV head; f32, rows padded to their strides.
struct KeyTables {
  int64_t len = 0, tiles = 0, groups = 0;
  int64_t d_qk = 0, d_v = 0;
  const float* k = nullptr;  // [len][k_stride]; k, v and v_low are not kept where bf16 products take their place
  int64_t k_stride = 0;
  const float* v = nullptr;  // [len][v_stride]
  int64_t v_stride = 0;
  // V - mean of V in the basis, the first `rank` columns in use; 0: V is taken as it is.
  int64_t rank = 0;
  const float* v_low = nullptr;  // [len][v_low_stride]
  int64_t v_low_stride = 0;
  // The same for bf16 products, tile after tile as pack_keys() and pack_values() leave them; null without them.
  const uint16_t* packed_k = nullptr;
  const uint32_t *packed_v = nullptr, *packed_v_low = nullptr;
  const uint16_t* packed_groups = nullptr;  // [groups], as pack_groups() leaves them
  const float* k_mean = nullptr;            // [d_qk]
  const float* basis = nullptr;             // [d_v][rank]
  const float* v_mean = nullptr;            // [d_v]
  // Far field, per 32 keys: mean of K and log2(32), then ln(2)/2 times its variance. The dot products with (q, 1) and
  // with q^2 give log2 of the group's weight at its mean, and the second-order term of what its spread adds.
  const float* group_k = nullptr;  // [groups][group_k_stride], 2 d_qk + 1 used
  int64_t group_k_stride = 0;
  const float* group_v = nullptr;      // [groups][v_stride]
  const float* group_v_low = nullptr;  // [groups][v_low_stride]
  // Rank probe: K - mean of K projected, a tile after another as pack_probe() leaves them. A query is multiplied by
  // probe_basis^T, whose last row is the mean of K.
  const char* probe_tiles = nullptr;
  int64_t probe_tile_bytes = 0;
  int64_t probe_rank = 0;
  const float* probe_basis = nullptr;  // [probe_rank + 1][d_qk]
  const char* byte_tiles = nullptr;    // byte_tile_bytes(d_qk) each; null: there are none
};

// Keys less their mean as bytes, those of a tile together: this, then rows of byte_width(d) bytes from kByteTileHead
// on; zeros where there is no key.
struct ByteTile {
  float scale[decide::kTileK / decide::kGroupK];
  int32_t offset[decide::kTileK];  // -128 times the sum of a key's bytes: what queries shifted by 128 add
};
inline constexpr int64_t kByteTileHead = (static_cast<int64_t>(sizeof(ByteTile)) + 63) / 64 * 64;
inline constexpr int64_t byte_width(int64_t d) { return (d + 63) / 64 * 64; }
inline constexpr int64_t byte_tile_bytes(int64_t d) { return kByteTileHead + decide::kTileK * byte_width(d); }

// Rows of a matrix, distances in bytes.
struct RowBytes {
  const char* first = nullptr;
  int64_t stride = 0, rows = 0, bytes = 0;
};

// Query heads of one KV head that go over its keys together.
inline constexpr int64_t kMostHeads = 4;

// One head's rows of a query tile.
struct AdaptiveTileArgs {
  RowBytes next_q;                       // queries that the same thread will probably want next; may be empty
  RowOperands rows;                      // one head: group 1, no softcap, ALiBi or bias
  int64_t row_begin = 0, row_count = 0;  // at most kTileRows
  const int32_t* key_begin = nullptr;    // as in PrefillArgs
  const int32_t* key_end = nullptr;
  KeyTables keys;
  // One bit per key tile of [tile_begin, tile_end), the tiles with any visible key: set = computed exactly. The others
  // are wholly visible to every row. The probe sets the bits of the tiles that it brings in.
  uint64_t* mask = nullptr;
  int64_t tile_begin = 0, tile_end = 0;
  bool bytes = false;     // scores of the mask's tiles are products of bytes
  bool probe = false;     // sweep the skipped tiles (rank probe if keys.probe_tiles, else all dimensions)
  float log2_needle = 0;  // log2 of the share of a row that brings a tile in
  bool far_field = false;
  // Not null: per block of 32 rows what stands for the tiles that are not in the mask, as weigh_dropped() leaves it.
  const float* dropped = nullptr;
  int64_t dropped_keys = 0;
  float remainder = 1;  // times the weight that the cells give them
  char* scratch = nullptr;
};

// Per block of rows: the share of its mass that is dropped, log2 of its weight, and from kDroppedHead on the mean of V
// that goes with it. The weight is that of the block's mean query.
inline constexpr int64_t kDroppedHead = 16;
inline constexpr int64_t dropped_stride(int64_t d_v) { return kDroppedHead + (d_v + 15) / 16 * 16; }

ADAATTN_HD inline bool tile_bit(const uint64_t* mask, int64_t tile) { return mask[tile / 64] >> tile % 64 & 1; }

struct AdaptiveTileResult {
  int64_t kept = 0;       // tiles computed exactly
  int64_t probed_in = 0;  // of these, by the probe
  float far_mass = 0;     // sum over rows of the share of the far field
};

// Key cells that stand together, an element of each after another.
inline constexpr int64_t kCellBlock = 16;
// Scores of the cells of `tiles` tiles with one block of queries, as weigh_cells() needs room for them.
inline constexpr int64_t cell_pitch(int64_t tiles) { return (tiles * 4 + 15) / 16 * 16 + 32; }

// Cells of one query tile (decide/cells.h).
struct CellArgs {
  const float *query_cells = nullptr, *query_scales = nullptr;  // [blocks][d] and [blocks]
  int64_t blocks = 0;                                           // of 32 queries
  const float *key_cells = nullptr, *key_scales = nullptr;      // of all keys, the former in blocks of kCellBlock
  int64_t d = 0, len = 0;                                       // keys
  float last_log2 = 0;                                          // log2 of how full the last cell is
  int64_t tile_begin = 0, tile_end = 0;
  float* scores = nullptr;                    // scratch: 4 cell_pitch(tiles)
  uint32_t *mass = nullptr, *peak = nullptr;  // out, of the tiles
  decide::CellRow* rows = nullptr;            // out, of the blocks; null: not wanted
};

// Tiles outside the mask, after weigh_cells().
struct DroppedArgs {
  CellArgs cells;
  const uint64_t* mask = nullptr;
  const float* group_v = nullptr;  // mean of V of each cell
  int64_t v_stride = 0, d_v = 0;
  const float* k_mean = nullptr;
  float* dropped = nullptr;  // [blocks][dropped_stride(d_v)]
};

// Means of neighbouring keys that stand together, those of a key tile.
inline constexpr int64_t kNeedleLanes = 16;

// One query tile's needles (decide/needles.h).
struct NeedleArgs {
  const char* query_rows = nullptr;   // 8 rows, as quantize_needle_rows() leaves them
  const float* limits = nullptr;      // [8], as decide::needle_limit() has them
  const char* key_blocks = nullptr;   // of all tiles, as quantize_needles() leaves them
  const float* key_scales = nullptr;  // [tiles][4]
  int64_t d = 0, tile_begin = 0, tile_end = 0;
  uint64_t* mask = nullptr;  // tiles that hold a needle are added
};

// Keys and values of a tile of the problem's own bf16, for bf16 products.
struct PackArgs {
  KeyOperand k, v;
  int64_t first = 0;  // key
  int64_t d_qk = 0, d_v = 0;
  uint16_t* packed_k = nullptr;
  uint32_t* packed_v = nullptr;
  float* key_means = nullptr;    // out: [16][d_qk], of 8 keys each
  float* value_means = nullptr;  // out: [4], of 32 keys each
  int64_t value_stride = 0;
  double within = 0;  // out: sum of ||v - mean of its 32||^2
};

struct AdaptiveKernels {
  // Rows [first, first + n) of K or V widened; false if some element is NaN or infinite.
  bool (*load_keys)(const KeyOperand& operand, int64_t first, int64_t n, int64_t d, float* out, int64_t stride);
  // Rows [first, first + n) of width d, widened and multiplied by `factor`, to out [n][d]; rows as in RowOperands.
  void (*load_rows)(const Operand& operand, int64_t group, int64_t first, int64_t n, int64_t d, float factor,
                    float* out);
  // Mean of each `count` neighbours of rows [first, first + n), the last short where n is no multiple of it, to
  // means [][d]; rows as in RowOperands.
  void (*row_means)(const Operand& operand, int64_t group, int64_t first, int64_t n, int64_t d, int64_t count,
                    float* means);
  // Mean and population variance of each group of 32 rows; the last may be short.
  void (*group_stats)(const float* rows, int64_t n, int64_t d, int64_t stride, float* mean, int64_t mean_stride,
                      float* variance, int64_t variance_stride);
  size_t (*gram_scratch)(int64_t n, int64_t d);
  // gram [d][d] = sum of (x_i - mean)(x_i - mean)^T over rows 0, step, 2 step, ... below n.
  void (*gram)(const float* rows, int64_t n, int64_t step, int64_t d, int64_t stride, const float* mean, float* gram,
               char* scratch);
  // y [n][0..r) = (x - mean) basis, basis [d][r], r a multiple of 16, n <= 128. Returns the sum of y^2.
  double (*project)(const float* rows, int64_t n, int64_t d, int64_t stride, const float* mean, const float* basis,
                    int64_t r, float* y, int64_t y_stride);
  // n rows of means less `shift` (null: 0) in 8 bits. Element c of row j goes to
  // cells[(j / block * d + c) * block + j % block]; what the bytes are to be multiplied with, times factor, to scales:
  // NaN where a row is not finite.
  void (*quantize_cells)(const float* rows, int64_t n, int64_t d, int64_t stride, const float* shift, float factor,
                         int64_t block, float* cells, float* scales);
  // Masses and peaks of the tiles as decide/cells.h defines them; false if some score is not finite.
  bool (*weigh_cells)(const CellArgs& args);
  // Needles: a tile's 16 means of keys less `shift`, and n <= 8 means of queries times `factor`.
  size_t (*needle_block_bytes)(int64_t d);
  size_t (*needle_row_bytes)(int64_t d);
  void (*quantize_needles)(const float* rows, int64_t d, int64_t stride, const float* shift, char* block,
                           float* scales);
  void (*quantize_needle_rows)(const float* rows, int64_t n, int64_t d, int64_t stride, float factor, char* to,
                               float* scales);
  void (*find_needles)(const NeedleArgs& args);
  // What stands for the dropped tiles.
  void (*weigh_dropped)(const DroppedArgs& args);
  // One tile of projected keys, y [n][y_stride], n <= 128, in the form that the rank probe reads; y holds zeros from
  // rank to the next multiple of 16.
  size_t (*probe_tile_bytes)(int64_t rank);
  void (*pack_probe)(const float* y, int64_t y_stride, int64_t n, int64_t rank, char* tile);
  size_t (*tile_scratch)(int64_t d_qk, int64_t d_v, int64_t probe_rank, int64_t heads);
  void (*tiles)(const AdaptiveTileArgs* heads, int64_t count, AdaptiveTileResult* results);
  int64_t heads_together = 1;  // that one call may hold without changing their results
  // n <= 128 keys less their mean as a tile of bytes. squares: of their elements; steps: of the distances between
  // neighbouring bytes; both added up over the keys. Null where there are no products of bytes.
  void (*pack_bytes)(const float* rows, int64_t n, int64_t d, int64_t stride, const float* mean, char* tile,
                     double* squares, double* steps) = nullptr;
  float byte_cost = 0;  // of a score of bytes, in scores of `tiles`
  float bf16_cost = 1;  // of a tile with bf16 products, in tiles of f32
  // With bf16 products only, else null: n <= 128 rows of K, or of V or V', as one tile of packed_elements(d) elements.
  void (*pack_keys)(const float* rows, int64_t n, int64_t d, int64_t stride, uint16_t* out) = nullptr;
  void (*pack_values)(const float* rows, int64_t n, int64_t d, int64_t stride, uint32_t* out) = nullptr;
  // All of a whole tile at once, widths being multiples of 32: its keys packed, and what analyze takes from them. False
  // if some element is NaN or infinite.
  bool (*pack_tile)(PackArgs& args) = nullptr;
  // project() with bf16 products.
  size_t (*project_scratch)(int64_t d) = nullptr;
  double (*project_tile)(const float* rows, int64_t n, int64_t d, int64_t stride, const float* mean, const float* basis,
                         int64_t r, float* y, int64_t y_stride, char* scratch) = nullptr;
  // Rows of group_k, as 2 packed_width(d) elements each.
  void (*pack_groups)(const float* groups, int64_t n, int64_t d, int64_t stride, const float* k_mean,
                      uint16_t* out) = nullptr;
};
inline constexpr int64_t packed_width(int64_t d) { return (d + 31) / 32 * 32; }
inline constexpr int64_t packed_elements(int64_t d) { return decide::kTileK * packed_width(d); }

// What a unit with bf16 products puts in the place of the f32 kernels of its instruction set.
struct Bf16Tiles {
  size_t (*tile_scratch)(int64_t d_qk, int64_t d_v, int64_t probe_rank, int64_t heads);
  void (*tiles)(const AdaptiveTileArgs* heads, int64_t count, AdaptiveTileResult* results);
  int64_t heads_together;
  float byte_cost, bf16_cost;
  void (*pack_keys)(const float* rows, int64_t n, int64_t d, int64_t stride, uint16_t* out);
  void (*pack_values)(const float* rows, int64_t n, int64_t d, int64_t stride, uint32_t* out);
  bool (*pack_tile)(PackArgs& args);
  void (*pack_groups)(const float* groups, int64_t n, int64_t d, int64_t stride, const float* k_mean, uint16_t* out);
  size_t (*probe_tile_bytes)(int64_t rank);
  void (*pack_probe)(const float* y, int64_t y_stride, int64_t n, int64_t rank, char* tile);
  size_t (*gram_scratch)(int64_t n, int64_t d);
  void (*gram)(const float* rows, int64_t n, int64_t step, int64_t d, int64_t stride, const float* mean, float* gram,
               char* scratch);
  size_t (*project_scratch)(int64_t d);
  double (*project_tile)(const float* rows, int64_t n, int64_t d, int64_t stride, const float* mean, const float* basis,
                         int64_t r, float* y, int64_t y_stride, char* scratch);
  void (*find_needles)(const NeedleArgs& args);  // null: as without bf16 products
};

#if defined(__x86_64__)
extern const AdaptiveKernels kBaselineAdaptive, kAvx2Adaptive, kAvx512Adaptive, kAvx512VnniAdaptive;
extern const Bf16Tiles kAvx512Bf16Tiles, kAmxTiles;
#elif defined(__aarch64__)
extern const AdaptiveKernels kNeonAdaptive;
#endif

}  // namespace adaattn::cpu
