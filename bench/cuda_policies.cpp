// The adaptive policies on a CUDA device, all stages counted, against the exact plan in the same run: on the operands
// of the shipped model's layers, and on random normal ones, where nothing is worth saving. Beside them, what single
// fields of a custom policy cost and gain.
#include <algorithm>
#include <array>
#include <cmath>
#include <fstream>
#include <iterator>
#include <memory>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "adaattn/adaattn.hpp"
#include "cuda_call.h"
#include "engine/attention.h"
#include "engine/cuda/compute.h"
#include "engine/tokenizer.h"
#include "harness.h"
#include "peers.h"
#include "reference/number.h"

namespace adaattn::bench {
namespace {

constexpr int64_t kBatch = 4;
// Beyond the length of the model's text it is taken again from its start.
constexpr int64_t kContexts[] = {8192, 16384, 32768};
constexpr int64_t kRandomContexts[] = {8192, 32768};
constexpr int64_t kCustomContext = 16384;
// Heads found dense are looked at in every eighth call: random operands are timed over whole rounds of that many.
constexpr int kRound = 8, kRounds = 3;
constexpr int kTurns = 3, kRandomTurns = 1;

struct NamedPolicy {
  const char* name;
  AdaptiveDesc desc;
};
AdaptiveDesc named(adaattn_policy_t policy) {
  AdaptiveDesc desc;
  desc.policy = policy;
  return desc;
}
// Tiles of a mass alone, or with a probe for keys of such a share of a row.
AdaptiveDesc tiles_of(double mass, adaattn_probe_t probe = ADAATTN_PROBE_OFF, double needle_share = 0) {
  AdaptiveDesc desc = named(ADAATTN_POLICY_CUSTOM);
  desc.tolerance = 1;
  desc.tile_mass = mass;
  desc.far_field = ADAATTN_SWITCH_OFF;
  desc.rank_mode = ADAATTN_RANK_OFF;
  desc.probe = probe;
  desc.needle_share = needle_share;
  return desc;
}
AdaptiveDesc with_rank(AdaptiveDesc desc) {
  desc.rank_mode = ADAATTN_RANK_DEFAULT;
  return desc;
}
AdaptiveDesc in_bytes(AdaptiveDesc desc) {
  desc.min_precision = desc.max_precision = ADAATTN_PRECISION_I8;
  return desc;
}
const NamedPolicy kPolicies[] = {{"quality", named(ADAATTN_POLICY_QUALITY)},
                                 {"balanced", named(ADAATTN_POLICY_BALANCED)},
                                 {"speed", named(ADAATTN_POLICY_SPEED)}};
// Where nothing is worth saving, all of them find the same.
const NamedPolicy kRandomPolicies[] = {{"balanced", named(ADAATTN_POLICY_BALANCED)}};
const NamedPolicy kCustomPolicies[] = {{"tiles.95", tiles_of(0.95)},
                                       {"tiles.95+i8", in_bytes(tiles_of(0.95))},
                                       {"tiles.90", tiles_of(0.90)},
                                       {"tiles.90+i8", in_bytes(tiles_of(0.90))},
                                       {"tiles.90+rank", with_rank(tiles_of(0.90))},
                                       {"tiles.90+full.05", tiles_of(0.90, ADAATTN_PROBE_FULL, 0.05)},
                                       {"tiles.90+full.02", tiles_of(0.90, ADAATTN_PROBE_FULL, 0.02)},
                                       {"tiles.90+rank.05", tiles_of(0.90, ADAATTN_PROBE_RANK, 0.05)},
                                       {"tiles.85", tiles_of(0.85)},
                                       {"tiles.85+full.05", tiles_of(0.85, ADAATTN_PROBE_FULL, 0.05)},
                                       {"tiles.85+full.02", tiles_of(0.85, ADAATTN_PROBE_FULL, 0.02)},
                                       {"tiles.85+rank.05", tiles_of(0.85, ADAATTN_PROBE_RANK, 0.05)},
                                       {"tiles.85+rank.02", tiles_of(0.85, ADAATTN_PROBE_RANK, 0.02)}};

// Device memory that frees itself, whoever allocated it.
using Memory = std::shared_ptr<void>;
struct Operands {
  Memory q, k, v;
};

struct Calls {
  Shape shape;
  std::vector<Operands> layers;
  bool mean = false;  // of a round of calls, where they differ; else the median of equal ones
};

size_t elements(const Shape& s, int64_t heads) {
  return static_cast<size_t>(s.batch * s.seqlen_q * heads * s.head_dim);
}

// Runs the model with exact attention over the first windows of its manual.txt, side by side.
Calls capture_layers(int64_t context) {
  using namespace generate;
  const std::string folder = ADAATTN_BENCH_MODEL;
  std::ifstream stream(folder + "/manual.txt", std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(stream), {}};
  const ModelConfig config = read_config(folder);
  const std::vector<int32_t> whole = tokenize(config, text);
  std::vector<int32_t> tokens(static_cast<size_t>(kBatch * context));
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = whole[i % whole.size()];
  const std::unique_ptr<Compute> compute =
      make_cuda_compute(config, load_weights(config, Checkpoint(folder)), DType::kBf16);
  ThreadPool pool(1);
  generate::Attention attention(config, DType::kBf16, ADAATTN_ISA_AUTO, {}, *compute, pool);
  Calls calls = {
      {kBatch, config.heads, config.kv_heads, context, context, config.head_dim, ADAATTN_MASK_CAUSAL}, {}, false};
  const auto take = [&](int64_t heads) { return compute->allocate(elements(calls.shape, heads) * 2); };
  const Buffer x = compute->allocate(tokens.size() * static_cast<size_t>(config.hidden_size) * sizeof(float));
  const Buffer o = take(config.heads);
  const Step step = {kBatch, context, 0};
  compute->embed(tokens, x.f32());
  for (int64_t layer = 0; layer < config.layers; ++layer) {
    const Buffer q = take(config.heads), k = take(config.kv_heads), v = take(config.kv_heads);
    compute->project_qkv(layer, step, x.f32(), q.get(), {k.get(), v.get(), context});
    attention.run(layer, step, q.get(), {k.get(), v.get(), context}, o.get());
    compute->finish_layer(layer, step, o.get(), x.f32());
    calls.layers.push_back({q.memory, k.memory, v.memory});
  }
  compute->clock_seconds();  // waits
  return calls;
}

Calls random_layer(int64_t seqlen) {
  Calls calls = {{kBatch, 6, 2, seqlen, seqlen, 128, ADAATTN_MASK_CAUSAL}, {}, true};
  const auto take = [&](int64_t heads, uint64_t seed) {
    const auto buffer = std::make_shared<CudaBuffer>(elements(calls.shape, heads) * 2, ADAATTN_DTYPE_BF16, seed);
    return Memory(buffer, buffer->data());
  };
  calls.layers.push_back({take(6, 1), take(2, 2), take(2, 3)});
  return calls;
}

// A plan for each layer, of one policy.
class Runner {
 public:
  Runner(Context& context, const Calls& calls, const AdaptiveDesc& adaptive) : calls_(calls) {
    const Shape& s = calls.shape;
    const adaattn_attn_desc_t desc = desc_of(s, ADAATTN_DTYPE_BF16);
    for (size_t i = 0; i < calls.layers.size(); ++i) {
      plans_.push_back(context.make_plan(desc, adaptive.policy == ADAATTN_POLICY_EXACT ? nullptr : &adaptive).value());
      o_.push_back(std::make_unique<CudaBuffer>(elements(s, s.heads_q) * 2));
    }
    workspace_ = std::make_unique<CudaBuffer>(plans_[0].workspace_size().value());
  }

