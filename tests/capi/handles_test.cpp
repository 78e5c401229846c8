// Contexts and plans over the back-end that computes nothing: lifetimes, options, workspaces, cache, failing hooks,
// foreign exceptions, calls that overlap.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

#include "capi/call.h"
#include "capi/context.h"
#include "capi/fake_backend.h"
#include "core/error.h"

namespace adaattn::test {
namespace {

// Counts what is outstanding and fails the n-th request.
struct CountingHook {
  int calls = 0, fail_at = -1;
  std::set<void*> live;
  Allocator allocator() { return {alloc, free, this}; }

  static void* alloc(void* user, size_t bytes, size_t alignment, adaattn_stream_t) {
    auto& hook = *static_cast<CountingHook*>(user);
    if (hook.calls++ == hook.fail_at) return nullptr;
    void* data = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    hook.live.insert(data);
    return data;
  }
  static void free(void* user, void* data, size_t, adaattn_stream_t) {
    EXPECT_EQ(static_cast<CountingHook*>(user)->live.erase(data), 1u);
    std::free(data);
  }
};

class Handles : public testing::Test {
 protected:
  Handles() { context = new adaattn_context(make_fake_backend(state, hook.allocator())); }
  ~Handles() override {
    EXPECT_EQ(adaattn_destroy(context), ADAATTN_SUCCESS) << last_error();
    EXPECT_EQ(state->plans_alive, 0);
    EXPECT_TRUE(hook.live.empty());
  }
  adaattn_plan_t* make_plan(const Call& call) {
    adaattn_plan_t* plan = nullptr;
    EXPECT_EQ(adaattn_plan_create(context, &call.desc, nullptr, &plan), ADAATTN_SUCCESS) << last_error();
    return plan;
  }
  void expect_error(adaattn_status_t got, adaattn_status_t expected, const std::string& text) {
    EXPECT_EQ(got, expected);
    EXPECT_NE(last_error().find(text), std::string::npos) << last_error();
    if (expected < ADAATTN_ERROR_NOT_SUPPORTED) {
      EXPECT_NE(last_error().find("; accepted"), std::string::npos) << last_error();
    }
  }

