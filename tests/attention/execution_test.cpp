// The same numbers however a call is executed: threads, hooks, workspaces, plans, repetition.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "attention/fixture.h"

namespace adaattn::test {
namespace {

// Shapes that several threads have to share, in each of the kernels.
std::vector<AttentionCase> shared_cases() {
  std::vector<AttentionCase> cases = invariant_cases();
  cases.push_back({.name = "OneHeadManyKeys", .seqlen_q = 1, .seqlen_k = 3000, .d_qk = 128});
  cases.push_back({.name = "Packed",
                   .heads_q = 3,
                   .heads_kv = 1,
                   .layout_q = ADAATTN_LAYOUT_THD,
                   .layout_kv = ADAATTN_LAYOUT_THD,
                   .mask = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT,
                   .lens_q = {300, 1, 0, 129},
                   .lens_k = {300, 900, 5, 129}});
  return cases;
}

class Execution : public OnEveryTarget {};
ADAATTN_ON_EVERY_TARGET(Execution);

TEST_P(Execution, ThreadCountsGiveTheSameBits) {
  for (const AttentionCase& c : shared_cases()) {
    for (const Dtypes& dtypes : uniform_dtypes()) {
      SCOPED_TRACE(describe(c) + dtypes.name);
      AttentionData one(c, dtypes, run_seed());
      run(Context(target(), 1), one);
      for (int32_t threads : {2, 5}) {
        AttentionData other = with_own_outputs(one);
        run(Context(target(), threads), other);
        EXPECT_TRUE(same_outputs(one, other)) << threads << " threads";
      }
    }
  }
}

TEST_P(Execution, ThreadCountMayChangeBetweenCalls) {
  const Context context(target(), 1);
  AttentionData one(shared_cases()[0], kF32All, run_seed());
  run(context, one);
  for (int64_t threads : {5, 2, 1, 3}) {
    ASSERT_TRUE(succeeded(adaattn_set_option(context.get(), ADAATTN_OPTION_NUM_THREADS, threads)));
    AttentionData other = with_own_outputs(one);
    run(context, other);
    EXPECT_TRUE(same_outputs(one, other)) << threads << " threads";
  }
}

struct ParallelFor {
  std::atomic<int> calls{0};
  std::atomic<int64_t> tasks{0};
};

void in_reverse(void* user, int64_t n, void (*task)(void*, int64_t), void* task_user) {
  auto* self = static_cast<ParallelFor*>(user);
  ++self->calls;
  self->tasks += n;
  for (int64_t i = n; i-- > 0;) task(task_user, i);
}

// Every task on a thread that has never run one before, three at a time.
void on_new_threads(void* user, int64_t n, void (*task)(void*, int64_t), void* task_user) {
  auto* self = static_cast<ParallelFor*>(user);
  ++self->calls;
  self->tasks += n;
  for (int64_t first = 0; first < n; first += 3) {
    std::vector<std::thread> threads;
    for (int64_t i = first; i < std::min(n, first + 3); ++i) threads.emplace_back([=] { task(task_user, i); });
    for (std::thread& thread : threads) thread.join();
  }
}

TEST_P(Execution, ParallelForHookMayRunTasksInAnyOrderOnAnyThread) {
  for (const auto hook : {in_reverse, on_new_threads}) {
    ParallelFor counts;
    adaattn_config_t config;
    ASSERT_EQ(adaattn_config_init(&config, sizeof config), ADAATTN_SUCCESS);
    config.isa = target().isa;
    config.num_threads = 4;
    config.parallel_for = hook;
    config.parallel_for_user = &counts;
    const Context hooked(config);
    for (const AttentionCase& c : shared_cases()) {
      SCOPED_TRACE(describe(c));
      AttentionData own(c, kF32All, run_seed());
      run(Context(target(), 1), own);
      AttentionData other = with_own_outputs(own);
      run(hooked, other);
      EXPECT_TRUE(same_outputs(own, other));
    }
    EXPECT_GT(counts.calls, 0);
    EXPECT_GT(counts.tasks, 0);
  }
}

TEST_P(Execution, WorkspaceContentsAndAlignmentDoNotMatter) {
  if (!kOnCpu) GTEST_SKIP() << "device workspaces are aligned; their contents are poisoned by the device's own tests";
  const Context context(target());
  for (const AttentionCase& c : shared_cases()) {
    SCOPED_TRACE(describe(c));
    AttentionData data(c, kBf16All, run_seed());
    const Plan plan(context, data.desc);
    const size_t bytes = plan.workspace_size();
    AttentionData own = with_own_outputs(data);
    ASSERT_TRUE(succeeded(plan.execute(own)));
    for (int poison : {0x00, 0xff, 0x7f}) {
      constexpr size_t kGuard = 64;
      for (size_t misalignment : {0, 1}) {
        std::vector<unsigned char> memory(bytes + misalignment + kGuard, static_cast<unsigned char>(poison));
        data.poison_outputs();
        const adaattn_io_t io = data.io();
        ASSERT_TRUE(succeeded(
            adaattn_plan_execute(plan.get(), &io, bytes ? memory.data() + misalignment : nullptr, bytes, nullptr)));
        EXPECT_TRUE(same_outputs(own, data)) << "poison " << poison << ", misalignment " << misalignment;
        for (size_t i = 0; i < kGuard; ++i)
          ASSERT_EQ(memory[bytes + misalignment + i], poison) << "written " << i << " bytes behind the workspace";
      }
    }
  }
}

TEST_P(Execution, RepeatedCallsGiveTheSameBits) {
  const Context context(target());
  for (const AttentionCase& c : shared_cases()) {
    AttentionData first(c, kF16All, run_seed());
    const Plan plan(context, first.desc);
    ASSERT_TRUE(succeeded(plan.execute(first)));
    for (int i = 0; i < 5; ++i) {
      AttentionData again = with_own_outputs(first);
      ASSERT_TRUE(succeeded(plan.execute(again)));
      EXPECT_TRUE(same_outputs(first, again));
    }
    EXPECT_EQ(plan.stats().calls, 6u);
  }
}

TEST_P(Execution, PlanAndOneCallGiveTheSameBits) {
  const Context context(target());
  for (const AttentionCase& c : shared_cases()) {
    AttentionData planned(c, kF32All, run_seed());
    ASSERT_TRUE(succeeded(Plan(context, planned.desc).execute(planned)));
    AttentionData one_call = with_own_outputs(planned);
    run(context, one_call);
    EXPECT_TRUE(same_outputs(planned, one_call));
    AttentionData again = with_own_outputs(planned);  // from the plan cache
    run(context, again);
    EXPECT_TRUE(same_outputs(planned, again));
    ASSERT_TRUE(succeeded(adaattn_set_option(context.get(), ADAATTN_OPTION_PLAN_CACHE_SIZE, 0)));
    AttentionData uncached = with_own_outputs(planned);
    run(context, uncached);
    EXPECT_TRUE(same_outputs(planned, uncached));
  }
}

TEST_P(Execution, APlanServesEverySizeUpToItsMaxima) {
  AttentionCase largest = {.name = "Largest",
                           .batch = 3,
                           .heads_q = 4,
                           .heads_kv = 2,
                           .seqlen_q = 200,
                           .seqlen_k = 400,
                           .d_qk = 40,
                           .mask = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT};
  const Context context(target());
  const Plan plan(context, make_desc(largest, kF32All));
  const size_t bytes = plan.workspace_size();
  const int64_t sizes[][3] = {{3, 200, 400}, {1, 1, 400}, {3, 1, 1}, {2, 129, 33}, {1, 0, 7}, {2, 5, 0}, {3, 4, 399}};
  for (const auto& size : sizes) {
    AttentionCase c = largest;
    c.batch = size[0];
    c.seqlen_q = size[1];
    c.seqlen_k = size[2];
    SCOPED_TRACE(describe(c));
    AttentionData data(c, kF32All, run_seed());
    const auto expected = reference::attention(data.desc, data.io());
    ASSERT_TRUE(succeeded(plan.execute(data)));
    EXPECT_TRUE(matches(data, expected, weights_of(target())));
    if (kOnCpu) {
      std::vector<unsigned char> memory(bytes + 1, 0xee);
      data.poison_outputs();
      const adaattn_io_t io = data.io();
      ASSERT_TRUE(succeeded(adaattn_plan_execute(plan.get(), &io, memory.data(), bytes, nullptr)));
      EXPECT_TRUE(matches(data, expected, weights_of(target())));
      EXPECT_EQ(memory[bytes], 0xee);
    }
  }
}

// Counts and checks what the library asks of the allocator hook.
struct Allocations {
  std::mutex mutex;
  std::map<void*, size_t> live;
  int count = 0;
  bool refuse = false;
};

void* hook_alloc(void* user, size_t bytes, size_t alignment, adaattn_stream_t) {
  auto* self = static_cast<Allocations*>(user);
  const std::lock_guard lock(self->mutex);
  if (self->refuse) return nullptr;
  ++self->count;
  void* memory = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  std::memset(memory, 0xff, bytes);
  self->live[memory] = bytes;
  return memory;
}

void hook_free(void* user, void* memory, size_t bytes, adaattn_stream_t) {
  auto* self = static_cast<Allocations*>(user);
  const std::lock_guard lock(self->mutex);
  const auto found = self->live.find(memory);
  if (found == self->live.end() || found->second != bytes) {
    ADD_FAILURE() << "freed " << bytes << " bytes that were never allocated so";
    return;
  }
  self->live.erase(found);
  std::free(memory);
}

TEST_P(Execution, WorkspacesComeFromTheAllocatorHookAndGoBack) {
  if (!kOnCpu) GTEST_SKIP() << "the hook of this test hands out host memory";
  Allocations allocations;
  adaattn_config_t config;
  ASSERT_EQ(adaattn_config_init(&config, sizeof config), ADAATTN_SUCCESS);
  config.isa = target().isa;
  config.num_threads = 2;
  config.alloc = hook_alloc;
  config.free = hook_free;
  config.alloc_user = &allocations;
  {
    const Context context(config);
    for (const AttentionCase& c : shared_cases()) {
      SCOPED_TRACE(describe(c));
      AttentionData data(c, kBf16All, run_seed());
      const auto expected = reference::attention(data.desc, data.io());
      const Plan plan(context, data.desc);
      const int before = allocations.count;
      ASSERT_TRUE(succeeded(plan.execute(data)));
      EXPECT_TRUE(matches(data, expected, weights_of(target())));
      if (plan.workspace_size() > 0) {
        EXPECT_GT(allocations.count, before);
        data.poison_outputs();
        const auto poisoned = data.o.bytes();
        allocations.refuse = true;
        EXPECT_EQ(plan.execute(data), ADAATTN_ERROR_OUT_OF_MEMORY);
        EXPECT_EQ(data.o.bytes(), poisoned) << "a refused call wrote to o";
        allocations.refuse = false;
        ASSERT_TRUE(succeeded(plan.execute(data)));
        EXPECT_TRUE(matches(data, expected, weights_of(target())));
      }
    }
  }
  EXPECT_TRUE(allocations.live.empty()) << allocations.live.size() << " allocations were not freed";
}

}  // namespace
}  // namespace adaattn::test
