// The tools on a CUDA device against float64.
#include <cmath>

#include "attention/fixture.h"
#include "core/sampling.h"
#include "gpu/device.h"
#include "reference/linalg.h"

namespace adaattn::test {
namespace {

using reference::Matrix;

class DeviceTools : public OnTheDevice {};

Tensor on_device(const Tensor& t) {
  t.upload(kDevice, 0);
  return t;
}
adaattn_tensor_t view(const Tensor& t) { return t.on(kDevice, 0); }

// ---- Entropy

struct Entropies {
  std::vector<double> rows, heads;
};

Entropies entropies(const Context& context, AttentionData& data, int32_t mode, int32_t normalized, int64_t sample_rows,
                    uint64_t seed) {
  adaattn_entropy_desc_t desc;
  adaattn_entropy_desc_init(&desc, sizeof desc);
  desc.mode = mode;
  desc.normalized = normalized;
  desc.sample_rows = sample_rows;
  desc.seed = seed;
  data.poison_outputs();
  data.upload(kDevice);
  adaattn_io_t io = data.io(kDevice);
  io.v = io.o = io.lse = adaattn_tensor_t{};
  if (mode == ADAATTN_ENTROPY_SAMPLED) io.entropy = adaattn_tensor_t{};
  Tensor heads(ADAATTN_DTYPE_F32, {data.batch(), data.desc.heads_q});
  heads.fill(std::nan(""));
  heads.upload(kDevice, 0);
  adaattn_attn_desc_t attn = data.desc;
  attn.outputs = 0;
  const adaattn_tensor_t head_view = view(heads);
  EXPECT_TRUE(succeeded(adaattn_entropy(context.get(), &attn, &desc, &io, &head_view, nullptr, 0, nullptr)));
  data.download(kDevice);
  heads.download(kDevice, 0);
  return {data.entropy.values(), heads.values()};
}

TEST_F(DeviceTools, EntropyOfEveryCaseOfTheTable) {
  const Context context(kCuda);
  int compared = 0;
  for (const AttentionCase& c : attention_cases()) {
    if (!c.reduced || c.d_qk > 256) continue;
    for (const Dtypes& dtypes : uniform_dtypes()) {
      SCOPED_TRACE(describe(c) + " " + dtypes.name);
      AttentionData data(c, dtypes, run_seed());
      const auto expected = reference::attention(data.desc, data.io());
      for (const int32_t normalized : {0, 1}) {
        const Entropies out = entropies(context, data, ADAATTN_ENTROPY_EXACT, normalized, 256, 0);
        ASSERT_EQ(out.rows.size(), expected.entropy.size());
        for (size_t i = 0; i < out.rows.size(); ++i) {
          double want = expected.entropy[i];
          ASSERT_EQ(std::isnan(out.rows[i]), std::isnan(want)) << i;
          if (std::isnan(want)) continue;
          if (normalized != 0) want = expected.keys[i] < 2 ? 0 : want / std::log(expected.keys[i]);
          ASSERT_NEAR(out.rows[i], want, 1e-4 * std::max(1.0, c.input_scale * want)) << i;
        }
        ++compared;
      }
    }
  }
  EXPECT_GT(compared, 30);
}

TEST_F(DeviceTools, SampledEntropyIsTheMeanOfTheDrawnRows) {
  AttentionCase c = {.name = "Sampled", .batch = 2, .heads_q = 6, .heads_kv = 2, .seqlen_q = 300, .seqlen_k = 420};
  c.d_qk = 40;
  c.mask = ADAATTN_MASK_CAUSAL;
  const Context context(kCuda);
  for (const Dtypes& dtypes : uniform_dtypes()) {
    AttentionData data(c, dtypes, run_seed());
    const std::vector<double> exact = entropies(context, data, ADAATTN_ENTROPY_EXACT, 0, 256, 0).rows;
    for (const int64_t rows : {1, 17, 64, 299, 300, 1000}) {
      const Entropies out = entropies(context, data, ADAATTN_ENTROPY_SAMPLED, 0, rows, 11);
      const int64_t strata = number_of_strata(rows, 300);
      for (int64_t b = 0; b < 2; ++b)
        for (int64_t h = 0; h < 6; ++h) {
          double mean = 0;
          for (int64_t s = 0; s < strata; ++s)
            mean += exact[static_cast<size_t>((b * 6 + h) * 300 + sampled_row(11, b, h, 6, s, strata, 300))];
          EXPECT_NEAR(out.heads[static_cast<size_t>(b * 6 + h)], mean / static_cast<double>(strata), 1e-5);
        }
    }
  }
}

// ---- Matrices

Matrix random_matrix(Random& random, int64_t rows, int64_t cols) {
  Matrix m(rows, cols);
  for (double& x : m.data) x = static_cast<float>(random.normal());
  return m;
}

// Decaying spectrum, rounded to f32.
Matrix decaying(Random& random, int64_t rows, int64_t cols, double ratio) {
  reference::Svd f = reference::svd(random_matrix(random, rows, cols));
  for (size_t i = 0; i < f.sigma.size(); ++i)
    for (int64_t r = 0; r < rows; ++r) f.u(r, static_cast<int64_t>(i)) *= 10 * std::pow(ratio, static_cast<double>(i));
  Matrix m = reference::multiply(f.u, reference::transpose(f.v));
  for (double& x : m.data) x = static_cast<float>(x);
  return m;
}

Tensor tensor_of(const std::vector<Matrix>& batch) {
  Tensor t(ADAATTN_DTYPE_F32, {static_cast<int64_t>(batch.size()), batch[0].rows, batch[0].cols});
  t.for_each([&](const std::vector<int64_t>& i, int64_t) { t.set(i, batch[static_cast<size_t>(i[0])](i[1], i[2])); });
  return on_device(t);
}

Tensor poisoned(std::vector<int64_t> shape, adaattn_dtype_t dtype = ADAATTN_DTYPE_F32) {
  Tensor t(dtype, std::move(shape));
  if (dtype == ADAATTN_DTYPE_F32) t.fill(std::nan(""));
  return on_device(t);
}

Matrix matrix_of(const Tensor& t, int64_t index, int64_t rows, int64_t cols) {
  Matrix m(rows, cols);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) m(r, c) = t.get({index, r, c});
  return m;
}

TEST_F(DeviceTools, LowRankIsWithinOnePercentOfTheBest) {
  Random random(run_seed());
  const Context context(kCuda);
  struct Size {
    int64_t rows, cols, rank;
    double ratio;
  };
  for (const Size& z :
       {Size{40, 12, 5, 0.7}, Size{300, 128, 32, 0.95}, Size{30, 200, 7, 0.9}, Size{64, 64, 64, 0.9}, Size{5, 1, 1, 1},
        Size{100, 30, 12, 0.02}, Size{400, 300, 12, 0.9}, Size{300, 400, 12, 0.9}, Size{290, 270, 260, 0.97}}) {
    SCOPED_TRACE(std::to_string(z.rows) + " x " + std::to_string(z.cols) + ", rank " + std::to_string(z.rank));
    std::vector<Matrix> batch;
    for (int i = 0; i < 3; ++i) batch.push_back(decaying(random, z.rows, z.cols, z.ratio));
    const Tensor a = tensor_of(batch);
    const Tensor u = poisoned({3, z.rows, z.rank}), s = poisoned({3, z.rank}), v = poisoned({3, z.cols, z.rank});
    adaattn_low_rank_desc_t desc;
    adaattn_low_rank_desc_init(&desc, sizeof desc);
    desc.batch = 3;
    desc.rows = z.rows;
    desc.cols = z.cols;
    desc.rank = z.rank;
    const adaattn_tensor_t av = view(a), uv = view(u), sv = view(s), vv = view(v);
    ASSERT_TRUE(succeeded(adaattn_low_rank(context.get(), &desc, &av, &uv, &sv, &vv, nullptr, 0, nullptr)));
    for (const Tensor* t : {&u, &s, &v}) t->download(kDevice, 0);
    for (int64_t i = 0; i < 3; ++i) {
      const Matrix& m = batch[static_cast<size_t>(i)];
      const reference::Svd best = reference::svd(m);
      const Matrix um = matrix_of(u, i, z.rows, z.rank), vm = matrix_of(v, i, z.cols, z.rank);
      std::vector<double> sigma;
      for (int64_t j = 0; j < z.rank; ++j) sigma.push_back(s.get({i, j}));
      // A projection cannot raise a singular value; the iteration finds the last ones to a per cent.
      for (size_t j = 0; j < sigma.size(); ++j) {
        EXPECT_LE(sigma[j], best.sigma[j] + 2e-6 * best.sigma[0]) << j;
        EXPECT_GE(sigma[j], 0.99 * best.sigma[j] - 2e-6 * best.sigma[0]) << j;
      }
      EXPECT_LT(reference::orthogonality_error(um), 5e-6);
      EXPECT_LT(reference::orthogonality_error(vm), 5e-6);
      EXPECT_LE(reference::reconstruction_error(m, um, sigma, vm),
                1.01 * reference::optimal_residual(best.sigma, z.rank) + 1e-6 * best.sigma[0]);
    }
  }
}

TEST_F(DeviceTools, EffectiveRankCountsTheEnergy) {
  Random random(run_seed());
  const Context context(kCuda);
  for (const auto& [rows, cols] :
       {std::pair<int64_t, int64_t>{50, 20}, {20, 50}, {300, 128}, {256, 256}, {270, 300}, {1, 9}}) {
    std::vector<Matrix> batch = {decaying(random, rows, cols, 0.8), Matrix(rows, cols),
                                 random_matrix(random, rows, cols)};
    const Tensor a = tensor_of(batch);
    const int64_t p = std::min(rows, cols);
    const Tensor ranks = poisoned({3}, ADAATTN_DTYPE_I32), values = poisoned({3, p});
    const adaattn_tensor_t av = view(a), rv = view(ranks), sv = view(values);
    for (const double threshold : {0.5, 0.9, 0.99}) {
      ASSERT_TRUE(succeeded(adaattn_effective_rank(context.get(), &av, threshold, &rv, &sv, nullptr, 0, nullptr)));
      ranks.download(kDevice, 0);
      values.download(kDevice, 0);
      for (int64_t i = 0; i < 3; ++i) {
        const std::vector<double> sigma = reference::svd(batch[static_cast<size_t>(i)]).sigma;
        EXPECT_EQ(ranks.get({i}), static_cast<double>(reference::effective_rank(sigma, threshold)))
            << rows << " x " << cols << " matrix " << i << " threshold " << threshold;
        for (int64_t j = 0; j < p; ++j)
          EXPECT_NEAR(values.get({i, j}), sigma[static_cast<size_t>(j)], 2e-6 * sigma[0]) << j;
      }
    }
  }
}

TEST_F(DeviceTools, SpectralNormIsTheLargestSingularValue) {
  Random random(run_seed());
  const Context context(kCuda);
  for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{70, 30}, {30, 70}, {1, 5}, {600, 3}}) {
    const std::vector<Matrix> batch = {decaying(random, rows, cols, 0.7), Matrix(rows, cols)};
    const Tensor a = tensor_of(batch);
    const Tensor norms = poisoned({2});
    const adaattn_tensor_t av = view(a), nv = view(norms);
    ASSERT_TRUE(succeeded(adaattn_spectral_norm(context.get(), &av, 1e-9, 0, 3, &nv, nullptr, 0, nullptr)));
    norms.download(kDevice, 0);
    EXPECT_NEAR(norms.get({0}) / reference::svd(batch[0]).sigma[0], 1, 1e-6);
    EXPECT_EQ(norms.get({1}), 0);
  }
}