  std::shared_ptr<FakeState> state = std::make_shared<FakeState>();
  CountingHook hook;
  adaattn_context_t* context;
};

TEST_F(Handles, ContextWithLivePlansIsNotDestroyed) {
  Call call;
  adaattn_plan_t* first = make_plan(call);
  adaattn_plan_t* second = make_plan(call);
  expect_error(adaattn_destroy(context), ADAATTN_ERROR_IN_USE, "context has 2 live plans");
  EXPECT_EQ(adaattn_plan_destroy(first), ADAATTN_SUCCESS);
  expect_error(adaattn_destroy(context), ADAATTN_ERROR_IN_USE, "context has 1 live plans");
  EXPECT_EQ(adaattn_plan_execute(second, &call.io, nullptr, 0, nullptr), ADAATTN_SUCCESS) << last_error();
  EXPECT_EQ(adaattn_plan_destroy(second), ADAATTN_SUCCESS);
  EXPECT_EQ(adaattn_destroy(context), ADAATTN_SUCCESS);
  context = nullptr;
}

TEST_F(Handles, NullHandlesAreNamedAndDestroyingNullIsFine) {
  Call call;
  EXPECT_EQ(adaattn_destroy(nullptr), ADAATTN_SUCCESS);
  EXPECT_EQ(adaattn_plan_destroy(nullptr), ADAATTN_SUCCESS);
  adaattn_plan_t* plan = nullptr;
  int64_t value = 0;
  size_t bytes = 0;
  adaattn_plan_info_t info = {};
  adaattn_plan_stats_t stats = {};
  constexpr auto kNull = ADAATTN_ERROR_NULL_POINTER;
  expect_error(adaattn_create(nullptr, nullptr), kNull, "context is NULL");
  expect_error(adaattn_set_option(nullptr, 1, 1), kNull, "context is NULL");
  expect_error(adaattn_get_option(nullptr, 1, &value), kNull, "context is NULL");
  expect_error(adaattn_get_option(context, 1, nullptr), kNull, "value is NULL");
  expect_error(adaattn_check_support(nullptr, &call.desc, nullptr, nullptr, 0), kNull, "context is NULL");
  expect_error(adaattn_plan_create(nullptr, &call.desc, nullptr, &plan), kNull, "context is NULL");
  expect_error(adaattn_plan_create(context, &call.desc, nullptr, nullptr), kNull, "plan is NULL");
  expect_error(adaattn_plan_workspace_size(nullptr, &bytes), kNull, "plan is NULL");
  expect_error(adaattn_plan_execute(nullptr, &call.io, nullptr, 0, nullptr), kNull, "plan is NULL");
  expect_error(adaattn_plan_get_info(nullptr, &info), kNull, "plan is NULL");
  expect_error(adaattn_plan_get_stats(nullptr, 0, &stats), kNull, "plan is NULL");
  expect_error(adaattn_attention(nullptr, &call.desc, nullptr, &call.io, nullptr), kNull, "context is NULL");
  plan = make_plan(call);
  expect_error(adaattn_plan_workspace_size(plan, nullptr), kNull, "bytes is NULL");
  expect_error(adaattn_plan_get_info(plan, nullptr), kNull, "info is NULL");
  expect_error(adaattn_plan_get_stats(plan, 0, nullptr), kNull, "stats is NULL");
  adaattn_plan_destroy(plan);
}

TEST_F(Handles, OptionsAreCheckedAndKept) {
  int64_t value = -1;
  ASSERT_EQ(adaattn_get_option(context, ADAATTN_OPTION_PLAN_CACHE_SIZE, &value), ADAATTN_SUCCESS);
  EXPECT_EQ(value, 64);
  ASSERT_EQ(adaattn_get_option(context, ADAATTN_OPTION_CHECK_POINTERS, &value), ADAATTN_SUCCESS);
  EXPECT_EQ(value, 0);
  for (auto [option, wrong] : std::vector<std::pair<adaattn_option_t, int64_t>>{{ADAATTN_OPTION_CHECK_POINTERS, 2},
                                                                                {ADAATTN_OPTION_NUM_THREADS, -1},
                                                                                {ADAATTN_OPTION_ISA, 6},
                                                                                {ADAATTN_OPTION_PLAN_CACHE_SIZE, -1}}) {
    int64_t before = 0, after = 0;
    adaattn_get_option(context, option, &before);
    expect_error(adaattn_set_option(context, option, wrong), ADAATTN_ERROR_INVALID_ARGUMENT,
                 "is " + std::to_string(wrong));
    adaattn_get_option(context, option, &after);
    EXPECT_EQ(before, after);
  }
  expect_error(adaattn_set_option(context, 0, 0), ADAATTN_ERROR_INVALID_ARGUMENT, "option is 0");
  value = 55;
  expect_error(adaattn_get_option(context, 99, &value), ADAATTN_ERROR_INVALID_ARGUMENT, "option is 99");
  EXPECT_EQ(value, 55);
  ASSERT_EQ(adaattn_set_option(context, ADAATTN_OPTION_NUM_THREADS, 3), ADAATTN_SUCCESS);
  ASSERT_EQ(adaattn_get_option(context, ADAATTN_OPTION_NUM_THREADS, &value), ADAATTN_SUCCESS);
  EXPECT_EQ(value, 3);
}

TEST_F(Handles, PointersAreCheckedWhereTheOptionSaysSo) {
  Call call;
  state->foreign_pointer = call.io.k.data;
  EXPECT_EQ(call.attention(context), ADAATTN_SUCCESS) << last_error();
  call.poison();
  ASSERT_EQ(adaattn_set_option(context, ADAATTN_OPTION_CHECK_POINTERS, 1), ADAATTN_SUCCESS);
  expect_error(call.attention(context), ADAATTN_ERROR_WRONG_DEVICE, "io.k.data");
  EXPECT_TRUE(call.outputs_untouched());
}

TEST_F(Handles, WorkspaceIsTheCallersOrTheHooksAndOfTheRightSize) {
  Call call;
  state->workspace_needed = 1000;
  adaattn_plan_t* plan = make_plan(call);
  size_t bytes = 0;
  ASSERT_EQ(adaattn_plan_workspace_size(plan, &bytes), ADAATTN_SUCCESS);
  EXPECT_EQ(bytes, 1000u);
  std::vector<char> workspace(1001);
  ASSERT_EQ(adaattn_plan_execute(plan, &call.io, workspace.data() + 1, 1000, nullptr), ADAATTN_SUCCESS) << last_error();
  EXPECT_EQ(state->workspace, workspace.data() + 1);
  EXPECT_EQ(hook.calls, 0);
  ASSERT_EQ(adaattn_plan_execute(plan, &call.io, nullptr, 0, nullptr), ADAATTN_SUCCESS) << last_error();
  EXPECT_EQ(hook.calls, 1);
  EXPECT_EQ(state->workspace_bytes, 1000u);

  call.poison();
  const int executed = state->executed;
  expect_error(adaattn_plan_execute(plan, &call.io, workspace.data(), 999, nullptr), ADAATTN_ERROR_WORKSPACE_TOO_SMALL,
               "workspace_bytes is 999; accepted: 1000");
  expect_error(adaattn_plan_execute(plan, &call.io, nullptr, 1000, nullptr), ADAATTN_ERROR_NULL_POINTER,
               "workspace is NULL while workspace_bytes is 1000");
  expect_error(adaattn_plan_execute(plan, &call.io, workspace.data(), SIZE_MAX, nullptr), ADAATTN_ERROR_SIZE_OVERFLOW,
               "workspace_bytes is 18446744073709551615");
  expect_error(adaattn_plan_execute(plan, &call.io, call.k.data(), 1000, nullptr), ADAATTN_ERROR_OVERLAP,
               "workspace overlaps io.k");
  EXPECT_EQ(state->executed, executed);
  EXPECT_TRUE(call.outputs_untouched());
  adaattn_plan_destroy(plan);
}

TEST_F(Handles, EveryFailureOfTheAllocatorIsAStatusAndLeavesNothingBehind) {
  state->workspace_needed = 64;
  Call call;
  adaattn_plan_t* plan = make_plan(call);
  const auto scenario = [&] {
    adaattn_status_t worst = call.attention(context);
    for (int i = 0; i < 3 && worst == ADAATTN_SUCCESS; ++i)
      worst = adaattn_plan_execute(plan, &call.io, nullptr, 0, nullptr);
    return worst;
  };
  ASSERT_EQ(scenario(), ADAATTN_SUCCESS);
  const int total = hook.calls;
  ASSERT_EQ(total, 4);
  for (int n = 0; n < total; ++n) {
    hook.calls = 0;
    hook.fail_at = n;
    const int executed = state->executed;
    call.poison();
    expect_error(scenario(), ADAATTN_ERROR_OUT_OF_MEMORY, "64 bytes");
    EXPECT_EQ(state->executed - executed, n);
    EXPECT_EQ(call.outputs_untouched(), n == 0);
    EXPECT_TRUE(hook.live.empty());
  }
  hook.fail_at = -1;
  EXPECT_EQ(scenario(), ADAATTN_SUCCESS) << last_error();
  adaattn_plan_destroy(plan);
}

TEST_F(Handles, InfoAndStatisticsComeThrough) {
  Call call;
  state->workspace_needed = 48;
  adaattn_plan_t* plan = make_plan(call);
  adaattn_plan_info_t info = {};
  info.struct_size = sizeof info;
  ASSERT_EQ(adaattn_plan_get_info(plan, &info), ADAATTN_SUCCESS) << last_error();
  EXPECT_STREQ(info.kernel, "fake_8");
  EXPECT_STREQ(info.isa, "none");
  EXPECT_EQ(info.tile_q, 16);
  EXPECT_EQ(info.tile_k, 32);
  EXPECT_EQ(info.splits, 1);
  EXPECT_EQ(info.exact, 1);
  EXPECT_EQ(info.workspace_bytes, 48u);
  ASSERT_EQ(adaattn_plan_execute(plan, &call.io, nullptr, 0, nullptr), ADAATTN_SUCCESS) << last_error();
  adaattn_plan_stats_t stats = {};
  stats.struct_size = sizeof stats;
  expect_error(adaattn_plan_get_stats(plan, 4, &stats), ADAATTN_ERROR_INVALID_ARGUMENT, "flags is 0x4");
  EXPECT_EQ(stats.calls, 0u);
  ASSERT_EQ(adaattn_plan_get_stats(plan, ADAATTN_STATS_WAIT | ADAATTN_STATS_RESET, &stats), ADAATTN_SUCCESS);
  EXPECT_EQ(stats.calls, 1u);
  EXPECT_EQ(stats.query_rows, 24u);
  EXPECT_EQ(stats.score_pairs, 24u * 8);
  EXPECT_EQ(stats.flops, 2.0 * (8 + 6) * 24 * 8);
  EXPECT_EQ(stats.violation_field, ADAATTN_FIELD_BLOCK_TABLE);
  EXPECT_EQ(stats.violation_index, 7);
  EXPECT_EQ(stats.violation_value, -9);
  ASSERT_EQ(adaattn_plan_get_stats(plan, 0, &stats), ADAATTN_SUCCESS);
  EXPECT_EQ(stats.calls, 0u);
  adaattn_plan_destroy(plan);
}

TEST_F(Handles, OneCallAttentionReusesPlansByProblemAndDropsTheLeastRecentlyUsed) {
  Call call;
  const auto attend = [&](int64_t max_seqlen_k) {
    call.desc.max_seqlen_k = max_seqlen_k;
    ASSERT_EQ(call.attention(context), ADAATTN_SUCCESS) << last_error();
  };
  attend(8);
  attend(8);
  EXPECT_EQ(state->plans_made, 1);
  call.desc.scale = 1 / std::sqrt(8.0);  // the default in other words
  attend(8);
  EXPECT_EQ(state->plans_made, 1);
  attend(9);
  EXPECT_EQ(state->plans_made, 2);
  ASSERT_EQ(adaattn_set_option(context, ADAATTN_OPTION_PLAN_CACHE_SIZE, 2), ADAATTN_SUCCESS);
  attend(8);   // 9 is the older one now
  attend(10);  // and goes
  EXPECT_EQ(state->plans_made, 3);
  EXPECT_EQ(state->plans_alive, 2);
  attend(8);
  EXPECT_EQ(state->plans_made, 3);
  attend(9);
  EXPECT_EQ(state->plans_made, 4);
  ASSERT_EQ(adaattn_set_option(context, ADAATTN_OPTION_PLAN_CACHE_SIZE, 0), ADAATTN_SUCCESS);
  EXPECT_EQ(state->plans_alive, 0);
  attend(9);
  EXPECT_EQ(state->plans_alive, 0);
}

TEST_F(Handles, ChangingTheInstructionSetForgetsThePlansMadeForTheOld) {
  Call call;
  ASSERT_EQ(call.attention(context), ADAATTN_SUCCESS) << last_error();
  EXPECT_EQ(state->plans_alive, 1);
  ASSERT_EQ(adaattn_set_option(context, ADAATTN_OPTION_ISA, ADAATTN_ISA_BASELINE), ADAATTN_SUCCESS);
  EXPECT_EQ(state->plans_alive, 0);
}

TEST_F(Handles, ExceptionsOfEveryKindBecomeStatuses) {
  Call call;
  const auto throwing = [&](auto exception) {
    state->on_execute = [exception] { throw exception; };
    call.poison();
    const adaattn_status_t status = call.attention(context);
    EXPECT_TRUE(call.outputs_untouched());
    return status;
  };
  expect_error(throwing(Error(ADAATTN_ERROR_DEVICE, "the device fell off")), ADAATTN_ERROR_DEVICE, "fell off");
  expect_error(throwing(std::bad_alloc()), ADAATTN_ERROR_OUT_OF_MEMORY, "memory");
  expect_error(throwing(std::runtime_error("surprise")), ADAATTN_ERROR_INTERNAL, "surprise");
  expect_error(throwing(42), ADAATTN_ERROR_INTERNAL, "unknown type");
  state->on_execute = nullptr;
  EXPECT_EQ(call.attention(context), ADAATTN_SUCCESS) << last_error();
  EXPECT_EQ(state->plans_made, 1) << "a failed call gives its plan back";
}

TEST_F(Handles, SelectorsRefusalReachesCheckSupportAndPlanCreateAlike) {
  Call call;
  state->on_select = [] { fail(ADAATTN_ERROR_NOT_SUPPORTED, "desc.head_dim_qk is too odd"); };
  char reason[12];
  expect_error(adaattn_check_support(context, &call.desc, nullptr, reason, sizeof reason), ADAATTN_ERROR_NOT_SUPPORTED,
               "too odd");
  EXPECT_STREQ(reason, "desc.head_d");
  adaattn_plan_t* plan = nullptr;
  expect_error(adaattn_plan_create(context, &call.desc, nullptr, &plan), ADAATTN_ERROR_NOT_SUPPORTED, "too odd");
  EXPECT_EQ(plan, nullptr);
  state->on_select = nullptr;
  EXPECT_EQ(adaattn_check_support(context, &call.desc, nullptr, reason, sizeof reason), ADAATTN_SUCCESS);
  EXPECT_STREQ(reason, "");
  EXPECT_EQ(adaattn_check_support(context, &call.desc, nullptr, nullptr, 0), ADAATTN_SUCCESS);
}

TEST_F(Handles, WhatWouldPullTheRugFromARunningCallIsRefused) {
  Call call, other;
  adaattn_plan_t* plan = make_plan(call);
  adaattn_plan_stats_t stats = {};
  stats.struct_size = sizeof stats;
  state->on_execute = [&] {
    state->on_execute = nullptr;
    // From another thread, as a caller's mistake would have it, while the plan is inside execute.
    std::thread([&] {
      expect_error(adaattn_plan_execute(plan, &other.io, nullptr, 0, nullptr), ADAATTN_ERROR_IN_USE, "plan is in use");
      expect_error(adaattn_plan_get_stats(plan, 0, &stats), ADAATTN_ERROR_IN_USE, "plan is in use");
      expect_error(adaattn_plan_destroy(plan), ADAATTN_ERROR_IN_USE, "plan is in use");
      expect_error(adaattn_set_option(context, ADAATTN_OPTION_NUM_THREADS, 1), ADAATTN_ERROR_IN_USE, "running");
      expect_error(adaattn_set_option(context, ADAATTN_OPTION_ISA, 0), ADAATTN_ERROR_IN_USE, "running");
      EXPECT_EQ(adaattn_set_option(context, ADAATTN_OPTION_PLAN_CACHE_SIZE, 5), ADAATTN_SUCCESS);
      EXPECT_EQ(other.attention(context), ADAATTN_SUCCESS) << last_error();  // another plan runs beside it
    }).join();
  };
  EXPECT_EQ(adaattn_plan_execute(plan, &call.io, nullptr, 0, nullptr), ADAATTN_SUCCESS) << last_error();
  EXPECT_TRUE(call.outputs_written());
  adaattn_plan_destroy(plan);

  state->on_execute = [&] {
    state->on_execute = nullptr;
    std::thread([&] { expect_error(adaattn_destroy(context), ADAATTN_ERROR_IN_USE, "running"); }).join();
  };
  EXPECT_EQ(call.attention(context), ADAATTN_SUCCESS) << last_error();
}

}  // namespace
}  // namespace adaattn::test
