// The tools on a CUDA device: entropy against attention over the same scores, matrix tools against PyTorch's routines
// (cuBLAS and cuSOLVER).
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <numbers>
#include <string>
#include <vector>

#include "cuda_call.h"
#include "harness.h"
#include "peers.h"
#include "shapes.h"

namespace adaattn::bench {
namespace {

constexpr int64_t kTerms = 96;  // of a spectrum that is not 0
constexpr double kRatio = 0.95;

// Contiguous, in the memory of device 0.
class DeviceTensor {
 public:
  DeviceTensor(adaattn_dtype_t dtype, std::vector<int64_t> shape, uint64_t seed = 0)
      : shape_(std::move(shape)),
        dtype_(dtype),
        buffer_(seed == 0 ? CudaBuffer(bytes()) : CudaBuffer(bytes(), dtype, seed)) {}
  explicit DeviceTensor(std::vector<int64_t> shape) : DeviceTensor(ADAATTN_DTYPE_F32, std::move(shape)) {}
  adaattn_tensor_t view() const {
    adaattn_tensor_t t;
    check(adaattn_tensor_init(&t, buffer_.data(), dtype_, ADAATTN_DEVICE_CUDA, 0, static_cast<int32_t>(shape_.size()),
                              shape_.data(), nullptr));
    return t;
  }
  void write(const std::vector<float>& host, int64_t copies) const {
    for (int64_t i = 0; i < copies; ++i)
      check(cudaMemcpy(static_cast<float*>(buffer_.data()) + i * static_cast<int64_t>(host.size()), host.data(),
                       host.size() * sizeof(float), cudaMemcpyHostToDevice));
  }
  std::vector<float> read(int64_t elements) const {
    std::vector<float> host(static_cast<size_t>(elements));
    check(cudaMemcpy(host.data(), buffer_.data(), host.size() * sizeof(float), cudaMemcpyDeviceToHost));
    return host;
  }

