// Low rank of large matrices with cuBLAS and cuSOLVER, where they can be opened, and by our own kernels.
#include <cmath>
#include <cstdlib>
#include <numbers>

#include "attention/fixture.h"
#include "gpu/device.h"
#include "reference/linalg.h"

namespace adaattn::test {
namespace {

using reference::Matrix;

constexpr const char* kSwitch = "ADAATTN_CUDA_LIBRARIES";
constexpr int64_t kRows = 2100, kCols = 1000, kTerms = 320;  // large enough for the libraries

std::string messages;  // of the library since the last look

class LargeLowRank : public OnTheDevice {
 protected:
  void SetUp() override {
    OnTheDevice::SetUp();
    const adaattn_log_fn record = [](void*, adaattn_log_level_t, const char* text) { messages += text; };
    adaattn_set_log_callback(record, nullptr, ADAATTN_LOG_INFO);
    messages.clear();
  }
  void TearDown() override {
    adaattn_set_log_callback(nullptr, nullptr, ADAATTN_LOG_OFF);
    unsetenv(kSwitch);
  }
};

// j-th vector of an orthonormal basis of cosines.
double cosine(int64_t n, int64_t i, int64_t j) {
  return std::sqrt((j == 0 ? 1.0 : 2.0) / static_cast<double>(n)) *
         std::cos(std::numbers::pi * (static_cast<double>(i) + 0.5) * static_cast<double>(j) / static_cast<double>(n));
}

double sigma(int64_t i, double ratio) { return 10 * std::pow(ratio, static_cast<double>(i)); }

// Its decomposition is known: kTerms singular values sigma(i), vectors of cosines.
Matrix decaying(double ratio) {
  Matrix left(kRows, kTerms), right(kTerms, kCols);
  for (int64_t t = 0; t < kTerms; ++t) {
    for (int64_t r = 0; r < kRows; ++r) left(r, t) = cosine(kRows, r, t);
    for (int64_t c = 0; c < kCols; ++c) right(t, c) = sigma(t, ratio) * cosine(kCols, c, t);
  }
  Matrix m = reference::multiply(left, right);
  for (double& x : m.data) x = static_cast<float>(x);
  return m;
}

class Decomposition {
 public:
  Decomposition(const Matrix& m, int64_t rank, bool transposed)
      : rows(transposed ? m.cols : m.rows),
        cols(transposed ? m.rows : m.cols),
        rank(rank),
        a(ADAATTN_DTYPE_F32, {rows, cols}),
        u(ADAATTN_DTYPE_F32, {rows, rank}),
        s(ADAATTN_DTYPE_F32, {rank}),
        v(ADAATTN_DTYPE_F32, {cols, rank}) {
    a.for_each([&](const std::vector<int64_t>& i, int64_t) { a.set(i, transposed ? m(i[1], i[0]) : m(i[0], i[1])); });
    a.upload(kDevice, 0);
    adaattn_low_rank_desc_init(&desc, sizeof desc);
    desc.rows = rows;
    desc.cols = cols;
    desc.rank = rank;
  }
  void poison() const {
    for (const Tensor* t : {&u, &s, &v}) {
      const_cast<Tensor*>(t)->fill(std::nan(""));
      t->upload(kDevice, 0);
    }
  }
  adaattn_status_t run(const Context& context, void* workspace, size_t bytes, adaattn_stream_t stream) const {
    const adaattn_tensor_t av = a.on(kDevice, 0), uv = u.on(kDevice, 0), sv = s.on(kDevice, 0), vv = v.on(kDevice, 0);
    return adaattn_low_rank(context.get(), &desc, &av, &uv, &sv, &vv, workspace, bytes, stream);
  }
  std::vector<double> results() const {
    std::vector<double> all;
    for (const Tensor* t : {&u, &s, &v}) {
      t->download(kDevice, 0);
      const std::vector<double> values = t->values();
      all.insert(all.end(), values.begin(), values.end());
    }
    return all;
  }
  Matrix left() const { return matrix(u, rows); }
  Matrix right() const { return matrix(v, cols); }

  int64_t rows, cols, rank;
  Tensor a, u, s, v;
  adaattn_low_rank_desc_t desc;

