#include "cuda_call.h"

#include <algorithm>
#include <atomic>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "reference/number.h"

namespace adaattn::bench {
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

std::vector<double> times_on_device(const std::function<void(cudaStream_t)>& call, int warm_runs, int runs, bool cold,
                                    bool held) {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  int l2_bytes = 0;
  check(cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, 0));
  const CudaBuffer flush(cold ? static_cast<size_t>(l2_bytes) * 2 : 1);
  cudaEvent_t start = nullptr, stop = nullptr;
  check(cudaEventCreate(&start));
  check(cudaEventCreate(&stop));
  // Without the hold first: code that is loaded when it is first launched may have to wait for the device.
  for (int i = 0; i < warm_runs; ++i) {
    call(stream);
    check(cudaStreamSynchronize(stream));
  }
  std::vector<double> us;
  for (int i = 0; i < runs; ++i) {
    std::atomic<bool> go{false};
    const auto hold = [](void* flag) {
      while (!static_cast<std::atomic<bool>*>(flag)->load()) {
      }
    };
    if (held) check(cudaLaunchHostFunc(stream, hold, &go));
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
  return us;
}

Timing measure_on_device(const std::function<void(cudaStream_t)>& call, bool cold, bool held) {
  constexpr int kWarmRuns = 3, kRuns = 15;
  std::vector<double> us = times_on_device(call, kWarmRuns, kRuns, cold, held);
  std::sort(us.begin(), us.end());
  const double median = us[us.size() / 2];
  return {median, (us.back() - us.front()) / median};
}

CudaContext::CudaContext(Report& report) {
  adaattn_config_t config;
  check(adaattn_config_init(&config, sizeof config));
  config.device = ADAATTN_DEVICE_CUDA;
  check(adaattn_create(&config, &context_));
  adaattn_device_info_t info;
  info.struct_size = sizeof info;
  check(adaattn_device_info(ADAATTN_DEVICE_CUDA, 0, &info));
  report.set_device(info.name);
}

CudaCall::CudaCall(adaattn_context_t* context, const Shape& shape, const NamedDtype& dtype, adaattn_math_t math,
                   const adaattn_adaptive_desc_t* adaptive)
    : AttentionCall(context, shape, dtype, math, adaptive),
      q_(query_bytes(), dtype.dtype, 1),
      k_(key_bytes(), dtype.dtype_kv == ADAATTN_DTYPE_NONE ? dtype.dtype : dtype.dtype_kv, 2),
      v_(key_bytes(), dtype.dtype_kv == ADAATTN_DTYPE_NONE ? dtype.dtype : dtype.dtype_kv, 3),
      o_(output_bytes()),
      ones_(factors() * sizeof(float)),
      tables_(page_tables().size() * sizeof(int32_t)),
      workspace_(workspace_bytes()) {
  const std::vector<float> ones(factors(), 1.0f);
  check(cudaMemcpy(ones_.data(), ones.data(), ones_.bytes(), cudaMemcpyHostToDevice));
  const std::vector<int32_t> tables = page_tables();
  check(cudaMemcpy(tables_.data(), tables.data(), tables.size() * sizeof(int32_t), cudaMemcpyHostToDevice));
  place(q_.data(), k_.data(), v_.data(), o_.data(), ones_.data(), tables_.data(), ADAATTN_DEVICE_CUDA);
}

void CudaCall::fetch(char* to, const char* from, size_t row_bytes, size_t pitch, size_t rows) const {
  check(cudaMemcpy2D(to, row_bytes, from, pitch, row_bytes, rows, cudaMemcpyDeviceToHost));
}

}  // namespace adaattn::bench
