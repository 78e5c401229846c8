// Plans that are dropped while their work is still in a stream's queue.
#include <atomic>

#include "attention/fixture.h"
#include "gpu/device.h"

namespace adaattn::test {
namespace {

class QueuedWork : public OnTheDevice {};

// A stream that does nothing before go(): whatever is enqueued meanwhile waits, and a call that waited for it would
// never return.
class HeldStream {
 public:
  HeldStream() {
    const auto wait = [](void* flag) {
      while (!static_cast<std::atomic<bool>*>(flag)->load()) {
      }
    };
    require(cudaLaunchHostFunc(stream_.get(), wait, &go_));
    require(cudaEventCreateWithFlags(&gone_, cudaEventDisableTiming));
    require(cudaEventRecord(gone_, stream_.get()));
  }
  ~HeldStream() {
    go();
    cudaEventDestroy(gone_);
  }
  adaattn_stream_t get() const { return stream_.get(); }
  // Holds another stream as well: two host functions need not run at once.
  void hold(const Stream& other) const { require(cudaStreamWaitEvent(other.get(), gone_)); }
  void go() {
    go_ = true;
    stream_.wait();
  }

 private:
  Stream stream_;
  cudaEvent_t gone_ = nullptr;
  std::atomic<bool> go_{false};
};

// Its lengths lie in device memory, so that the device counts the rows in the plan's record.
AttentionCase counted_case() {
  return {.name = "Counted",
          .batch = 3,
          .heads_q = 4,
          .heads_kv = 2,
          .seqlen_q = 40,
          .seqlen_k = 90,
          .d_qk = 64,
          .used_k = {90, 60, 41}};
}

// Enough query tiles for each multiprocessor to take several: they are handed out by a counter in the plan's record.
AttentionCase many_tiles_case() {
  return {.name = "ManyTiles",
          .batch = 8,
          .heads_q = 16,
          .heads_kv = 4,
          .seqlen_q = 260,
          .seqlen_k = 260,
          .d_qk = 64,
          .mask = ADAATTN_MASK_CAUSAL};
}

// CUDA loads a kernel at its first launch, and that may wait for the whole device: nothing to do while a stream is
// held.
void load_kernels(const Context& context, const AttentionData& data) {
  AttentionData copy = with_own_outputs(data);
  run(context, copy);
}

void keep_no_plans(const Context& context) {
  ASSERT_TRUE(succeeded(adaattn_set_option(context.get(), ADAATTN_OPTION_PLAN_CACHE_SIZE, 0)));
}

TEST_F(QueuedWork, OfADroppedPlanIsNotCountedInAnother) {
  const Context context(kCuda);
  keep_no_plans(context);
  AttentionData data(counted_case(), kBf16All, run_seed());
  load_kernels(context, data);
  data.upload(kDevice);
  const adaattn_io_t io = data.io(kDevice);
  HeldStream held;
  ASSERT_TRUE(succeeded(adaattn_attention(context.get(), &data.desc, nullptr, &io, held.get())));
  const Plan plan(context, data.desc);
  held.go();
  EXPECT_EQ(plan.stats().query_rows, 0u);
  data.download(kDevice);
  EXPECT_TRUE(matches(data, reference::attention(data.desc, data.io())));
}

TEST_F(QueuedWork, OfManyDroppedPlansComesOutRight) {
  constexpr size_t kCalls = 20;
  const Context context(kCuda);
  keep_no_plans(context);
  for (const AttentionCase& c : {counted_case(), many_tiles_case()}) {
    SCOPED_TRACE(describe(c));
    const AttentionData data(c, kBf16All, run_seed());
    load_kernels(context, data);
    std::vector<AttentionData> calls;
    for (size_t i = 0; i < kCalls; ++i) {
      calls.push_back(with_own_outputs(data));
      calls.back().upload(kDevice);
    }
    const Stream second;
    {
      // Two queues, so that launches of different plans run at once when they are let go.
      HeldStream first;
      first.hold(second);
      for (size_t i = 0; i < kCalls; ++i) {
        const adaattn_io_t io = calls[i].io(kDevice);
        const adaattn_stream_t stream = i % 2 == 0 ? first.get() : second.get();
        ASSERT_TRUE(succeeded(adaattn_attention(context.get(), &calls[i].desc, nullptr, &io, stream)));
      }
    }
    second.wait();
    const auto expected = reference::attention(data.desc, data.io());
    for (AttentionData& call : calls) {
      call.download(kDevice);
      EXPECT_TRUE(matches(call, expected));
    }
  }
}

TEST_F(QueuedWork, RecordsOfDroppedPlansAreUsedAgainFromZero) {
  constexpr int kRounds = 400;  // more plans than the library makes records for at once
  const Context context(kCuda);
  keep_no_plans(context);
  AttentionData data(counted_case(), kBf16All, run_seed());
  data.upload(kDevice);
  const adaattn_io_t io = data.io(kDevice);
  const Stream stream;
  size_t free_then = 0, free_now = 0, total = 0;
  for (int round = 0; round < kRounds; ++round) {
    ASSERT_TRUE(succeeded(adaattn_attention(context.get(), &data.desc, nullptr, &io, stream.get())));
    if (round == 150) require(cudaMemGetInfo(&free_then, &total));
    if (round % 10 != 0) continue;
    const Plan plan(context, data.desc);
    ASSERT_EQ(plan.stats().query_rows, 0u) << "round " << round;
  }
  require(cudaMemGetInfo(&free_now, &total));
  EXPECT_GE(free_now, free_then);
}

TEST_F(QueuedWork, OfAPlanThatMovesBetweenStreamsOutlivesIt) {
  const Context context(kCuda);
  AttentionData data(counted_case(), kBf16All, run_seed());
  load_kernels(context, data);
  data.upload(kDevice);
  const adaattn_io_t io = data.io(kDevice);
  HeldStream held;
  {
    const Plan plan(context, data.desc);
    ASSERT_TRUE(succeeded(adaattn_plan_execute(plan.get(), &io, nullptr, 0, held.get())));
    for (int i = 0; i < 10; ++i) {
      const Stream passing;  // destroyed with the plan still there
      ASSERT_TRUE(succeeded(adaattn_plan_execute(plan.get(), &io, nullptr, 0, passing.get())));
      passing.wait();
    }
  }
  const Plan plan(context, data.desc);
  held.go();
  EXPECT_EQ(plan.stats().query_rows, 0u);
}

}  // namespace
}  // namespace adaattn::test
