// Calls of the tools through the C API on test tensors, with matrices as float64 for judging the results.
#pragma once

#include <gtest/gtest.h>

#include <vector>

#include "attention/fixture.h"
#include "reference/linalg.h"

namespace adaattn::test {

using reference::Matrix;

inline Matrix random_matrix(int64_t rows, int64_t cols, Random& random) {
  Matrix m(rows, cols);
  for (double& x : m.data) x = random.normal();
  return m;
}

// f32 [batch, rows, cols].
Tensor to_tensor(const std::vector<Matrix>& matrices);
// Matrix `index` of a [batch, rows, cols] tensor.
Matrix to_matrix(const Tensor& tensor, int64_t index);
// Vector `index` of a [batch, n] tensor.
std::vector<double> to_vector(const Tensor& tensor, int64_t index);

struct LowRank {
  Tensor u, s, v;
};
// Randomized SVD of a [batch, rows, cols] with the default oversampling and power iterations.
LowRank low_rank(const Context& context, const Tensor& a, int64_t rank, uint64_t seed);

std::vector<int32_t> effective_rank(const Context& context, const Tensor& a, double threshold);
std::vector<double> spectral_norm(const Context& context, const Tensor& a, double tolerance = 0);

struct Entropies {
  Tensor rows, heads;
};
// The entropy tool on the q, k and optional inputs of data.
Entropies entropy(const Context& context, const AttentionData& data, const adaattn_entropy_desc_t& desc);
adaattn_entropy_desc_t entropy_desc(bool normalized);

}  // namespace adaattn::test
