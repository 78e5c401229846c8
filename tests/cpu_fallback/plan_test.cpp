// What a plan promises before it runs, and how a call is cut: workspace, items, repeatability.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "backend.h"
#include "cpu_fallback/attend/kernels.h"
#include "cpu_fallback/isa/registry.h"

namespace adaattn::cpu {
namespace {

// A call over contiguous f32 tensors [batch, seqlen, heads, d].
struct Call {
  int64_t batch, heads_q, heads_kv, seqlen_q, seqlen_k, d;
  bool causal = false;
  int64_t window_left = -1;
  std::vector<float> q, k, v, o, lse;

  Call(int64_t b, int64_t hq, int64_t hkv, int64_t sq, int64_t sk, int64_t dim)
      : batch(b), heads_q(hq), heads_kv(hkv), seqlen_q(sq), seqlen_k(sk), d(dim) {
    std::mt19937 engine(42);
    std::normal_distribution<float> normal;
    for (auto* x : {&q, &k, &v}) {
      x->resize(static_cast<size_t>(x == &q ? b * sq * hq * dim : b * sk * hkv * dim));
      for (float& e : *x) e = normal(engine);
    }
    o.assign(q.size(), std::nanf(""));
    lse.assign(static_cast<size_t>(b * hq * sq), std::nanf(""));
  }

  Problem problem() const {
    Problem p;
    p.max_batch = batch;
    p.max_seqlen_q = seqlen_q;
    p.max_seqlen_k = seqlen_k;
    p.heads_q = heads_q;
    p.heads_kv = heads_kv;
    p.d_qk = p.d_v = d;
    p.dtype_q = p.dtype_kv = p.dtype_o = Dtype::kF32;
    p.want_lse = true;
    return p;
  }

  AttnParams params() {
    AttnParams p;
    const auto view = [&](std::vector<float>& x, int64_t s, int64_t h) {
      return Operand{x.data(), s * h * d, h * d, d, Dtype::kF32};
    };
    p.q = view(q, seqlen_q, heads_q);
    p.o = view(o, seqlen_q, heads_q);
    p.k = view(k, seqlen_k, heads_kv);
    p.v = view(v, seqlen_k, heads_kv);
    p.lse = {lse.data(), heads_q * seqlen_q, 1, seqlen_q, Dtype::kF32};
    p.batch = batch;
    p.heads_q = heads_q;
    p.heads_kv = heads_kv;
    p.d_qk = p.d_v = d;
    p.seqlen_q = seqlen_q;
    p.seqlen_k = seqlen_k;
    p.total_q = batch * seqlen_q;
    p.total_k = batch * seqlen_k;
    p.scale = 1 / std::sqrt(static_cast<float>(d));
    if (causal) p.window_right = 0;
    p.window_left = window_left;
    return p;
  }

