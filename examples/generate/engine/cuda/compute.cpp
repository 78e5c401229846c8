#include "engine/cuda/compute.h"

#include <algorithm>
#include <string>

#include "adaattn/adaattn.hpp"
#include "engine/cuda/blas.h"
#include "engine/cuda/kernels.h"
#include "engine/cuda/runtime.h"
#include "engine/elementwise.h"
#include "engine/rope.h"

namespace generate {
namespace {

using cuda::check;

// Rows go through in chunks whose widest activation stays below this.
constexpr int64_t kChunkBytes = int64_t{256} << 20;

struct DeviceLinear {
  int64_t out = 0;
  int64_t in = 0;
  Buffer weight;  // in the attention's type
  Buffer bias;    // f32; no memory: none
};

struct DeviceLayer {
  Buffer attention_norm;  // f32
  DeviceLinear qkv;
  DeviceLinear attention_output;
  Buffer mlp_norm;
  DeviceLinear gate_up;
  DeviceLinear down;
};

// Memory that grows to what the largest step needs.
struct Scratch {
  Buffer buffer;
  size_t bytes = 0;
};

class CudaCompute : public Compute {
 public:
  CudaCompute(const ModelConfig& config, const Weights& weights, DType dtype)
      : config_(config), dtype_(dtype), rope_(config.head_dim, config.rope_theta) {
    keep_freed_memory();
    embedding_ = upload(weights.embedding);
    head_ = &weights.head() == &weights.embedding ? embedding_ : upload(weights.head());
    for (const LayerWeights& from : weights.layers) {
      DeviceLayer& layer = layers_.emplace_back();
      layer.attention_norm = upload(from.attention_norm);
      layer.qkv = upload(from.qkv);
      layer.attention_output = upload(from.attention_output);
      layer.mlp_norm = upload(from.mlp_norm);
      layer.gate_up = upload(from.gate_up);
      layer.down = upload(from.down);
    }
    final_norm_ = upload(weights.final_norm);
  }

  adaattn_device_t device() const override { return ADAATTN_DEVICE_CUDA; }
  adaattn_stream_t stream() const override { return stream_->get(); }

  Buffer allocate(size_t bytes) override { return cuda::allocate_on(stream_, bytes); }

  void embed(std::span<const int32_t> tokens, float* x) override {
    const auto* on_device = static_cast<const int32_t*>(to_device(tokens, tokens_));
    check(cuda::embed(embedding_.weight.get(), dtype_, on_device, static_cast<int64_t>(tokens.size()),
                      config_.hidden_size, x, stream()),
          "embedding");
  }

  void project_qkv(int64_t layer, const Step& step, const float* x, void* q, const KvSlot& kv) override {
    const DeviceLayer& weights = layers_[static_cast<size_t>(layer)];
    const int64_t hidden = config_.hidden_size;
    grow_rope_table(step.start + step.seqlen);
    for_each_chunk(step.rows(), weights.qkv.out, [&](int64_t first, int64_t rows) {
      const void* normed = norm(x + first * hidden, weights.attention_norm, rows);
      float* qkv = f32(wide_, rows * weights.qkv.out);
      multiply(weights.qkv, rows, normed, 0.0f, qkv);
      const cuda::QkvTarget target = {.cos = rope_cos_.f32(),
                                      .sin = rope_sin_.f32(),
                                      .q = q,
                                      .k = kv.k,
                                      .v = kv.v,
                                      .heads = config_.heads,
                                      .kv_heads = config_.kv_heads,
                                      .head_dim = config_.head_dim,
                                      .first_row = first,
                                      .seqlen = step.seqlen,
                                      .start = step.start,
                                      .capacity = kv.capacity,
                                      .first_position = kv.first};
      check(cuda::store_qkv(qkv, rows, dtype_, target, stream()), "storing q, k and v");
    });
  }

  void quantize(const Step& step, const KvSlot& from, const KvSlot& to) override {
    const cuda::QuantizeShape shape = {.batch = step.batch,
                                       .kv_heads = config_.kv_heads,
                                       .head_dim = config_.head_dim,
                                       .seqlen = step.seqlen,
                                       .start = step.start,
                                       .capacity = to.capacity};
    check(cuda::quantize(from.k, dtype_, shape, to.k, to.k_factors, stream()), "quantizing keys");
    check(cuda::quantize(from.v, dtype_, shape, to.v, to.v_factors, stream()), "quantizing values");
  }