  void run(cudaStream_t stream) {
    for (size_t i = 0; i < plans_.size(); ++i) {
      Io io;
      io.q = view(calls_.layers[i].q.get(), calls_.shape.heads_q);
      io.k = view(calls_.layers[i].k.get(), calls_.shape.heads_kv);
      io.v = view(calls_.layers[i].v.get(), calls_.shape.heads_kv);
      io.o = view(o_[i]->data(), calls_.shape.heads_q);
      plans_[i].execute(io, {workspace_->data(), workspace_->bytes()}, stream).or_throw();
    }
  }

  void time() {
    const auto call = [this](cudaStream_t stream) { run(stream); };
    if (!calls_.mean) {
      times_.push_back(measure_on_device(call, false));
      return;
    }
    std::vector<double> means;
    for (int round = 0; round < kRounds; ++round) {
      const std::vector<double> us = times_on_device(call, round == 0 ? kRound + 2 : 0, kRound, false);
      means.push_back(std::accumulate(us.begin(), us.end(), 0.0) / kRound);
    }
    std::sort(means.begin(), means.end());
    times_.push_back({means[kRounds / 2], (means.back() - means.front()) / means[kRounds / 2]});
  }
  // Of all layers once.
  Timing median() const {
    std::vector<Timing> sorted = times_;
    std::sort(sorted.begin(), sorted.end(), [](const Timing& a, const Timing& b) { return a.us < b.us; });
    return sorted[sorted.size() / 2];
  }

