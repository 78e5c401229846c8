// Adaptive attention on the CPU against the library's own exact attention on the same operands in the same run: those
// of the shipped model at context 8192, and random normal ones, where nothing is worth saving.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <random>
#include <string>

#include "engine/attention.h"
#include "harness.h"
#include "model_attention.h"
#include "reference/number.h"

namespace adaattn::bench {
namespace {

constexpr int64_t kContext = 8192;
// Feedback and warm bases always come from the window before: the two take turns.
constexpr int kWindows = 2;
// Heads found dense are looked at in every eighth call.
constexpr int kLookedAtEvery = 8;

struct NamedPolicy {
  const char* name;
  adaattn_policy_t policy;
};
constexpr NamedPolicy kPolicies[] = {
    {"quality", ADAATTN_POLICY_QUALITY}, {"balanced", ADAATTN_POLICY_BALANCED}, {"speed", ADAATTN_POLICY_SPEED}};

struct NamedType {
  const char* name;
  adaattn_dtype_t dtype;
  int turns;  // the shorter calls are, the more a neighbour's load moves them
  adaattn_precision_t least;
};
constexpr NamedType kTypes[] = {{"f32", ADAATTN_DTYPE_F32, 3, ADAATTN_PRECISION_DEFAULT},
                                {"bf16", ADAATTN_DTYPE_BF16, 7, ADAATTN_PRECISION_DEFAULT},
                                {"f32-from-i8", ADAATTN_DTYPE_F32, 2, ADAATTN_PRECISION_I8},
                                {"bf16-from-i8", ADAATTN_DTYPE_BF16, 3, ADAATTN_PRECISION_I8}};

adaattn::Context make_context(int threads) {
  Config config;
  config.num_threads = threads;
  return adaattn::Context::create(config).value();
}

// A turn is as many runs as it takes to see every window, or a head found dense looked at again; its time is their
// mean. Median over the turns.
Timing timing(const std::vector<double>& us, size_t turn) {
  std::vector<double> means;
  for (auto first = us.begin(); first != us.end(); first += static_cast<std::ptrdiff_t>(turn))
    means.push_back(std::accumulate(first, first + static_cast<std::ptrdiff_t>(turn), 0.0) / static_cast<double>(turn));
  std::sort(means.begin(), means.end());
  const double median = (means[means.size() / 2] + means[(means.size() - 1) / 2]) / 2;
  return {median, (means.back() - means.front()) / median};
}

// Plans of all layers of one policy; the exact one serves every layer.
class Runner {
 public:
  Runner(adaattn::Context& context, const ModelAttention& model, adaattn_policy_t policy,
         adaattn_precision_t least = ADAATTN_PRECISION_DEFAULT)
      : model_(model) {
    AdaptiveDesc adaptive;
    adaptive.policy = policy;
    adaptive.min_precision = least;
    const bool exact = policy == ADAATTN_POLICY_EXACT;
    const size_t layers = model.windows[0].size();
    for (size_t i = 0; i < (exact ? 1 : layers); ++i)
      plans_.push_back(context.make_plan(model.desc(), exact ? nullptr : &adaptive).value());
    workspace_.resize(plans_[0].workspace_size().value());
    o_.resize(layers, std::vector<char>(model.windows[0][0].q.size()));
  }

  // All layers of a window.
  void run(size_t window) {
    const auto start = std::chrono::steady_clock::now();
    for (size_t i = 0; i < o_.size(); ++i)
      plans_[i % plans_.size()]
          .execute(model_.io(model_.windows[window][i], o_[i].data()), {workspace_.data(), workspace_.size()})
          .or_throw();
    times_.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count());
  }

  void forget() {
    times_.clear();
    for (Plan& plan : plans_) plan.stats(ADAATTN_STATS_WAIT | ADAATTN_STATS_RESET).value();
  }

