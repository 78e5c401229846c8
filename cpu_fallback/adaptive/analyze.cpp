#include <algorithm>
#include <cmath>

#include "cpu_fallback/adaptive/call.h"
#include "cpu_fallback/tools/subspace.h"

namespace adaattn::cpu {
namespace {

constexpr float kHalfLn2 = 0.34657359027997264f;
constexpr float kLog2E = 1.4426950408889634f;
constexpr int64_t kGroupsPerTile = decide::kTileK / decide::kGroupK;
// Rows of K, V or Q behind a Gram matrix: a basis of 1,024 strided rows loses 6 to 9 per cent more energy than the
// optimal one, and what it loses is measured on all rows.
constexpr int64_t kGramRows = 1024;
constexpr int64_t kOversampling = 8;
constexpr int64_t kColdSweeps = 4, kWarmSweeps = 1;
// Ridge on the queries' Gram matrix, relative to its mean diagonal, so that directions without queries stay invertible.
constexpr double kRidge = 1e-3;

int64_t tile_rows(const Unit& unit, int64_t tile) {
  return std::min<int64_t>(decide::kTileK, unit.seq.len_k - tile * decide::kTileK);
}

int64_t group_rows(const Unit& unit, int64_t group) {
  return std::min<int64_t>(decide::kGroupK, unit.seq.len_k - group * decide::kGroupK);
}

SubspaceParams subspace_params(int64_t dim, int64_t rank, uint64_t seed, const WarmBasis* warm, const double* start) {
  SubspaceParams s;
  s.dim = dim;
  s.rank = rank;
  s.oversampling = kOversampling;
  s.seed = seed;
  const bool is_warm = warm != nullptr && warm->warm;
  s.sweeps = is_warm ? kWarmSweeps : kColdSweeps;
  s.warm = is_warm ? start : nullptr;
  return s;
}

struct BasisScratch {
  char *gram_work, *subspace_work;
  float* gram;
  double *matrix, *chol, *inverse, *product, *basis, *values;
  float* rows;
  GemmScratch gemm;
};

BasisScratch lay_out_basis(Arena& arena, const UnitShape& s, const AdaptiveKernels& kernels) {
  const int64_t d = std::max(s.d_qk, s.d_v);
  const int64_t rank = std::max(s.max_rank, s.probe_rank);
  BasisScratch x;
  x.gram_work = arena.take<char>(static_cast<int64_t>(kernels.gram_scratch(kGramRows, d)));
  x.gram = arena.take<float>(d * d);
  x.matrix = arena.take<double>(d * d);
  x.chol = arena.take<double>(d * d);
  x.inverse = arena.take<double>(d * d);
  x.product = arena.take<double>(d * d);
  x.basis = arena.take<double>((rank + kOversampling) * d);
  x.values = arena.take<double>(rank + kOversampling);
  x.rows = arena.take<float>(kGramRows * d);
  x.gemm = take_gemm_scratch(arena, 1, gemm_partial_size(d, d, d));
  size_t work = 0;
  if (s.max_rank > 0) work = subspace_iteration_workspace(subspace_params(s.d_v, s.max_rank, 0, nullptr, nullptr), 1);
  if (s.probe_rank > 0)
    work = std::max(work, subspace_iteration_workspace(subspace_params(s.d_qk, s.probe_rank, 0, nullptr, nullptr), 1));
  x.subspace_work = arena.take<char>(static_cast<int64_t>(work));
  return x;
}

void widen(const float* from, int64_t n, double* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

// Principal directions of V - mean, and the least rank class that keeps enough of its energy.
void make_value_basis(const AdaptiveCall& call, Unit& unit, WarmBasis* warm, const Exec& exec, BasisScratch& x) {
  const UnitShape& s = call.shape;
  const decide::Options& o = call.problem.adaptive;
  const int64_t n = unit.seq.len_k, d = s.d_v;
  const int64_t step = std::max<int64_t>(1, n / kGramRows + (n % kGramRows != 0));
  call.kernels.gram(unit.v, n, step, d, s.v_stride, unit.v_mean, x.gram, x.gram_work);
  widen(x.gram, d * d, x.matrix);
  double trace = 0;
  for (int64_t i = 0; i < d; ++i) trace += x.matrix[i * d + i];
  if (!(trace > 0)) return;
  const SubspaceParams params =
      subspace_params(d, s.max_rank, o.seed, warm, warm == nullptr ? nullptr : warm->v.data());
  double* basis = warm == nullptr ? x.basis : warm->v.data();
  const SubspaceResult result = subspace_iteration(exec, params, x.matrix, basis, x.values, x.subspace_work);
  if (!result.finite) return;

  const double cap = o.rank_ratio * static_cast<double>(d);
  int64_t chosen = 0;
  double kept = 0;
  for (int rank_class = decide::kRankClasses - 1; rank_class > 0 && chosen == 0; --rank_class) {
    const int64_t rank = decide::rank_of_class(rank_class);
    if (rank > s.max_rank || rank < o.min_rank) continue;
    kept = 0;
    for (int64_t i = 0; i < rank; ++i) kept += x.values[i];
    const bool enough =
        o.rank_mode == decide::RankMode::kFixed ? static_cast<double>(rank) >= cap : kept >= o.rank_threshold * trace;
    if (!enough) continue;
    if (o.rank_mode == decide::RankMode::kEnergy && static_cast<double>(rank) > cap) break;
    chosen = rank_class;
  }
  if (chosen == 0) return;
  unit.rank_class = chosen;
  const int64_t rank = decide::rank_of_class(static_cast<int>(chosen));
  for (int64_t c = 0; c < d; ++c) {
    for (int64_t i = 0; i < rank; ++i) unit.basis[c * rank + i] = static_cast<float>(basis[i * d + c]);
  }
}

// Directions in which scores vary most: with the queries' second moment r^T r and C the Gram matrix of K - mean, the
// leading eigenvectors W of r C r^T. Queries are multiplied by r^-1 W, keys by r^T W (adaptive probe of the scores).
bool make_probe_basis(const AdaptiveCall& call, Unit& unit, WarmBasis* warm, const Exec& exec, BasisScratch& x) {
  const UnitShape& s = call.shape;
  const int64_t d = s.d_qk, rank = s.probe_rank, n = unit.seq.len_k;
  const float factor = call.params.scale * kLog2E;

  const int64_t queries = unit.seq.len_q * s.group;
  const int64_t step = std::max<int64_t>(1, queries / kGramRows + (queries % kGramRows != 0));
  const RowOperands rows = row_operands(call.params, unit.b, unit.seq, unit.kv_head * s.group, s.group);
  int64_t samples = 0;
  // A step that shares no factor with the group size visits all of its heads.
  const int64_t stride = step % s.group == 0 && s.group > 1 ? step + 1 : step;
  for (int64_t r = 0; r < queries && samples < kGramRows; r += stride, ++samples)
    call.kernels.load_rows(rows.q, rows.group, r, 1, d, factor, x.rows + samples * d);
  std::fill(x.values, x.values + rank, 0.0);
  float* zero = unit.probe_basis;  // d zeros, overwritten below
  std::fill(zero, zero + d, 0.0f);
  call.kernels.gram(x.rows, samples, 1, d, d, zero, x.gram, x.gram_work);
  widen(x.gram, d * d, x.chol);
  double trace = 0;
  for (int64_t i = 0; i < d; ++i) trace += x.chol[i * d + i];
  if (!(trace > 0)) return false;
  for (int64_t i = 0; i < d; ++i) x.chol[i * d + i] += kRidge * trace / static_cast<double>(d);
  if (!cholesky(d, x.chol, 1e-12)) return false;

  const int64_t key_step = std::max<int64_t>(1, n / kGramRows + (n % kGramRows != 0));
  call.kernels.gram(unit.k, n, key_step, d, s.k_stride, unit.k_mean, x.gram, x.gram_work);
  const ConstMatrix gram{x.gram, d, d, d, 1, false};
  const ConstMatrix r = row_major(x.chol, d, d);
  gemm(exec, x.gemm, r, gram, x.product, d, Precision::kF64);
  gemm(exec, x.gemm, row_major(x.product, d, d), r.transposed(), x.matrix, d, Precision::kF64);
  const SubspaceParams params =
      subspace_params(d, rank, call.problem.adaptive.seed + 1, warm, warm == nullptr ? nullptr : warm->probe.data());
  double* basis = warm == nullptr ? x.basis : warm->probe.data();
  if (!subspace_iteration(exec, params, x.matrix, basis, x.values, x.subspace_work).finite) return false;

  // Keys: r^T W, [d][rank], kept in the scratch until the tiles are projected would cost a copy per tile: it goes where
  // the queries' basis follows it.
  const ConstMatrix w = row_major(basis, rank, d);
  gemm(exec, x.gemm, r.transposed(), w.transposed(), x.product, rank, Precision::kF64);
  for (int64_t i = 0; i < d * rank; ++i) unit.probe_key_basis[i] = static_cast<float>(x.product[i]);
  std::copy(x.chol, x.chol + d * d, x.inverse);
  invert_upper(d, x.inverse);
  gemm(exec, x.gemm, w, row_major(x.inverse, d, d).transposed(), x.product, d, Precision::kF64);
  for (int64_t i = 0; i < rank * d; ++i) unit.probe_basis[i] = static_cast<float>(x.product[i]);
  for (int64_t c = 0; c < d; ++c) unit.probe_basis[rank * d + c] = unit.k_mean[c];
  return true;
}

}  // namespace

size_t analyze_scratch(const UnitShape& s, const decide::Options&, const AdaptiveKernels& kernels) {
  Arena basis;
  lay_out_basis(basis, s, kernels);
  Arena tile;
  tile.take<char>(static_cast<int64_t>(kernels.project_scratch(std::max(s.d_qk, s.d_v))));
  tile.take<float>(decide::kTileQ * std::max(s.d_qk, s.probe_rank));
  tile.take<float>(s.key_tiles);
  tile.take<uint32_t>(s.key_tiles);
  tile.take<int32_t>(2 * decide::kTileQ);
  tile.take<float>(kGroupsPerTile * s.d_v);
  return std::max(basis.used(), tile.used()) + Arena::kAlignment;
}

void load_key_tile(const AdaptiveCall& call, Unit& unit, int64_t tile, char* scratch) {
  const UnitShape& s = call.shape;
  const int64_t first = tile * decide::kTileK, n = tile_rows(unit, tile), group = tile * kGroupsPerTile;
  const KeyOperand k = key_operand(call.params, call.params.k, unit.b, unit.seq, unit.kv_head);
  const KeyOperand v = key_operand(call.params, call.params.v, unit.b, unit.seq, unit.kv_head);
  const bool k_finite = call.kernels.load_keys(k, first, n, s.d_qk, unit.k + first * s.k_stride, s.k_stride);
  const bool v_finite = call.kernels.load_keys(v, first, n, s.d_v, unit.v + first * s.v_stride, s.v_stride);
  unit.tile_finite[tile] = k_finite && v_finite;
  if (!unit.tile_finite[tile]) return;

  float* mean = unit.group_k + group * s.group_k_stride;
  call.kernels.group_stats(unit.k + first * s.k_stride, n, s.d_qk, s.k_stride, mean, s.group_k_stride,
                           mean + s.d_qk + 1, s.group_k_stride);
  Arena arena(scratch);
  float* variance = arena.take<float>(kGroupsPerTile * s.d_v);
  call.kernels.group_stats(unit.v + first * s.v_stride, n, s.d_v, s.v_stride, unit.group_v + group * s.v_stride,
                           s.v_stride, variance, s.d_v);
  double within = 0;
  for (int64_t g = 0; g * decide::kGroupK < n; ++g) {
    const auto rows = static_cast<double>(group_rows(unit, group + g));
    mean[g * s.group_k_stride + s.d_qk] = static_cast<float>(std::log2(rows));
    for (int64_t c = 0; c < s.d_v; ++c) within += rows * variance[g * s.d_v + c];
  }
  unit.within[tile] = within;
}

void analyze_unit(const AdaptiveCall& call, Unit& unit, WarmBasis* warm, char* scratch) {
  const UnitShape& s = call.shape;
  const int64_t tiles = unit.keys.tiles, groups = unit.keys.groups, d = s.d_qk;
  unit.keys.probe_tiles = nullptr;
  unit.keys.probe_rank = 0;
  unit.finite = std::all_of(unit.tile_finite, unit.tile_finite + tiles, [](uint8_t x) { return x != 0; });
  if (!unit.finite || unit.seq.len_k == 0) return;
  const double n = static_cast<double>(unit.seq.len_k);

  // Means over groups in f64; tile statistics from their groups.
  for (int64_t c = 0; c < d; ++c) {
    double sum = 0;
    for (int64_t g = 0; g < groups; ++g)
      sum += static_cast<double>(group_rows(unit, g)) * unit.group_k[g * s.group_k_stride + c];
    unit.k_mean[c] = static_cast<float>(sum / n);
  }
  for (int64_t c = 0; c < s.d_v; ++c) {
    double sum = 0;
    for (int64_t g = 0; g < groups; ++g)
      sum += static_cast<double>(group_rows(unit, g)) * unit.group_v[g * s.v_stride + c];
    unit.v_mean[c] = static_cast<float>(sum / n);
  }
  double within = 0, between_groups = 0, between_tiles = 0;
  for (int64_t t = 0; t < tiles; ++t) {
    float* terms = unit.tile_terms + t * s.term_width();
    const int64_t first = t * kGroupsPerTile, last = std::min(first + kGroupsPerTile, groups);
    const float inverse = 1.0f / static_cast<float>(tile_rows(unit, t));
    for (int64_t c = 0; c < d; ++c) {
      float mean = 0, variance = 0;
      for (int64_t g = first; g < last; ++g)
        mean += static_cast<float>(group_rows(unit, g)) * inverse * unit.group_k[g * s.group_k_stride + c];
      for (int64_t g = first; g < last; ++g) {
        const float* group = unit.group_k + g * s.group_k_stride;
        const float shift = group[c] - mean;
        variance += static_cast<float>(group_rows(unit, g)) * inverse * (group[d + 1 + c] + shift * shift);
      }
      // log2 of a tile's mean weight to second order, for queries in log2 units:
      //   q . k + (ln 2 / 2) sum_i [(q_i^2 + sigma_q,i^2) sigma_k,i^2 + sigma_q,i^2 k_i^2]
      const float centred = mean - unit.k_mean[c];
      terms[c] = centred;
      terms[d + c] = kHalfLn2 * variance;
      terms[2 * d + c] = kHalfLn2 * centred * centred;
    }
    within += unit.within[t];
    for (int64_t c = 0; c < s.d_v; ++c) {
      double mean = 0;
      for (int64_t g = first; g < last; ++g) {
        const double shift = static_cast<double>(unit.group_v[g * s.v_stride + c]) - unit.v_mean[c];
        const auto rows = static_cast<double>(group_rows(unit, g));
        between_groups += rows * shift * shift;
        mean += rows * inverse * shift;
      }
      between_tiles += static_cast<double>(tile_rows(unit, t)) * mean * mean;
    }
  }
  for (int64_t g = 0; g < groups; ++g) {
    float* variance = unit.group_k + g * s.group_k_stride + d + 1;
    for (int64_t c = 0; c < d; ++c) variance[c] *= kHalfLn2;
  }
  const double total = within + between_groups;
  unit.v_spread = static_cast<float>(std::sqrt(total / n));
  unit.errors = {};
  if (!(unit.v_spread > 0)) return;
  unit.errors.far_spread = static_cast<float>(std::sqrt(within / total));
  unit.errors.drop_spread = static_cast<float>(std::sqrt(between_tiles / total));

  Arena arena(scratch);
  BasisScratch x = lay_out_basis(arena, s, call.kernels);
  const Exec exec{nullptr, &call.tools, 1};
  if (s.max_rank > 0) make_value_basis(call, unit, warm, exec, x);
  if (s.probe_rank > 0 && make_probe_basis(call, unit, warm, exec, x)) {
    unit.keys.probe_tiles = unit.probe_tiles;
    unit.keys.probe_rank = s.probe_rank;
  }
  if (warm != nullptr) warm->warm = unit.rank_class > 0 || s.max_rank == 0;
}

void project_key_tile(const AdaptiveCall& call, Unit& unit, int64_t tile, char* scratch) {
  const UnitShape& s = call.shape;
  const int64_t first = tile * decide::kTileK, n = tile_rows(unit, tile);
  Arena arena(scratch);
  char* work = arena.take<char>(static_cast<int64_t>(call.kernels.project_scratch(std::max(s.d_qk, s.d_v))));
  unit.captured[tile] = 0;
  if (unit.rank_class > 0) {
    const int64_t rank = decide::rank_of_class(static_cast<int>(unit.rank_class));
    float* y = unit.v_low + first * s.low_stride;
    call.kernels.project(unit.v + first * s.v_stride, n, s.d_v, s.v_stride, unit.v_mean, unit.basis, rank, y,
                         s.low_stride, work);
    double captured = 0;
    for (int64_t j = 0; j < n; ++j) {
      float sum = 0;
      for (int64_t c = 0; c < rank; ++c) sum += y[j * s.low_stride + c] * y[j * s.low_stride + c];
      captured += sum;
    }
    unit.captured[tile] = captured;
    const int64_t group = tile * kGroupsPerTile, groups = (n + decide::kGroupK - 1) / decide::kGroupK;
    call.kernels.project(unit.group_v + group * s.v_stride, groups, s.d_v, s.v_stride, unit.v_mean, unit.basis, rank,
                         unit.group_v_low + group * s.low_stride, s.low_stride, work);
  }
  if (unit.keys.probe_rank > 0) {
    float* y = arena.take<float>(decide::kTileK * s.probe_rank);
    call.kernels.project(unit.k + first * s.k_stride, n, s.d_qk, s.k_stride, unit.k_mean, unit.probe_key_basis,
                         s.probe_rank, y, s.probe_rank, work);
    call.kernels.pack_probe(y, s.probe_rank, n, s.probe_rank, unit.probe_tiles + tile * s.probe_tile_bytes);
  }
}

void estimate_tiles(const AdaptiveCall& call, const Unit& unit, int64_t member, int64_t tile, float* estimate) {
  const UnitShape& s = call.shape;
  const decide::TileRow& row = unit.tile_levels[member * s.query_tiles + tile].row;
  const float* terms = unit.query_terms + (member * s.query_tiles + tile) * s.term_width();
  const int64_t count = row.end - row.begin;
  call.kernels.dot_rows(terms, unit.tile_terms + row.begin * s.term_width(), count, s.term_width(), estimate);
  estimate[count - 1] += std::log2(static_cast<float>(tile_rows(unit, row.end - 1)) / decide::kTileK);
}

void analyze_query_tile(const AdaptiveCall& call, Unit& unit, int64_t member, int64_t tile, char* scratch) {
  const UnitShape& s = call.shape;
  const int64_t d = s.d_qk, first = tile * decide::kTileQ;
  const int64_t n = std::min<int64_t>(decide::kTileQ, unit.seq.len_q - first);
  Arena arena(scratch);
  float* rows = arena.take<float>(decide::kTileQ * d);
  float* estimate = arena.take<float>(s.key_tiles);
  uint32_t* mass = arena.take<uint32_t>(s.key_tiles);
  int32_t* begin = arena.take<int32_t>(2 * decide::kTileQ);
  int32_t* end = begin + decide::kTileQ;

  const RowOperands q = row_operands(call.params, unit.b, unit.seq, unit.kv_head * s.group + member, 1);
  call.kernels.load_rows(q.q, 1, first, n, d, call.params.scale * kLog2E, rows);
  float* terms = unit.query_terms + (member * s.query_tiles + tile) * s.term_width();
  const float inverse = 1.0f / static_cast<float>(n);
  for (int64_t c = 0; c < d; ++c) terms[c] = terms[2 * d + c] = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t c = 0; c < d; ++c) terms[c] += inverse * rows[i * d + c];
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t c = 0; c < d; ++c) {
      const float shift = rows[i * d + c] - terms[c];
      terms[2 * d + c] += inverse * shift * shift;
    }
  }
  for (int64_t c = 0; c < d; ++c) terms[d + c] = terms[c] * terms[c] + terms[2 * d + c];

  decide::TileLevels& levels = unit.tile_levels[member * s.query_tiles + tile];
  levels = {};
  fill_ranges(call.params, unit.seq, 1, first, n, begin, end);
  decide::TileRow& row = levels.row;
  int64_t lowest = unit.seq.len_k, highest = 0, begin_max = 0, end_min = unit.seq.len_k, seen = 0;
  for (int64_t i = 0; i < n; ++i) {
    begin_max = std::max<int64_t>(begin_max, begin[i]);
    end_min = std::min<int64_t>(end_min, end[i]);
    if (begin[i] >= end[i]) continue;
    lowest = std::min<int64_t>(lowest, begin[i]);
    highest = std::max<int64_t>(highest, end[i]);
    seen += end[i] - begin[i];
  }
  if (lowest >= highest) return;
  row.begin = static_cast<int32_t>(lowest / decide::kTileK);
  row.end = static_cast<int32_t>((highest + decide::kTileK - 1) / decide::kTileK);
  row.full_begin = static_cast<int32_t>((begin_max + decide::kTileK - 1) / decide::kTileK);
  row.full_end = static_cast<int32_t>(end_min / decide::kTileK);

  estimate_tiles(call, unit, member, tile, estimate);
  decide::measure_levels(estimate, static_cast<float>(seen) / static_cast<float>(n), mass, &levels);
}

}  // namespace adaattn::cpu