  // One sequence of a layer.
  std::vector<char> output(size_t layer) const {
    const size_t bytes = o_[layer]->bytes() / static_cast<size_t>(kBatch);
    std::vector<char> host(bytes);
    check(cudaMemcpy(host.data(), static_cast<const char*>(o_[layer]->data()) + layer % kBatch * bytes, bytes,
                     cudaMemcpyDeviceToHost));
    return host;
  }

  // Means over the calls so far.
  std::map<std::string, double> details() const {
    adaattn_plan_stats_t sum = {};
    for (const Plan& plan : plans_) generate::add_stats(plan.stats().value(), &sum);
    const auto heads = static_cast<double>(sum.heads);
    std::map<std::string, double> d;
    d["tiles_kept"] = static_cast<double>(sum.tiles_kept) / static_cast<double>(sum.tiles);
    d["tiles_probed_in"] = static_cast<double>(sum.tiles_probed_in) / static_cast<double>(sum.tiles);
    d["dense_heads"] = static_cast<double>(sum.heads_dense) / heads;
    d["mean_rank_v"] = sum.rank_v_sum / heads;
    d["predicted_error"] = sum.predicted_error_sum / heads;
    const double microseconds = 1e6 * static_cast<double>(plans_.size()) / static_cast<double>(sum.calls);
    d["analyze_us"] = microseconds * sum.seconds_analyze;
    d["decide_us"] = microseconds * sum.seconds_decide;
    d["attend_us"] = microseconds * sum.seconds_attend;
    d["verify_us"] = microseconds * sum.seconds_verify;
    if (sum.verified_heads > 0) {
      d["measured_error"] = sum.measured_error_sum / static_cast<double>(sum.verified_heads);
      d["heads_over_tolerance"] = static_cast<double>(sum.heads_over_tolerance) / static_cast<double>(sum.calls);
    }
    return d;
  }

 private:
  adaattn_tensor_t view(void* data, int64_t heads) const {
    return tensor(data, ADAATTN_DTYPE_BF16, {calls_.shape.batch, calls_.shape.seqlen_q, heads, calls_.shape.head_dim},
                  {}, {ADAATTN_DEVICE_CUDA, 0});
  }