void project(const Context& context, Random& random, int64_t rows, int64_t cols, int64_t rank) {
  SCOPED_TRACE(std::to_string(rows) + " x " + std::to_string(cols) + ", rank " + std::to_string(rank));
  const std::vector<Matrix> batch = {random_matrix(random, rows, cols), random_matrix(random, rows, cols)};
  const Matrix basis = reference::svd(random_matrix(random, cols, rank)).u;
  const Tensor a = tensor_of(batch), b = tensor_of({basis, basis});
  Tensor mean(ADAATTN_DTYPE_F32, {2, cols});
  mean.fill(0.25);
  mean.upload(kDevice, 0);
  const Tensor y = poisoned({2, rows, rank}), row = poisoned({2, rows}), whole = poisoned({2});
  const adaattn_tensor_t av = view(a), bv = view(b), mv = view(mean), yv = view(y), rv = view(row), wv = view(whole);
  ASSERT_TRUE(succeeded(adaattn_low_rank_project(context.get(), &av, &bv, &mv, &yv, &rv, &wv, nullptr)));
  for (const Tensor* t : {&y, &row, &whole}) t->download(kDevice, 0);
  for (int64_t i = 0; i < 2; ++i) {
    double lost = 0, all = 0;
    for (int64_t r = 0; r < rows; ++r) {
      double rest = 0;
      std::vector<double> x(static_cast<size_t>(cols)), want(static_cast<size_t>(rank));
      for (int64_t c = 0; c < cols; ++c) x[static_cast<size_t>(c)] = batch[static_cast<size_t>(i)](r, c) - 0.25;
      for (int64_t k = 0; k < rank; ++k) {
        for (int64_t c = 0; c < cols; ++c) want[static_cast<size_t>(k)] += x[static_cast<size_t>(c)] * b.get({i, c, k});
        EXPECT_NEAR(y.get({i, r, k}), want[static_cast<size_t>(k)], 1e-5);
      }
      for (int64_t c = 0; c < cols; ++c) {
        double e = x[static_cast<size_t>(c)];
        for (int64_t k = 0; k < rank; ++k) e -= want[static_cast<size_t>(k)] * b.get({i, c, k});
        rest += e * e;
        all += x[static_cast<size_t>(c)] * x[static_cast<size_t>(c)];
      }
      EXPECT_NEAR(row.get({i, r}), std::sqrt(rest), 1e-5);
      lost += rest;
    }
    EXPECT_NEAR(whole.get({i}), std::sqrt(lost / all), 1e-6);
  }
}

