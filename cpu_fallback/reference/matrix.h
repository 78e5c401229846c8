// A dense row-major matrix of double.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace adaattn::reference {

struct Matrix {
  int64_t rows = 0, cols = 0;
  std::vector<double> data;

  Matrix() = default;
  Matrix(int64_t r, int64_t c, double value = 0) : rows(r), cols(c), data(static_cast<size_t>(r * c), value) {}
  double& operator()(int64_t i, int64_t j) { return data[static_cast<size_t>(i * cols + j)]; }
  double operator()(int64_t i, int64_t j) const { return data[static_cast<size_t>(i * cols + j)]; }
  const double* row(int64_t i) const { return data.data() + i * cols; }
  double* row(int64_t i) { return data.data() + i * cols; }
};

}  // namespace adaattn::reference
