#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <string>

#include "core/check_tensor.h"
#include "core/error.h"
#include "core/validate.h"

namespace adaattn {
namespace {

// What a dimension of an argument has to be equal to.
struct Extent {
  int64_t value;
  const char* why;
};

// The tensors of one call to a tool: every one belongs to the batch that `a`, the first, sets by its leading
// dimensions.
class MatrixReader {
 public:
  // scope null: shapes only.
  MatrixReader(const adaattn_tensor_t& a, const DeviceScope* scope) : a_(a), scope_(scope) {
    check(a, "a", Access::kInput, 2, 4, Dtype::kF32);
    leading_ = a.ndim - 2;
  }

  int64_t rows() const { return a_.shape[leading_]; }
  int64_t cols() const { return a_.shape[leading_ + 1]; }
  int64_t batch() const {
    int64_t product = 1;
    for (int i = 0; i < leading_; ++i) product *= a_.shape[i];  // fits: check_range saw the whole tensor
    return product;
  }

  MatrixBatch a() const { return batch_of(a_, leading_, leading_ + 1); }

  MatrixBatch matrix(const adaattn_tensor_t* t, const char* name, Access access, Extent rows, Extent cols) {
    if (is_absent(t, name)) return {};
    check(*t, name, access, leading_ + 2, leading_ + 2, Dtype::kF32);
    expect_leading(*t, name);
    if (rows.value >= 0) expect_extent(*t, name, leading_, rows.value, rows.why);
    if (cols.value >= 0) expect_extent(*t, name, leading_ + 1, cols.value, cols.why);
    return batch_of(*t, leading_, leading_ + 1);
  }

  MatrixBatch vector(const adaattn_tensor_t* t, const char* name, Access access, Extent extent) {
    if (is_absent(t, name)) return {};
    check(*t, name, access, leading_ + 1, leading_ + 1, Dtype::kF32);
    expect_leading(*t, name);
    expect_extent(*t, name, leading_, extent.value, extent.why);
    return batch_of(*t, leading_, -1);
  }

  // One number per matrix: a last dimension of 1, or none where there is a batch.
  MatrixBatch scalar(const adaattn_tensor_t* t, const char* name, Dtype dtype) {
    if (is_absent(t, name)) return {};
    check(*t, name, Access::kOutput, std::max(leading_, 1), leading_ + 1, dtype);
    expect_leading(*t, name);
    if (t->ndim == leading_) return batch_of(*t, -1, -1);
    expect_extent(*t, name, leading_, 1, "one number per matrix");
    return batch_of(*t, leading_, -1);
  }

  CallMemory& memory() { return memory_; }

 private:
  void check(const adaattn_tensor_t& t, const char* name, Access access, int min_ndim, int max_ndim, Dtype dtype) {
    if (t.ndim == 0) {
      is_absent(&t, name);
      fail(ADAATTN_ERROR_NULL_POINTER, "%s is absent; accepted: a tensor of %d to %d dimensions", name, min_ndim,
           max_ndim);
    }
    if (scope_ != nullptr)
      check_tensor(t, name, access, min_ndim, max_ndim, {dtype}, *scope_);
    else
      check_tensor_shape(t, name, access, min_ndim, max_ndim, {dtype});
    for (int i = 0; i < t.ndim; ++i)
      if (t.shape[i] == 0) fail(ADAATTN_ERROR_INVALID_SHAPE, "%s.shape[%d] is 0; accepted: 1 or more", name, i);
    memory_.add(t, name, is_output(access));
  }

  void expect_leading(const adaattn_tensor_t& t, const char* name) const {
    for (int i = 0; i < leading_; ++i) expect_extent(t, name, i, a_.shape[i], "that of a");
  }

  MatrixBatch batch_of(const adaattn_tensor_t& t, int row, int col) const {
    MatrixBatch m;
    m.data = t.data;
    m.dtype = static_cast<Dtype>(t.dtype);
    if (leading_ > 0) {
      m.batch0 = t.shape[0];
      m.stride0 = effective_stride(t, 0);
    }
    if (leading_ > 1) {
      m.batch1 = t.shape[1];
      m.stride1 = effective_stride(t, 1);
    }
    m.rows = row >= 0 ? t.shape[row] : 1;
    m.stride_row = row >= 0 ? effective_stride(t, row) : 0;
    m.cols = col >= 0 ? t.shape[col] : 1;
    m.stride_col = col >= 0 ? effective_stride(t, col) : 0;
    return m;
  }

