// A Llama-architecture model over a Compute and an Attention.
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine/attention.h"
#include "engine/compute.h"
#include "engine/config.h"
#include "engine/thread_pool.h"

namespace generate {

struct ModelOptions {
  adaattn_device_t device = ADAATTN_DEVICE_CPU;
  int threads = 0;  // of the CPU; 0: as many as this process may run on
  adaattn_isa_t isa = ADAATTN_ISA_AUTO;
  // Of q, k, v and o, on CUDA of the weights and of what they are multiplied with too. Empty: f32 on the CPU, bf16 on
  // CUDA.
  std::optional<DType> dtype;
  CacheFormat cache = CacheFormat::kAsAttention;
  AttentionPolicy attention;
};

// Keys and values of `batch` sequences with room for `capacity` tokens each, in memory of the device.
class KvCache {
 public:
  // What a cache is for: continuing a sequence step by step, or one step alone. The latter needs no layer's keys once
  // the next layer starts, so that all layers share one slot.
  enum class Use { kManySteps, kOneStep };

  int64_t batch() const { return batch_; }
  int64_t capacity() const { return capacity_; }
  int64_t length() const { return length_; }
  void clear() { length_ = 0; }

 private:
  friend class Model;
  KvSlot slot(int64_t layer) const;

  int64_t batch_ = 0;
  int64_t capacity_ = 0;
  int64_t length_ = 0;
  std::vector<KvSlot> slots_;
  std::vector<Buffer> memory_;
};

class Model {
 public:
  Model(const std::filesystem::path& folder, const ModelOptions& options);
  ~Model();

  const ModelConfig& config() const { return config_; }
  adaattn_device_t device() const { return compute_->device(); }
  DType dtype() const { return dtype_; }
  CacheFormat cache_format() const { return cache_format_; }
  int threads() const { return pool_.threads(); }
  std::string compute_description() const { return compute_->description(); }
  adaattn_plan_info_t attention_info(const Step& step, int64_t capacity);
  AttentionReport attention_report() const { return attention_.report(); }

  // Makes plans and loads code for such a step, so that it can be timed.
  void prepare(const Step& step, int64_t capacity);

  KvCache make_cache(int64_t batch, int64_t capacity, KvCache::Use use);

  // Runs tokens [batch, seqlen], the next ones of the cache's sequences, and keeps their last hidden states for
  // logits() and losses().
  void forward(std::span<const int32_t> tokens, KvCache& cache);

  // Logits [vocab] of one row of the last forward(), rows ordered [batch, seqlen].
  std::vector<float> logits(int64_t row);

  // -ln p(targets[r]) for every row of the last forward().
  std::vector<double> losses(std::span<const int32_t> targets);

  // Runs one sequence's tokens in chunks of kPrefillChunk and returns the logits after the last.
  static constexpr int64_t kPrefillChunk = 2048;
  std::vector<float> prefill(std::span<const int32_t> tokens, KvCache& cache);

 private:
  ModelConfig config_;
  DType dtype_;
  CacheFormat cache_format_;
  ThreadPool pool_;
  std::unique_ptr<Compute> compute_;
  Attention attention_;
  int64_t rows_ = 0;      // of the last forward()
  int64_t row_room_ = 0;  // rows that the buffers hold
  Buffer hidden_;         // [rows, hidden] f32
  Buffer q_;              // [rows, heads, head_dim] in dtype_
  Buffer o_;              // the same
  Buffer new_k_, new_v_;  // [rows, kv_heads, head_dim] in dtype_, for caches of another format
};

}  // namespace generate