 private:
  size_t bytes() const {
    int64_t elements = dtype_ == ADAATTN_DTYPE_F32 ? 4 : 2;
    for (const int64_t n : shape_) elements *= n;
    return static_cast<size_t>(elements);
  }
  std::vector<int64_t> shape_;
  adaattn_dtype_t dtype_;
  CudaBuffer buffer_;
};

void entropy(Report& report, adaattn_context_t* context, const Shape& shape) {
  const std::string tail = shape_name(shape, "bf16");
  if (!report.wants("entropy-exact/" + tail) && !report.wants("entropy-sampled/" + tail)) return;
  CudaCall attention(context, shape, ADAATTN_DTYPE_BF16, ADAATTN_MATH_EXACT);
  const Timing attention_time = measure_on_device([&](cudaStream_t stream) { attention.run(stream); }, false);

  const DeviceTensor q(ADAATTN_DTYPE_BF16, {shape.batch, shape.seqlen_q, shape.heads_q, shape.head_dim}, 1);
  const DeviceTensor k(ADAATTN_DTYPE_BF16, {shape.batch, shape.seqlen_k, shape.heads_kv, shape.head_dim}, 2);
  const DeviceTensor rows({shape.batch, shape.heads_q, shape.seqlen_q}), heads({shape.batch, shape.heads_q});
  const adaattn_attn_desc_t desc = desc_of(shape, ADAATTN_DTYPE_BF16);
  adaattn_io_t io;
  check(adaattn_io_init(&io, sizeof io));
  io.q = q.view();
  io.k = k.view();
  io.entropy = rows.view();
  const adaattn_tensor_t means = heads.view();
  adaattn_entropy_desc_t settings;
  check(adaattn_entropy_desc_init(&settings, sizeof settings));
  size_t bytes = 0;
  check(adaattn_entropy_workspace_size(context, &desc, &settings, &bytes));
  const CudaBuffer workspace(bytes);
  const auto run = [&](cudaStream_t stream) {
    check(adaattn_entropy(context, &desc, &settings, &io, &means, workspace.data(), workspace.bytes(), stream));
  };
  Row row;
  row.name = "entropy-exact/" + tail;
  row.time = measure_on_device(run, false);
  row.rate = attention.flops() / 2 / row.time.us * 1e-6;
  row.unit = "TFLOP/s";
  row.peer = "own-exact-attention";
  row.peer_us = attention_time.us;
  report.add(row);

  const std::vector<float> exact = heads.read(shape.batch * shape.heads_q);
  const double exact_us = row.time.us;
  io.entropy = adaattn_tensor_t{};
  settings.mode = ADAATTN_ENTROPY_SAMPLED;
  row = {};
  row.name = "entropy-sampled/" + tail;
  row.time = measure_on_device(run, false);
  const std::vector<float> sampled = heads.read(shape.batch * shape.heads_q);
  for (size_t h = 0; h < exact.size(); ++h)
    row.error = std::max<double>(row.error, std::abs(sampled[h] - exact[h]) / exact[h]);
  row.rate = static_cast<double>(settings.sample_rows * shape.batch * shape.heads_q) / row.time.us;
  row.unit = "row/us";
  row.peer = "own-exact-entropy";
  row.peer_us = exact_us;
  report.add(row);
}

enum class Tool { kLowRank, kProject, kSpectralNorm };

struct MatrixCase {
  Tool tool;
  int64_t batch, rows, cols, rank;
  std::string tool_name() const {
    return tool == Tool::kLowRank ? "low-rank" : tool == Tool::kProject ? "project" : "spectral-norm";
  }
  std::string name() const {
    const std::string tail = tool == Tool::kSpectralNorm ? "" : "r" + std::to_string(rank);
    return tool_name() + "/f32/b" + std::to_string(batch) + "/m" + std::to_string(rows) + "n" + std::to_string(cols) +
           tail;
  }
};

double sigma(int64_t i) { return 100 * std::pow(kRatio, static_cast<double>(i)); }

// Singular values sigma(i), singular vectors cosines.
std::vector<float> decaying(int64_t rows, int64_t cols) {
  const int64_t terms = std::min({rows, cols, kTerms});
  const auto cosine = [](int64_t n, int64_t i, int64_t j) {
    const double angle = std::numbers::pi * (static_cast<double>(i) + 0.5) * static_cast<double>(j);
    return std::sqrt((j == 0 ? 1.0 : 2.0) / static_cast<double>(n)) * std::cos(angle / static_cast<double>(n));
  };
  std::vector<float> right(static_cast<size_t>(terms * cols)), a(static_cast<size_t>(rows * cols));
  for (int64_t t = 0; t < terms; ++t)
    for (int64_t c = 0; c < cols; ++c)
      right[static_cast<size_t>(t * cols + c)] = static_cast<float>(sigma(t) * cosine(cols, c, t));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t t = 0; t < terms; ++t) {
      const auto left = static_cast<float>(cosine(rows, r, t));
      float* out = a.data() + r * cols;
      const float* in = right.data() + t * cols;
      for (int64_t c = 0; c < cols; ++c) out[c] += left * in[c];
    }
  return a;
}

class MatrixCall {
 public:
  MatrixCall(adaattn_context_t* context, const MatrixCase& c, const DeviceTensor& matrix)
      : context_(context),
        c_(c),
        a_(matrix),
        left_({c.batch, c.rows, c.rank}),
        values_({c.batch, c.rank}),
        right_({c.batch, c.cols, c.rank}),
        residuals_({c.batch, c.rows}),
        norms_({c.batch}) {
    check(adaattn_low_rank_desc_init(&desc_, sizeof desc_));
    desc_.batch = c.batch;
    desc_.rows = c.rows;
    desc_.cols = c.cols;
    desc_.rank = c.rank;
    size_t bytes = 0;
    const adaattn_tensor_t a = a_.view();
    if (c.tool == Tool::kLowRank) check(adaattn_low_rank_workspace_size(context, &desc_, &bytes));
    if (c.tool == Tool::kSpectralNorm) check(adaattn_spectral_norm_workspace_size(context, &a, &bytes));
    workspace_ = std::make_unique<CudaBuffer>(bytes);
    if (c.tool == Tool::kProject) {  // the leading right vectors
      std::vector<float> basis(static_cast<size_t>(c.cols * c.rank));
      for (int64_t i = 0; i < c.cols; ++i)
        for (int64_t j = 0; j < c.rank; ++j)
          basis[static_cast<size_t>(i * c.rank + j)] =
              static_cast<float>(std::sqrt((j == 0 ? 1.0 : 2.0) / static_cast<double>(c.cols)) *
                                 std::cos(std::numbers::pi * (static_cast<double>(i) + 0.5) * static_cast<double>(j) /
                                          static_cast<double>(c.cols)));
      right_.write(basis, c.batch);
    }
  }

  void run(cudaStream_t stream) const {
    const adaattn_tensor_t a = a_.view(), left = left_.view(), values = values_.view(), right = right_.view();
    const adaattn_tensor_t residuals = residuals_.view(), norms = norms_.view();
    switch (c_.tool) {
      case Tool::kLowRank:
        return check(adaattn_low_rank(context_, &desc_, &a, &left, &values, &right, workspace_->data(),
                                      workspace_->bytes(), stream));
      case Tool::kProject:
        return check(adaattn_low_rank_project(context_, &a, &right, nullptr, &left, &residuals, nullptr, stream));
      case Tool::kSpectralNorm:
        return check(
            adaattn_spectral_norm(context_, &a, 0, 0, 1, &norms, workspace_->data(), workspace_->bytes(), stream));
    }
  }

