// The tools on the CPU: entropy against attention over the same scores, decompositions against the time that their
// large products alone would take at the measured peak.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "attention_call.h"
#include "cpu_ceilings.h"
#include "harness.h"
#include "reference/head.h"
#include "reference/linalg.h"
#include "shapes.h"

namespace adaattn::bench {
namespace {

struct Context {
  adaattn_context_t* handle = nullptr;
  explicit Context(int threads) {
    adaattn_config_t config;
    check(adaattn_config_init(&config, sizeof config));
    config.num_threads = threads;
    check(adaattn_create(&config, &handle));
  }
  ~Context() { adaattn_destroy(handle); }
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
};

struct FloatTensor {
  std::vector<float> data;
  std::vector<int64_t> shape;
  explicit FloatTensor(std::vector<int64_t> extents) : shape(std::move(extents)) {
    int64_t elements = 1;
    for (int64_t n : shape) elements *= n;
    data.resize(static_cast<size_t>(elements));
  }
  void fill_normal(uint64_t seed) {
    std::mt19937_64 engine(seed);
    std::normal_distribution<float> normal;
    for (float& x : data) x = normal(engine);
  }
  adaattn_tensor_t view() {
    adaattn_tensor_t t;
    check(adaattn_tensor_init(&t, data.data(), ADAATTN_DTYPE_F32, ADAATTN_DEVICE_CPU, 0,
                              static_cast<int32_t>(shape.size()), shape.data(), nullptr));
    return t;
  }
};

std::string suffix(int threads) { return "/t" + std::to_string(threads); }

double fma_peak(const Report& report, int threads) {
  return report.ceiling("fma_f32_gflops_" + std::to_string(threads) + "t");
}

// Largest relative difference from the oracle over a few rows of the first head.
double entropy_error(const Shape& shape, const FloatTensor& q, const FloatTensor& k, const FloatTensor& entropy) {
  double worst = 0;
  const int64_t d = shape.head_dim;
  for (int64_t i : {shape.seqlen_q / 3, shape.seqlen_q - 1}) {
    reference::Head head;
    head.q = reference::Matrix(1, d);
    head.k = reference::Matrix(shape.seqlen_k, d);
    head.v = reference::Matrix(shape.seqlen_k, 1);
    for (int64_t c = 0; c < d; ++c) head.q(0, c) = q.data[static_cast<size_t>(i * shape.heads_q * d + c)];
    for (int64_t j = 0; j < shape.seqlen_k; ++j)
      for (int64_t c = 0; c < d; ++c) head.k(j, c) = k.data[static_cast<size_t>(j * shape.heads_kv * d + c)];
    head.scale = 1 / std::sqrt(static_cast<double>(d));
    head.causal = shape.mask != ADAATTN_MASK_NONE;
    head.off = i + shape.seqlen_k - shape.seqlen_q;
    const double expected = reference::attend(head).entropy[0];
    worst = std::max(worst, std::abs(entropy.data[static_cast<size_t>(i)] - expected) / expected);
  }
  return worst;
}

void entropy(Report& report, const Shape& shape, int threads) {
  const std::string tail = shape_name(shape, "f32") + suffix(threads);
  if (!report.wants("entropy-exact/" + tail) && !report.wants("entropy-sampled/" + tail)) return;
  const Context context(threads);
  CpuCall attention(context.handle, shape, ADAATTN_DTYPE_F32);
  const Timing attention_time = measure([&] { attention.run(); });

  FloatTensor q({shape.batch, shape.seqlen_q, shape.heads_q, shape.head_dim});
  FloatTensor k({shape.batch, shape.seqlen_k, shape.heads_kv, shape.head_dim});
  FloatTensor rows({shape.batch, shape.heads_q, shape.seqlen_q}), heads({shape.batch, shape.heads_q});
  q.fill_normal(1);
  k.fill_normal(2);
  const adaattn_attn_desc_t desc = desc_of(shape, ADAATTN_DTYPE_F32);
  adaattn_io_t io;
  check(adaattn_io_init(&io, sizeof io));
  io.q = q.view();
  io.k = k.view();
  const adaattn_tensor_t means = heads.view();
  adaattn_entropy_desc_t settings;
  check(adaattn_entropy_desc_init(&settings, sizeof settings));
  size_t bytes = 0;
  check(adaattn_entropy_workspace_size(context.handle, &desc, &settings, &bytes));
  std::vector<char> workspace(bytes);
  const auto run = [&] {
    check(adaattn_entropy(context.handle, &desc, &settings, &io, &means, workspace.data(), workspace.size(), nullptr));
  };

  Row row;
  row.name = "entropy-exact/" + tail;
  io.entropy = rows.view();
  row.time = measure(run);
  row.rate = attention.flops() / 2 / row.time.us * 1e-3;
  row.unit = "GFLOP/s";
  row.error = entropy_error(shape, q, k, rows);
  row.peer = "own-exact-attention";
  row.peer_us = attention_time.us;
  report.add(row);

  const std::vector<float> exact = heads.data;
  const double exact_us = row.time.us;
  io.entropy = adaattn_tensor_t{};
  settings.mode = ADAATTN_ENTROPY_SAMPLED;
  row = {};
  row.name = "entropy-sampled/" + tail;
  row.time = measure(run);
  for (size_t h = 0; h < exact.size(); ++h)
    row.error = std::max<double>(row.error, std::abs(heads.data[h] - exact[h]) / exact[h]);
  row.rate = static_cast<double>(settings.sample_rows * shape.batch * shape.heads_q) / row.time.us * 1e3;
  row.unit = "krow/s";
  row.peer = "own-exact-entropy";
  row.peer_us = exact_us;
  report.add(row);
}

// A decaying spectrum with a known optimum: sigma_i = decay^i on random orthonormal vectors.
struct Spectrum {
  FloatTensor a;
  std::vector<double> sigma;
  Spectrum(int64_t batch, int64_t m, int64_t n) : a({batch, m, n}) {
    constexpr int64_t kTerms = 96;  // of the spectrum that is not noise
    std::mt19937_64 engine(7);
    std::normal_distribution<double> normal;
    const auto orthonormal = [&](int64_t rows) {
      reference::Matrix q(rows, kTerms);
      for (double& x : q.data) x = normal(engine);
      for (int64_t j = 0; j < kTerms; ++j) {
        double energy = 0;
        for (int64_t i = 0; i < j; ++i) {
          double dot = 0;
          for (int64_t r = 0; r < rows; ++r) dot += q(r, i) * q(r, j);
          for (int64_t r = 0; r < rows; ++r) q(r, j) -= dot * q(r, i);
        }
        for (int64_t r = 0; r < rows; ++r) energy += q(r, j) * q(r, j);
        for (int64_t r = 0; r < rows; ++r) q(r, j) /= std::sqrt(energy);
      }
      return q;
    };
    reference::Matrix u = orthonormal(m);
    const reference::Matrix v = orthonormal(n);
    for (int64_t j = 0; j < kTerms; ++j) {
      sigma.push_back(100 * std::pow(0.95, static_cast<double>(j)));
      for (int64_t i = 0; i < m; ++i) u(i, j) *= sigma.back();
    }
    const reference::Matrix one = reference::multiply(u, reference::transpose(v));
    for (int64_t b = 0; b < batch; ++b)
      for (size_t i = 0; i < one.data.size(); ++i)
        a.data[static_cast<size_t>(b) * one.data.size() + i] = static_cast<float>(one.data[i]);
  }
};

// How far the residual of the first matrix is above the best possible one, relatively.
double excess(const Spectrum& input, const FloatTensor& u, const FloatTensor& s, const FloatTensor& v) {
  const int64_t m = input.a.shape[1], n = input.a.shape[2], r = s.shape[1];
  double lost = 0;
  std::vector<double> row(static_cast<size_t>(n));
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) row[static_cast<size_t>(j)] = input.a.data[static_cast<size_t>(i * n + j)];
    for (int64_t c = 0; c < r; ++c) {
      const double weight =
          static_cast<double>(u.data[static_cast<size_t>(i * r + c)]) * s.data[static_cast<size_t>(c)];
      for (int64_t j = 0; j < n; ++j) row[static_cast<size_t>(j)] -= weight * v.data[static_cast<size_t>(j * r + c)];
    }
    for (double x : row) lost += x * x;
  }
  return std::sqrt(lost) / reference::optimal_residual(input.sigma, r) - 1;
}