  const adaattn_tensor_t& a_;
  const DeviceScope* scope_;
  int leading_ = 0;
  CallMemory memory_;
};

constexpr Extent kAny{-1, nullptr};

void require(const adaattn_tensor_t* t, const char* name) {
  if (is_absent(t, name))
    fail(ADAATTN_ERROR_NULL_POINTER, "%s is absent; accepted: a tensor, as the call needs it", name);
}

// o* and lse* of merge: [batch, tokens, heads, d] and [batch, heads, tokens], or both without the batch.
Operand merge_operand(const adaattn_tensor_t& t, int token, int head) {
  Operand x;
  x.data = t.data;
  x.stride_b = std::min(token, head) > 0 ? effective_stride(t, 0) : 0;
  x.stride_s = effective_stride(t, token);
  x.stride_h = effective_stride(t, head);
  x.dtype = static_cast<Dtype>(t.dtype);
  return x;
}

EffectiveRankParams effective_rank_shape(const MatrixReader& reader) {
  constexpr int64_t kMaxSide = 1024;
  const int64_t side = std::min(reader.rows(), reader.cols());
  if (side > kMaxSide)
    fail(ADAATTN_ERROR_INVALID_SHAPE, "a is %" PRId64 " x %" PRId64 "; accepted: a smaller side of at most %" PRId64,
         reader.rows(), reader.cols(), kMaxSide);
  EffectiveRankParams p;
  p.a = reader.a();
  return p;
}

void range(const char* field, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high)
    fail(ADAATTN_ERROR_INVALID_ARGUMENT, "%s is %" PRId64 "; accepted: %" PRId64 " to %" PRId64, field, value, low,
         high);
}

MatrixBatch shape_of(int64_t batch, int64_t rows, int64_t cols) {
  MatrixBatch m;
  m.batch0 = batch;
  m.rows = rows;
  m.cols = cols;
  m.stride0 = rows * cols;
  m.stride_row = cols;
  m.stride_col = 1;
  return m;
}

}  // namespace

MergeParams merge_from(const adaattn_tensor_t& o_a, const adaattn_tensor_t& lse_a, const adaattn_tensor_t& o_b,
                       const adaattn_tensor_t& lse_b, const adaattn_tensor_t& o, const adaattn_tensor_t* lse,
                       const DeviceScope& scope) {
  require(&o_a, "o_a");
  check_tensor(o_a, "o_a", Access::kDistinctInput, 3, 4, {Dtype::kF32, Dtype::kF16, Dtype::kBF16}, scope);
  const int ndim = o_a.ndim, token = ndim - 3, head = ndim - 2;
  const Dtype dtype = static_cast<Dtype>(o_a.dtype);
  const auto same_shape = [&](const adaattn_tensor_t& t, const char* name) {
    for (int i = 0; i < ndim; ++i) expect_extent(t, name, i, o_a.shape[i], "that of o_a");
  };
  const auto lse_shape = [&](const adaattn_tensor_t& t, const char* name) {
    if (ndim == 4) expect_extent(t, name, 0, o_a.shape[0], "the batch of o_a");
    expect_extent(t, name, ndim - 3, o_a.shape[head], "the heads of o_a");
    expect_extent(t, name, ndim - 2, o_a.shape[token], "the tokens of o_a");
  };
  require(&lse_a, "lse_a");
  check_tensor(lse_a, "lse_a", Access::kInput, ndim - 1, ndim - 1, {Dtype::kF32}, scope);
  lse_shape(lse_a, "lse_a");
  require(&o_b, "o_b");
  check_tensor(o_b, "o_b", Access::kDistinctInput, ndim, ndim, {dtype}, scope);
  same_shape(o_b, "o_b");
  require(&lse_b, "lse_b");
  check_tensor(lse_b, "lse_b", Access::kInput, ndim - 1, ndim - 1, {Dtype::kF32}, scope);
  lse_shape(lse_b, "lse_b");
  require(&o, "o");
  if (dtype == Dtype::kF32)
    check_tensor(o, "o", Access::kUnitOutput, ndim, ndim, {Dtype::kF32, Dtype::kF16, Dtype::kBF16}, scope);
  else
    check_tensor(o, "o", Access::kUnitOutput, ndim, ndim, {dtype}, scope);
  same_shape(o, "o");

  CallMemory memory;
  const int at_o = memory.add(o_a, "o_a", false), at_lse = memory.add(lse_a, "lse_a", false);
  memory.add(o_b, "o_b", false);
  memory.add(lse_b, "lse_b", false);
  memory.add(o, "o", true, at_o);
  MergeParams p;
  if (!is_absent(lse, "lse")) {
    check_tensor(*lse, "lse", Access::kOutput, ndim - 1, ndim - 1, {Dtype::kF32}, scope);
    lse_shape(*lse, "lse");
    memory.add(*lse, "lse", true, at_lse);
    p.lse = merge_operand(*lse, ndim - 2, ndim - 3);
  }
  memory.check();
  p.o_a = merge_operand(o_a, token, head);
  p.o_b = merge_operand(o_b, token, head);
  p.o = merge_operand(o, token, head);
  p.lse_a = merge_operand(lse_a, ndim - 2, ndim - 3);
  p.lse_b = merge_operand(lse_b, ndim - 2, ndim - 3);
  p.batch = ndim == 4 ? o_a.shape[0] : 1;
  p.tokens = o_a.shape[token];
  p.heads = o_a.shape[head];
  p.d_v = o_a.shape[ndim - 1];
  return p;
}

