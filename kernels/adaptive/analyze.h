// The analyze and decide stages on the device. Everything is enqueued; nothing allocates or waits.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "adaptive/tables.h"
#include "core/problem.h"
#include "decide/cells.h"
#include "decide/policy.h"
#include "decide/precision.h"
#include "decide/tile_levels.h"

namespace adaattn::cuda {

// Sums over the keys of one tile.
struct TileEnergy {
  float within;                          // ||v - mean of the tile||^2
  float between;                         // ||mean of the tile - v_mean||^2
  float captured[decide::kRankClasses];  // ||v_low||^2 over the columns of each rank class; [0] unused
  int32_t finite;
};

struct UnitStats {
  decide::GroupErrors errors;
  float v_spread = 0;      // sqrt(mean ||v - v_mean||^2)
  float rank_energy = 1;   // share of it in the rank class
  int32_t rank_class = 0;  // candidate; 0: none keeps enough
  int32_t usable = 0;      // 0: not finite, or nothing varies: computed exactly
};

// What the levels of a unit's query tiles add up to, head by head.
struct HeadSums {
  unsigned long long kept[decide::kLevels], dropped_sq[decide::kLevels];
  unsigned long long dropped[decide::kLevels];  // over query rows, in units of 2^-16
  unsigned long long query_tiles, tiles;
  unsigned long long entropy;  // of its query tiles, in units of 1 / kEntropyUnit
};
inline constexpr double kEntropyUnit = 4294967296.0;
struct UnitSums {
  uint32_t ctas, unusable;  // that are done; query tiles with estimates that are not finite
};

// When the stages of the call at hand began, in nanoseconds of the device: noted by the first CTA of a stage's first
// kernel.
enum Stage : int32_t { kAnalyzeStage, kDecideStage, kAttendStage, kVerifyStage, kStages };
struct StageClock {
  unsigned long long start[kStages];
};

// What lasts from call to call, in device memory that the caller keeps; zero bytes are a valid start but for the
// multipliers. Calls that share it come one after the other.
struct AdaptiveState {
  double* basis = nullptr;         // state_basis_doubles()
  int32_t* warm = nullptr;         // [units]
  double* probe_basis = nullptr;   // probe_basis_doubles()
  int32_t* probe_warm = nullptr;   // [units]
  int32_t* dense_calls = nullptr;  // [units]: calls for which it is computed exactly, whatever it holds; or null
  int32_t* dense_left = nullptr;   // [units]: dense_calls as the call before left them; null where they are
  decide::HeadFeedback* feedback = nullptr;  // [batch, heads_q]; null: multipliers are 1
  decide::HeadChoice* frozen = nullptr;      // [batch, heads_q]: what the chosen units keep; null: every call chooses
  int32_t* chosen = nullptr;                 // [units], where frozen: whether an earlier call has chosen
  unsigned long long* calls = nullptr;       // done so far
  StageClock* clock = nullptr;               // null: not wanted
};
// A unit that was judged dense is computed exactly for this many calls, in the last of which it is looked at again:
// what that finds is for the calls after it, so that one in which all units are dense runs the exact kernel.
inline constexpr int32_t kDenseCalls = 8;

// The statistics between analyze and decide, and the writable views of AdaptiveTables' arrays. In the workspace.
struct AnalyzeTables {
  float* k_mean = nullptr;  // [units, d_qk]
  float* v_mean = nullptr;  // [units, d_v]
  // Means of 32 rows, of K less k_mean, each times 127 / its largest element: decide/cells.h.
  int8_t* key_cells = nullptr;           // [units, key_cells_of_unit(), d_qk]
  float* key_scales = nullptr;           // [units, key_cells_of_unit()]; 0 beyond the sequence
  int8_t* query_cells = nullptr;         // [batch, heads_q, query_tiles, 4, d_qk]
  float* query_scales = nullptr;         // [batch, heads_q, query_tiles, 4], in log2 units; 0 beyond the sequence
  decide::CellRow* cell_rows = nullptr;  // [batch, heads_q, query_tiles, 4]
  // Finer means, where the shape has needles: decide/needles.h. A scale for each cell of 32 keys.
  int8_t* needle_keys = nullptr;         // [units, key_cells_of_unit(), 4, d_qk]
  float* needle_key_scales = nullptr;    // [units, key_cells_of_unit()]
  int8_t* needle_queries = nullptr;      // [batch, heads_q, query_tiles, 8, d_qk]
  float* needle_query_scales = nullptr;  // [batch, heads_q, query_tiles, 8], in log2 units
  TileEnergy* energy = nullptr;          // [units, key_tiles]
  UnitStats* units = nullptr;            // [units]
  decide::TileLevels* levels = nullptr;  // [batch, heads_q, query_tiles]
  // For levels of mass, the lowest one that keeps a tile, [batch, heads_q, query_tiles, key_tiles] from each query
  // tile's first visible key tile on; null where they would take more than kMaxCodeBytes: then masks take the estimates
  // again.
  uint8_t* codes = nullptr;
  // The tiles' shares of their query tile's mass in units of 2^-16, [batch, heads_q, wave_tiles, key_tiles] laid out as
  // codes; null where nothing is compensated.
  uint16_t* shares = nullptr;
  float* remainder = nullptr;                 // AdaptiveTables' with the same name; null without shares
  __nv_bfloat16* mean_k = nullptr;            // likewise
  HeadSums* head_sums = nullptr;              // [batch, heads_q], zeros before and after decide
  UnitSums* unit_sums = nullptr;              // [units], likewise
  decide::HeadLevels* head_levels = nullptr;  // [batch, heads_q]
  float* head_entropy = nullptr;              // [batch, heads_q]: mean over query tiles; 1 = uniform
  double* head_dropped = nullptr;             // [batch, heads_q]: mass that the choice leaves out, over query rows
  decide::HeadChoice* choice = nullptr;
  uint64_t* mask = nullptr;
  int32_t* kept = nullptr;
  decide::TileRow* tile_range = nullptr;
  uint32_t *work = nullptr, *work_count = nullptr;
  int32_t* exceeds = nullptr;  // [batch, heads_q], where options.recompute: measured over the tolerance in this call
  __nv_bfloat16 *v_low = nullptr, *basis = nullptr;
  __nv_bfloat16 *group_k = nullptr, *group_v = nullptr, *group_v_low = nullptr;
  // The sample behind the bases.
  float* sample = nullptr;        // [units, kSampleRows, d_v], 0 beyond the rows taken
  double* sample_sums = nullptr;  // [units, kSampleParts, d_qk + d_v]
  double* vectors = nullptr;      // [units, sample_columns(), d_v]
  double *values = nullptr, *trace = nullptr, *scratch = nullptr;
  void* gram_space = nullptr;
  // Of a probe in a basis (TableShape::probe_columns): rows of Q and of K less its mean, what comes of their second
  // moments (probe.cu), and the tables of AdaptiveTables with the same names.
  float* probe_sample = nullptr;         // [units, 2, kSampleRows, d_qk]
  float* probe_factor = nullptr;         // [units, d_qk, d_qk]
  double* probe_matrix = nullptr;        // likewise
  double* probe_vectors = nullptr;       // [units, probe_vectors_of(), d_qk]
  double* probe_values = nullptr;        // [units, probe_vectors_of()]
  __nv_bfloat16* probe_bases = nullptr;  // [units, 2, d_qk, probe_columns]: of Q and of K
  __nv_bfloat16 *probe_q = nullptr, *probe_k = nullptr;
  float* probe_base = nullptr;
  double* probe_scratch = nullptr;
  void* probe_gram_space = nullptr;
};

inline constexpr int kWorkBuckets = 128;
inline constexpr int64_t kMaxCodeBytes = int64_t{16} << 20;
// Tiles are read two at a time.
ADAATTN_HD inline int64_t key_cells_of_unit(const TableShape& s) {
  return (int64_t{s.key_tiles} + 1) / 2 * 2 * decide::kCellsOfTile;
}
// Query rows of a tile that enter its statistics: every fourth, with needles all of them.
inline constexpr int kQueryStep = 4;
// The column that byte `at` of a row of the tables of means stands for: a quarter of them has the pairs that a lane of
// the tensor cores' accumulators has. Products of rows do not depend on the order.
ADAATTN_HD constexpr int table_column(int at, int d) { return at % (d / 4) / 2 * 8 + at / (d / 4) * 2 + at % 2; }
inline constexpr int kSampleRows = 1024;
inline constexpr int kSampleParts = 8;

struct AnalyzeArgs {
  AttnParams p;
  TableShape shape;
  decide::Options options;
  decide::CostTable costs;
  decide::ByteScores bytes;  // where the shape has them; per_head: of one key tile
  AnalyzeTables tables;
  AdaptiveState state;
  float scale_log2 = 0;           // scale log2(e)
  float compensation = 0;         // weight of what a query tile leaves out, in its masses by the estimate
  float log2_needle = 0;          // log2 of the share of a needle from which on its tile is kept
  uint32_t keep_peak = 0;         // share of a cell from which on its tile is kept at every mass level: decide/cells.h
  int32_t multiprocessors = 132;  // of the device
  int32_t dense_units = 0;        // the call is the exact kernel's, and has no lists, if dense_left has all of so many
  // Heads stand in the work lists in sections whose 16-bit K and V take at most this: half of a Hopper's L2 cache.
  int64_t cache_bytes = int64_t{25} << 20;
};

// wave_tiles: at most this many query tiles of a head at a time; 0: all.
TableShape table_shape(const Problem& problem, int32_t wave_tiles);
size_t state_basis_doubles(const TableShape& shape);
size_t probe_basis_doubles(const TableShape& shape);
size_t analyze_bytes(const TableShape& shape);
AnalyzeTables analyze_layout(const TableShape& shape, void* workspace);
AdaptiveTables tables_of(const AnalyzeArgs& args, int32_t first_tile);

// Costs of the kernels of this back-end, in exact tiles.
decide::CostTable device_costs(const TableShape& shape, const decide::Options& options);
// Of kernels in 8 bits, whose K and V cost `per_head` for each key tile of a KV head.
decide::ByteScores device_bytes();

// Once per device, before the first launch of what follows.
void prepare_analyze();

// analyze: bf16 or f16, d_qk and d_v 64 or 128, rows on 16 bytes. decide: a choice per head.
void analyze(const AnalyzeArgs& args, cudaStream_t stream);
void decide_heads(const AnalyzeArgs& args, cudaStream_t stream);
// The schedule of one wave; with needles in the shape the tiles that hold one are kept too, which the order of the work
// lists does not know.
void write_schedule(const AnalyzeArgs& args, int32_t first_tile, cudaStream_t stream);
// That of the heads that exceed the tolerance: every tile they see, in the list of class 0.
void write_exact_schedule(const AnalyzeArgs& args, int32_t first_tile, cudaStream_t stream);

}  // namespace adaattn::cuda
