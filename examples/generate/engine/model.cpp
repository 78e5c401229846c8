#include "engine/model.h"

#include <algorithm>
#include <utility>

#include "engine/cpu_compute.h"
#include "engine/cuda/compute.h"
#include "engine/error.h"
#include "engine/weights.h"

namespace generate {
namespace {

DType dtype_of(const ModelOptions& options) {
  return options.dtype.value_or(options.device == ADAATTN_DEVICE_CPU ? DType::kF32 : DType::kBf16);
}

std::unique_ptr<Compute> make_compute(const ModelConfig& config, Weights weights, const ModelOptions& options,
                                      ThreadPool& pool) {
  if (options.device == ADAATTN_DEVICE_CPU)
    return std::make_unique<CpuCompute>(config, std::move(weights), dtype_of(options), pool);
  if (options.isa != ADAATTN_ISA_AUTO) fail("isa chooses among the instruction sets of the CPU; CUDA takes auto only");
  return make_cuda_compute(config, weights, dtype_of(options));
}

}  // namespace

KvSlot KvCache::slot(int64_t layer) const { return slots_[static_cast<size_t>(layer) % slots_.size()]; }

Model::Model(const std::filesystem::path& folder, const ModelOptions& options)
    : config_(read_config(folder)),
      dtype_(dtype_of(options)),
      cache_format_(options.cache),
      pool_(options.device == ADAATTN_DEVICE_CPU ? options.threads : 1),
      compute_(make_compute(config_, load_weights(config_, Checkpoint(folder)), options, pool_)),
      attention_(config_, dtype_, options.isa, options.attention, *compute_, pool_, options.cache) {}

Model::~Model() = default;

adaattn_plan_info_t Model::attention_info(const Step& step, int64_t capacity) {
  return attention_.describe(step, capacity);
}

void Model::prepare(const Step& step, int64_t capacity) {
  compute_->warm_up(step.rows(), capacity);
  attention_.prepare(step, capacity);
}

KvCache Model::make_cache(int64_t batch, int64_t capacity, KvCache::Use use) {
  if (capacity > config_.max_positions)
    fail("%lld tokens do not fit: max_position_embeddings of the model is %lld", static_cast<long long>(capacity),
         static_cast<long long>(config_.max_positions));
  KvCache cache;
  cache.batch_ = batch;
  cache.capacity_ = capacity;
  const bool narrow = cache_format_ == CacheFormat::kE4m3;
  const size_t bytes = static_cast<size_t>(batch * capacity * config_.kv_size()) * (narrow ? 1 : dtype_size(dtype_));
  const int64_t slots = use == KvCache::Use::kManySteps ? config_.layers : 1;
  for (int64_t i = 0; i < slots; ++i) {
    const Buffer k = compute_->allocate(bytes), v = compute_->allocate(bytes);
    KvSlot& slot = cache.slots_.emplace_back(KvSlot{.k = k.get(), .v = v.get(), .capacity = capacity});
    cache.memory_.insert(cache.memory_.end(), {k, v});
    if (!narrow) continue;
    const size_t factors = static_cast<size_t>(batch * config_.kv_heads * slot.blocks()) * sizeof(float);
    const Buffer k_factors = compute_->allocate(factors), v_factors = compute_->allocate(factors);
    slot.k_factors = k_factors.f32();
    slot.v_factors = v_factors.f32();
    cache.memory_.insert(cache.memory_.end(), {k_factors, v_factors});
  }
  return cache;
}

void Model::forward(std::span<const int32_t> tokens, KvCache& cache) {
  const Step step = {cache.batch_, static_cast<int64_t>(tokens.size()) / cache.batch_, cache.length_};
  if (step.seqlen < 1 || step.rows() != static_cast<int64_t>(tokens.size()))
    fail("%zu tokens cannot be shared by %lld sequences", tokens.size(), static_cast<long long>(cache.batch_));
  if (step.seqlen > cache.capacity_ - cache.length_)
    fail("%lld more tokens do not fit in a cache of %lld that holds %lld", static_cast<long long>(step.seqlen),
         static_cast<long long>(cache.capacity_), static_cast<long long>(cache.length_));
  if (cache.length_ > 0 && static_cast<int64_t>(cache.slots_.size()) < config_.layers)
    fail("a cache for one step cannot take a second one");
  for (const int32_t token : tokens)
    if (token < 0 || token >= config_.vocab_size)
      fail("token %d is outside the vocabulary of %lld", token, static_cast<long long>(config_.vocab_size));

  if (step.rows() > row_room_) {
    const size_t rows = static_cast<size_t>(step.rows()), q_size = static_cast<size_t>(config_.q_size());
    hidden_ = compute_->allocate(rows * static_cast<size_t>(config_.hidden_size) * sizeof(float));
    q_ = compute_->allocate(rows * q_size * dtype_size(dtype_));
    o_ = compute_->allocate(rows * q_size * dtype_size(dtype_));
    if (cache_format_ == CacheFormat::kE4m3) {
      const size_t kv_bytes = rows * static_cast<size_t>(config_.kv_size()) * dtype_size(dtype_);
      new_k_ = compute_->allocate(kv_bytes);
      new_v_ = compute_->allocate(kv_bytes);
    }
    row_room_ = step.rows();
  }
  rows_ = step.rows();
  compute_->embed(tokens, hidden_.f32());
  for (int64_t layer = 0; layer < config_.layers; ++layer) {
    const KvSlot kv = cache.slot(layer);
    if (cache_format_ == CacheFormat::kE4m3) {
      const KvSlot fresh = {.k = new_k_.get(), .v = new_v_.get(), .capacity = step.seqlen, .first = step.start};
      compute_->project_qkv(layer, step, hidden_.f32(), q_.get(), fresh);
      compute_->quantize(step, fresh, kv);
    } else {
      compute_->project_qkv(layer, step, hidden_.f32(), q_.get(), kv);
    }
    attention_.run(layer, step, q_.get(), kv, o_.get());
    compute_->finish_layer(layer, step, o_.get(), hidden_.f32());
  }
  cache.length_ += step.seqlen;
}

std::vector<float> Model::logits(int64_t row) {
  if (row < 0 || row >= rows_)
    fail("row %lld is not one of the %lld of the last step", static_cast<long long>(row),
         static_cast<long long>(rows_));
  std::vector<float> logits(static_cast<size_t>(config_.vocab_size));
  compute_->logits(1, hidden_.f32() + row * config_.hidden_size, logits.data());
  return logits;
}

std::vector<double> Model::losses(std::span<const int32_t> targets) {
  if (static_cast<int64_t>(targets.size()) != rows_)
    fail("%zu targets for the %lld rows of the last step", targets.size(), static_cast<long long>(rows_));
  for (const int32_t target : targets)
    if (target < 0 || target >= config_.vocab_size)
      fail("token %d is outside the vocabulary of %lld", target, static_cast<long long>(config_.vocab_size));
  std::vector<double> losses(targets.size());
  compute_->losses(targets, hidden_.f32(), losses.data());
  return losses;
}

std::vector<float> Model::prefill(std::span<const int32_t> tokens, KvCache& cache) {
  if (cache.batch_ != 1 || tokens.empty()) fail("prefill takes one sequence of at least one token");
  for (size_t first = 0; first < tokens.size(); first += kPrefillChunk)
    forward(tokens.subspan(first, std::min<size_t>(kPrefillChunk, tokens.size() - first)), cache);
  return logits(rows_ - 1);
}

}  // namespace generate
