// Calls of adaptive plans that find all of their units dense: the exact kernel computes them, whose blocks are not the
// walk's, and the device says which it is.
#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "attend/plan.h"
#include "attend/select.h"
#include "attend/sm90/dense_round.h"
#include "core/validate.h"
#include "gpu/kernel_rows.h"
#include "gpu/tile_plans.h"

namespace adaattn::test {
namespace {

class DenseRounds : public OnHopper {};

// Of more than two tiles of 192 rows for each multiprocessor.
AttentionCase wide_case() {
  AttentionCase c = causal_case(2048);
  c.heads_q = 16;
  c.heads_kv = 4;
  return c;
}

AttentionData random_data(const AttentionCase& c) { return {c, kBf16All, run_seed(), ADAATTN_OUTPUT_LSE}; }

AttentionData by_exact_plan(const Context& context, const AttentionData& data) {
  AttentionData exact = with_own_outputs(data);
  const AdaptivePlan plan(context, data.desc, adaptive_desc(ADAATTN_POLICY_EXACT));
  EXPECT_EQ(std::string(plan.info().kernel), "sm90_forward_bf16_d128_tall");
  execute(plan, exact);
  return exact;
}

// The call that finds its units dense walks them; the exact kernel computes the calls after it, and those after a look
// that found something else walk again.
TEST_F(DenseRounds, StartInTheCallAfterTheLookAndEndLikewise) {
  const Context context(kCuda);
  AttentionData random = random_data(wide_case()), changed = structured(wide_case());
  const AttentionData exact_random = by_exact_plan(context, random), exact_changed = by_exact_plan(context, changed);
  const AdaptivePlan plan(context, random.desc, adaptive_desc(ADAATTN_POLICY_SPEED));
  const uint64_t heads = 2 * 16;
  const auto call = [&](AttentionData& data, const AttentionData& exact, bool dense, bool same, int number) {
    SCOPED_TRACE("call " + std::to_string(number));
    const adaattn_plan_stats_t before = plan.stats();
    ASSERT_NO_FATAL_FAILURE(execute(plan, data));
    const adaattn_plan_stats_t after = plan.stats();
    EXPECT_EQ(after.heads_dense - before.heads_dense == heads, dense);
    EXPECT_EQ(after.tiles - before.tiles, causal_tiles(wide_case()));
    EXPECT_EQ(static_cast<bool>(same_outputs(data, exact)), same);
    if (!dense) return;
    EXPECT_EQ(after.tiles_kept - before.tiles_kept, after.tiles - before.tiles);
    if (number < 2) {
      EXPECT_EQ(check_maps(plan, data), 0);
    }
    for (int64_t h = 0; h < 16 && !same; h += 5) EXPECT_LE(head_error(data, exact.o, 0, h), 1e-3);
  };
  for (int i = 0; i < 12; ++i) ASSERT_NO_FATAL_FAILURE(call(random, exact_random, true, i > 0, i));
  // Looked at in calls 0 and 8, so next in call 16, for call 17.
  for (int i = 12; i < 17; ++i) ASSERT_NO_FATAL_FAILURE(call(changed, exact_changed, true, true, i));
  for (int i = 17; i < 19; ++i) ASSERT_NO_FATAL_FAILURE(call(changed, exact_changed, false, false, i));
  for (int i = 19; i < 22; ++i) ASSERT_NO_FATAL_FAILURE(call(random, exact_random, true, i > 19, i));
  EXPECT_GT(plan.stats().seconds_attend, 0);
}

// Replays launch everything and leave it to the device; a host that waits knows before it launches.
TEST_F(DenseRounds, OfReplaysAreThoseOfCalls) {
  const Context context(kCuda);
  const AttentionData random = random_data(wide_case()), changed = structured(wide_case());
  AttentionData mixed = random_data(wide_case());  // its second sequence is structured
  for (auto [to, from] : {std::pair{&mixed.q, &changed.q}, {&mixed.k, &changed.k}, {&mixed.v, &changed.v}})
    to->for_each([to = to, from = from](const std::vector<int64_t>& index, int64_t) {
      if (index[0] == 1) to->set(index, from->get(index));
    });
  const AttentionData exact_random = by_exact_plan(context, random), exact_changed = by_exact_plan(context, changed);
  AttentionData data = random_data(wide_case());
  const adaattn_adaptive_desc_t adaptive = adaptive_desc(ADAATTN_POLICY_QUALITY);
  const AdaptivePlan captured(context, data.desc, adaptive), eager(context, data.desc, adaptive);
  ReplayedCall replay(captured, data);
  // The first sequence's units are looked at in calls 0, 8 and 16, the second's in calls 0 to 3, 11 and 19.
  for (int call = 0; call < 25; ++call) {
    SCOPED_TRACE("call " + std::to_string(call));
    const bool is_random = (call >= 3 && call < 13) || call >= 23;
    if (call == 0 || call == 3 || call == 13 || call == 23)
      copy_inputs(is_random ? random : call < 3 ? mixed : changed, data);
    AttentionData again = with_own_outputs(data);
    ASSERT_NO_FATAL_FAILURE(execute(eager, again));
    replay.run();
    EXPECT_TRUE(same_outputs(data, again));
    const bool exact = (call > 3 && call < 17) || call == 24;
    if (call < 3) continue;
    EXPECT_EQ(static_cast<bool>(same_outputs(data, is_random ? exact_random : exact_changed)), exact);
  }
  const adaattn_plan_stats_t a = captured.stats(), b = eager.stats();
  EXPECT_EQ(a.heads_dense, b.heads_dense);
  EXPECT_EQ(a.tiles_kept, b.tiles_kept);
  EXPECT_EQ(a.dropped_mass_sum, b.dropped_mass_sum);
}

// Calls that are launched before the host can know what the earlier ones found.
TEST_F(DenseRounds, DoNotDependOnWhatTheHostKnows) {
  const Context context(kCuda);
  const AttentionData random = random_data(wide_case()), changed = structured(wide_case());
  for (const AttentionData* from : {&random, &changed}) {
    AttentionData data = with_own_outputs(*from);
    const AdaptivePlan waits(context, data.desc, adaptive_desc(ADAATTN_POLICY_BALANCED));
    const AdaptivePlan ahead(context, data.desc, adaptive_desc(ADAATTN_POLICY_BALANCED));
    const DeviceMemory workspace(workspace_size(ahead));
    for (const int calls : {2, 10}) {
      SCOPED_TRACE(calls);
      for (int i = 0; i < calls; ++i) ASSERT_NO_FATAL_FAILURE(execute(waits, data));
      AttentionData again = with_own_outputs(data);
      again.upload(kDevice);
      const adaattn_io_t io = again.io(kDevice);
      for (int i = 0; i < calls; ++i)
        ASSERT_TRUE(succeeded(adaattn_plan_execute(ahead.get(), &io, workspace.data(), workspace.bytes(), nullptr)));
      require(cudaDeviceSynchronize());
      again.download(kDevice);
      EXPECT_TRUE(same_outputs(data, again));
      const bool exact = static_cast<bool>(same_outputs(again, by_exact_plan(context, *from)));
      EXPECT_EQ(exact, from == &random);
      EXPECT_EQ(waits.stats().heads_dense, ahead.stats().heads_dense);
      EXPECT_EQ(waits.stats().tiles_kept, ahead.stats().tiles_kept);
    }
  }
}

// Of 1.6 tiles of 192 rows for each multiprocessor, 2.4 of 128.
TEST_F(DenseRounds, OfCallsWithoutAMask) {
  const Context context(kCuda);
  AttentionCase c = wide_case();
  c.name = "Full";
  c.batch = 1;
  c.heads_q = 20;
  c.mask = ADAATTN_MASK_NONE;
  AttentionData data = random_data(c);
  const AttentionData exact = by_exact_plan(context, data);
  const AdaptivePlan waits(context, data.desc, adaptive_desc(ADAATTN_POLICY_SPEED));
  const AdaptivePlan captured(context, data.desc, adaptive_desc(ADAATTN_POLICY_SPEED));
  AttentionData again = with_own_outputs(data);
  ReplayedCall replay(captured, again);
  for (int call = 0; call < 3; ++call) {
    ASSERT_NO_FATAL_FAILURE(execute(waits, data));
    EXPECT_EQ(static_cast<bool>(same_outputs(data, exact)), call > 0) << call;
    replay.run();
    EXPECT_TRUE(same_outputs(data, again)) << call;
  }
  EXPECT_EQ(waits.stats().heads_dense, 3u * 20);
}

// The host never knows the lengths, and fewer sequences than before are other units.
TEST_F(DenseRounds, OfLengthsOnTheDeviceAndOfFewerSequences) {
  const Context context(kCuda);
  AttentionCase packed = wide_case();
  packed.name = "Packed";
  packed.layout_q = packed.layout_kv = ADAATTN_LAYOUT_THD;
  packed.lens_q = packed.lens_k = {2048, 1999};
  AttentionData data = random_data(packed);
  const AttentionData exact = by_exact_plan(context, data);
  const AdaptivePlan plan(context, data.desc, adaptive_desc(ADAATTN_POLICY_SPEED));
  for (int call = 0; call < 10; ++call) {
    ASSERT_NO_FATAL_FAILURE(execute(plan, data));
    EXPECT_EQ(static_cast<bool>(same_outputs(data, exact)), call > 0) << call;
  }
  EXPECT_EQ(plan.stats().heads_dense, 10u * 2 * 16);

  AttentionCase one = wide_case();
  one.batch = 1;
  one.heads_q = 32;
  one.heads_kv = 8;
  AttentionCase two = one;
  two.batch = 2;
  AttentionData both = structured(two), first = random_data(one);
  const AttentionData exact_first = by_exact_plan(context, first);
  for (const bool captured : {false, true}) {
    SCOPED_TRACE(captured);
    const AdaptivePlan changing(context, both.desc, adaptive_desc(ADAATTN_POLICY_SPEED));
    ASSERT_NO_FATAL_FAILURE(execute(changing, both));
    std::unique_ptr<ReplayedCall> replay;
    if (captured) replay = std::make_unique<ReplayedCall>(changing, first);
    for (int call = 0; call < 3; ++call) {
      if (captured)
        replay->run();
      else
        ASSERT_NO_FATAL_FAILURE(execute(changing, first));
      EXPECT_EQ(static_cast<bool>(same_outputs(first, exact_first)), call > 0) << call;
    }
    // The second sequence's units are not dense.
    AttentionData again = with_own_outputs(both);
    ASSERT_NO_FATAL_FAILURE(execute(changing, again));
    EXPECT_LT(changing.stats().heads_dense, 3u * 32 + 2 * 32);
  }
}

// O and the LSE of a row by the tensors' own numbers.
struct ExactRow {
  std::vector<double> o;
  double lse;
};
ExactRow exact_row(const AttentionData& data, int64_t head, int64_t row) {
  const int64_t d = data.desc.head_dim_qk, kv = head / (data.desc.heads_q / data.desc.heads_kv);
  const double scale = 1 / std::sqrt(static_cast<double>(d));
  std::vector<double> q(static_cast<size_t>(d)), scores;
  for (int64_t c = 0; c < d; ++c) q[static_cast<size_t>(c)] = data.q.get(data.query_index(0, row, head, c));
  for (int64_t j = 0; j <= row; ++j) {
    double sum = 0;
    for (int64_t c = 0; c < d; ++c) sum += q[static_cast<size_t>(c)] * data.k.get(data.key_index(0, j, kv, c));
    scores.push_back(scale * sum);
  }
  const double top = *std::max_element(scores.begin(), scores.end());
  double total = 0;
  ExactRow out{std::vector<double>(static_cast<size_t>(d)), 0};
  for (int64_t j = 0; j <= row; ++j) {
    const double weight = std::exp(scores[static_cast<size_t>(j)] - top);
    total += weight;
    for (int64_t c = 0; c < d; ++c) out.o[static_cast<size_t>(c)] += weight * data.v.get(data.key_index(0, j, kv, c));
  }
  for (double& x : out.o) x /= total;
  out.lse = top + std::log(total);
  return out;
}

// Random input at lengths where it is to cost no more than the exact plan, and that plan's rows against the oracle.
TEST_F(DenseRounds, OfLongSequences) {
  const Context context(kCuda);
  for (const auto& [seqlen, heads, heads_kv] :
       {std::array<int64_t, 3>{8192, 8, 2}, std::array<int64_t, 3>{32768, 2, 1}}) {
    AttentionCase c = causal_case(seqlen);
    c.batch = 1;
    c.heads_q = heads;
    c.heads_kv = heads_kv;
    SCOPED_TRACE(describe(c));
    AttentionData data = random_data(c);
    const AttentionData exact = by_exact_plan(context, data);
    for (const int64_t row : {int64_t{0}, int64_t{63}, int64_t{64}, seqlen / 2 + 5, seqlen - 193, seqlen - 1})
      for (const int64_t head : {int64_t{0}, heads - 1}) {
        const ExactRow want = exact_row(data, head, row);
        double wrong = 0, all = 0;
        for (int64_t i = 0; i < 128; ++i) {
          const double x = want.o[static_cast<size_t>(i)];
          wrong += std::pow(exact.o.get(exact.query_index(0, row, head, i)) - x, 2);
          all += x * x;
        }
        EXPECT_LE(std::sqrt(wrong / all), 4e-3) << "row " << row << " head " << head;
        EXPECT_NEAR(exact.lse.get({0, head, row}), want.lse, 1e-3) << "row " << row << " head " << head;
      }
    const AdaptivePlan plan(context, data.desc, adaptive_desc(ADAATTN_POLICY_BALANCED));
    for (int call = 0; call < 10; ++call) {
      ASSERT_NO_FATAL_FAILURE(execute(plan, data));
      EXPECT_EQ(static_cast<bool>(same_outputs(data, exact)), call > 0) << call;
    }
    EXPECT_EQ(plan.stats().heads_dense, static_cast<uint64_t>(10 * heads));
  }
}

// The kernel by itself, several tiles for each CTA: the bits of the one that asks nothing, or nothing at all.
TEST_F(DenseRounds, ASmallOneLeavesAtOnceUnlessAllUnitsAreDense) {
  const cuda::AttendKernel* kernel = nullptr;
  for (const cuda::AttendKernel* row : rows({cuda::Phase::kForward}))
    if (cuda::sm90::has_dense_round(*row)) kernel = row;
  ASSERT_NE(kernel, nullptr);
  AttentionCase c = causal_case(450);
  AttentionData data = random_data(c);
  const Problem problem = problem_from(data.desc, Use::kAttention);
  cuda::prepare_kernel(*kernel);
  cuda::sm90::prepare_dense_round();
  data.poison_outputs();
  data.upload(kDevice);
  const adaattn_io_t io = data.io(kDevice);
  const AttnParams params = attention_from(problem, io, {ADAATTN_DEVICE_CUDA, 0, nullptr}, {});
  cuda::Launch launch{.kernel = kernel, .section = 3};
  launch.m_tiles = static_cast<int32_t>((params.seqlen_q + kernel->tile_q - 1) / kernel->tile_q);
  cuda::AttendArgs args = cuda::make_args(params, problem, launch, nullptr);
  const DeviceMemory counters(2 * sizeof(uint32_t)), units(600 * sizeof(int32_t));
  require(cudaMemset(counters.data(), 0, counters.bytes()));
  args.scheduler = static_cast<uint32_t*>(counters.data());
  args.multiprocessors = 3;
  require(kernel->launch(args, nullptr));
  require(cudaDeviceSynchronize());
  data.download(kDevice);
  const AttentionData expected = data;
  const auto run = [&](int count, int not_dense) {
    std::vector<int32_t> calls(600, 1);
    if (not_dense >= 0) calls[static_cast<size_t>(not_dense)] = 0;
    require(cudaMemcpy(units.data(), calls.data(), units.bytes(), cudaMemcpyDefault));
    AttentionData own = with_own_outputs(data);
    own.upload(kDevice);
    const adaattn_io_t own_io = own.io(kDevice);
    args.p = attention_from(problem, own_io, {ADAATTN_DEVICE_CUDA, 0, nullptr}, {});
    require(cuda::sm90::launch_dense_round(args, {static_cast<const int32_t*>(units.data()), count}, nullptr));
    require(cudaDeviceSynchronize());
    own.download(kDevice);
    return own;
  };
  const AttentionData untouched = with_own_outputs(data);
  EXPECT_TRUE(same_outputs(run(0, 0), expected));
  EXPECT_TRUE(same_outputs(run(600, -1), expected));
  EXPECT_TRUE(same_outputs(run(7, 7), expected));
  EXPECT_TRUE(same_outputs(run(600, 0), untouched));
  EXPECT_TRUE(same_outputs(run(600, 599), untouched));
  EXPECT_TRUE(same_outputs(run(1, -1), expected));
}

}  // namespace
}  // namespace adaattn::test
