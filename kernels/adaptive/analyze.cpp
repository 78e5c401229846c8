#include "adaptive/analyze.h"

#include <algorithm>

#include "adaptive/bytes.h"
#include "adaptive/sample.h"
#include "decide/costs.h"
#include "decide/needles.h"
#include "lowrank/gram.cuh"
#include "lowrank/subspace.h"

namespace adaattn::cuda {
namespace {

constexpr int kOversampling = 8;

class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <typename T>
  T* take(int64_t count) {
    const size_t here = used_;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return reinterpret_cast<T*>(memory_ + here);
  }
  size_t used() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

int32_t tiles_of(int64_t length) { return static_cast<int32_t>((length + decide::kTileK - 1) / decide::kTileK); }

// Of all query tiles, whatever the waves. In floating point: the product of maxima that a descriptor may name need not
// fit an integer.
double estimated_tiles(const TableShape& s) {
  return static_cast<double>(s.batch) * s.heads_q * s.query_tiles * s.key_tiles;
}

// For the Gram matrices of samples: the sums of up to kSampleRows / 256 parts, and their sum.
int64_t gram_doubles(int64_t samples, int64_t dim) {
  const int64_t ld = subspace_ld(dim);
  return samples * ld * ld * (kSampleRows / 256 + 1) + 64;
}

AnalyzeTables lay_out(const TableShape& s, Arena& arena) {
  const int64_t units = int64_t{s.batch} * s.heads_kv, heads = int64_t{s.batch} * s.heads_q;
  AnalyzeTables t;
  t.k_mean = arena.take<float>(units * s.d_qk);
  t.v_mean = arena.take<float>(units * s.d_v);
  const int64_t key_cells = units * key_cells_of_unit(s), query_cells = heads * s.query_tiles * decide::kCellsOfTile;
  t.key_cells = arena.take<int8_t>(key_cells * s.d_qk);
  t.key_scales = arena.take<float>(key_cells);
  t.query_cells = arena.take<int8_t>(query_cells * s.d_qk);
  t.query_scales = arena.take<float>(query_cells);
  if (s.needles) {
    t.needle_keys = arena.take<int8_t>(key_cells * decide::kNeedlesOfCell * s.d_qk);
    t.needle_key_scales = arena.take<float>(key_cells);
    const int64_t rows = heads * s.query_tiles * decide::kNeedleRowsOfTile;
    t.needle_queries = arena.take<int8_t>(rows * s.d_qk);
    t.needle_query_scales = arena.take<float>(rows);
  }
  t.energy = arena.take<TileEnergy>(units * s.key_tiles);
  t.units = arena.take<UnitStats>(units);
  t.levels = arena.take<decide::TileLevels>(heads * s.query_tiles);
  t.cell_rows = arena.take<decide::CellRow>(query_cells);
  if (!s.by_shares && s.wave_tiles == s.query_tiles && estimated_tiles(s) <= kMaxCodeBytes)
    t.codes = arena.take<uint8_t>(heads * s.query_tiles * s.key_tiles);
  if (s.compensates) {
    t.shares = arena.take<uint16_t>(heads * s.wave_tiles * s.key_tiles);
    t.remainder = arena.take<float>(heads * s.wave_tiles * kRemainderWidth);
    t.mean_k = arena.take<__nv_bfloat16>(units * 2 * s.d_qk);
  }
  t.head_sums = arena.take<HeadSums>(heads);
  t.unit_sums = arena.take<UnitSums>(units);
  t.head_levels = arena.take<decide::HeadLevels>(heads);
  t.head_entropy = arena.take<float>(heads);
  t.head_dropped = arena.take<double>(heads);
  t.choice = arena.take<decide::HeadChoice>(heads);
  t.mask = arena.take<uint64_t>(heads * s.wave_tiles * s.mask_words);
  t.kept = arena.take<int32_t>(heads * s.wave_tiles);
  t.tile_range = arena.take<decide::TileRow>(heads * s.query_tiles);
  t.work = arena.take<uint32_t>((s.bytes ? kWorkLists : decide::kRankClasses) * heads * s.wave_tiles);
  t.work_count = arena.take<uint32_t>(kWorkLists);
  t.exceeds = arena.take<int32_t>(heads);
  t.v_low = arena.take<__nv_bfloat16>(units * s.key_rows() * s.max_rank);
  t.basis = arena.take<__nv_bfloat16>(units * s.d_v * s.max_rank);
  t.group_k = arena.take<__nv_bfloat16>(units * s.key_groups() * 2 * s.d_qk);
  t.group_v = arena.take<__nv_bfloat16>(units * s.key_groups() * s.d_v);
  t.group_v_low = arena.take<__nv_bfloat16>(units * s.key_groups() * s.max_rank);
  t.sample_sums = arena.take<double>(units * kSampleParts * (s.d_qk + s.d_v));
  if (s.probe_columns > 0) {
    const int64_t vectors = probe_vectors_of(s), square = int64_t{s.d_qk} * s.d_qk;
    t.probe_sample = arena.take<float>(units * 2 * kSampleRows * s.d_qk);
    t.probe_factor = arena.take<float>(units * square);
    t.probe_matrix = arena.take<double>(units * square);
    t.probe_vectors = arena.take<double>(units * vectors * s.d_qk);
    t.probe_values = arena.take<double>(units * vectors);
    t.probe_bases = arena.take<__nv_bfloat16>(units * 2 * s.d_qk * s.probe_columns);
    t.probe_q = arena.take<__nv_bfloat16>(heads * s.query_rows() * s.probe_columns);
    t.probe_k = arena.take<__nv_bfloat16>(units * s.key_rows() * s.probe_columns);
    t.probe_base = arena.take<float>(heads * s.query_rows());
    t.probe_scratch = arena.take<double>(static_cast<int64_t>(subspace_scratch_bytes(units, s.d_qk, vectors) / 8));
    t.probe_gram_space = arena.take<double>(gram_doubles(2 * units, s.d_qk));
  }
  if (s.max_rank == 0) return t;
  const int64_t columns = sample_columns(s);
  t.sample = arena.take<float>(units * kSampleRows * s.d_v);
  t.vectors = arena.take<double>(units * columns * s.d_v);
  t.values = arena.take<double>(units * columns);
  t.trace = arena.take<double>(units);
  t.scratch = arena.take<double>(static_cast<int64_t>(subspace_scratch_bytes(units, s.d_v, columns) / 8));
  t.gram_space = arena.take<double>(gram_doubles(units, s.d_v));
  return t;
}

}  // namespace

TallView sample_view(float* rows, int64_t samples, int64_t dim) {
  MatrixBatch m;
  m.data = rows;
  m.batch0 = samples;
  m.rows = kSampleRows;
  m.cols = dim;
  m.stride0 = kSampleRows * dim;
  m.stride_row = dim;
  m.stride_col = 1;
  return tall_view(m);
}

int32_t probe_vectors_of(const TableShape& s) {
  return static_cast<int32_t>(subspace_columns(s.probe_columns, kOversampling));
}

int32_t sample_columns(const TableShape& s) {
  return static_cast<int32_t>(subspace_columns(s.max_rank, kOversampling));
}

void prepare_analyze() {
  prepare_statistics();
  prepare_stream();
  prepare_levels();
  prepare_masks();
  prepare_remainder();
  prepare_probe();
}

void analyze(const AnalyzeArgs& args, cudaStream_t stream) {
  sample(args, stream);
  if (args.shape.probe_columns > 0) probe_tables(args, stream);
  if (streams(args))
    stream_statistics(args, stream);
  else
    tile_statistics(args, stream);
}

TableShape table_shape(const Problem& problem, int32_t wave_tiles) {
  TableShape s;
  s.batch = static_cast<int32_t>(problem.max_batch);
  s.heads_q = static_cast<int32_t>(problem.heads_q);
  s.heads_kv = static_cast<int32_t>(problem.heads_kv);
  s.group = s.heads_q / s.heads_kv;
  s.d_qk = static_cast<int32_t>(problem.d_qk);
  s.d_v = static_cast<int32_t>(problem.d_v);
  s.query_tiles = tiles_of(problem.max_seqlen_q);
  s.key_tiles = tiles_of(problem.max_seqlen_k);
  for (int c = 1; c < decide::kRankClasses; ++c) {
    const int32_t rank = decide::rank_of_class(c);
    // Over half of d_v, what a projection saves hardly pays for finding it.
    if (problem.adaptive.rank_mode != decide::RankMode::kOff && 2 * rank <= s.d_v)
      s.max_rank = std::max(s.max_rank, rank);
  }
  s.mask_words = (s.key_tiles + 63) / 64;
  const decide::Options& o = problem.adaptive;
  // Of more columns the scores themselves are as cheap.
  if (o.probe == decide::Probe::kRank && o.probe_rank <= 64) s.probe_columns = o.probe_rank <= 32 ? 32 : 64;
  s.wave_tiles = wave_tiles > 0 ? std::min(wave_tiles, s.query_tiles) : s.query_tiles;
  return s;
}

size_t state_basis_doubles(const TableShape& s) {
  return s.max_rank == 0 ? 0 : static_cast<size_t>(int64_t{s.batch} * s.heads_kv * sample_columns(s) * s.d_v);
}

size_t probe_basis_doubles(const TableShape& s) {
  return s.probe_columns == 0 ? 0 : static_cast<size_t>(int64_t{s.batch} * s.heads_kv * probe_vectors_of(s) * s.d_qk);
}

size_t analyze_bytes(const TableShape& shape) {
  Arena arena(nullptr);
  lay_out(shape, arena);
  return arena.used();
}

AnalyzeTables analyze_layout(const TableShape& shape, void* workspace) {
  Arena arena(workspace);
  return lay_out(shape, arena);
}

AdaptiveTables tables_of(const AnalyzeArgs& args, int32_t first_tile) {
  const AnalyzeTables& from = args.tables;
  AdaptiveTables t;
  t.shape = args.shape;
  t.first_tile = first_tile;
  t.choice = from.choice;
  t.mask = from.mask;
  t.kept = from.kept;
  t.tile_range = from.tile_range;
  t.work = from.work;
  t.work_count = from.work_count;
  t.v_low = from.v_low;
  t.basis = from.basis;
  t.v_mean = from.v_mean;
  t.group_k = from.group_k;
  t.group_v = from.group_v;
  t.group_v_low = from.group_v_low;
  t.remainder = from.remainder;
  t.mean_k = from.mean_k;
  t.probe_q = from.probe_q;
  t.probe_k = from.probe_k;
  t.probe_base = from.probe_base;
  return t;
}

decide::CostTable device_costs(const TableShape& s, const decide::Options& o) {
  // A score's exponential and bookkeeping, in multiply-adds of the tensor cores.
  constexpr float kScoreCost = 48;
  // The maximum of a swept score, and the wait for K: as measured.
  constexpr float kSweepCost = 32;
  const auto d_qk = static_cast<float>(s.d_qk);
  decide::CostTable c =
      decide::product_costs(d_qk, static_cast<float>(s.d_v), kScoreCost,
                            (s.probe_columns > 0 ? static_cast<float>(s.probe_columns) : d_qk) + kSweepCost);
  // Measured (NOTES.md): exponentials hide under the products, and the fewer there are of these the less.
  if (s.d_qk == 128 && s.d_v == 128) {
    c.tile[1] = 1.03f;
    c.tile[2] = 0.96f;
    c.tile[3] = 0.88f;
  }
  return c;
}

decide::ByteScores device_bytes() {
  decide::ByteScores bytes;
  // Measured beside 16 bits in calls one after the other, where these meet the card's power limit (../attend/sm90/
  // NOTES.md, D1 as a class); the pass takes 30 us for the 1,024 key tiles of 8 KV heads.
  for (float& tile : bytes.tile) tile = 0.74f;
  bytes.per_query_tile = 3.4f;
  bytes.per_head = 2.35f;
  bytes.round_error = kByteRoundError;
  return bytes;
}

}  // namespace adaattn::cuda
