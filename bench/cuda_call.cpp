#include "cuda_call.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <random>
#include <stdexcept>
#include <vector>

#include "attention_call.h"
#include "reference/head.h"
#include "reference/number.h"

namespace adaattn::bench {
namespace {

size_t tensor_bytes(const Shape& s, int64_t seqlen, int64_t heads, adaattn_dtype_t dtype) {
  return static_cast<size_t>(s.batch * seqlen * heads * s.head_dim * reference::size_of(dtype));
}

}  // namespace

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

CudaBuffer::CudaBuffer(size_t bytes) : bytes_(bytes) {
  check(cudaMalloc(&data_, std::max<size_t>(bytes, 1)));
  check(cudaMemset(data_, 0, bytes));
}

CudaBuffer::CudaBuffer(size_t bytes, adaattn_dtype_t dtype, uint64_t seed) : CudaBuffer(bytes) {
  // A block of odd length repeated: no two rows of a head are equal.
  constexpr int64_t kBlock = (int64_t{1} << 20) + 7;
  std::vector<char> block(static_cast<size_t>(kBlock * reference::size_of(dtype)));
  std::mt19937_64 engine(seed);
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < kBlock; ++i) reference::store(block.data(), dtype, i, normal(engine));
  for (size_t at = 0; at < bytes; at += block.size())
    check(cudaMemcpy(static_cast<char*>(data_) + at, block.data(), std::min(block.size(), bytes - at),
                     cudaMemcpyHostToDevice));
}

Timing measure_on_device(const std::function<void(cudaStream_t)>& call, bool cold) {
  constexpr int kRuns = 15;
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  int l2_bytes = 0;
  check(cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, 0));
  const CudaBuffer flush(cold ? static_cast<size_t>(l2_bytes) * 2 : 1);
  cudaEvent_t start = nullptr, stop = nullptr;
  check(cudaEventCreate(&start));
  check(cudaEventCreate(&stop));
  for (int i = 0; i < 3; ++i) call(stream);
  check(cudaStreamSynchronize(stream));
  std::vector<double> us;
  for (int i = 0; i < kRuns; ++i) {
    std::atomic<bool> go{false};
    const auto hold = [](void* flag) {
      while (!static_cast<std::atomic<bool>*>(flag)->load()) {
      }
    };
    check(cudaLaunchHostFunc(stream, hold, &go));
    if (cold) check(cudaMemsetAsync(flush.data(), i, flush.bytes(), stream));
    check(cudaEventRecord(start, stream));
    call(stream);
    check(cudaEventRecord(stop, stream));
    go = true;
    check(cudaStreamSynchronize(stream));
    float ms = 0;
    check(cudaEventElapsedTime(&ms, start, stop));
    us.push_back(ms * 1e3);
  }
  check(cudaEventDestroy(start));
  check(cudaEventDestroy(stop));
  check(cudaStreamDestroy(stream));
  std::sort(us.begin(), us.end());
  const double median = us[us.size() / 2];
  return {median, (us.back() - us.front()) / median};
}

CudaCall::CudaCall(adaattn_context_t* context, const Shape& shape, adaattn_dtype_t dtype, adaattn_math_t math)
    : shape_(shape),
      dtype_(dtype),
      q_(tensor_bytes(shape, shape.seqlen_q, shape.heads_q, dtype), dtype, 1),
      k_(tensor_bytes(shape, shape.seqlen_k, shape.heads_kv, dtype), dtype, 2),
      v_(tensor_bytes(shape, shape.seqlen_k, shape.heads_kv, dtype), dtype, 3),
      o_(tensor_bytes(shape, shape.seqlen_q, shape.heads_q, dtype)) {
  adaattn_attn_desc_t desc;
  check(adaattn_attn_desc_init(&desc, sizeof desc));
  desc.max_batch = shape.batch;
  desc.max_seqlen_q = shape.seqlen_q;
  desc.max_seqlen_k = shape.seqlen_k;
  desc.heads_q = shape.heads_q;
  desc.heads_kv = shape.heads_kv;
  desc.head_dim_qk = shape.head_dim;
  desc.dtype_q = dtype;
  desc.math = math;
  desc.mask = shape.mask;
  check(adaattn_plan_create(context, &desc, nullptr, &plan_));
  check(adaattn_io_init(&io_, sizeof io_));
  const auto tensor = [&](adaattn_tensor_t* t, const CudaBuffer& data, int64_t seqlen, int64_t heads) {
    const int64_t dims[4] = {shape.batch, seqlen, heads, shape.head_dim};
    check(adaattn_tensor_init(t, data.data(), dtype, ADAATTN_DEVICE_CUDA, 0, 4, dims, nullptr));
  };
  tensor(&io_.q, q_, shape.seqlen_q, shape.heads_q);
  tensor(&io_.k, k_, shape.seqlen_k, shape.heads_kv);
  tensor(&io_.v, v_, shape.seqlen_k, shape.heads_kv);
  tensor(&io_.o, o_, shape.seqlen_q, shape.heads_q);
  check(adaattn_plan_workspace_size(plan_, &workspace_bytes_));
  check(cudaMalloc(&workspace_, std::max<size_t>(workspace_bytes_, 1)));
}

