// The stages of adaptive attention on Hopper, below the C API, one after the other and each by itself: bases and means,
// statistics, levels and choices, masks and lists, the walks by class, the tally. Warm: the L2 cache as the run before
// left it; cold: overwritten.
#include <cuda_bf16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "adaptive/analyze.h"
#include "adaptive/sample.h"
#include "adaptive/tile_tally.h"
#include "attend/sm90/walk.h"
#include "cuda_call.h"
#include "hopper_call.h"
#include "model_attention.h"

namespace adaattn::bench {
namespace {

constexpr int64_t kD = 128;

struct StageCase {
  const char* name;
  int64_t batch, heads_q, heads_kv, seqlen;
};

struct Setting {
  double mass;
  bool far_field;
  decide::RankMode rank_mode;
  double peak = 0;  // share of a cell that keeps its tile; 0: none does
};

class Stages {
 public:
  // model: of one window, whose layers are taken as the sequences of the batch; null: normally distributed numbers.
  Stages(const StageCase& c, const ModelAttention* model) : c_(c) {
    const size_t q_bytes = static_cast<size_t>(c.seqlen * c.heads_q * kD) * 2,
                 kv_bytes = static_cast<size_t>(c.seqlen * c.heads_kv * kD) * 2;
    const auto batch = static_cast<size_t>(c.batch);
    const auto make = [&](size_t bytes, std::vector<char> LayerOperands::*part, uint64_t seed) {
      auto buffer = model != nullptr ? std::make_unique<CudaBuffer>(bytes * batch)
                                     : std::make_unique<CudaBuffer>(bytes * batch, ADAATTN_DTYPE_BF16, seed);
      for (size_t b = 0; b < batch && model != nullptr; ++b) {
        const std::vector<LayerOperands>& layers = model->windows[0];
        check(cudaMemcpy(static_cast<char*>(buffer->data()) + b * bytes,
                         (layers[b * layers.size() / batch].*part).data(), bytes, cudaMemcpyHostToDevice));
      }
      return buffer;
    };
    q_ = make(q_bytes, &LayerOperands::q, 1);
    k_ = make(kv_bytes, &LayerOperands::k, 2);
    v_ = make(kv_bytes, &LayerOperands::v, 3);
    o_ = std::make_unique<CudaBuffer>(q_bytes * batch);
    counters_ = std::make_unique<CudaBuffer>(8);
    args_.p = hopper_params({c.batch, c.heads_q, c.heads_kv, c.seqlen, kD, true}, q_->data(), k_->data(), v_->data(),
                            o_->data());
    args_.scale_log2 = args_.p.scale * 1.4426950408889634f;
  }

  void set(const Setting& x) {
    adaattn::Problem problem;
    problem.max_batch = c_.batch;
    problem.heads_q = c_.heads_q;
    problem.heads_kv = c_.heads_kv;
    problem.d_qk = problem.d_v = kD;
    problem.max_seqlen_q = problem.max_seqlen_k = c_.seqlen;
    decide::Options& o = problem.adaptive;
    o.policy = decide::Policy::kCustom;
    o.tolerance = 10;
    o.min_level = decide::level_for_mass(x.mass);
    o.tiles = true;
    o.far_field = x.far_field;
    o.rank_mode = x.rank_mode;
    args_.options = o;
    args_.keep_peak = static_cast<uint32_t>(std::lround(x.peak * (1 << 24)));
    args_.shape = cuda::table_shape(problem, 0);
    const cuda::TableShape& s = args_.shape;
    args_.costs = cuda::device_costs(s, o);
    workspace_ = std::make_unique<CudaBuffer>(cuda::analyze_bytes(s));
    args_.tables = cuda::analyze_layout(s, workspace_->data());
    const auto units = static_cast<size_t>(s.batch * s.heads_kv), heads = static_cast<size_t>(s.batch * s.heads_q);
    basis_ = std::make_unique<CudaBuffer>(cuda::state_basis_doubles(s) * sizeof(double));
    warm_ = std::make_unique<CudaBuffer>(units * sizeof(int32_t));
    calls_ = std::make_unique<CudaBuffer>(sizeof(unsigned long long));
    outlook_ = std::make_unique<CudaBuffer>(sizeof(unsigned long long));
    args_.state = {};
    args_.state.basis = static_cast<double*>(basis_->data());
    args_.state.warm = static_cast<int32_t*>(warm_->data());
    args_.state.calls = static_cast<unsigned long long*>(calls_->data());
    far_share_ = std::make_unique<CudaBuffer>(heads * static_cast<size_t>(s.wave_tiles) * cuda::sm90::kWalkShares * 4);
    tallies_ = std::make_unique<CudaBuffer>(heads * sizeof(cuda::HeadTally));
    totals_ = std::make_unique<CudaBuffer>(2 * sizeof(cuda::TileTotals));
    ctas_ = std::make_unique<CudaBuffer>(sizeof(uint32_t));
  }