  // Low rank: what the truncation leaves, relatively above the least possible, or of the norm where that is nothing.
  // Otherwise of the norm, or of the norm of what a projection loses.
  double error() const {
    double tail = 0, all = 0, found = 0;
    const int64_t terms = std::min({c_.rows, c_.cols, kTerms});
    for (int64_t i = terms; i-- > 0;) {
      all += sigma(i) * sigma(i);
      if (i >= c_.rank) tail = all;
    }
    if (c_.tool == Tool::kSpectralNorm) return std::abs(norms_.read(1)[0] / sigma(0) - 1);
    if (c_.tool == Tool::kLowRank) {
      for (const float s : values_.read(c_.rank)) found += static_cast<double>(s) * s;
      if (c_.rank >= terms) return std::abs(std::sqrt(found / all) - 1);
      return std::sqrt(std::max(0.0, all - found) / tail) - 1;
    }
    for (const float r : residuals_.read(c_.rows)) found += static_cast<double>(r) * r;
    return std::abs(std::sqrt(found / tail) - 1);
  }

  // Read of a once, at least.
  double bytes() const { return 4.0 * static_cast<double>(c_.batch * c_.rows * c_.cols); }

 private:
  adaattn_context_t* context_;
  MatrixCase c_;
  const DeviceTensor& a_;
  DeviceTensor left_, values_, right_, residuals_, norms_;
  std::unique_ptr<CudaBuffer> workspace_;
  adaattn_low_rank_desc_t desc_;
};

std::vector<MatrixCase> matrix_cases(const Report& report) {
  constexpr MatrixCase kAll[] = {{Tool::kLowRank, 64, 1024, 128, 32},    {Tool::kLowRank, 64, 1024, 128, 64},
                                 {Tool::kLowRank, 64, 8192, 128, 64},    {Tool::kLowRank, 1, 65536, 256, 64},
                                 {Tool::kLowRank, 1, 65536, 1024, 64},   {Tool::kLowRank, 1, 8192, 8192, 64},
                                 {Tool::kProject, 64, 4096, 128, 64},    {Tool::kSpectralNorm, 64, 1024, 128, 1},
                                 {Tool::kSpectralNorm, 1, 2048, 2048, 1}};
  std::vector<MatrixCase> list;
  for (const MatrixCase& c : kAll)
    if (report.wants(c.name())) list.push_back(c);
  return list;
}

}  // namespace

void run_cuda_tools(Report& report) {
  const CudaContext context(report);
  for (const Shape& shape : {Shape{1, 16, 16, 8192, 8192, 128, ADAATTN_MASK_CAUSAL}, Shape{4, 16, 16, 4096, 4096, 64}})
    entropy(report, context.get(), shape);
  const std::vector<MatrixCase> list = matrix_cases(report);
  adaattn_low_rank_desc_t defaults;
  check(adaattn_low_rank_desc_init(&defaults, sizeof defaults));
  nlohmann::json request = nlohmann::json::array();
  for (const MatrixCase& c : list)
    request.push_back({{"name", c.name()},
                       {"tool", c.tool_name()},
                       {"batch", c.batch},
                       {"rows", c.rows},
                       {"cols", c.cols},
                       {"rank", c.rank},
                       {"oversampling", defaults.oversampling},
                       {"power_iterations", defaults.power_iterations}});
  const nlohmann::json peers = run_peers(ADAATTN_BENCH_TOOL_PEERS, request);
  setenv("ADAATTN_CUDA_LIBRARIES", "off", 1);  // read when a context is made
  const CudaContext own(report);
  unsetenv("ADAATTN_CUDA_LIBRARIES");
  const auto measure = [&](const MatrixCase& c, const DeviceTensor& a, adaattn_context_t* chosen, const char* ending) {
    const MatrixCall call(chosen, c, a);
    Row row;
    row.name = c.name() + ending;
    row.time = measure_on_device([&](cudaStream_t stream) { call.run(stream); }, false, false);
    row.rate = call.bytes() / row.time.us * 1e-3;
    row.unit = "GB/s";
    row.error = call.error();
    if (peers["rows"].contains(c.name()))
      for (const auto& [peer, us] : peers["rows"][c.name()].items()) {
        row.peer = peer;
        row.peer_us = us.get<double>();
      }
    report.add(row);
  };
  for (const MatrixCase& c : list) {
    const DeviceTensor a({c.batch, c.rows, c.cols});
    a.write(decaying(c.rows, c.cols), c.batch);
    measure(c, a, context.get(), "");
    if (c.tool == Tool::kLowRank && c.batch == 1) measure(c, a, own.get(), "/own-kernels");
  }
}

}  // namespace adaattn::bench