void decompose(Report& report, int64_t batch, int64_t m, int64_t n, int64_t r, int threads) {
  const std::string name = "low-rank/f32/b" + std::to_string(batch) + "/m" + std::to_string(m) + "n" +
                           std::to_string(n) + "r" + std::to_string(r) + suffix(threads);
  if (!report.wants(name)) return;
  const Context context(threads);
  Spectrum input(batch, m, n);
  FloatTensor u({batch, m, r}), s({batch, r}), v({batch, n, r});
  adaattn_low_rank_desc_t desc;
  check(adaattn_low_rank_desc_init(&desc, sizeof desc));
  desc.batch = batch;
  desc.rows = m;
  desc.cols = n;
  desc.rank = r;
  size_t bytes = 0;
  check(adaattn_low_rank_workspace_size(context.handle, &desc, &bytes));
  std::vector<char> workspace(bytes);
  const adaattn_tensor_t a = input.a.view(), left = u.view(), values = s.view(), right = v.view();
  Row row;
  row.name = name;
  row.time = measure([&] {
    check(adaattn_low_rank(context.handle, &desc, &a, &left, &values, &right, workspace.data(), workspace.size(),
                           nullptr));
  });
  const double products = static_cast<double>(2 * desc.power_iterations + 2);
  const double flops = 2 * products * static_cast<double>(batch * m * n * (r + desc.oversampling));
  row.rate = flops / row.time.us * 1e-3;
  row.unit = "GFLOP/s";
  row.error = excess(input, u, s, v);
  row.peer = "products-at-fma-f32-peak";
  row.peer_us = flops / fma_peak(report, threads) * 1e-3;
  report.add(row);
}

}  // namespace

void run_cpu_tools(Report& report) {
  adaattn_device_info_t info;
  info.struct_size = sizeof info;
  check(adaattn_device_info(ADAATTN_DEVICE_CPU, 0, &info));
  report.set_device(std::string(info.name) + " (" + info.isa + ")");
  const int most = std::min(info.compute_units, 2);
  for (int threads = 1; threads <= most; ++threads)
    report.add_ceiling("fma_f32_gflops_" + std::to_string(threads) + "t", fma_gflops(threads));
  for (int threads = 1; threads <= most; ++threads) {
    entropy(report, {1, 2, 2, 8192, 8192, 128, ADAATTN_MASK_CAUSAL}, threads);
    decompose(report, 1, 4096, 512, 32, threads);   // iterations on the matrix
    decompose(report, 32, 1024, 128, 64, threads);  // on Gram matrices, one per head
  }
}

}  // namespace adaattn::bench
