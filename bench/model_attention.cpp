#include "model_attention.h"

#include <fstream>
#include <iterator>
#include <stdexcept>

#include "engine/attention.h"
#include "engine/cpu_compute.h"
#include "engine/tokenizer.h"

namespace adaattn::bench {

AttnDesc ModelAttention::desc() const {
  AttnDesc d;
  d.max_batch = 1;
  d.max_seqlen_q = d.max_seqlen_k = seqlen;
  d.heads_q = heads_q;
  d.heads_kv = heads_kv;
  d.head_dim_qk = head_dim;
  d.dtype_q = dtype;
  d.mask = ADAATTN_MASK_CAUSAL;
  return d;
}

Io ModelAttention::io(const LayerOperands& layer, void* o) const {
  const auto view = [&](const void* data, int64_t heads) { return tensor(data, dtype, {1, seqlen, heads, head_dim}); };
  Io io;
  io.q = view(layer.q.data(), heads_q);
  io.k = view(layer.k.data(), heads_kv);
  io.v = view(layer.v.data(), heads_kv);
  io.o = view(o, heads_q);
  return io;
}

ModelAttention capture_attention(const std::string& folder, int64_t seqlen, int64_t windows, adaattn_dtype_t dtype,
                                 int threads) {
  using namespace generate;
  std::ifstream stream(folder + "/manual.txt", std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(stream), {}};
  const ModelConfig config = read_config(folder);
  const std::vector<int32_t> tokens = tokenize(config, text);
  if (static_cast<int64_t>(tokens.size()) < windows * seqlen)
    throw std::runtime_error(folder + "/manual.txt is too short for the windows of this suite");
  const auto engine_dtype = static_cast<DType>(dtype);
  ThreadPool pool(threads);
  CpuCompute compute(config, load_weights(config, Checkpoint(folder)), engine_dtype, pool);
  Attention attention(config, engine_dtype, ADAATTN_ISA_AUTO, {}, compute, pool);

  const size_t element = dtype_size(engine_dtype), rows = static_cast<size_t>(seqlen);
  const size_t q_bytes = rows * static_cast<size_t>(config.q_size()) * element;
  const size_t kv_bytes = rows * static_cast<size_t>(config.kv_size()) * element;
  const Buffer x = compute.allocate(rows * static_cast<size_t>(config.hidden_size) * sizeof(float));
  const Buffer q = compute.allocate(q_bytes), o = compute.allocate(q_bytes);
  const Buffer k = compute.allocate(kv_bytes), v = compute.allocate(kv_bytes);
  const KvSlot kv = {k.get(), v.get(), seqlen};
  const Step step = {1, seqlen, 0};
  const auto copy = [](const Buffer& from, size_t bytes) {
    const char* data = static_cast<const char*>(from.get());
    return std::vector<char>(data, data + bytes);
  };
  ModelAttention captured = {seqlen, config.heads, config.kv_heads, config.head_dim, dtype, {}};
  for (int64_t window = 0; window < windows; ++window) {
    std::vector<LayerOperands>& layers = captured.windows.emplace_back();
    compute.embed(std::span(tokens).subspan(static_cast<size_t>(window * seqlen), rows), x.f32());
    for (int64_t layer = 0; layer < config.layers; ++layer) {
      compute.project_qkv(layer, step, x.f32(), q.get(), kv);
      layers.push_back({copy(q, q_bytes), copy(k, kv_bytes), copy(v, kv_bytes)});
      attention.run(layer, step, q.get(), kv, o.get());
      compute.finish_layer(layer, step, o.get(), x.f32());
    }
  }
  return captured;
}

}  // namespace adaattn::bench