CudaCall::~CudaCall() {
  adaattn_plan_destroy(plan_);
  cudaFree(workspace_);
}

void CudaCall::run(cudaStream_t stream) {
  check(adaattn_plan_execute(plan_, &io_, workspace_, workspace_bytes_, stream));
}

double CudaCall::flops() const {
  double pairs = static_cast<double>(shape_.seqlen_q) * static_cast<double>(shape_.seqlen_k);
  if (shape_.mask != ADAATTN_MASK_NONE)  // the half that peers' figures count
    pairs = static_cast<double>(shape_.seqlen_q) *
            (static_cast<double>(shape_.seqlen_k) - static_cast<double>(shape_.seqlen_q) / 2);
  return 4.0 * static_cast<double>(shape_.batch * shape_.heads_q * shape_.head_dim) * pairs;
}

double CudaCall::sampled_error() const {
  constexpr int64_t kRows = 4;
  const int64_t d = shape_.head_dim, group = shape_.heads_q / shape_.heads_kv, size = reference::size_of(dtype_);
  // Rows [first, first + count) of one head.
  const auto fetch = [&](const CudaBuffer& from, int64_t seqlen, int64_t heads, int64_t b, int64_t h, int64_t first,
                         int64_t count) {
    std::vector<char> raw(static_cast<size_t>(count * d * size));
    check(cudaMemcpy2D(raw.data(), static_cast<size_t>(d * size),
                       static_cast<const char*>(from.data()) + (((b * seqlen + first) * heads + h) * d) * size,
                       static_cast<size_t>(heads * d * size), static_cast<size_t>(d * size), static_cast<size_t>(count),
                       cudaMemcpyDeviceToHost));
    reference::Matrix m(count, d);
    for (int64_t i = 0; i < count * d; ++i) m.data[static_cast<size_t>(i)] = reference::load(raw.data(), dtype_, i);
    return m;
  };
  double wrong = 0, all = 0;
  for (int64_t sample = 0; sample < kRows; ++sample) {
    const int64_t b = sample % shape_.batch, h = sample * 5 % shape_.heads_q;
    const int64_t i = std::min((2 * sample + 1) * shape_.seqlen_q / (2 * kRows), shape_.seqlen_q - 1);
    reference::Head head;
    head.q = fetch(q_, shape_.seqlen_q, shape_.heads_q, b, h, i, 1);
    head.k = fetch(k_, shape_.seqlen_k, shape_.heads_kv, b, h / group, 0, shape_.seqlen_k);
    head.v = fetch(v_, shape_.seqlen_k, shape_.heads_kv, b, h / group, 0, shape_.seqlen_k);
    head.scale = 1 / std::sqrt(static_cast<double>(d));
    head.causal = shape_.mask != ADAATTN_MASK_NONE;
    head.off = i + shape_.seqlen_k - shape_.seqlen_q;
    const reference::Matrix o = fetch(o_, shape_.seqlen_q, shape_.heads_q, b, h, i, 1);
    const reference::HeadResult expected = reference::attend(head);
    for (int64_t c = 0; c < d; ++c) {
      const double e = expected.o(0, c);
      wrong += (o(0, c) - e) * (o(0, c) - e);
      all += e * e;
    }
  }
  return std::sqrt(wrong / all);
}

std::string CudaCall::kernel() const {
  adaattn_plan_info_t info;
  info.struct_size = sizeof info;
  check(adaattn_plan_get_info(plan_, &info));
  return info.kernel;
}

}  // namespace adaattn::bench
