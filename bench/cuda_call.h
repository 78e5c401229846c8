// One attention call on a CUDA device, timed by events, and its distance from the oracle.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "adaattn/adaattn.h"
#include "harness.h"
#include "shapes.h"

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

// Device time of `call` on `stream`: the stream is held until everything is enqueued, so launch costs do not show.
// cold: the L2 cache is overwritten before each run.
Timing measure_on_device(const std::function<void(cudaStream_t)>& call, bool cold);

class CudaCall {
 public:
  CudaCall(adaattn_context_t* context, const Shape& shape, adaattn_dtype_t dtype, adaattn_math_t math);
  ~CudaCall();
  CudaCall(const CudaCall&) = delete;
  CudaCall& operator=(const CudaCall&) = delete;
  void run(cudaStream_t stream);
  double flops() const;
  double kv_bytes() const { return static_cast<double>(k_.bytes() + v_.bytes()); }
  double sampled_error() const;  // ||o - oracle|| / ||oracle|| over some rows of some heads
  std::string kernel() const;

 private:
  Shape shape_;
  adaattn_dtype_t dtype_;
  CudaBuffer q_, k_, v_, o_;
  adaattn_plan_t* plan_ = nullptr;
  adaattn_io_t io_;
  size_t workspace_bytes_ = 0;
  void* workspace_ = nullptr;
};

}  // namespace adaattn::bench