  Timing time(int turn) const { return timing(times_, static_cast<size_t>(turn)); }
  double element(size_t layer, int64_t index) const { return reference::load(o_[layer].data(), model_.dtype, index); }

  // Counts of all calls since forget(), as fractions and means.
  std::map<std::string, double> details(double exact_us, double exact_f32_us) const {
    adaattn_plan_stats_t sum = {};
    for (const Plan& plan : plans_) generate::add_stats(plan.stats().value(), &sum);
    const auto rounds = static_cast<double>(times_.size()), heads = static_cast<double>(sum.heads);
    std::map<std::string, double> d;
    d["analyze_us"] = 1e6 * sum.seconds_analyze / rounds;
    d["decide_us"] = 1e6 * sum.seconds_decide / rounds;
    d["attend_us"] = 1e6 * sum.seconds_attend / rounds;
    d["verify_us"] = 1e6 * sum.seconds_verify / rounds;
    d["analyze_of_exact"] = d["analyze_us"] / exact_us;
    d["analyze_of_f32_exact"] = d["analyze_us"] / exact_f32_us;
    d["tiles_kept"] = static_cast<double>(sum.tiles_kept) / static_cast<double>(sum.tiles);
    d["dense_heads"] = static_cast<double>(sum.heads_dense) / heads;
    d["bf16_heads"] = static_cast<double>(sum.heads_bf16) / heads;
    d["i8_heads"] = static_cast<double>(sum.heads_i8) / heads;
    d["mean_rank_v"] = sum.rank_v_sum / heads;
    d["predicted_error"] = sum.predicted_error_sum / heads;
    d["measured_error"] = sum.verified_heads > 0 ? sum.measured_error_sum / static_cast<double>(sum.verified_heads) : 0;
    d["heads_over_tolerance"] = static_cast<double>(sum.heads_over_tolerance);
    return d;
  }

