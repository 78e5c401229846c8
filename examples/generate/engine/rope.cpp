#include "engine/rope.h"

#include <algorithm>
#include <cmath>

namespace generate {

// Angles are products of f32 numbers, as in the implementations that models are trained with: at large positions their
// rounding is part of the model. Cosine and sine of them are exact to f32.
bool RopeTable::grow(int64_t positions) {
  const int64_t half = head_dim_ / 2;
  int64_t position = static_cast<int64_t>(cos_.size()) / half;
  if (positions <= position) return false;
  positions = std::max(positions, 2 * position);
  std::vector<float> frequencies;
  for (int64_t i = 0; i < half; ++i) {
    const double exponent = static_cast<double>(2 * i) / static_cast<double>(head_dim_);
    frequencies.push_back(static_cast<float>(std::pow(theta_, -exponent)));
  }
  for (; position < positions; ++position)
    for (const float frequency : frequencies) {
      const double angle = static_cast<float>(position) * frequency;
      cos_.push_back(static_cast<float>(std::cos(angle)));
      sin_.push_back(static_cast<float>(std::sin(angle)));
    }
  return true;
}

}  // namespace generate
