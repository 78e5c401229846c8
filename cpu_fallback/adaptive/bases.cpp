#include <algorithm>
#include <cmath>

#include "cpu_fallback/adaptive/call.h"
#include "cpu_fallback/tools/subspace.h"

namespace adaattn::cpu {
namespace {

// Rows of K, V or Q behind a Gram matrix: a basis of 1,024 strided rows loses 6 to 9 per cent more energy than the
// optimal one, and what it loses is measured on all rows.
constexpr int64_t kGramRows = 1024;
constexpr int64_t kOversampling = 8;
constexpr int64_t kColdSweeps = 4, kWarmSweeps = 1;
// Ridge on the queries' Gram matrix, relative to its mean diagonal, so that directions without queries stay invertible.
constexpr double kRidge = 1e-3;

int64_t gram_step(int64_t rows) { return std::max<int64_t>(1, (rows + kGramRows - 1) / kGramRows); }

SubspaceParams subspace_params(int64_t dim, int64_t rank, uint64_t seed, const WarmBasis& start) {
  SubspaceParams s;
  s.dim = dim;
  s.rank = rank;
  s.oversampling = kOversampling;
  s.seed = seed;
  s.sweeps = start.warm ? kWarmSweeps : kColdSweeps;
  s.warm = start.warm ? start.vectors.data() : nullptr;
  // Rotated even when warm: one sweep leaves the columns near the last rank in an order of the previous call's, and a
  // prefix of them is what a rank class takes.
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
  if (s.max_rank > 0) work = subspace_iteration_workspace(subspace_params(s.d_v, s.max_rank, 0, {}), 1);
  if (s.probe_rank > 0)
    work = std::max(work, subspace_iteration_workspace(subspace_params(s.d_qk, s.probe_rank, 0, {}), 1));
  x.subspace_work = arena.take<char>(static_cast<int64_t>(work));
  return x;
}

void widen(const float* from, int64_t n, double* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

double trace_of(const double* matrix, int64_t d) {
  double trace = 0;
  for (int64_t i = 0; i < d; ++i) trace += matrix[i * d + i];
  return trace;
}

// The Gram matrix of some rows of K or V less their mean, in x.gram.
void gram_of_keys(const AdaptiveCall& call, const Unit& unit, const Operand& tensor, const float* wide, int64_t d,
                  int64_t stride, const float* mean, BasisScratch& x) {
  const int64_t n = unit.seq.len_k, step = gram_step(n);
  if (!call.shape.packs) {
    call.kernels.gram(wide, n, step, d, stride, mean, x.gram, x.gram_work);
    return;
  }
  const KeyOperand keys = key_operand(call.params, tensor, unit.b, unit.seq, unit.kv_head);
  int64_t samples = 0;
  for (int64_t j = 0; j < n; j += step, ++samples) call.kernels.load_keys(keys, j, 1, d, x.rows + samples * d, d);
  call.kernels.gram(x.rows, samples, 1, d, d, mean, x.gram, x.gram_work);
}

// Leading eigenvectors of x.matrix, left in `start` where it has room for them; null if the matrix is not finite.
const double* find_basis(const AdaptiveCall& call, int64_t dim, int64_t rank, uint64_t seed, WarmBasis& start,
                         const Exec& exec, BasisScratch& x) {
  double* basis = start.vectors.empty() ? x.basis : start.vectors.data();
  const SubspaceParams params = subspace_params(dim, rank, call.problem.adaptive.seed + seed, start);
  const bool finite = subspace_iteration(exec, params, x.matrix, basis, x.values, x.subspace_work).finite;
  start.warm = finite && !start.vectors.empty();
  return finite ? basis : nullptr;
}

}  // namespace

size_t basis_scratch(const UnitShape& s, const AdaptiveKernels& kernels) {
  Arena arena;
  lay_out_basis(arena, s, kernels);
  return arena.used() + Arena::kAlignment;
}

WarmBasis room_for_basis(int64_t dim, int64_t rank) {
  WarmBasis basis;
  if (rank > 0) basis.vectors.resize(static_cast<size_t>(std::min(rank + kOversampling, dim) * dim));
  return basis;
}

void make_value_basis(const AdaptiveCall& call, Unit& unit, WarmBasis& start, char* scratch) {
  const UnitShape& s = call.shape;
  const decide::Options& o = call.problem.adaptive;
  const int64_t d = s.d_v;
  Arena arena(scratch);
  BasisScratch x = lay_out_basis(arena, s, call.kernels);
  const Exec exec{nullptr, &call.tools, 1};
  gram_of_keys(call, unit, call.params.v, unit.v, d, s.v_stride, unit.v_mean, x);
  widen(x.gram, d * d, x.matrix);
  const double trace = trace_of(x.matrix, d);
  if (!(trace > 0)) return;
  const double* basis = find_basis(call, d, s.max_rank, 0, start, exec, x);
  if (basis == nullptr) return;

  const double cap = o.rank_ratio * static_cast<double>(d);
  for (int rank_class = decide::kRankClasses - 1; rank_class > 0; --rank_class) {
    const int64_t rank = decide::rank_of_class(rank_class);
    if (rank > s.max_rank || rank < o.min_rank) continue;
    double kept = 0;
    for (int64_t i = 0; i < rank; ++i) kept += x.values[i];
    const bool enough =
        o.rank_mode == decide::RankMode::kFixed ? static_cast<double>(rank) >= cap : kept >= o.rank_threshold * trace;
    if (!enough) continue;
    if (o.rank_mode == decide::RankMode::kEnergy && static_cast<double>(rank) > cap) return;
    unit.rank_class = rank_class;
    for (int64_t c = 0; c < d; ++c) {
      for (int64_t i = 0; i < rank; ++i) unit.basis[c * rank + i] = static_cast<float>(basis[i * d + c]);
    }
    return;
  }
}

// With the queries' second moment r^T r and C the Gram matrix of K - mean, the leading eigenvectors W of r C r^T span
// the directions in which scores vary most. Queries are multiplied by r^-1 W, keys by r^T W.
void make_probe_basis(const AdaptiveCall& call, Unit& unit, WarmBasis& start, char* scratch) {
  const UnitShape& s = call.shape;
  const int64_t d = s.d_qk, rank = s.probe_rank;
  Arena arena(scratch);
  BasisScratch x = lay_out_basis(arena, s, call.kernels);
  const Exec exec{nullptr, &call.tools, 1};

  const int64_t queries = unit.seq.len_q * s.group;
  const int64_t step = gram_step(queries);
  const RowOperands rows = row_operands(call.params, unit.b, unit.seq, unit.kv_head * s.group, s.group);
  int64_t samples = 0;
  // A step that shares no factor with the group size visits all of its heads.
  const int64_t stride = step % s.group == 0 && s.group > 1 ? step + 1 : step;
  for (int64_t r = 0; r < queries && samples < kGramRows; r += stride, ++samples)
    call.kernels.load_rows(rows.q, rows.group, r, 1, d, query_factor(call), x.rows + samples * d);
  float* zero = unit.probe_basis;  // d zeros, overwritten below
  std::fill(zero, zero + d, 0.0f);
  call.kernels.gram(x.rows, samples, 1, d, d, zero, x.gram, x.gram_work);
  widen(x.gram, d * d, x.chol);
  const double trace = trace_of(x.chol, d);
  if (!(trace > 0)) return;
  for (int64_t i = 0; i < d; ++i) x.chol[i * d + i] += kRidge * trace / static_cast<double>(d);
  if (!cholesky(d, x.chol, 1e-12)) return;

  gram_of_keys(call, unit, call.params.k, unit.k, d, s.k_stride, unit.k_mean, x);
  const ConstMatrix gram{x.gram, d, d, d, 1, false};
  const ConstMatrix r = row_major(x.chol, d, d);
  gemm(exec, x.gemm, r, gram, x.product, d, Precision::kF64);
  gemm(exec, x.gemm, row_major(x.product, d, d), r.transposed(), x.matrix, d, Precision::kF64);
  const double* basis = find_basis(call, d, rank, 1, start, exec, x);
  if (basis == nullptr) return;

  const ConstMatrix w = row_major(basis, rank, d);
  const int64_t columns = padded_rank(rank);
  gemm(exec, x.gemm, r.transposed(), w.transposed(), x.product, rank, Precision::kF64);
  for (int64_t c = 0; c < d; ++c) {
    for (int64_t i = 0; i < columns; ++i)
      unit.probe_key_basis[c * columns + i] = i < rank ? static_cast<float>(x.product[c * rank + i]) : 0;
  }
  std::copy(x.chol, x.chol + d * d, x.inverse);
  invert_upper(d, x.inverse);
  gemm(exec, x.gemm, w, row_major(x.inverse, d, d).transposed(), x.product, d, Precision::kF64);
  for (int64_t i = 0; i < rank * d; ++i) unit.probe_basis[i] = static_cast<float>(x.product[i]);
  for (int64_t c = 0; c < d; ++c) unit.probe_basis[rank * d + c] = unit.k_mean[c];
  unit.keys.probe_tiles = unit.probe_tiles;
  unit.keys.probe_rank = rank;
}

}  // namespace adaattn::cpu