  // With exactly the promised workspace, misaligned and fenced.
  void run(adaattn_isa_t isa, int32_t threads, const Problem& problem, int32_t threads_at_run = 0) {
    BackendConfig config;
    config.isa = isa;
    config.num_threads = threads;
    const auto backend = make_cpu_backend(config);
    const auto plan = backend->make_plan(problem);
    if (threads_at_run != 0) backend->set_option(ADAATTN_OPTION_NUM_THREADS, threads_at_run);
    const size_t bytes = plan->info().workspace_bytes;
    std::vector<unsigned char> workspace(bytes + 2, 0xa5);
    plan->execute(params(), workspace.data() + 1, bytes, nullptr);
    EXPECT_EQ(workspace.front(), 0xa5);
    EXPECT_EQ(workspace.back(), 0xa5);
  }
};

std::vector<adaattn_isa_t> usable_isas() {
  std::vector<adaattn_isa_t> list;
  for (adaattn_isa_t isa : compiled_isa_list())
    if (isa_available(isa)) list.push_back(isa);
  return list;
}

TEST(Plan, ResultsDoNotDependOnThreadsOrMaxima) {
  const Call shapes[] = {{2, 4, 2, 300, 700, 64}, {1, 8, 2, 1, 2100, 64}, {3, 6, 6, 5, 1100, 40}};
  for (adaattn_isa_t isa : usable_isas())
    for (Call call : shapes)
      for (bool causal : {false, true}) {
        call.causal = causal;
        call.run(isa, 1, call.problem());
        const std::vector<float> o = call.o, lse = call.lse;
        for (float x : o) ASSERT_TRUE(std::isfinite(x));
        Problem larger = call.problem();
        larger.max_batch += 3;
        larger.max_seqlen_q += 500;
        larger.max_seqlen_k += 3000;
        for (int32_t threads : {2, 5}) {
          for (const Problem& problem : {call.problem(), larger}) {
            call.o.assign(o.size(), std::nanf(""));
            call.run(isa, threads, problem);
            EXPECT_EQ(call.o, o) << isa_name(isa) << ", " << threads << " threads";
            EXPECT_EQ(call.lse, lse) << isa_name(isa) << ", " << threads << " threads";
          }
        }
        // More threads than the plan's workspace was made for.
        call.o.assign(o.size(), std::nanf(""));
        call.run(isa, 1, call.problem(), 4);
        EXPECT_EQ(call.o, o) << isa_name(isa);
      }
}

TEST(Plan, NanInTheFutureLeavesThePastBitIdentical) {
  for (adaattn_isa_t isa : usable_isas())
    for (int64_t queries : {int64_t{6}, int64_t{400}}) {
      Call call(1, 2, 1, queries, 400, 64);
      call.causal = true;
      call.run(isa, 2, call.problem());
      const std::vector<float> clean = call.o;
      // Keys past the first half of the queries turn into NaN and infinity.
      const int64_t half = queries / 2, first_key = 400 - queries + half;
      for (size_t i = static_cast<size_t>(first_key * 64); i < call.k.size(); ++i) {
        call.k[i] = std::nanf("");
        call.v[i] = i % 2 == 0 ? std::nanf("") : std::numeric_limits<float>::infinity();
      }
      call.run(isa, 2, call.problem());
      const size_t row = 2 * 64;
      for (size_t i = 0; i < static_cast<size_t>(half) * row; ++i) ASSERT_EQ(call.o[i], clean[i]) << i;
      for (size_t i = static_cast<size_t>(half) * row; i < clean.size(); ++i) ASSERT_TRUE(std::isnan(call.o[i])) << i;
    }
}

TEST(Plan, AWindowOverSeveralSplitsCountsEachKeyOnce) {
  for (adaattn_isa_t isa : usable_isas())
    for (int64_t window = 500; window < 520; ++window) {
      Call call(1, 2, 1, 1, 3 * kSplitKeys - 7, 32);
      std::fill(call.k.begin(), call.k.end(), 0.0f);  // every score is 0, the LSE ln of the number of keys
      call.window_left = window;
      call.run(isa, 2, call.problem());
      for (float lse : call.lse)
        ASSERT_NEAR(lse, std::log(static_cast<double>(window + 1)), 2e-6) << isa_name(isa) << ", window " << window;
    }
}

TEST(Plan, FewRowsPerKvHeadAreDecoded) {
  BackendConfig config;
  const auto backend = make_cpu_backend(config);
  Problem p = Call(1, 8, 2, 1, 4096, 64).problem();
  const PlanInfo decode = backend->select(p);
  EXPECT_EQ(decode.kernel.rfind("decode", 0), 0u) << decode.kernel;
  EXPECT_EQ(decode.splits, 4096 / kSplitKeys);
  p.max_seqlen_q = 1024;
  const PlanInfo prefill = backend->select(p);
  EXPECT_EQ(prefill.kernel.rfind("prefill", 0), 0u) << prefill.kernel;
  EXPECT_EQ(prefill.splits, 1);
}

TEST(Plan, WorkspaceDoesNotGrowWithTheSquareOfTheLength) {
  BackendConfig config;
  config.num_threads = 2;
  const auto backend = make_cpu_backend(config);
  Problem p = Call(1, 8, 8, 1, 1, 128).problem();
  p.max_seqlen_q = p.max_seqlen_k = 4096;
  const size_t small = backend->select(p).workspace_bytes;
  p.max_seqlen_q = p.max_seqlen_k = 65536;
  EXPECT_LE(backend->select(p).workspace_bytes, 16 * small);
}

TEST(Plan, CountersAreExact) {
  BackendConfig config;
  const auto backend = make_cpu_backend(config);
  Call call(2, 4, 2, 7, 10, 16);
  call.causal = true;
  const auto plan = backend->make_plan(call.problem());
  std::vector<char> workspace(plan->info().workspace_bytes);
  for (int i = 0; i < 3; ++i) plan->execute(call.params(), workspace.data(), workspace.size(), nullptr);
  const PlanCounters counters = plan->counters(true, true);
  EXPECT_EQ(counters.calls, 3u);
  EXPECT_EQ(counters.query_rows, 3u * 2 * 4 * 7);
  EXPECT_EQ(counters.score_pairs, 3u * 2 * 4 * (4 + 5 + 6 + 7 + 8 + 9 + 10));
  EXPECT_EQ(counters.violation.field, Field::kNone);
  EXPECT_EQ(plan->counters(true, false).calls, 0u);
}

}  // namespace
}  // namespace adaattn::cpu