LowRankParams low_rank_from(const adaattn_low_rank_desc_t& desc) {
  range("desc.batch", desc.batch, 1, INT32_MAX);
  range("desc.rows", desc.rows, 1, INT32_MAX);
  range("desc.cols", desc.cols, 1, INT32_MAX);
  if (desc.rank < 1 || desc.rank > std::min(desc.rows, desc.cols))
    fail(ADAATTN_ERROR_INVALID_ARGUMENT,
         "desc.rank is %" PRId64 "; accepted: 1 to %" PRId64 " (the smaller of desc.rows and desc.cols)", desc.rank,
         std::min(desc.rows, desc.cols));
  range("desc.oversampling", desc.oversampling, 0, INT32_MAX);
  range("desc.power_iterations", desc.power_iterations, 0, 1000);
  int64_t bytes;
  if (__builtin_mul_overflow(desc.rows * desc.cols, desc.batch * 64, &bytes))
    fail(ADAATTN_ERROR_SIZE_OVERFLOW,
         "desc.batch is %" PRId64 " with desc.rows %" PRId64 " and desc.cols %" PRId64
         "; accepted: products whose size in bytes fits 64 bits",
         desc.batch, desc.rows, desc.cols);
  LowRankParams p;
  p.a = shape_of(desc.batch, desc.rows, desc.cols);
  p.u = shape_of(desc.batch, desc.rows, desc.rank);
  p.s = shape_of(desc.batch, desc.rank, 1);
  p.v = shape_of(desc.batch, desc.cols, desc.rank);
  p.rank = desc.rank;
  p.oversampling = desc.oversampling;
  p.power_iterations = desc.power_iterations;
  p.seed = desc.seed;
  return p;
}

LowRankParams low_rank_from(const adaattn_low_rank_desc_t& desc, const adaattn_tensor_t& a, const adaattn_tensor_t* u,
                            const adaattn_tensor_t& s, const adaattn_tensor_t* v, const DeviceScope& scope,
                            const Workspace& workspace) {
  LowRankParams p = low_rank_from(desc);
  MatrixReader reader(a, &scope);
  if (reader.batch() != desc.batch)
    fail(ADAATTN_ERROR_INVALID_SHAPE, "a holds %" PRId64 " matrices; accepted: %" PRId64 " (desc.batch)",
         reader.batch(), desc.batch);
  expect_extent(a, "a", a.ndim - 2, desc.rows, "desc.rows");
  expect_extent(a, "a", a.ndim - 1, desc.cols, "desc.cols");
  const Extent rank{desc.rank, "desc.rank"};
  p.a = reader.a();
  p.u = reader.matrix(u, "u", Access::kOutput, {desc.rows, "desc.rows"}, rank);
  require(&s, "s");
  p.s = reader.vector(&s, "s", Access::kOutput, rank);
  p.v = reader.matrix(v, "v", Access::kOutput, {desc.cols, "desc.cols"}, rank);
  reader.memory().add(workspace);
  reader.memory().check();
  return p;
}