  void finish_layer(int64_t layer, const Step& step, const void* attention, float* x) override {
    const DeviceLayer& weights = layers_[static_cast<size_t>(layer)];
    const int64_t hidden = config_.hidden_size, intermediate = config_.intermediate_size;
    const size_t row_bytes = static_cast<size_t>(config_.q_size()) * dtype_size(dtype_);
    for_each_chunk(step.rows(), weights.gate_up.out, [&](int64_t first, int64_t rows) {
      float* chunk = x + first * hidden;
      const auto* attended = static_cast<const std::byte*>(attention) + static_cast<size_t>(first) * row_bytes;
      multiply(weights.attention_output, rows, attended, 1.0f, chunk);
      const void* normed = norm(chunk, weights.mlp_norm, rows);
      float* gate_up = f32(wide_, rows * weights.gate_up.out);
      multiply(weights.gate_up, rows, normed, 0.0f, gate_up);
      void* activated = reserve(activated_, static_cast<size_t>(rows * intermediate) * dtype_size(dtype_));
      check(cuda::swiglu(gate_up, rows, intermediate, dtype_, activated, stream()), "activation");
      multiply(weights.down, rows, activated, 1.0f, chunk);
    });
  }

  void logits(int64_t rows, const float* x, float* logits) override {
    for_each_chunk(rows, config_.vocab_size, [&](int64_t first, int64_t count) {
      const float* chunk = head_logits(x + first * config_.hidden_size, count);
      to_host(chunk, static_cast<size_t>(count * config_.vocab_size), logits + first * config_.vocab_size);
    });
    wait();
  }

  void losses(std::span<const int32_t> targets, const float* x, double* losses) override {
    const auto* on_device = static_cast<const int32_t*>(to_device(targets, tokens_));
    auto* device_losses = static_cast<double*>(reserve(losses_, targets.size() * sizeof(double)));
    const auto all = static_cast<int64_t>(targets.size());
    for_each_chunk(all, config_.vocab_size, [&](int64_t first, int64_t rows) {
      const float* chunk = head_logits(x + first * config_.hidden_size, rows);
      check(cuda::negative_log_likelihood(chunk, on_device + first, rows, config_.vocab_size, device_losses + first,
                                          stream()),
            "losses");
    });
    to_host(device_losses, targets.size(), losses);
    wait();
  }

  // cuBLAS loads its kernels one by one when a shape first needs them, and so does CUDA with those of this program.
  void warm_up(int64_t rows, int64_t positions) override {
    grow_rope_table(positions);
    const size_t q_bytes = static_cast<size_t>(rows * config_.q_size()) * dtype_size(dtype_);
    const size_t kv_bytes = static_cast<size_t>(rows * config_.kv_size()) * dtype_size(dtype_);
    const Buffer x = allocate(static_cast<size_t>(rows * config_.hidden_size) * sizeof(float)), q = allocate(q_bytes);
    const Buffer k = allocate(kv_bytes), v = allocate(kv_bytes);
    const std::vector<int32_t> tokens(static_cast<size_t>(rows));
    std::vector<double> losses(tokens.size());
    std::vector<float> logits(static_cast<size_t>(config_.vocab_size));
    const Step step = {1, rows, 0};
    embed(tokens, x.f32());
    project_qkv(0, step, x.f32(), q.get(), {k.get(), v.get(), rows});
    finish_layer(0, step, q.get(), x.f32());
    this->losses(tokens, x.f32(), losses.data());
    this->logits(1, x.f32(), logits.data());
  }

  void start_clock() override { clock_.start(stream()); }
  void stop_clock() override { clock_.stop(stream()); }
  double clock_seconds() override {
    wait();
    return clock_.seconds();
  }

  std::string description() const override { return blas_.description(); }

 private:
  // Freed memory stays in the pool that cudaMallocAsync takes from, instead of going back to the driver whenever the
  // host waits.
  static void keep_freed_memory() {
    int device = 0;
    cudaMemPool_t pool = nullptr;
    uint64_t keep = UINT64_MAX;
    check(cudaGetDevice(&device), "asking for the device");
    check(cudaDeviceGetDefaultMemPool(&pool, device), "asking for the memory pool");
    check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep), "setting up the memory pool");
  }

  Buffer upload(const std::vector<float>& values) {
    Buffer buffer = allocate(values.size() * sizeof(float));
    check(cudaMemcpyAsync(buffer.get(), values.data(), values.size() * sizeof(float), cudaMemcpyHostToDevice, stream()),
          "uploading weights");
    return buffer;
  }

