#include "engine/cpu_compute.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <new>
#include <utility>

#include "engine/blas.h"
#include "engine/elementwise.h"
#include "engine/float_types.h"

namespace generate {
namespace {

// Rows of a chunk: enough that OpenBLAS packs each weight matrix rarely, few enough that the widest activation of a
// chunk stays in the cache.
constexpr int64_t kChunkRows = 512;
// Below this many rows a thread, spreading columns is faster than spreading rows.
constexpr int64_t kFewRows = 8;
constexpr int64_t kCacheLine = 64;

}  // namespace

CpuCompute::CpuCompute(const ModelConfig& config, Weights weights, DType attention_dtype, ThreadPool& pool)
    : config_(config),
      weights_(std::move(weights)),
      dtype_(attention_dtype),
      pool_(pool),
      scratch_(pool.threads()),
      rope_(config.head_dim, config.rope_theta) {
  open_blas();
}

std::string CpuCompute::description() const { return blas_description(); }

Buffer CpuCompute::allocate(size_t bytes) {
  void* memory = ::operator new (bytes, std::align_val_t{kCacheLine});
  std::memset(memory, 0, bytes);
  return {std::shared_ptr<void>(memory, [](void* p) { ::operator delete (p, std::align_val_t{kCacheLine}); })};
}

// Calls body(scratch, first, rows) for chunks that cover [0, rows).
template <class Body>
void CpuCompute::for_each_chunk(int64_t rows, const Body& body) {
  const int64_t threads = pool_.threads();
  few_rows_ = rows <= kFewRows * threads;
  if (few_rows_) return body(scratch_[0], int64_t{0}, rows);
  // A whole number of chunks for each thread: with equal work the last one to finish is not late.
  const int64_t chunks_each = (rows + kChunkRows * threads - 1) / (kChunkRows * threads);
  const int64_t chunk = (rows + chunks_each * threads - 1) / (chunks_each * threads);
  std::atomic<int64_t> next{0};
  pool_.parallel_for(threads, [&](int64_t thread) {
    for (int64_t first = chunk * next++; first < rows; first = chunk * next++)
      body(scratch_[thread], first, std::min(chunk, rows - first));
  });
}

// y = beta * y + x W^T + bias. On the calling thread inside a chunk, on all threads when the rows are few.
void CpuCompute::linear(const Linear& linear, int64_t rows, const float* x, float beta, float* y) {
  const auto columns = [&](int64_t first, int64_t count) {
    matmul_transposed(rows, count, linear.in, x, linear.weight.data() + first * linear.in, beta, y + first, linear.out);
    if (!linear.bias.empty()) add_bias(linear.bias.data() + first, rows, count, y + first, linear.out);
  };
  if (!few_rows_) return columns(0, linear.out);
  const int64_t share = (linear.out + pool_.threads() - 1) / pool_.threads();
  pool_.parallel_for(pool_.threads(), [&](int64_t thread) {
    const int64_t first = std::min(linear.out, thread * share);
    if (first < linear.out) columns(first, std::min(share, linear.out - first));
  });
}

void CpuCompute::embed(std::span<const int32_t> tokens, float* x) {
  const size_t hidden = static_cast<size_t>(config_.hidden_size);
  for (size_t row = 0; row < tokens.size(); ++row)
    std::memcpy(x + row * hidden, weights_.embedding.weight.data() + static_cast<size_t>(tokens[row]) * hidden,
                hidden * sizeof(float));
}

void CpuCompute::store_qkv(const Step& step, int64_t first_row, int64_t rows, float* qkv, void* q,
                           const KvSlot& kv) const {
  const int64_t head_dim = config_.head_dim, q_size = config_.q_size(), kv_size = config_.kv_size();
  const size_t size = dtype_size(dtype_);
  for (int64_t row = first_row; row < first_row + rows; ++row, qkv += q_size + 2 * kv_size) {
    const int64_t sequence = row / step.seqlen, position = step.start + row % step.seqlen;
    const float* cos = rope_.cos().data() + position * (head_dim / 2);
    const float* sin = rope_.sin().data() + position * (head_dim / 2);
    for (int64_t head = 0; head < config_.heads + config_.kv_heads; ++head)
      apply_rope(qkv + head * head_dim, cos, sin, head_dim);
    const size_t place = static_cast<size_t>((sequence * kv.capacity + position - kv.first) * kv_size) * size;
    convert_from_f32(qkv, q_size, dtype_, static_cast<std::byte*>(q) + static_cast<size_t>(row * q_size) * size);
    convert_from_f32(qkv + q_size, kv_size, dtype_, static_cast<std::byte*>(kv.k) + place);
    convert_from_f32(qkv + q_size + kv_size, kv_size, dtype_, static_cast<std::byte*>(kv.v) + place);
  }
}

void CpuCompute::project_qkv(int64_t layer, const Step& step, const float* x, void* q, const KvSlot& kv) {
  const LayerWeights& weights = weights_.layers[layer];
  const int64_t hidden = config_.hidden_size;
  rope_.grow(step.start + step.seqlen);
  for_each_chunk(step.rows(), [&](Scratch& scratch, int64_t first, int64_t rows) {
    scratch.normed.resize(rows * hidden);
    scratch.wide.resize(rows * weights.qkv.out);
    rms_norm(x + first * hidden, weights.attention_norm.data(), config_.rms_norm_eps, rows, hidden,
             scratch.normed.data());
    linear(weights.qkv, rows, scratch.normed.data(), 0.0f, scratch.wide.data());
    store_qkv(step, first, rows, scratch.wide.data(), q, kv);
  });
}

// One head's keys or values: block by block their largest magnitude, the factor where the block starts, the elements.
void CpuCompute::quantize_head(const Step& step, int64_t sequence, int64_t head, const void* values, const KvSlot& from,
                               uint8_t* cache, float* factors, const KvSlot& to) const {
  const int64_t kv_size = config_.kv_size(), head_dim = config_.head_dim, end = step.start + step.seqlen;
  std::vector<float> rows(static_cast<size_t>(kFactorTokens * head_dim));
  for (int64_t first = step.start; first < end;) {
    const int64_t block = first / kFactorTokens, last = std::min((block + 1) * kFactorTokens, end);
    float largest = 0;
    for (int64_t position = first; position < last; ++position) {
      const int64_t element = (sequence * from.capacity + position - from.first) * kv_size + head * head_dim;
      float* row = rows.data() + (position - first) * head_dim;
      convert_to_f32(static_cast<const std::byte*>(values) + static_cast<size_t>(element) * dtype_size(dtype_),
                     head_dim, dtype_, row);
      for (int64_t i = 0; i < head_dim; ++i) largest = std::max(largest, std::fabs(row[i]));
    }
    float& factor = factors[(sequence * config_.kv_heads + head) * to.blocks() + block];
    if (first % kFactorTokens == 0) {
      const float room = last - first == kFactorTokens ? 1 : kE4m3Room;
      factor = largest > 0 ? largest * room / kE4m3Max : 1;
    }
    for (int64_t position = first; position < last; ++position) {
      const float* row = rows.data() + (position - first) * head_dim;
      uint8_t* out = cache + (sequence * to.capacity + position) * kv_size + head * head_dim;
      for (int64_t i = 0; i < head_dim; ++i) out[i] = f32_to_e4m3(row[i] / factor);
    }
    first = last;
  }
}

void CpuCompute::quantize(const Step& step, const KvSlot& from, const KvSlot& to) {
  pool_.parallel_for(step.batch * config_.kv_heads, [&](int64_t item) {
    const int64_t sequence = item / config_.kv_heads, head = item % config_.kv_heads;
    quantize_head(step, sequence, head, from.k, from, static_cast<uint8_t*>(to.k), to.k_factors, to);
    quantize_head(step, sequence, head, from.v, from, static_cast<uint8_t*>(to.v), to.v_factors, to);
  });
}

// `count` elements of attention from `first` on, in f32.
const float* CpuCompute::widened(Scratch& scratch, const void* attention, int64_t first, int64_t count) const {
  if (dtype_ == DType::kF32) return static_cast<const float*>(attention) + first;
  scratch.attention.resize(count);
  convert_to_f32(static_cast<const uint16_t*>(attention) + first, count, dtype_, scratch.attention.data());
  return scratch.attention.data();
}

void CpuCompute::finish_layer(int64_t layer, const Step& step, const void* attention, float* x) {
  const LayerWeights& weights = weights_.layers[layer];
  const int64_t hidden = config_.hidden_size, q_size = config_.q_size(), intermediate = config_.intermediate_size;
  for_each_chunk(step.rows(), [&](Scratch& scratch, int64_t first, int64_t rows) {
    scratch.normed.resize(rows * hidden);
    scratch.wide.resize(rows * 2 * intermediate);
    scratch.activated.resize(rows * intermediate);
    float* chunk = x + first * hidden;
    linear(weights.attention_output, rows, widened(scratch, attention, first * q_size, rows * q_size), 1.0f, chunk);
    rms_norm(chunk, weights.mlp_norm.data(), config_.rms_norm_eps, rows, hidden, scratch.normed.data());
    linear(weights.gate_up, rows, scratch.normed.data(), 0.0f, scratch.wide.data());
    swiglu(scratch.wide.data(), rows, intermediate, scratch.activated.data());
    linear(weights.down, rows, scratch.activated.data(), 1.0f, chunk);
  });
}

void CpuCompute::logits(int64_t rows, const float* x, float* logits) {
  const int64_t hidden = config_.hidden_size, vocab = config_.vocab_size;
  for_each_chunk(rows, [&](Scratch& scratch, int64_t first, int64_t count) {
    scratch.normed.resize(count * hidden);
    rms_norm(x + first * hidden, weights_.final_norm.data(), config_.rms_norm_eps, count, hidden,
             scratch.normed.data());
    linear(weights_.head(), count, scratch.normed.data(), 0.0f, logits + first * vocab);
  });
}

void CpuCompute::losses(std::span<const int32_t> targets, const float* x, double* losses) {
  const int64_t hidden = config_.hidden_size, vocab = config_.vocab_size;
  for_each_chunk(static_cast<int64_t>(targets.size()), [&](Scratch& scratch, int64_t first, int64_t rows) {
    scratch.normed.resize(rows * hidden);
    scratch.wide.resize(rows * vocab);
    rms_norm(x + first * hidden, weights_.final_norm.data(), config_.rms_norm_eps, rows, hidden, scratch.normed.data());
    linear(weights_.head(), rows, scratch.normed.data(), 0.0f, scratch.wide.data());
    for (int64_t row = 0; row < rows; ++row)
      losses[first + row] = negative_log_likelihood(scratch.wide.data() + row * vocab, vocab, targets[first + row]);
  });
}

}  // namespace generate