  const Calls& calls_;
  std::vector<Plan> plans_;
  std::vector<std::unique_ptr<CudaBuffer>> o_;
  std::unique_ptr<CudaBuffer> workspace_;
  std::vector<Timing> times_;
};

// ||o - exact|| / ||exact|| over all layers.
double relative_error(const Runner& ours, const Runner& exact, size_t layers) {
  double wrong = 0, all = 0;
  for (size_t layer = 0; layer < layers; ++layer) {
    const std::vector<char> o = ours.output(layer), e = exact.output(layer);
    for (int64_t i = 0; i < static_cast<int64_t>(e.size() / 2); ++i) {
      const double x = reference::load(e.data(), ADAATTN_DTYPE_BF16, i);
      const double shift = reference::load(o.data(), ADAATTN_DTYPE_BF16, i) - x;
      wrong += shift * shift;
      all += x * x;
    }
  }
  return std::sqrt(wrong / all);
}

void compare(Report& report, const Calls& calls, std::span<const NamedPolicy> policies, const std::string& prefix,
             const nlohmann::json& peers) {
  Config config;
  config.device = ADAATTN_DEVICE_CUDA;
  Context context = Context::create(config).value();
  Runner exact(context, calls, named(ADAATTN_POLICY_EXACT));
  std::vector<std::unique_ptr<Runner>> runners;
  for (const NamedPolicy& p : policies) runners.push_back(std::make_unique<Runner>(context, calls, p.desc));
  // In turns: the card's clock follows its power, and that follows what ran before.
  for (int turn = 0; turn < (calls.mean ? kRandomTurns : kTurns); ++turn) {
    exact.time();
    for (const auto& runner : runners) runner->time();
  }
  const auto layers = static_cast<double>(calls.layers.size());
  double cudnn_us = 0;
  if (peers["rows"].contains(prefix)) {
    for (const auto& [peer, us] : peers["rows"][prefix].items())
      if (peer.starts_with("cudnn")) cudnn_us = layers * us.get<double>();
  }
  const Shape& s = calls.shape;
  const double pairs = static_cast<double>(s.seqlen_q) * static_cast<double>(s.seqlen_q + 1) / 2;
  const double flops = 4.0 * layers * static_cast<double>(s.batch * s.heads_q * s.head_dim) * pairs;
  const auto add = [&](const std::string& name, const Runner& runner, Row row) {
    row.name = prefix + "/" + name;
    row.time = runner.median();
    row.rate = flops / row.time.us * 1e-6;
    row.unit = "TFLOP/s";
    if (cudnn_us > 0) row.details["of_cudnn"] = row.time.us / cudnn_us;
    report.add(row);
  };
  add("exact", exact, {});
  for (size_t i = 0; i < runners.size(); ++i) {
    Row row;
    row.error = relative_error(*runners[i], exact, calls.layers.size());
    row.peer = "own-exact";
    row.peer_us = exact.median().us;
    row.details = runners[i]->details();
    row.details["of_exact"] = runners[i]->median().us / row.peer_us;
    add(policies[i].name, *runners[i], row);
  }
}

}  // namespace

void run_cuda_policies(Report& report) {
  const CudaContext context(report);
  struct Case {
    std::string name;
    int64_t seqlen;
    bool model;
    std::span<const NamedPolicy> policies;
  };
  // Ours are rounds of all layers, in which the card meets its power limit: so are the peers'.
  const int64_t layers = generate::read_config(ADAATTN_BENCH_MODEL).layers;
  std::vector<Case> cases;
  nlohmann::json request = nlohmann::json::array();
  const auto add = [&](const std::string& kind, bool model, int64_t seqlen, std::span<const NamedPolicy> policies,
                       bool with_peers = true) {
    const Shape shape = {kBatch, 6, 2, seqlen, seqlen, 128, ADAATTN_MASK_CAUSAL};
    const std::string name = kind + "/" + shape_name(shape, "bf16");
    if (!report.wants(name)) return;
    cases.push_back({name, seqlen, model, policies});
    if (!with_peers) return;
    request.push_back({{"name", name},
                       {"dtype", "bf16"},
                       {"batch", shape.batch},
                       {"heads_q", shape.heads_q},
                       {"heads_kv", shape.heads_kv},
                       {"seqlen_q", seqlen},
                       {"seqlen_k", seqlen},
                       {"head_dim", shape.head_dim},
                       {"causal", true},
                       {"cold", false},
                       {"calls", model ? layers : 1}});
  };
  for (const int64_t seqlen : kContexts) add("model", true, seqlen, kPolicies);
  add("custom", true, kCustomContext, kCustomPolicies, false);
  for (const int64_t seqlen : kRandomContexts) add("random", false, seqlen, kRandomPolicies);
  const nlohmann::json peers = run_peers(ADAATTN_BENCH_PEERS, request);
  for (const Case& c : cases) {
    compare(report, c.model ? capture_layers(c.seqlen) : random_layer(c.seqlen), c.policies, c.name, peers);
  }
}

}  // namespace adaattn::bench