 private:
  Matrix matrix(const Tensor& t, int64_t length) const {
    Matrix m(length, rank);
    for (int64_t i = 0; i < length; ++i)
      for (int64_t j = 0; j < rank; ++j) m(i, j) = t.get({i, j});
    return m;
  }
};

TEST_F(LargeLowRank, AgreesWithTheOracleWithAndWithoutLibraries) {
  struct Case {
    int64_t rank;
    double ratio;
    bool transposed;
  };
  for (const Case& c : {Case{20, 0.9, false}, Case{20, 0.9, true}, Case{260, 0.97, false}}) {
    const Matrix m = decaying(c.ratio);
    double tail = 0;
    for (int64_t i = kTerms; i-- > c.rank;) tail += sigma(i, c.ratio) * sigma(i, c.ratio);
    const Decomposition d(m, c.rank, c.transposed);
    for (const bool libraries : {true, false}) {
      SCOPED_TRACE("rank " + std::to_string(c.rank) + (c.transposed ? ", transposed" : "") +
                   (libraries ? ", libraries where there are any" : ", own kernels"));
      libraries ? unsetenv(kSwitch) : setenv(kSwitch, "off", 1);
      messages.clear();
      const Context context(kCuda);
      d.poison();
      ASSERT_TRUE(succeeded(d.run(context, nullptr, 0, nullptr)));
      const std::vector<double> first = d.results();
      const bool opened = messages.find("large products by cuBLAS") != std::string::npos;
      const bool said_absent = messages.find("without cuBLAS") != std::string::npos;
      EXPECT_EQ(libraries, opened != said_absent) << messages;
      if (!libraries) EXPECT_FALSE(opened || said_absent) << messages;

      std::vector<double> found;
      for (int64_t j = 0; j < c.rank; ++j) {
        found.push_back(d.s.get({j}));
        EXPECT_NEAR(found.back(), sigma(j, c.ratio), 0.01 * sigma(j, c.ratio) + 2e-5) << j;
        EXPECT_LE(found.back(), sigma(j, c.ratio) + 2e-5) << j;
      }
      const Matrix u = d.left(), v = d.right();
      EXPECT_LT(reference::orthogonality_error(u), 5e-6);
      EXPECT_LT(reference::orthogonality_error(v), 5e-6);
      const Matrix original = c.transposed ? reference::transpose(m) : m;
      EXPECT_LE(reference::reconstruction_error(original, u, found, v), 1.01 * std::sqrt(tail) + 1e-5);

      d.poison();
      ASSERT_TRUE(succeeded(d.run(context, nullptr, 0, nullptr)));
      EXPECT_EQ(d.results(), first) << "repeated for the same seed";
    }
  }
}

TEST_F(LargeLowRank, CanBeCaptured) {
  const Matrix m = decaying(0.95);
  for (const int64_t rank : {16, 260})
    for (const bool libraries : {true, false}) {
      libraries ? unsetenv(kSwitch) : setenv(kSwitch, "off", 1);
      const Context context(kCuda);
      const Decomposition d(m, rank, false);
      size_t bytes = 0;
      ASSERT_TRUE(succeeded(adaattn_low_rank_workspace_size(context.get(), &d.desc, &bytes)));
      const DeviceMemory workspace(bytes);
      const Stream stream;
      d.poison();  // which makes the device tensors
      cudaGraph_t graph = nullptr;
      cudaGraphExec_t ready = nullptr;
      require(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeGlobal));
      ASSERT_TRUE(succeeded(d.run(context, workspace.data(), workspace.bytes(), stream.get())));
      require(cudaStreamEndCapture(stream.get(), &graph));
      require(cudaGraphInstantiate(&ready, graph, 0));
      require(cudaGraphLaunch(ready, stream.get()));
      stream.wait();
      d.results();
      for (int64_t j = 0; j < rank; ++j) EXPECT_NEAR(d.s.get({j}), sigma(j, 0.95), 0.01 * sigma(j, 0.95) + 2e-5) << j;
      EXPECT_LT(reference::orthogonality_error(d.left()), 5e-6);
      require(cudaGraphExecDestroy(ready));
      require(cudaGraphDestroy(graph));
    }
}

TEST_F(LargeLowRank, NotANumberReachesEveryResult) {
  Matrix m = decaying(0.95);
  m(17, 29) = std::nan("");
  for (const int64_t rank : {16, 260})
    for (const bool libraries : {true, false}) {
      libraries ? unsetenv(kSwitch) : setenv(kSwitch, "off", 1);
      const Context context(kCuda);
      const Decomposition d(m, rank, false);
      ASSERT_TRUE(succeeded(d.run(context, nullptr, 0, nullptr)));
      d.results();
      for (int64_t j = 0; j < rank; ++j) {
        EXPECT_TRUE(std::isnan(d.s.get({j}))) << j;
        EXPECT_TRUE(std::isnan(d.u.get({5, j}))) << j;
        EXPECT_TRUE(std::isnan(d.v.get({5, j}))) << j;
      }
    }
}

}  // namespace
}  // namespace adaattn::test
