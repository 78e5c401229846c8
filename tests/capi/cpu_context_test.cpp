// Contexts on the CPU through the shared library: configuration, hooks, threads, results from many threads at once.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "capi/call.h"

namespace adaattn::test {
namespace {

adaattn_config_t config() {
  adaattn_config_t c;
  adaattn_config_init(&c, sizeof c);
  return c;
}

void* some_alloc(void*, size_t bytes, size_t, adaattn_stream_t) { return std::malloc(bytes); }
void some_free(void*, void* data, size_t, adaattn_stream_t) { std::free(data); }

TEST(CpuContext, BadConfigurationIsRefusedByName) {
  const struct {
    const char* name;
    void (*spoil)(adaattn_config_t&);
    adaattn_status_t status;
    const char* text;
  } rows[] = {
      {"size", [](auto& c) { c.struct_size = 3; }, ADAATTN_ERROR_STRUCT_SIZE, "config.struct_size is 3"},
      {"device", [](auto& c) { c.device = 7; }, ADAATTN_ERROR_INVALID_ARGUMENT, "config.device is 7"},
      {"id", [](auto& c) { c.device_id = 1; }, ADAATTN_ERROR_INVALID_ARGUMENT, "config.device_id is 1"},
      {"negative id", [](auto& c) { c.device_id = -1; }, ADAATTN_ERROR_INVALID_ARGUMENT, "config.device_id is -1"},
      {"threads", [](auto& c) { c.num_threads = -1; }, ADAATTN_ERROR_INVALID_ARGUMENT, "config.num_threads is -1"},
      {"isa", [](auto& c) { c.isa = 17; }, ADAATTN_ERROR_INVALID_ARGUMENT, "config.isa is 17"},
      {"alloc alone", [](auto& c) { c.alloc = some_alloc; }, ADAATTN_ERROR_INVALID_ARGUMENT, "config.free is NULL"},
      {"free alone", [](auto& c) { c.free = some_free; }, ADAATTN_ERROR_INVALID_ARGUMENT, "config.alloc is NULL"},
  };
  for (const auto& row : rows) {
    SCOPED_TRACE(row.name);
    adaattn_config_t c = config();
    row.spoil(c);
    auto* const sentinel = reinterpret_cast<adaattn_context_t*>(&c);
    adaattn_context_t* context = sentinel;
    EXPECT_EQ(adaattn_create(&c, &context), row.status);
    EXPECT_EQ(last_error().rfind(row.text, 0), 0u) << last_error();
    EXPECT_NE(last_error().find("; accepted"), std::string::npos) << last_error();
    EXPECT_EQ(context, sentinel);
  }
}

TEST(CpuContext, ForeignInstructionSetIsRefused) {
  adaattn_config_t c = config();
#if defined(__x86_64__)
  c.isa = ADAATTN_ISA_NEON;
#else
  c.isa = ADAATTN_ISA_AVX2;
#endif
  adaattn_context_t* context = nullptr;
  const adaattn_status_t status = adaattn_create(&c, &context);
  EXPECT_EQ(status, ADAATTN_ERROR_NOT_SUPPORTED);
  EXPECT_EQ(context, nullptr);
  EXPECT_EQ(last_error().rfind("isa is " + std::to_string(c.isa), 0), 0u) << last_error();
  EXPECT_NE(last_error().find("accepted on this processor: auto "), std::string::npos) << last_error();
}

TEST(CpuContext, CudaWithoutADeviceOrBackEndIsAStatus) {
  int32_t count = 0;
  ASSERT_EQ(adaattn_device_count(ADAATTN_DEVICE_CUDA, &count), ADAATTN_SUCCESS);
  if (count > 0) GTEST_SKIP() << "this machine has " << count << " CUDA devices";
  adaattn_config_t c = config();
  c.device = ADAATTN_DEVICE_CUDA;
  adaattn_context_t* context = nullptr;
  const adaattn_status_t status = adaattn_create(&c, &context);
  EXPECT_TRUE(status == ADAATTN_ERROR_NOT_BUILT || (status >= 4000 && status < 5000)) << status;
  EXPECT_NE(last_error(), "");
}

struct Hook {
  int calls = 0, fail_at = -1, live = 0;
  static void* alloc(void* user, size_t bytes, size_t alignment, adaattn_stream_t) {
    auto& hook = *static_cast<Hook*>(user);
    if (hook.calls++ == hook.fail_at) return nullptr;
    ++hook.live;
    return std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  }
  static void free(void* user, void* data, size_t, adaattn_stream_t) {
    --static_cast<Hook*>(user)->live;
    std::free(data);
  }
};

TEST(CpuContext, EveryFailureOfTheAllocatorIsAStatusAndLeavesNothingBehind) {
  Hook hook;
  adaattn_config_t c = config();
  c.num_threads = 1;
  c.alloc = Hook::alloc;
  c.free = Hook::free;
  c.alloc_user = &hook;
  adaattn_context_t* context = nullptr;
  ASSERT_EQ(adaattn_create(&c, &context), ADAATTN_SUCCESS) << last_error();
  for (Form form : {Form::kBSHD, Form::kPackedPaged}) {
    Call call(form);
    hook = {};
    ASSERT_EQ(call.attention(context), ADAATTN_SUCCESS) << last_error();
    ASSERT_TRUE(call.outputs_written());
    const int total = hook.calls, live = hook.live;
    for (int n = 0; n < total; ++n) {
      hook.calls = 0;
      hook.fail_at = n;
      call.poison();
      EXPECT_EQ(call.attention(context), ADAATTN_ERROR_OUT_OF_MEMORY) << "allocation " << n << " of " << total;
      EXPECT_TRUE(call.outputs_untouched());
      EXPECT_EQ(hook.live, live);
    }
    hook.fail_at = -1;
    EXPECT_EQ(call.attention(context), ADAATTN_SUCCESS) << last_error();
  }
  EXPECT_EQ(adaattn_destroy(context), ADAATTN_SUCCESS) << last_error();
  EXPECT_EQ(hook.live, 0);
}

TEST(CpuContext, CallersParallelForRunsTheWork) {
  struct Counter {
    std::atomic<int> calls{0};
    static void run(void* user, int64_t n, void (*task)(void*, int64_t), void* task_user) {
      ++static_cast<Counter*>(user)->calls;
      for (int64_t i = n; i-- > 0;) task(task_user, i);  // any order
    }
  } counter;
  adaattn_config_t c = config();
  c.num_threads = 2;
  c.parallel_for = Counter::run;
  c.parallel_for_user = &counter;
  adaattn_context_t* context = nullptr;
  ASSERT_EQ(adaattn_create(&c, &context), ADAATTN_SUCCESS) << last_error();
  Call hooked, plain;
  ASSERT_EQ(hooked.attention(context), ADAATTN_SUCCESS) << last_error();
  EXPECT_GT(counter.calls, 0);
  adaattn_destroy(context);
  context = make_context();
  ASSERT_EQ(plain.attention(context), ADAATTN_SUCCESS) << last_error();
  EXPECT_EQ(hooked.o, plain.o);
  EXPECT_EQ(hooked.lse, plain.lse);
  adaattn_destroy(context);
}

TEST(CpuContext, ThreadsAndInstructionSetAreReadBack) {
  adaattn_context_t* context = make_context();
  int64_t value = 0;
  ASSERT_EQ(adaattn_set_option(context, ADAATTN_OPTION_NUM_THREADS, 2), ADAATTN_SUCCESS) << last_error();
  ASSERT_EQ(adaattn_get_option(context, ADAATTN_OPTION_NUM_THREADS, &value), ADAATTN_SUCCESS);
  EXPECT_EQ(value, 2);
  ASSERT_EQ(adaattn_get_option(context, ADAATTN_OPTION_ISA, &value), ADAATTN_SUCCESS);
  EXPECT_GT(value, ADAATTN_ISA_AUTO);
  EXPECT_EQ(adaattn_set_option(context, ADAATTN_OPTION_ISA, value), ADAATTN_SUCCESS) << last_error();
  adaattn_destroy(context);
}

// Named for the run under ThreadSanitizer.
TEST(CpuContextConcurrent, OneContextServesManyThreads) {
  adaattn_context_t* context = make_context();
  Call reference;
  ASSERT_EQ(reference.attention(context), ADAATTN_SUCCESS) << last_error();
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      Call call;
      adaattn_plan_t* plan = nullptr;
      if (adaattn_plan_create(context, &call.desc, nullptr, &plan) != ADAATTN_SUCCESS) ++wrong;
      for (int i = 0; i < 20; ++i) {
        call.poison();
        if (call.attention(context) != ADAATTN_SUCCESS || call.o != reference.o) ++wrong;
        call.poison();
        if (adaattn_plan_execute(plan, &call.io, nullptr, 0, nullptr) != ADAATTN_SUCCESS || call.o != reference.o)
          ++wrong;
        Call bad;
        bad.desc.heads_kv = 3 + t;
        const std::string expected =
            t == 1 ? "io.k" : "desc.heads_q is 4; accepted: a multiple of desc.heads_kv, " + std::to_string(3 + t);
        if (bad.attention(context) == ADAATTN_SUCCESS || last_error().rfind(expected, 0) != 0) ++wrong;
        adaattn_set_option(context, ADAATTN_OPTION_PLAN_CACHE_SIZE, i % 3);
      }
      if (adaattn_plan_destroy(plan) != ADAATTN_SUCCESS) ++wrong;
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(adaattn_destroy(context), ADAATTN_SUCCESS) << last_error();
}

TEST(CpuContextConcurrent, ContextsComeAndGoInManyThreads) {
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&] {
      for (int i = 0; i < 5; ++i) {
        adaattn_context_t* context = make_context();
        Call call;
        if (call.attention(context) != ADAATTN_SUCCESS || !call.outputs_written()) ++wrong;
        if (adaattn_destroy(context) != ADAATTN_SUCCESS) ++wrong;
      }
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace adaattn::test
