// What the tests of the CPU tools share: the tools on a chosen number of threads and instruction set, matrices in
// float64 and their f32 images with free strides.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "cpu_fallback/reference/linalg.h"
#include "cpu_fallback/tools/linalg.h"
#include "cpu_fallback/tools/tools.h"
#include "support/random.h"

namespace adaattn::cpu::test {

using adaattn::test::Random;
using reference::Matrix;

// A pool, the kernels of an instruction set and workspaces that are poisoned and guarded.
class Runner {
 public:
  explicit Runner(int32_t threads = 2, adaattn_isa_t isa = ADAATTN_ISA_AUTO);
  const ToolContext& context() const { return context_; }
  Exec exec() { return {&pool_, &context_.kernels, pool_.num_threads()}; }
  // Memory of exactly `bytes` at an odd address. The fixture fails if a byte beside it changes.
  void* workspace(size_t bytes);
  void check_workspace() const;

 private:
  ThreadPool pool_;
  ToolContext context_;
  std::vector<uint8_t> memory_;
  size_t bytes_ = 0;
};

// Instruction sets usable here.
std::vector<adaattn_isa_t> isas();

enum class Order { kRowMajor, kColMajor, kPadded, kScattered };  // scattered: no unit stride

// f32 matrices of equal shape; poisoned with NaN.
class Batch {
 public:
  Batch(int64_t batch0, int64_t batch1, int64_t rows, int64_t cols, Order order = Order::kRowMajor);
  Batch(const Matrix& only, Order order = Order::kRowMajor);
  const MatrixBatch& view() const { return view_; }
  // Matrix `index`, as the float64 values of its f32 elements.
  Matrix get(int64_t index = 0) const;
  void set(int64_t index, const Matrix& m);
  const std::vector<float>& storage() const { return storage_; }

 private:
  MatrixBatch view_;
  std::vector<float> storage_;
};

Matrix random_matrix(Random& random, int64_t rows, int64_t cols);
// Orthonormal columns.
Matrix random_orthonormal(Random& random, int64_t rows, int64_t cols);
// sum_i sigma_i u_i v_i^T with random orthonormal u, v.
Matrix with_spectrum(Random& random, int64_t rows, int64_t cols, const std::vector<double>& sigma);
// Rounded to f32, as the tools see it.
Matrix rounded(const Matrix& m);

}  // namespace adaattn::cpu::test
