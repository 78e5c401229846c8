#include "cpu_fallback/tools/tool_fixture.h"

#include <algorithm>
#include <limits>

#include "cpu_fallback/isa/registry.h"

namespace adaattn::cpu::test {
namespace {
constexpr size_t kGuard = 256;
constexpr uint8_t kGuardByte = 0xA5, kPoison = 0xFF;  // all ones is a NaN
}  // namespace

Runner::Runner(int32_t threads, adaattn_isa_t isa)
    : pool_(threads, nullptr, nullptr),
      context_{pool_, tool_kernels(resolve_isa(isa)), *kernels_of(resolve_isa(isa))} {}

void* Runner::workspace(size_t bytes) {
  bytes_ = bytes;
  memory_.assign(bytes + 2 * kGuard, kGuardByte);
  std::fill_n(memory_.data() + kGuard + 1, bytes, kPoison);
  return memory_.data() + kGuard + 1;
}

void Runner::check_workspace() const {
  for (size_t i = 0; i < memory_.size(); ++i) {
    if (i > kGuard && i <= kGuard + bytes_) continue;
    ASSERT_EQ(memory_[i], kGuardByte) << "byte " << i << " beside a workspace of " << bytes_;
  }
}

std::vector<adaattn_isa_t> isas() {
  std::vector<adaattn_isa_t> usable;
  for (adaattn_isa_t isa : {ADAATTN_ISA_BASELINE, ADAATTN_ISA_AVX2, ADAATTN_ISA_AVX512, ADAATTN_ISA_NEON})
    if (isa_available(isa)) usable.push_back(isa);
  return usable;
}

Batch::Batch(int64_t batch0, int64_t batch1, int64_t rows, int64_t cols, Order order) {
  view_.batch0 = batch0;
  view_.batch1 = batch1;
  view_.rows = rows;
  view_.cols = cols;
  const int64_t step = order == Order::kScattered ? 3 : 1, pad = order == Order::kPadded ? 5 : 0;
  const bool col_major = order == Order::kColMajor;
  view_.stride_col = col_major ? rows : step;
  view_.stride_row = col_major ? 1 : (cols + pad) * step;
  const int64_t one = col_major ? rows * cols : rows * view_.stride_row;
  // The first batch dimension varies fastest, so a plain walk over memory would be wrong.
  view_.stride0 = one;
  view_.stride1 = one * batch0 + 7;
  storage_.assign(static_cast<size_t>(view_.stride1 * batch1 + 1), std::numeric_limits<float>::quiet_NaN());
  view_.data = storage_.data();
}

Batch::Batch(const Matrix& only, Order order) : Batch(1, 1, only.rows, only.cols, order) { set(0, only); }

Matrix Batch::get(int64_t index) const {
  Matrix m(view_.rows, view_.cols);
  for (int64_t i = 0; i < m.rows; ++i)
    for (int64_t j = 0; j < m.cols; ++j)
      m(i, j) = storage_[static_cast<size_t>(view_.offset(index) + i * view_.stride_row + j * view_.stride_col)];
  return m;
}

void Batch::set(int64_t index, const Matrix& m) {
  for (int64_t i = 0; i < m.rows; ++i)
    for (int64_t j = 0; j < m.cols; ++j)
      storage_[static_cast<size_t>(view_.offset(index) + i * view_.stride_row + j * view_.stride_col)] =
          static_cast<float>(m(i, j));
}

Matrix random_matrix(Random& random, int64_t rows, int64_t cols) {
  Matrix m(rows, cols);
  for (double& x : m.data) x = random.normal();
  return m;
}

Matrix random_orthonormal(Random& random, int64_t rows, int64_t cols) {
  return reference::orthonormal_columns(random_matrix(random, rows, cols));
}

Matrix with_spectrum(Random& random, int64_t rows, int64_t cols, const std::vector<double>& sigma) {
  const int64_t r = static_cast<int64_t>(sigma.size());
  Matrix u = random_orthonormal(random, rows, r);
  const Matrix v = random_orthonormal(random, cols, r);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < r; ++j) u(i, j) *= sigma[static_cast<size_t>(j)];
  return reference::multiply(u, reference::transpose(v));
}

Matrix rounded(const Matrix& m) {
  Matrix r = m;
  for (double& x : r.data) x = static_cast<float>(x);
  return r;
}

}  // namespace adaattn::cpu::test