  void sample(cudaStream_t s) { cuda::sample(args_, s); }
  void statistics(cudaStream_t s) { cuda::tile_statistics(args_, s); }
  void levels(cudaStream_t s) { cuda::decide_heads(args_, s); }
  void schedule(cudaStream_t s) { cuda::write_schedule(args_, 0, s); }
  void walk(cudaStream_t s) {
    cuda::sm90::WalkCall call;
    call.p = args_.p;
    call.tables = cuda::tables_of(args_, 0);
    call.far_field = args_.options.far_field;
    call.far_share = call.far_field ? static_cast<float*>(far_share_->data()) : nullptr;
    call.counters = static_cast<uint32_t*>(counters_->data());
    call.multiprocessors = multiprocessors();
    for (int c = 0; c < decide::kRankClasses; ++c) {
      if (c != 0 && decide::rank_of_class(c) > args_.shape.max_rank) continue;
      call.rank_class = c;
      check(cuda::sm90::launch_walk(call, s));
    }
  }
  void tally(cudaStream_t s) {
    cuda::TallyTargets targets;
    targets.heads = static_cast<cuda::HeadTally*>(tallies_->data());
    targets.totals = static_cast<cuda::TileTotals*>(totals_->data());
    targets.newest = targets.totals + 1;
    targets.ctas = static_cast<uint32_t*>(ctas_->data());
    targets.outlook = static_cast<unsigned long long*>(outlook_->data());
    const float* far = args_.options.far_field ? static_cast<float*>(far_share_->data()) : nullptr;
    check(cuda::launch_tally(args_, 0, {far}, targets, {}, nullptr, true, s));
  }
  void all(cudaStream_t s) {
    sample(s);
    statistics(s);
    levels(s);
    schedule(s);
    walk(s);
    tally(s);
  }
  void exact(cudaStream_t s) {
    const ExactCall call = exact_call("sm90_forward_bf16_d128_masked", args_.p, counters_->data());
    check(call.kernel->launch(call.args, s));
  }

  void report(const char* input, const Setting& x) {
    set(x);
    all(nullptr);
    check(cudaDeviceSynchronize());
    check(cudaMemset(totals_->data(), 0, totals_->bytes()));
    all(nullptr);
    check(cudaDeviceSynchronize());
    cuda::TileTotals t;
    check(cudaMemcpy(&t, totals_->data(), sizeof t, cudaMemcpyDeviceToHost));
    const auto time = [&](void (Stages::*stage)(cudaStream_t), bool cold) {
      return measure_on_device([&](cudaStream_t s) { (this->*stage)(s); }, cold).us;
    };
    const double exact = time(&Stages::exact, false);
    std::printf(
        "%s %s mass %.2f peak %.4f far %d rank %d: kept %.3f, heads %llu dense %llu of low rank %llu; exact %.0f us\n",
        c_.name, input, x.mass, x.peak, x.far_field, static_cast<int>(x.rank_mode),
        static_cast<double>(t.kept) / static_cast<double>(t.tiles), static_cast<unsigned long long>(t.heads),
        static_cast<unsigned long long>(t.heads_dense), static_cast<unsigned long long>(t.heads_low_rank), exact);
    constexpr std::pair<const char*, void (Stages::*)(cudaStream_t)> kStages[] = {
        {"sample", &Stages::sample}, {"statistics", &Stages::statistics},
        {"levels", &Stages::levels}, {"schedule", &Stages::schedule},
        {"walk", &Stages::walk},     {"tally", &Stages::tally},
        {"all", &Stages::all}};
    for (const auto& [name, stage] : kStages) {
      const double warm = time(stage, false), cold = time(stage, true);
      std::printf("  %-10s %7.1f warm %7.1f cold  %.4f of exact\n", name, warm, cold, warm / exact);
    }
    std::fflush(stdout);
  }

 private:
  StageCase c_;
  cuda::AnalyzeArgs args_;
  std::unique_ptr<CudaBuffer> q_, k_, v_, o_, counters_, workspace_, basis_, warm_, far_share_, tallies_, totals_;
  std::unique_ptr<CudaBuffer> calls_, outlook_, ctas_;
};

// One run of everything, for a profiler.
void run_once(const StageCase& c, const Setting& x) {
  Stages stages(c, nullptr);
  stages.set(x);
  for (int i = 0; i < 2; ++i) stages.all(nullptr);
  check(cudaDeviceSynchronize());
}

}  // namespace
}  // namespace adaattn::bench

int main(int argc, char** argv) {
  using namespace adaattn::bench;
  using adaattn::decide::RankMode;
  adaattn::cuda::sm90::prepare_walk();
  adaattn::cuda::prepare_analyze();
  const StageCase cases[] = {
      {"B4 H6/2 16k", 4, 6, 2, 16384}, {"B4 H6/2 8k", 4, 6, 2, 8192}, {"B4 H16/16 8k", 4, 16, 16, 8192}};
  if (argc > 1 && std::strcmp(argv[1], "once") == 0) {
    run_once(cases[0], {0.9, true, RankMode::kOff});
    return 0;
  }
  const int threads = argc > 1 ? std::atoi(argv[1]) : 8;
  for (const StageCase& c : cases) {
    {
      Stages random(c, nullptr);
      random.report("random", {0.9, true, RankMode::kOff});
    }
    if (c.heads_kv != 2) continue;
    const ModelAttention model = capture_attention(ADAATTN_BENCH_MODEL, c.seqlen, 1, ADAATTN_DTYPE_BF16, threads);
    Stages real(c, &model);
    for (const bool far_field : {false, true}) {
      real.report("model", {0.9, far_field, RankMode::kOff});
      for (const double peak : {0.002, 0.004, 0.008}) real.report("model", {0.7, far_field, RankMode::kOff, peak});
    }
    real.report("model", {0.9, true, RankMode::kEnergy});
  }
}
