// Attention calls on a CUDA device, timed by events.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <vector>

#include "attention_call.h"
#include "harness.h"

namespace adaattn::bench {

void check(cudaError_t error);

// Device memory of normally distributed numbers (or zeros), freed with the object.
class CudaBuffer {
 public:
  CudaBuffer(size_t bytes, adaattn_dtype_t dtype, uint64_t seed);
  explicit CudaBuffer(size_t bytes);
  ~CudaBuffer() { cudaFree(data_); }
  CudaBuffer(const CudaBuffer&) = delete;
  CudaBuffer& operator=(const CudaBuffer&) = delete;
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

// Device times of `call` in microseconds, one run after another, when it has run `warm_runs` times: the stream is held
// until everything of a run is enqueued, so launch costs do not show; not held: for calls that wait for their stream.
// cold: the L2 cache is overwritten before each run.
std::vector<double> times_on_device(const std::function<void(cudaStream_t)>& call, int warm_runs, int runs, bool cold,
                                    bool held = true);

// Their median.
Timing measure_on_device(const std::function<void(cudaStream_t)>& call, bool cold, bool held = true);

// A context on device 0, whose name the report gets.
class CudaContext {
 public:
  explicit CudaContext(Report& report);
  ~CudaContext() { adaattn_destroy(context_); }
  CudaContext(const CudaContext&) = delete;
  CudaContext& operator=(const CudaContext&) = delete;
  adaattn_context_t* get() const { return context_; }

 private:
  adaattn_context_t* context_ = nullptr;
};

class CudaCall final : public AttentionCall {
 public:
  CudaCall(adaattn_context_t* context, const Shape& shape, const NamedDtype& dtype, adaattn_math_t math,
           const adaattn_adaptive_desc_t* adaptive = nullptr);
  CudaCall(adaattn_context_t* context, const Shape& shape, adaattn_dtype_t dtype, adaattn_math_t math,
           const adaattn_adaptive_desc_t* adaptive = nullptr)
      : CudaCall(context, shape, NamedDtype{"", dtype}, math, adaptive) {}
  void run(cudaStream_t stream) { execute(workspace_.data(), workspace_.bytes(), stream); }

 private:
  void fetch(char* to, const char* from, size_t row_bytes, size_t pitch, size_t rows) const override;

  CudaBuffer q_, k_, v_, o_, ones_, tables_, workspace_;
};

}  // namespace adaattn::bench