 private:
  const ModelAttention& model_;
  std::vector<Plan> plans_;
  std::vector<char> workspace_;
  std::vector<std::vector<char>> o_;  // [layers]
  std::vector<double> times_;         // microseconds of each run
};

// ||o - exact|| / ||exact|| of the newest window, over all layers.
double relative_error(const Runner& ours, const Runner& exact, size_t layers, int64_t elements) {
  double wrong = 0, all = 0;
  for (size_t layer = 0; layer < layers; ++layer) {
    for (int64_t i = 0; i < elements; ++i) {
      const double e = exact.element(layer, i), shift = ours.element(layer, i) - e;
      wrong += shift * shift;
      all += e * e;
    }
  }
  return std::sqrt(wrong / all);
}

double dense_flops(const ModelAttention& model) {
  const auto s = static_cast<double>(model.seqlen);
  return 4.0 * static_cast<double>(model.heads_q * model.head_dim * static_cast<int64_t>(model.windows[0].size())) * s *
         (s + 1) / 2;
}

// Time of exact attention on the same bf16 values in f32, the yardstick of the analysis for every type.
double exact_f32_us(adaattn::Context& context, const ModelAttention& model) {
  ModelAttention wide = model;
  wide.dtype = ADAATTN_DTYPE_F32;
  const auto widen = [&](std::vector<char>& data) {
    // bf16 is the upper half of an f32.
    std::vector<char> to(2 * data.size());
    for (size_t i = 0; i < data.size(); i += 2) std::copy_n(data.data() + i, 2, to.data() + 2 * i + 2);
    data.swap(to);
  };
  for (auto& window : wide.windows) {
    for (auto& layer : window) {
      widen(layer.q);
      widen(layer.k);
      widen(layer.v);
    }
  }
  Runner exact(context, wide, ADAATTN_POLICY_EXACT);
  for (size_t window = 0; window < wide.windows.size(); ++window) exact.run(window);
  return exact.time(static_cast<int>(wide.windows.size())).us;
}

// Every policy beside exact attention, one round after another, so that they share the machine's moods.
void compare(Report& report, const ModelAttention& model, const std::string& prefix, const std::string& suffix,
             int threads, int turn, int turns, adaattn_precision_t least) {
  std::vector<NamedPolicy> wanted;
  for (const NamedPolicy& p : kPolicies) {
    if (report.wants(prefix + p.name + suffix)) wanted.push_back(p);
  }
  if (wanted.empty()) return;
  adaattn::Context context = make_context(threads);
  Runner exact(context, model, ADAATTN_POLICY_EXACT);
  std::vector<Runner> runners;
  for (const NamedPolicy& p : wanted) runners.emplace_back(context, model, p.policy, least);
  const auto warm_rounds = static_cast<int>(model.windows.size());
  for (int round = -warm_rounds; round < turn * turns; ++round) {
    const size_t window = static_cast<size_t>(round + warm_rounds) % model.windows.size();
    if (round == 0) {
      exact.forget();
      for (Runner& runner : runners) runner.forget();
    }
    if (round >= 0 || round == -1) exact.run(window);
    for (Runner& runner : runners) runner.run(window);
  }
  const double flops = dense_flops(model);
  const double f32_us = model.dtype == ADAATTN_DTYPE_F32 ? exact.time(turn).us : exact_f32_us(context, model);
  const auto elements = model.seqlen * model.heads_q * model.head_dim;
  const auto add = [&](const std::string& name, const Runner& runner) {
    Row row;
    row.name = name;
    row.time = runner.time(turn);
    row.rate = flops / row.time.us * 1e-3;
    row.unit = "GFLOP/s";
    return row;
  };
  report.add(add(prefix + "exact" + suffix, exact));
  for (size_t i = 0; i < wanted.size(); ++i) {
    Row row = add(prefix + wanted[i].name + suffix, runners[i]);
    row.error = relative_error(runners[i], exact, model.windows[0].size(), elements);
    row.peer = "own-exact";
    row.peer_us = exact.time(turn).us;
    row.details = runners[i].details(row.peer_us, f32_us);
    report.add(row);
  }
}

ModelAttention random_attention(int64_t seqlen) {
  ModelAttention model = {seqlen, 2, 1, 128, ADAATTN_DTYPE_F32, {}};
  std::mt19937_64 engine(1);
  std::normal_distribution<float> normal;
  const auto fill = [&](int64_t heads) {
    std::vector<char> data(static_cast<size_t>(seqlen * heads * model.head_dim) * sizeof(float));
    for (int64_t i = 0; i < seqlen * heads * model.head_dim; ++i)
      reference::store(data.data(), model.dtype, i, normal(engine));
    return data;
  };
  model.windows.resize(1);
  model.windows[0].push_back({fill(2), fill(1), fill(1)});
  return model;
}

}  // namespace

void run_cpu_adaptive(Report& report) {
  adaattn_device_info_t info;
  info.struct_size = sizeof info;
  Status(adaattn_device_info(ADAATTN_DEVICE_CPU, 0, &info)).or_throw();
  report.set_device(std::string(info.name) + " (" + info.isa + ")");
  const int threads = std::min(info.compute_units, 2);
  const std::string suffix = "/t" + std::to_string(threads);
  for (const NamedType& type : kTypes) {
    const std::string prefix = std::string("model/") + type.name + "/s" + std::to_string(kContext) + "/";
    const auto wanted = [&](const NamedPolicy& p) { return report.wants(prefix + p.name + suffix); };
    if (std::none_of(std::begin(kPolicies), std::end(kPolicies), wanted)) continue;
    compare(report, capture_attention(ADAATTN_BENCH_MODEL, kContext, kWindows, type.dtype, threads), prefix, suffix,
            threads, kWindows, type.turns, type.least);
  }
  compare(report, random_attention(kContext), "random/f32/s" + std::to_string(kContext) + "/", suffix, threads,
          kLookedAtEvery, 3, ADAATTN_PRECISION_DEFAULT);
}

}  // namespace adaattn::bench
