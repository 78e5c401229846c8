// The error bounds that adaptive attention rests on, on random rows of the library's own attention. With the unit
// matrix in V the outputs are the weights themselves, and a bias perturbs the scores as told.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "support/context.h"
#include "support/random.h"

namespace adaattn::test {
namespace {

constexpr int64_t kRows = 128, kKeys = 64, kDim = 32, kValues = 24, kTrials = 20;
constexpr double kRounding = 2e-5;  // of f32 attention over so few keys, far below the bounds under test

// One head, every key visible: o [rows][d_v].
struct Problem {
  int64_t rows = kRows, keys = kKeys, d = kDim, d_v = kValues;
  std::vector<float> q, k, v, bias;  // bias [rows][keys], or empty

  float value(int64_t j, int64_t c) const { return v[static_cast<size_t>(j * d_v + c)]; }
};

struct Outcome {
  std::vector<float> o, lse, entropy;
};

std::vector<float> normals(Random& random, int64_t n, double factor = 1) {
  std::vector<float> x(static_cast<size_t>(n));
  for (float& value : x) value = static_cast<float>(factor * random.normal());
  return x;
}

Problem random_problem(Random& random, double sharpness) {
  Problem p;
  p.q = normals(random, p.rows * p.d, sharpness);
  p.k = normals(random, p.keys * p.d);
  p.v = normals(random, p.keys * p.d_v);
  return p;
}

void set_view(adaattn_tensor_t* t, const std::vector<float>& data, std::vector<int64_t> shape) {
  ASSERT_TRUE(succeeded(adaattn_tensor_init(t, const_cast<float*>(data.data()), ADAATTN_DTYPE_F32, ADAATTN_DEVICE_CPU,
                                            0, static_cast<int32_t>(shape.size()), shape.data(), nullptr)));
}

Outcome attend(const Problem& p) {
  const Context context;
  adaattn_attn_desc_t desc;
  adaattn_io_t io;
  adaattn_attn_desc_init(&desc, sizeof desc);
  adaattn_io_init(&io, sizeof io);
  desc.max_batch = desc.heads_q = desc.heads_kv = 1;
  desc.max_seqlen_q = p.rows;
  desc.max_seqlen_k = p.keys;
  desc.head_dim_qk = p.d;
  desc.head_dim_v = p.d_v;
  desc.dtype_q = ADAATTN_DTYPE_F32;
  desc.outputs = ADAATTN_OUTPUT_ALL;
  const float nan = std::nanf("");
  Outcome out;
  out.o.assign(static_cast<size_t>(p.rows * p.d_v), nan);
  out.lse.assign(static_cast<size_t>(p.rows), nan);
  out.entropy = out.lse;
  set_view(&io.q, p.q, {1, p.rows, 1, p.d});
  set_view(&io.k, p.k, {1, p.keys, 1, p.d});
  set_view(&io.v, p.v, {1, p.keys, 1, p.d_v});
  set_view(&io.o, out.o, {1, p.rows, 1, p.d_v});
  set_view(&io.lse, out.lse, {1, 1, p.rows});
  set_view(&io.entropy, out.entropy, {1, 1, p.rows});
  if (!p.bias.empty()) {
    desc.flags = ADAATTN_FLAG_BIAS;
    set_view(&io.bias, p.bias, {1, 1, p.rows, p.keys});
  }
  EXPECT_TRUE(succeeded(adaattn_attention(context.get(), &desc, nullptr, &io, nullptr)));
  return out;
}

// p [rows][keys].
std::vector<float> weights(Problem p) {
  p.d_v = p.keys;
  p.v.assign(static_cast<size_t>(p.keys * p.keys), 0.0f);
  for (int64_t j = 0; j < p.keys; ++j) p.v[static_cast<size_t>(j * (p.keys + 1))] = 1;
  return attend(p).o;
}

const float* row(const std::vector<float>& x, int64_t i, int64_t width) { return x.data() + i * width; }

double distance(const float* a, const float* b, int64_t n) {
  double sum = 0;
  for (int64_t c = 0; c < n; ++c) sum += std::pow(static_cast<double>(a[c]) - b[c], 2);
  return std::sqrt(sum);
}

double variation(const float* a, const float* b, int64_t n) {
  double sum = 0;
  for (int64_t j = 0; j < n; ++j) sum += std::abs(static_cast<double>(a[j]) - b[j]);
  return sum / 2;
}

double diameter(const Problem& p) {
  double most = 0;
  for (int64_t i = 0; i < p.keys; ++i) {
    for (int64_t j = 0; j < i; ++j) most = std::max(most, distance(row(p.v, i, p.d_v), row(p.v, j, p.d_v), p.d_v));
  }
  return most;
}

// sqrt(E_p ||v - o||^2)
double spread(const Problem& p, const float* weight, const float* o) {
  double sum = 0;
  for (int64_t j = 0; j < p.keys; ++j) sum += weight[j] * std::pow(distance(row(p.v, j, p.d_v), o, p.d_v), 2);
  return std::sqrt(sum);
}

// T1: TV(p, p') <= tanh(eps / 2). T2: ||o - o'|| <= tanh(eps / 2) diam(V). T3: ||o - o'|| <= sinh(eps) sqrt(E||v||^2 -
// ||o||^2), with the weights of either run. eps is the half-range of the scores' perturbation over a row.
TEST(Bounds, PerturbedScoresMoveWeightsAndOutputsNoFurtherThanTheirRangeAllows) {
  Random random(run_seed());
  for (int64_t trial = 0; trial < kTrials; ++trial) {
    Problem p = random_problem(random, 0.3 * std::exp2(random.uniform() * 4));
    const double eps = 0.01 * std::pow(300.0, random.uniform()), offset = random.normal();
    const Outcome before = attend(p);
    const std::vector<float> weight = weights(p);
    p.bias.resize(static_cast<size_t>(p.rows * p.keys));
    for (float& e : p.bias) {
      const double u = 2 * random.uniform() - 1;
      e = static_cast<float>(offset + eps * (trial % 2 == 0 ? u : (u > 0 ? 1 : -1)));
    }
    const Outcome after = attend(p);
    const std::vector<float> moved = weights(p);
    const double diam = diameter(p);
    for (int64_t i = 0; i < p.rows; ++i) {
      const float *w = row(weight, i, p.keys), *w2 = row(moved, i, p.keys);
      const float *o = row(before.o, i, p.d_v), *o2 = row(after.o, i, p.d_v);
      EXPECT_LE(variation(w, w2, p.keys), std::tanh(eps / 2) + kRounding) << "T1, row " << i << ", eps " << eps;
      const double shift = distance(o, o2, p.d_v);
      EXPECT_LE(shift, std::tanh(eps / 2) * diam + kRounding) << "T2, row " << i << ", eps " << eps;
      EXPECT_LE(shift, std::sinh(eps) * spread(p, w, o) + kRounding) << "T3, row " << i << ", eps " << eps;
      EXPECT_LE(shift, std::sinh(eps) * spread(p, w2, o2) + kRounding) << "T3 after, row " << i << ", eps " << eps;
    }
  }
}

TEST(Bounds, TwoKeysReachTheBoundsOnWeightsAndOutputs) {
  for (const double eps : {0.01, 0.3, 1.0, 3.0}) {
    Problem p;
    p.rows = 1;
    p.keys = 2;
    p.q.assign(static_cast<size_t>(p.d), 0.0f);
    p.k.assign(static_cast<size_t>(2 * p.d), 0.0f);
    p.v.assign(static_cast<size_t>(2 * p.d_v), 1.0f);
    std::fill_n(p.v.begin(), p.d_v, -2.0f);
    p.bias = {static_cast<float>(-eps), 0};
    const Outcome before = attend(p);
    const std::vector<float> weight = weights(p);
    p.bias[0] = static_cast<float>(eps);
    const Outcome after = attend(p);
    const std::vector<float> moved = weights(p);
    EXPECT_NEAR(variation(weight.data(), moved.data(), 2), std::tanh(eps / 2), 1e-6);
    EXPECT_NEAR(distance(before.o.data(), after.o.data(), p.d_v), std::tanh(eps / 2) * diameter(p), 2e-5);
  }
}

// T4: keys in tiles of mass mu_b, perturbed by eps_b around a shift that all tiles of the row share:
// TV <= sum mu_b (e^eps_b - 1) / sum mu_b e^-eps_b.
TEST(Bounds, LightTilesMayBePerturbedMoreThanHeavyOnes) {
  Random random(run_seed());
  constexpr int64_t kTile = 8, kTiles = kKeys / kTile;
  for (int64_t trial = 0; trial < kTrials; ++trial) {
    Problem p = random_problem(random, 2);
    const std::vector<float> weight = weights(p);
    double eps[kTiles];
    for (double& e : eps) e = 0.003 * std::pow(300.0, random.uniform());
    p.bias.resize(static_cast<size_t>(p.rows * p.keys));
    for (int64_t i = 0; i < p.rows; ++i) {
      const double shift = random.normal();
      for (int64_t j = 0; j < p.keys; ++j)
        p.bias[static_cast<size_t>(i * p.keys + j)] =
            static_cast<float>(shift + eps[j / kTile] * (2 * random.uniform() - 1));
    }
    const std::vector<float> moved = weights(p);
    for (int64_t i = 0; i < p.rows; ++i) {
      double above = 0, below = 0;
      for (int64_t j = 0; j < p.keys; ++j) {
        const double mass = row(weight, i, p.keys)[j];
        above += mass * std::expm1(eps[j / kTile]);
        below += mass * std::exp(-eps[j / kTile]);
      }
      EXPECT_LE(variation(row(weight, i, p.keys), row(moved, i, p.keys), p.keys), above / below + kRounding) << i;
    }
  }
}

// T7: l <= N_eff <= e^H, l the denominator relative to the largest score, N_eff = 1 / sum p^2.
TEST(Bounds, DenominatorAndEntropyEncloseTheEffectiveNumberOfKeys) {
  Random random(run_seed());
  for (int64_t trial = 0; trial < kTrials; ++trial) {
    const Problem p = random_problem(random, 0.1 * std::exp2(random.uniform() * 7));
    const Outcome out = attend(p);
    const std::vector<float> weight = weights(p);
    for (int64_t i = 0; i < p.rows; ++i) {
      double squares = 0, largest = -HUGE_VAL;
      for (int64_t j = 0; j < p.keys; ++j) {
        squares += std::pow(static_cast<double>(row(weight, i, p.keys)[j]), 2);
        double score = 0;
        for (int64_t c = 0; c < p.d; ++c) score += static_cast<double>(row(p.q, i, p.d)[c]) * row(p.k, j, p.d)[c];
        largest = std::max(largest, score / std::sqrt(static_cast<double>(p.d)));
      }
      const double effective = 1 / squares, at = static_cast<double>(i);
      EXPECT_LE(std::exp(out.lse[static_cast<size_t>(i)] - largest), effective * (1 + 1e-4)) << "row " << at;
      EXPECT_LE(effective, std::exp(static_cast<double>(out.entropy[static_cast<size_t>(i)])) * (1 + 1e-4))
          << "row " << at;
    }
  }
}

// To the nearest bf16, ties to even.
float to_bf16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  u = (u + 0x7fff + (u >> 16 & 1)) & 0xffff0000u;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

// Rounds in place; the mean square of the relative error.
double round_all(std::vector<float>& x) {
  double error = 0, all = 0;
  for (float& value : x) {
    const double exact = value;
    value = to_bf16(value);
    error += std::pow(value - exact, 2);
    all += exact * exact;
  }
  return error / all;
}

double squared_shift(const Outcome& a, const Outcome& b) {
  double sum = 0;
  for (size_t i = 0; i < a.o.size(); ++i) sum += std::pow(static_cast<double>(a.o[i]) - b.o[i], 2);
  return sum;
}

// T6: roundings that are independent over keys average out as sum p^2; that of Q is shared by all keys of a row and
// acts through the covariance of v with each dimension of k.
TEST(Bounds, RoundingErrorsAreThoseOfTheModel) {
  Random random(run_seed());
  double shift_v = 0, shift_k = 0, shift_q = 0, model_v = 0, model_k = 0, model_q = 0;
  for (int64_t trial = 0; trial < kTrials; ++trial) {
    const Problem p = random_problem(random, 1.5);
    const Outcome exact = attend(p);
    const std::vector<float> weight = weights(p);
    Problem v = p, k = p, q = p;
    const double u_v = round_all(v.v), u_k = round_all(k.k), u_q = round_all(q.q);
    shift_v += squared_shift(exact, attend(v));
    shift_k += squared_shift(exact, attend(k));
    shift_q += squared_shift(exact, attend(q));
    for (int64_t i = 0; i < p.rows; ++i) {
      const float *w = row(weight, i, p.keys), *o = row(exact.o, i, p.d_v);
      double of_v = 0, of_k = 0;
      for (int64_t j = 0; j < p.keys; ++j) {
        double norm = 0, score_error = 0;
        for (int64_t c = 0; c < p.d_v; ++c) norm += std::pow(static_cast<double>(p.value(j, c)), 2);
        for (int64_t c = 0; c < p.d; ++c)
          score_error += std::pow(static_cast<double>(row(p.q, i, p.d)[c]) * row(p.k, j, p.d)[c], 2);
        const double square = static_cast<double>(w[j]) * w[j];
        of_v += square * norm;
        of_k += square * score_error * std::pow(distance(row(p.v, j, p.d_v), o, p.d_v), 2);
      }
      model_v += u_v * of_v;
      model_k += u_k * of_k / static_cast<double>(p.d);
      for (int64_t dim = 0; dim < p.d; ++dim) {
        double covariance = 0;
        for (int64_t c = 0; c < p.d_v; ++c) {
          double both = 0;
          for (int64_t j = 0; j < p.keys; ++j) {
            const double key = row(p.k, j, p.d)[dim];
            both += w[j] * key * (p.value(j, c) - o[c]);
          }
          covariance += both * both;
        }
        model_q +=
            u_q / static_cast<double>(p.d) * std::pow(static_cast<double>(row(p.q, i, p.d)[dim]), 2) * covariance;
      }
    }
  }
  EXPECT_NEAR(shift_v / model_v, 1, 0.15);
  EXPECT_NEAR(shift_k / model_k, 1, 0.15);
  EXPECT_NEAR(shift_q / model_q, 1, 0.15);
}

// T8: projecting V - mean on any basis moves a row by at most the mean residual of its weights, and so by at most the
// largest residual.
TEST(Bounds, ProjectedValuesMoveOutputsByTheirResidualsAtMost) {
  Random random(run_seed());
  const Context context;
  constexpr int64_t kRank = 8;
  for (int64_t trial = 0; trial < kTrials; ++trial) {
    Problem p = random_problem(random, 2);
    for (int64_t j = 0; j < p.keys; ++j) {
      for (int64_t c = 0; c < p.d_v; ++c)
        p.v[static_cast<size_t>(j * p.d_v + c)] =
            static_cast<float>(3 + p.value(j, c) * (c < kRank ? 2 : 0.3 * random.uniform()));
    }
    std::vector<float> mean(static_cast<size_t>(p.d_v));
    for (int64_t c = 0; c < p.d_v; ++c) {
      for (int64_t j = 0; j < p.keys; ++j) mean[static_cast<size_t>(c)] += p.value(j, c) / static_cast<float>(p.keys);
    }
    // A good basis, from V - mean, and every other time one that has nothing to do with it.
    std::vector<float> source = trial % 2 == 0 ? p.v : normals(random, p.keys * p.d_v);
    for (int64_t j = 0; trial % 2 == 0 && j < p.keys; ++j) {
      for (int64_t c = 0; c < p.d_v; ++c) source[static_cast<size_t>(j * p.d_v + c)] -= mean[static_cast<size_t>(c)];
    }
    std::vector<float> values(kRank), basis(static_cast<size_t>(p.d_v * kRank));
    std::vector<float> y(static_cast<size_t>(p.keys * kRank)), residual(static_cast<size_t>(p.keys));
    adaattn_tensor_t source_t, values_t, basis_t, v_t, mean_t, y_t, residual_t;
    set_view(&source_t, source, {p.keys, p.d_v});
    set_view(&values_t, values, {kRank});
    set_view(&basis_t, basis, {p.d_v, kRank});
    set_view(&v_t, p.v, {p.keys, p.d_v});
    set_view(&mean_t, mean, {p.d_v});
    set_view(&y_t, y, {p.keys, kRank});
    set_view(&residual_t, residual, {p.keys});
    adaattn_low_rank_desc_t desc;
    adaattn_low_rank_desc_init(&desc, sizeof desc);
    desc.rows = p.keys;
    desc.cols = p.d_v;
    desc.rank = kRank;
    ASSERT_TRUE(succeeded(
        adaattn_low_rank(context.get(), &desc, &source_t, nullptr, &values_t, &basis_t, nullptr, 0, nullptr)));
    ASSERT_TRUE(succeeded(
        adaattn_low_rank_project(context.get(), &v_t, &basis_t, &mean_t, &y_t, &residual_t, nullptr, nullptr)));
    const Outcome exact = attend(p);
    const std::vector<float> weight = weights(p);
    double largest = 0;
    for (int64_t j = 0; j < p.keys; ++j) {
      largest = std::max<double>(largest, residual[static_cast<size_t>(j)]);
      for (int64_t c = 0; c < p.d_v; ++c) {
        double x = mean[static_cast<size_t>(c)];
        for (int64_t r = 0; r < kRank; ++r)
          x += static_cast<double>(y[static_cast<size_t>(j * kRank + r)]) * basis[static_cast<size_t>(c * kRank + r)];
        p.v[static_cast<size_t>(j * p.d_v + c)] = static_cast<float>(x);
      }
    }
    const Outcome projected = attend(p);
    for (int64_t i = 0; i < p.rows; ++i) {
      double mean_residual = 0;
      for (int64_t j = 0; j < p.keys; ++j)
        mean_residual += static_cast<double>(row(weight, i, p.keys)[j]) * residual[static_cast<size_t>(j)];
      const double shift = distance(row(exact.o, i, p.d_v), row(projected.o, i, p.d_v), p.d_v);
      EXPECT_LE(shift, mean_residual + kRounding) << "row " << i;
      EXPECT_LE(mean_residual, largest + kRounding) << "row " << i;
    }
  }
}

}  // namespace
}  // namespace adaattn::test