ProjectParams project_from(const adaattn_tensor_t& a, const adaattn_tensor_t& basis, const adaattn_tensor_t* mean,
                           const adaattn_tensor_t* y, const adaattn_tensor_t* row_residual,
                           const adaattn_tensor_t* residual, const DeviceScope& scope) {
  MatrixReader reader(a, &scope);
  ProjectParams p;
  p.a = reader.a();
  require(&basis, "basis");
  const Extent rows{reader.rows(), "the rows of a"}, cols{reader.cols(), "the columns of a"};
  p.basis = reader.matrix(&basis, "basis", Access::kInput, cols, kAny);
  if (p.basis.cols > p.basis.rows)
    fail(ADAATTN_ERROR_INVALID_SHAPE,
         "basis.shape[%d] is %" PRId64 "; accepted: 1 to %" PRId64 " (no more orthonormal columns exist)",
         basis.ndim - 1, p.basis.cols, p.basis.rows);
  p.mean = reader.vector(mean, "mean", Access::kInput, cols);
  p.y = reader.matrix(y, "y", Access::kOutput, rows, {p.basis.cols, "the columns of basis"});
  p.row_residual = reader.vector(row_residual, "row_residual", Access::kOutput, rows);
  p.residual = reader.scalar(residual, "residual", Dtype::kF32);
  if (p.y.data == nullptr && p.row_residual.data == nullptr && p.residual.data == nullptr)
    fail(ADAATTN_ERROR_NULL_POINTER, "y, row_residual and residual are all absent; accepted: at least one of them");
  reader.memory().check();
  return p;
}

EffectiveRankParams effective_rank_from(const adaattn_tensor_t& a) {
  return effective_rank_shape(MatrixReader(a, nullptr));
}

EffectiveRankParams effective_rank_from(const adaattn_tensor_t& a, double threshold, const adaattn_tensor_t& ranks,
                                        const adaattn_tensor_t* singular_values, const DeviceScope& scope,
                                        const Workspace& workspace) {
  MatrixReader reader(a, &scope);
  EffectiveRankParams p = effective_rank_shape(reader);
  if (!(threshold > 0 && threshold <= 1))
    fail(ADAATTN_ERROR_INVALID_ARGUMENT, "threshold is %g; accepted: above 0, at most 1", threshold);
  p.threshold = threshold;
  require(&ranks, "ranks");
  p.ranks = reader.scalar(&ranks, "ranks", Dtype::kI32);
  p.singular_values = reader.vector(singular_values, "singular_values", Access::kOutput,
                                    {std::min(reader.rows(), reader.cols()), "the smaller side of a"});
  reader.memory().add(workspace);
  reader.memory().check();
  return p;
}

SpectralNormParams spectral_norm_from(const adaattn_tensor_t& a) {
  SpectralNormParams p;
  p.a = MatrixReader(a, nullptr).a();
  return p;
}

SpectralNormParams spectral_norm_from(const adaattn_tensor_t& a, double tolerance, int64_t max_iterations,
                                      uint64_t seed, const adaattn_tensor_t& norms, const DeviceScope& scope,
                                      const Workspace& workspace) {
  MatrixReader reader(a, &scope);
  if (!(tolerance >= 0 && tolerance < 1))
    fail(ADAATTN_ERROR_INVALID_ARGUMENT, "tolerance is %g; accepted: 0 (1e-6) or below 1", tolerance);
  range("max_iterations", max_iterations, 0, INT32_MAX);
  SpectralNormParams p;
  p.a = reader.a();
  p.tolerance = tolerance != 0 ? tolerance : 1e-6;
  p.max_iterations = max_iterations != 0 ? max_iterations : 1000;
  p.seed = seed;
  require(&norms, "norms");
  p.norms = reader.scalar(&norms, "norms", Dtype::kF32);
  reader.memory().add(workspace);
  reader.memory().check();
  return p;
}

}  // namespace adaattn
