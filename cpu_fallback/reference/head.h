// Attention of one query head over one sequence in float64: the definition that everything else is held against.
#pragma once

#include <optional>
#include <vector>

#include "matrix.h"

namespace adaattn::reference {

struct Head {
  Matrix q, k, v;  // [len_q, d_qk], [len_k, d_qk], [len_k, d_v]
  Matrix bias;     // [len_q, len_k] or empty
  double scale = 1;
  double softcap = 0;  // 0: off
  double alibi_slope = 0;
  std::optional<double> sink;
  bool causal = false;
  int64_t window_left = -1, window_right = -1;  // -1: open
  int64_t off = 0;                              // key position that query 0 stands at
};

struct HeadResult {
  Matrix o;                     // [len_q, d_v]
  std::vector<double> lse;      // natural logarithm, the sink included
  std::vector<double> entropy;  // nats, over real keys
  std::vector<int64_t> keys;    // visible keys
  // What rounding acts on, for tolerances: sqrt(mean_c(o_c^2 + sum_j p_j^2 v_jc^2)) of each row of o, and the largest
  // scale * sum_c |q_c k_jc| of a row.
  std::vector<double> o_scale, score_scale;
};

bool visible(const Head& head, int64_t i, int64_t j);
double score(const Head& head, int64_t i, int64_t j);
HeadResult attend(const Head& head);

}  // namespace adaattn::reference