  DeviceLinear upload(const Linear& from) {
    DeviceLinear to = {from.out, from.in, {}, {}};
    std::vector<std::byte> narrow(from.weight.size() * dtype_size(dtype_));
    convert_from_f32(from.weight.data(), static_cast<int64_t>(from.weight.size()), dtype_, narrow.data());
    to.weight = allocate(narrow.size());
    check(cudaMemcpyAsync(to.weight.get(), narrow.data(), narrow.size(), cudaMemcpyHostToDevice, stream()),
          "uploading weights");
    if (!from.bias.empty()) to.bias = upload(from.bias);
    return to;
  }

  void* reserve(Scratch& scratch, size_t bytes) {
    if (bytes > scratch.bytes) {
      scratch.buffer = {};  // freed in the stream's order, before the larger one is taken
      scratch.buffer = allocate(bytes);
      scratch.bytes = bytes;
    }
    return scratch.buffer.get();
  }
  float* f32(Scratch& scratch, int64_t count) {
    return static_cast<float*>(reserve(scratch, static_cast<size_t>(count) * sizeof(float)));
  }

  // Calls body(first, rows) for chunks of rows that are `width` f32 numbers wide.
  template <typename Body>
  void for_each_chunk(int64_t rows, int64_t width, const Body& body) {
    const int64_t chunk = std::max<int64_t>(1, kChunkBytes / (width * static_cast<int64_t>(sizeof(float))));
    for (int64_t first = 0; first < rows; first += chunk) body(first, std::min(chunk, rows - first));
  }

  const void* norm(const float* x, const Buffer& weight, int64_t rows) {
    void* out = reserve(normed_, static_cast<size_t>(rows * config_.hidden_size) * dtype_size(dtype_));
    check(cuda::rms_norm(x, weight.f32(), config_.rms_norm_eps, rows, config_.hidden_size, dtype_, out, stream()),
          "norm");
    return out;
  }

  // y [rows, out] = beta * y + x W^T + bias.
  void multiply(const DeviceLinear& linear, int64_t rows, const void* x, float beta, float* y) {
    blas_.multiply_transposed(rows, linear.out, linear.in, dtype_, x, linear.weight.get(), beta, y);
    if (linear.bias.get() == nullptr) return;
    check(cuda::add_bias(linear.bias.f32(), rows, linear.out, y, stream()), "bias");
  }

  const float* head_logits(const float* x, int64_t rows) {
    const void* normed = norm(x, final_norm_, rows);
    float* out = f32(wide_, rows * config_.vocab_size);
    multiply(head_, rows, normed, 0.0f, out);
    return out;
  }

  void grow_rope_table(int64_t positions) {
    if (!rope_.grow(positions)) return;
    rope_cos_ = upload(rope_.cos());
    rope_sin_ = upload(rope_.sin());
  }

  const void* to_device(std::span<const int32_t> tokens, Scratch& scratch) {
    void* to = reserve(scratch, tokens.size_bytes());
    check(cudaMemcpyAsync(to, tokens.data(), tokens.size_bytes(), cudaMemcpyHostToDevice, stream()),
          "uploading tokens");
    return to;
  }

  template <typename T>
  void to_host(const T* from, size_t count, T* to) {
    check(cudaMemcpyAsync(to, from, count * sizeof(T), cudaMemcpyDeviceToHost, stream()), "fetching results");
  }

  void wait() {
    check(cudaStreamSynchronize(stream()), "running the model");
    clock_.collect();
  }

  const ModelConfig& config_;
  DType dtype_;
  // First, so that it outlives what is allocated on it.
  std::shared_ptr<cuda::Stream> stream_ = std::make_shared<cuda::Stream>();
  cuda::Blas blas_{stream_->get()};
  cuda::Clock clock_;
  DeviceLinear embedding_;
  DeviceLinear head_;  // shares the embedding's memory where they are tied
  std::vector<DeviceLayer> layers_;
  Buffer final_norm_;
  RopeTable rope_;
  Buffer rope_cos_;
  Buffer rope_sin_;
  Scratch tokens_;
  Scratch normed_;
  Scratch wide_;
  Scratch activated_;
  Scratch losses_;
};

}  // namespace

std::unique_ptr<Compute> make_cuda_compute(const ModelConfig& config, const Weights& weights, DType dtype) {
  if (adaattn::device_count(ADAATTN_DEVICE_CUDA).value() == 0)
    fail("CUDA cannot be used: %s", adaattn::last_error().c_str());
  return std::make_unique<CudaCompute>(config, weights, dtype);
}

}  // namespace generate
