// What only a device can get wrong: pointers, streams, the caller's current device, memory.
#include "gpu/device.h"

#include <map>

#include "attention/fixture.h"

namespace adaattn::test {
namespace {

class Device : public OnTheDevice {};

AttentionCase small_case() {
  return {.name = "Small", .batch = 2, .heads_q = 4, .heads_kv = 2, .seqlen_q = 40, .seqlen_k = 90, .d_qk = 64};
}
AttentionCase split_case() {
  return {.name = "Split", .heads_q = 8, .heads_kv = 2, .seqlen_q = 1, .seqlen_k = 3000, .d_qk = 128};
}

TEST_F(Device, InfoNamesTheProcessor) {
  adaattn_device_info_t info{};
  info.struct_size = sizeof info;
  ASSERT_TRUE(succeeded(adaattn_device_info(ADAATTN_DEVICE_CUDA, 0, &info)));
  EXPECT_GE(info.compute_capability, 80);
  EXPECT_GT(info.compute_units, 0);
  EXPECT_GT(info.memory_bytes, int64_t{1} << 30);
  EXPECT_STRNE(info.name, "");
  EXPECT_EQ(adaattn_device_info(ADAATTN_DEVICE_CUDA, 1000, &info), ADAATTN_ERROR_NO_DEVICE);
}

TEST_F(Device, HostMemoryIsRefusedByName) {
  const Context context(kCuda);
  AttentionData data(small_case(), kBf16All, run_seed());
  const Plan plan(context, data.desc);
  data.upload(kDevice);
  std::vector<std::byte> host(data.k.buffer()->bytes());
  adaattn_io_t io = data.io(kDevice);
  io.k.data = host.data();
  EXPECT_EQ(adaattn_plan_execute(plan.get(), &io, nullptr, 0, nullptr), ADAATTN_ERROR_WRONG_DEVICE);
  EXPECT_EQ(last_error().find("io.k.data is "), 0u) << last_error();
  io = data.io(kDevice);
  EXPECT_TRUE(succeeded(adaattn_plan_execute(plan.get(), &io, nullptr, 0, nullptr))) << "the plan stays usable";
  require(cudaDeviceSynchronize());
}

TEST_F(Device, MemoryOfAnotherDeviceIsRefused) {
  int32_t devices = 0;
  ASSERT_TRUE(succeeded(adaattn_device_count(ADAATTN_DEVICE_CUDA, &devices)));
  if (devices < 2) GTEST_SKIP() << "one device only";
  const Context context(kCuda);
  AttentionData data(small_case(), kBf16All, run_seed());
  const Plan plan(context, data.desc);
  data.upload(kDevice);
  require(cudaSetDevice(1));
  {
    const DeviceMemory elsewhere(data.k.buffer()->bytes());
    adaattn_io_t io = data.io(kDevice);
    io.k.data = elsewhere.data();
    EXPECT_EQ(adaattn_plan_execute(plan.get(), &io, nullptr, 0, nullptr), ADAATTN_ERROR_WRONG_DEVICE);
    const Stream stream;
    io = data.io(kDevice);
    EXPECT_EQ(adaattn_plan_execute(plan.get(), &io, nullptr, 0, stream.get()), ADAATTN_ERROR_WRONG_DEVICE);
    EXPECT_TRUE(succeeded(adaattn_plan_execute(plan.get(), &io, nullptr, 0, nullptr)));
    int current = -1;
    require(cudaGetDevice(&current));
    EXPECT_EQ(current, 1) << "the caller's device";
  }
  require(cudaSetDevice(0));
  require(cudaDeviceSynchronize());
}

TEST_F(Device, WorkspaceOneByteShortIsRefused) {
  const Context context(kCuda);
  AttentionData data(split_case(), kBf16All, run_seed());
  const Plan plan(context, data.desc);
  ASSERT_GT(plan.workspace_size(), 0u);
  const DeviceMemory workspace(plan.workspace_size());
  data.upload(kDevice);
  const adaattn_io_t io = data.io(kDevice);
  EXPECT_EQ(adaattn_plan_execute(plan.get(), &io, workspace.data(), workspace.bytes() - 1, nullptr),
            ADAATTN_ERROR_WORKSPACE_TOO_SMALL);
  EXPECT_TRUE(succeeded(adaattn_plan_execute(plan.get(), &io, workspace.data(), workspace.bytes(), nullptr)));
  data.download(kDevice);
  EXPECT_TRUE(matches(data, reference::attention(data.desc, data.io())));
}

TEST_F(Device, PoisonedWorkspaceNeverShows) {
  const Context context(kCuda);
  for (const AttentionCase& c : {small_case(), split_case()}) {
    AttentionData data(c, kF16All, run_seed());
    const Plan plan(context, data.desc);
    const DeviceMemory workspace(plan.workspace_size());
    data.upload(kDevice);
    const adaattn_io_t io = data.io(kDevice);
    ASSERT_TRUE(succeeded(adaattn_plan_execute(plan.get(), &io, workspace.data(), workspace.bytes(), nullptr)));
    data.download(kDevice);
    EXPECT_TRUE(matches(data, reference::attention(data.desc, data.io())));
  }
}

// Hands out device memory and fails on the n-th request.
struct FailingHook {
  int requests = 0, fail_at = -1;
  std::map<void*, size_t> live;
  static void* alloc(void* user, size_t bytes, size_t, adaattn_stream_t) {
    auto* self = static_cast<FailingHook*>(user);
    if (self->requests++ == self->fail_at) return nullptr;
    void* memory = nullptr;
    if (cudaMalloc(&memory, bytes) != cudaSuccess) return nullptr;
    self->live[memory] = bytes;
    return memory;
  }
  static void free(void* user, void* memory, size_t bytes, adaattn_stream_t) {
    auto* self = static_cast<FailingHook*>(user);
    EXPECT_EQ(self->live.at(memory), bytes);
    self->live.erase(memory);
    cudaFree(memory);
  }
};

TEST_F(Device, AllocatorFailingAtAnyRequestLeavesEverythingUsable) {
  FailingHook hook;
  adaattn_config_t config;
  ASSERT_TRUE(succeeded(adaattn_config_init(&config, sizeof config)));
  config.device = ADAATTN_DEVICE_CUDA;
  config.alloc = &FailingHook::alloc;
  config.free = &FailingHook::free;
  config.alloc_user = &hook;
  {
    const Context context(config);
    AttentionData data(split_case(), kBf16All, run_seed());
    const auto expected = reference::attention(data.desc, data.io());
    ASSERT_TRUE(succeeded(attention(context, data)));
    const int requests = hook.requests;
    ASSERT_GT(requests, 0);
    for (int n = 0; n < requests; ++n) {
      hook.requests = 0;
      hook.fail_at = n;
      EXPECT_EQ(attention(context, data), ADAATTN_ERROR_OUT_OF_MEMORY) << "request " << n;
      hook.fail_at = -1;
      data.poison_outputs();
      ASSERT_TRUE(succeeded(attention(context, data)));
      EXPECT_TRUE(matches(data, expected));
    }
  }
  EXPECT_TRUE(hook.live.empty()) << hook.live.size() << " allocations were not given back";
}

TEST_F(Device, PlansOnTwoStreamsRunAtOnce) {
  const Context context(kCuda);
  AttentionData a(small_case(), kBf16All, run_seed()), b(split_case(), kF16All, run_seed() + 1);
  const auto expected_a = reference::attention(a.desc, a.io()), expected_b = reference::attention(b.desc, b.io());
  const Plan plan_a(context, a.desc), plan_b(context, b.desc);
  a.upload(kDevice);
  b.upload(kDevice);
  const adaattn_io_t io_a = a.io(kDevice), io_b = b.io(kDevice);
  const Stream stream_a, stream_b;
  for (int round = 0; round < 20; ++round) {
    ASSERT_TRUE(succeeded(adaattn_plan_execute(plan_a.get(), &io_a, nullptr, 0, stream_a.get())));
    ASSERT_TRUE(succeeded(adaattn_plan_execute(plan_b.get(), &io_b, nullptr, 0, stream_b.get())));
  }
  stream_a.wait();
  stream_b.wait();
  a.download(kDevice);
  b.download(kDevice);
  EXPECT_TRUE(matches(a, expected_a));
  EXPECT_TRUE(matches(b, expected_b));
  EXPECT_EQ(plan_a.stats().calls, 20u);
}

TEST_F(Device, RepeatedCallsGiveTheSameBits) {
  const Context context(kCuda);
  for (const AttentionCase& c : {small_case(), split_case()}) {
    for (const Dtypes& dtypes : uniform_dtypes()) {
      AttentionData one(c, dtypes, run_seed());
      run(context, one);
      for (int round = 0; round < 5; ++round) {
        AttentionData other = with_own_outputs(one);
        run(context, other);
        EXPECT_TRUE(same_outputs(one, other));
      }
    }
  }
}

TEST_F(Device, FastF32StaysWithinTf32) {
  for (const int64_t d : {40, 64, 128, 200}) {
    AttentionCase c = small_case();
    c.d_qk = d;
    AttentionData data(c, kF32All, run_seed());
    data.desc.math = ADAATTN_MATH_FAST_F32;
    const Context context(kCuda);
    const Plan plan(context, data.desc);
    EXPECT_EQ(plan.info().exact, 0);
    ASSERT_TRUE(succeeded(plan.execute(data)));
    EXPECT_TRUE(matches(data, reference::attention(data.desc, data.io()), {2e-3, 5e-3, 5e-3})) << "head_dim " << d;
  }
}

}  // namespace
}  // namespace adaattn::test
