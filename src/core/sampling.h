// What randomized algorithms draw, as pure functions of the seed, so that every device draws the same.
#pragma once

#include <cstdint>

#include "core/philox.h"

namespace adaattn {

// Row drawn from stratum s of `strata` equal parts of [0, rows), for one head of one sequence. With strata >= rows
// every row is its own stratum: use number_of_strata() first.
ADAATTN_HD inline int64_t sampled_row(uint64_t seed, int64_t batch, int64_t head, int64_t heads, int64_t s,
                                      int64_t strata, int64_t rows) {
  // floor(s * rows / strata) without overflow.
  const int64_t whole = rows / strata, rest = rows % strata;
  const int64_t begin = s * whole + s * rest / strata, end = (s + 1) * whole + (s + 1) * rest / strata;
  return begin + random_below(seed, static_cast<uint64_t>(batch * heads + head), static_cast<uint64_t>(s), end - begin);
}

ADAATTN_HD inline int64_t number_of_strata(int64_t sample_rows, int64_t rows) {
  return sample_rows < rows ? sample_rows : rows;
}

// Entry of a random sketch: uniform in (-1, 1), an odd multiple of 2^-24 and so exact in f32. Signs would leave one
// sketch vector in two orthogonal to differences of two coordinates.
ADAATTN_HD inline float sketch_entry(uint64_t seed, uint64_t stream, uint64_t index) {
  const int32_t odd = static_cast<int32_t>(random_u32(seed, stream, index) >> 8) * 2 + 1 - (1 << 24);
  return static_cast<float>(odd) * (1.0f / 16777216.0f);
}

}  // namespace adaattn
