// What a device does for the engine around attention: the weights' matrix products and the element-wise work of each
// layer. Attention itself is engine/attention.h, which sees the same device memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "engine/dtype.h"
#include "engine/weights.h"

namespace generate {

// The tokens of one step: `batch` sequences, each with `seqlen` new tokens at positions start, start + 1, ...
// Rows of activations are ordered [batch, seqlen].
struct Step {
  int64_t batch = 0;
  int64_t seqlen = 0;
  int64_t start = 0;

  int64_t rows() const { return batch * seqlen; }
};

// Keys and values of one layer, each [batch, capacity, kv_heads, head_dim] in the attention's type, from position
// `first` on; or in E4M3, with factors [batch, kv_heads, blocks of kFactorTokens].
struct KvSlot {
  void* k = nullptr;
  void* v = nullptr;
  int64_t capacity = 0;
  int64_t first = 0;
  float* k_factors = nullptr;  // null: not E4M3
  float* v_factors = nullptr;

  int64_t blocks() const { return (capacity + kFactorTokens - 1) / kFactorTokens; }
};

// Memory of the device, zero-filled.
struct Buffer {
  std::shared_ptr<void> memory;
  float* f32() const { return static_cast<float*>(memory.get()); }
  void* get() const { return memory.get(); }
};

class Compute {
 public:
  virtual ~Compute() = default;

  virtual adaattn_device_t device() const = 0;

  // Where all work is enqueued, attention's included; null on the CPU, where each call is done when it returns.
  virtual adaattn_stream_t stream() const = 0;

  virtual Buffer allocate(size_t bytes) = 0;

  // x [rows, hidden] = embeddings of the tokens.
  virtual void embed(std::span<const int32_t> tokens, float* x) = 0;

  // Norm, projections and rotary embedding: q [rows, heads, head_dim] in the attention's type, and the new tokens'
  // keys and values into their places in kv.
  virtual void project_qkv(int64_t layer, const Step& step, const float* x, void* q, const KvSlot& kv) = 0;

  // The step's keys and values, in the attention's type, into a cache in E4M3.
  virtual void quantize(const Step& step, const KvSlot& from, const KvSlot& to) = 0;

  // Output projection of attention [rows, heads, head_dim], residual and MLP, into x.
  virtual void finish_layer(int64_t layer, const Step& step, const void* attention, float* x) = 0;

  // Final norm and output head of `rows` rows of x; logits [rows, vocab] in host memory.
  virtual void logits(int64_t rows, const float* x, float* logits) = 0;

  // -ln p(targets[r]) for each row of x, in host memory.
  virtual void losses(std::span<const int32_t> targets, const float* x, double* losses) = 0;

  // Does what only the first step of so many rows, or the first up to so many positions, would do, so that steps can be
  // timed.
  virtual void warm_up(int64_t rows, int64_t positions) = 0;

  // The device's time between each start and stop, summed; asking for it waits for the device.
  virtual void start_clock() = 0;
  virtual void stop_clock() = 0;
  virtual double clock_seconds() = 0;

  // Of the library that does the matrix products.
  virtual std::string description() const = 0;
};

}  // namespace generate
