#include "head.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace adaattn::reference {

bool visible(const Head& head, int64_t i, int64_t j) {
  const int64_t distance = j - (i + head.off);
  if (head.causal && distance > 0) return false;
  if (head.window_left >= 0 && distance < -head.window_left) return false;
  if (head.window_right >= 0 && distance > head.window_right) return false;
  return true;
}

double score(const Head& head, int64_t i, int64_t j) {
  double s = 0;
  for (int64_t c = 0; c < head.q.cols; ++c) s += head.q(i, c) * head.k(j, c);
  s *= head.scale;
  if (head.softcap > 0) s = head.softcap * std::tanh(s / head.softcap);
  if (head.alibi_slope != 0) s -= head.alibi_slope * static_cast<double>(std::abs(i + head.off - j));
  if (!head.bias.data.empty()) s += head.bias(i, j);
  return s;
}

HeadResult attend(const Head& head) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  const int64_t len_q = head.q.rows, len_k = head.k.rows, d_v = head.v.cols;
  HeadResult result;
  result.o = Matrix(len_q, d_v);
  std::vector<double> p(static_cast<size_t>(len_k));  // score, then weight; 0 where not visible
  for (int64_t i = 0; i < len_q; ++i) {
    std::vector<int64_t> keys;
    for (int64_t j = 0; j < len_k; ++j)
      if (visible(head, i, j)) keys.push_back(j);

    double largest = head.sink.value_or(-kInf), score_scale = 0;
    for (int64_t j : keys) {
      p[j] = score(head, i, j);
      largest = std::max(largest, p[j]);
      double magnitude = 0;
      for (int64_t c = 0; c < head.q.cols; ++c) magnitude += std::fabs(head.q(i, c) * head.k(j, c));
      score_scale = std::max(score_scale, std::fabs(head.scale) * magnitude);
    }
    if (largest == -kInf) largest = 0;  // nothing to weigh: every term below is 0

    double real = 0;  // sum over real keys, relative to e^largest
    for (int64_t j : keys) real += std::exp(p[j] - largest);
    const double total = real + (head.sink ? std::exp(*head.sink - largest) : 0);

    double entropy = 0;
    std::vector<double> square(static_cast<size_t>(d_v));
    for (int64_t j : keys) {
      const double s = p[j] - largest;
      const double w = real == 0 ? 0 : std::exp(s) / real;
      if (w != 0) entropy -= w * (s - std::log(real));
      p[j] = total == 0 ? 0 : std::exp(s) / total;
      for (int64_t c = 0; c < d_v; ++c) {
        const double term = p[j] * head.v(j, c);
        result.o(i, c) += term;
        square[c] += term * term;
      }
    }
    double o_square = 0;  // of the finite columns
    for (int64_t c = 0; c < d_v; ++c)
      if (std::isfinite(square[c])) o_square += square[c] + result.o(i, c) * result.o(i, c);

    result.lse.push_back(largest + std::log(total));
    result.entropy.push_back(entropy);
    result.keys.push_back(static_cast<int64_t>(keys.size()));
    result.o_scale.push_back(d_v > 0 ? std::sqrt(o_square / static_cast<double>(d_v)) : 0);
    result.score_scale.push_back(score_scale);
  }
  return result;
}

}  // namespace adaattn::reference
