// The working memory of one unit: a sequence and KV head with the query heads that share it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/problem.h"
#include "cpu_fallback/adaptive/kernels.h"
#include "cpu_fallback/tools/arena.h"
#include "decide/choose.h"

namespace adaattn::cpu {

// Sizes that the problem fixes.
struct UnitShape {
  int64_t d_qk = 0, d_v = 0, group = 1;
  int64_t len_k = 0, key_tiles = 0, key_groups = 0, query_tiles = 0;
  int64_t k_stride = 0, v_stride = 0, low_stride = 0, group_k_stride = 0, probe_tile_bytes = 0;
  int64_t max_rank = 0;     // 0: V is not projected
  int64_t probe_rank = 0;   // 0: no rank probe
  int64_t heads = 1;        // that go over the keys together
  int64_t exact_tiles = 1;  // of kTileRows rows that an item of exact attention may have
  bool needles = false;     // tiles are kept for them
  bool masked = false;      // analyze leaves the masks of the lowest level
  bool direct = false;      // whole tiles are packed from K and V themselves
  int64_t needle_block_bytes = 0, needle_row_bytes = 0, mask_words = 0, dropped_floats = 0;
  bool packs = false;                                     // K and V are kept for bf16 products, and not in f32
  bool rounds = false;                                    // and those have less precision than K and V
  bool bytes = false;                                     // heads may have scores of bytes
  decide::Precision precision = decide::Precision::kF32;  // of the products
};

// Columns that projections write: whole vectors of every instruction set.
inline int64_t padded_rank(int64_t rank) { return (rank + 15) / 16 * 16; }

UnitShape unit_shape(const Problem& problem, const AdaptiveKernels& kernels, int64_t exact_tiles);

// Decisions and measurements for one query head.
struct HeadState {
  decide::HeadLevels levels;
  decide::HeadChoice choice;
  double entropy = 0;
  int64_t tiles = 0;  // with any visible pair
  double measured_error = 0, measured_row_max = 0;
  bool recomputed = false;
  bool refused = false;   // its prediction left no tile to skip
  float round_error = 0;  // part of the predicted error that is rounding
};

struct Unit {
  int64_t b = 0, kv_head = 0;
  Sequence seq;
  bool analyzed = false;  // false: the unit is computed exactly without looking at it
  bool finite = true;     // K and V hold no NaN or infinity
  KeyTables keys;
  int64_t rank_class = 0;  // candidate that analyze prepared V for; 0: none
  float rank_energy = 1;   // share of V's energy in it
  float v_spread = 0;      // sqrt(mean ||v - mean||^2)
  decide::GroupErrors errors;

  // Writable views of the arrays that keys points at, and of the rest.
  float *k = nullptr, *v = nullptr, *v_low = nullptr;
  uint16_t *packed_k = nullptr, *packed_groups = nullptr;
  uint32_t *packed_v = nullptr, *packed_v_low = nullptr;
  char* probe_tiles = nullptr;
  float *group_k = nullptr, *group_v = nullptr, *group_v_low = nullptr;
  float *k_mean = nullptr, *v_mean = nullptr, *basis = nullptr;
  float *probe_basis = nullptr, *probe_key_basis = nullptr;
  // Block means of 32 rows in 8 bits, see AdaptiveKernels::quantize_cells.
  float *key_cells = nullptr, *key_scales = nullptr;      // [key_tiles * 4]
  float *query_cells = nullptr, *query_scales = nullptr;  // [group][query_tiles][4]
  // Means of 8 keys, and the same in 8 bits, see AdaptiveKernels::quantize_needles.
  float* needle_means = nullptr;   // [key_tiles][16][d_qk]
  char* needle_blocks = nullptr;   // [key_tiles]
  float* needle_scales = nullptr;  // [key_tiles][4]
  uint64_t* masks = nullptr;       // [group][query_tiles][mask words]: what the lowest level keeps
  uint32_t* covered = nullptr;     // [group][query_tiles]: tiles that hold the mass of the lowest level
  float* dropped = nullptr;        // [group][query_tiles][4 dropped_stride()]: what stands for the rest
  char* byte_tiles = nullptr;      // [key_tiles], see AdaptiveKernels::pack_bytes
  double *key_squares = nullptr, *key_steps = nullptr;  // [key_tiles]: of their sums, or of ||k||^2 alone
  float *query_squares = nullptr,
        *query_steps = nullptr;               // [group][query_tiles]: means of ||q||^2 and of bytes' steps^2
  double* within = nullptr;                   // [key_tiles]: sum of ||v - mean of its 32||^2
  double* captured = nullptr;                 // [key_tiles]: sum of ||V'||^2
  uint8_t* tile_finite = nullptr;             // [key_tiles]
  decide::TileLevels* tile_levels = nullptr;  // [group][query_tiles]
  AdaptiveTileResult* results = nullptr;      // [group][query_tiles]
  HeadState* heads = nullptr;                 // [group]
  float* exact_rows = nullptr;                // [verify rows][group][d_v]
  uint64_t* map = nullptr;                    // [group][query_tiles][mask words], of the plan; null: not wanted
};

// Takes one unit's arrays from the arena.
void lay_out_unit(const UnitShape& shape, const decide::Options& options, Arena& arena, Unit& unit);

}  // namespace adaattn::cpu