TEST_F(DeviceTools, ProjectionMeasuresWhatItLoses) {
  Random random(run_seed());
  const Context context(kCuda);
  struct Size {
    int64_t rows, cols, rank;
  };
  // Tensor cores from 64 rows on, up to rank 32 and 64; the others an element at a time.
  for (const Size& z : {Size{77, 40, 9}, Size{64, 7, 1}, Size{1000, 130, 33}, Size{200, 96, 64}, Size{20, 40, 9},
                        Size{150, 90, 70}, Size{70, 1500, 40}})
    project(context, random, z.rows, z.cols, z.rank);
}

TEST_F(DeviceTools, DependentColumnsOfALargeMatrixLeaveOrthonormalVectors) {
  Random random(run_seed());
  const Context context(kCuda);
  const int64_t rows = 350, cols = 290, rank = 9;
  const Matrix thin = reference::multiply(random_matrix(random, rows, 3), random_matrix(random, 3, cols));
  Matrix spoilt = random_matrix(random, rows, cols);
  spoilt(11, 13) = std::nan("");
  const Tensor a = tensor_of({thin, Matrix(rows, cols), spoilt});
  const Tensor u = poisoned({3, rows, rank}), s = poisoned({3, rank}), v = poisoned({3, cols, rank});
  adaattn_low_rank_desc_t desc;
  adaattn_low_rank_desc_init(&desc, sizeof desc);
  desc.batch = 3;
  desc.rows = rows;
  desc.cols = cols;
  desc.rank = rank;
  const adaattn_tensor_t av = view(a), uv = view(u), sv = view(s), vv = view(v);
  ASSERT_TRUE(succeeded(adaattn_low_rank(context.get(), &desc, &av, &uv, &sv, &vv, nullptr, 0, nullptr)));
  for (const Tensor* t : {&u, &s, &v}) t->download(kDevice, 0);
  const double largest = reference::svd(matrix_of(a, 0, rows, cols)).sigma[0];
  for (int64_t i = 0; i < 2; ++i) {
    EXPECT_LT(reference::orthogonality_error(matrix_of(u, i, rows, rank)), 5e-6);
    EXPECT_LT(reference::orthogonality_error(matrix_of(v, i, cols, rank)), 5e-6);
    for (int64_t j = i == 0 ? 3 : 0; j < rank; ++j) EXPECT_LT(s.get({i, j}), 1e-6 * largest);
  }
  EXPECT_NEAR(s.get({0, 0}), largest, 1e-5 * largest);
  for (int64_t j = 0; j < rank; ++j) {
    EXPECT_TRUE(std::isnan(s.get({2, j})));
    EXPECT_TRUE(std::isnan(u.get({2, 5, j})));
    EXPECT_TRUE(std::isnan(v.get({2, 5, j})));
  }
}

TEST_F(DeviceTools, RanksBeyondTheEigenSolverAreRefused) {
  const Context context(kCuda);
  adaattn_low_rank_desc_t desc;
  adaattn_low_rank_desc_init(&desc, sizeof desc);
  desc.rows = desc.cols = 4000;
  desc.rank = 1100;
  size_t bytes = 0;
  EXPECT_EQ(adaattn_low_rank_workspace_size(context.get(), &desc, &bytes), ADAATTN_ERROR_NOT_SUPPORTED);
  EXPECT_NE(last_error().find("1024"), std::string::npos) << last_error();
}

}  // namespace
}  // namespace adaattn::test
