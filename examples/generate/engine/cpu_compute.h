// The CPU's share of a layer: chunks of rows walk through norm, product and activation while they are in the cache;
// with few rows (decoding) the columns of each product are spread over the threads instead.
#pragma once

#include <vector>

#include "engine/compute.h"
#include "engine/thread_pool.h"

namespace generate {

class CpuCompute : public Compute {
 public:
  // Both references must outlive this object.
  CpuCompute(const ModelConfig& config, const Weights& weights, DType attention_dtype, ThreadPool& pool);

  Buffer allocate(size_t bytes) override;
  void embed(std::span<const int32_t> tokens, float* x) override;
  void project_qkv(int64_t layer, const Step& step, const float* x, void* q, const KvSlot& kv) override;
  void finish_layer(int64_t layer, const Step& step, const void* attention, float* x) override;
  void logits(int64_t rows, const float* x, float* logits) override;
  void losses(std::span<const int32_t> targets, const float* x, double* losses) override;
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
  const float* widened(Scratch& scratch, const void* attention, int64_t first, int64_t count) const;
  void grow_rope_table(int64_t positions);
  void store_qkv(const Step& step, int64_t first_row, int64_t rows, float* qkv, void* q, const KvSlot& kv) const;

  const ModelConfig& config_;
  const Weights& weights_;
  DType dtype_;
  ThreadPool& pool_;
  bool few_rows_ = false;  // of the stage in progress
  std::vector<Scratch> scratch_;
  std::vector<float> rope_cos_;  // [positions, head_dim / 2]
  std::vector<float> rope_sin_;
};

}  // namespace generate
