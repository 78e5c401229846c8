// The CPU's share of a layer: chunks of rows walk through norm, product and activation while they are in the cache;
// with few rows (decoding) the columns of each product are spread over the threads instead.
#pragma once

#include <chrono>
#include <vector>

#include "engine/compute.h"
#include "engine/rope.h"
#include "engine/thread_pool.h"

namespace generate {

class CpuCompute : public Compute {
 public:
  // Both references must outlive this object.
  CpuCompute(const ModelConfig& config, Weights weights, DType attention_dtype, ThreadPool& pool);

  adaattn_device_t device() const override { return ADAATTN_DEVICE_CPU; }
  adaattn_stream_t stream() const override { return nullptr; }
  Buffer allocate(size_t bytes) override;
  void embed(std::span<const int32_t> tokens, float* x) override;
  void project_qkv(int64_t layer, const Step& step, const float* x, void* q, const KvSlot& kv) override;
  void quantize(const Step& step, const KvSlot& from, const KvSlot& to) override;
  void finish_layer(int64_t layer, const Step& step, const void* attention, float* x) override;
  void logits(int64_t rows, const float* x, float* logits) override;
  void losses(std::span<const int32_t> targets, const float* x, double* losses) override;
  void warm_up(int64_t /*rows*/, int64_t positions) override { rope_.grow(positions); }
  void start_clock() override { started_ = std::chrono::steady_clock::now(); }
  void stop_clock() override { clocked_ += std::chrono::steady_clock::now() - started_; }
  double clock_seconds() override { return clocked_.count(); }
  std::string description() const override;

 private:
  // A thread's working memory for one chunk of rows.
  struct Scratch {
    std::vector<float> normed;
    std::vector<float> attention;
    std::vector<float> wide;
    std::vector<float> activated;
  };

  template <class Body>
  void for_each_chunk(int64_t rows, const Body& body);
  void linear(const Linear& linear, int64_t rows, const float* x, float beta, float* y);
  void quantize_head(const Step& step, int64_t sequence, int64_t head, const void* values, const KvSlot& from,
                     uint8_t* cache, float* factors, const KvSlot& to) const;
  const float* widened(Scratch& scratch, const void* attention, int64_t first, int64_t count) const;
  void store_qkv(const Step& step, int64_t first_row, int64_t rows, float* qkv, void* q, const KvSlot& kv) const;

  const ModelConfig& config_;
  Weights weights_;
  DType dtype_;
  ThreadPool& pool_;
  bool few_rows_ = false;  // of the stage in progress
  std::vector<Scratch> scratch_;
  RopeTable rope_;
  std::chrono::steady_clock::time_point started_;
  std::chrono::duration<double> clocked_{0};
};

}  // namespace generate
