// A host without memory: the n-th operator new fails, for every n, and each time a status comes back, nothing leaks and
// the next attempt succeeds. A program of its own, as it replaces operator new.
#include <gtest/gtest.h>

#include <cstdlib>
#include <new>

#include "capi/call.h"
#include "capi/context.h"
#include "capi/fake_backend.h"

namespace {

struct Heap {
  bool armed = false;
  int calls = 0, fail_at = -1;
  long live = 0;
};
Heap heap;  // of a program with one thread

}  // namespace

void* operator new(size_t bytes) {
  if (heap.armed && heap.calls++ == heap.fail_at) throw std::bad_alloc();
  void* data = std::malloc(bytes != 0 ? bytes : 1);
  if (data == nullptr) throw std::bad_alloc();
  if (heap.armed) ++heap.live;
  return data;
}

void operator delete(void* data) noexcept {
  if (heap.armed && data != nullptr) --heap.live;
  std::free(data);
}

void operator delete(void* data, size_t) noexcept { operator delete(data); }

namespace adaattn::test {
namespace {

// Runs action with every allocation failing in turn, until none is left to fail. Returns how many there were.
template <typename Action>
int fail_each_allocation(Action&& action) {
  for (int n = 0;; ++n) {
    heap = {true, 0, n, 0};
    const adaattn_status_t status = action();
    const Heap after = heap;
    heap.armed = false;
    EXPECT_EQ(after.live, 0) << "allocation " << n;
    if (after.calls <= n) {
      EXPECT_EQ(status, ADAATTN_SUCCESS) << last_error();
      return n;
    }
    EXPECT_EQ(status, ADAATTN_ERROR_OUT_OF_MEMORY) << "allocation " << n << ": " << last_error();
  }
}

class OutOfMemory : public testing::Test {
 protected:
  ~OutOfMemory() override {
    EXPECT_EQ(adaattn_destroy(context), ADAATTN_SUCCESS) << last_error();
    EXPECT_EQ(state->plans_alive, 0);
  }
  std::shared_ptr<FakeState> state = std::make_shared<FakeState>();
  adaattn_context_t* context = new adaattn_context(make_fake_backend(state));
};

TEST_F(OutOfMemory, PlanCreateFailsCleanly) {
  const Call call;
  const int allocations = fail_each_allocation([&] {
    adaattn_plan_t* plan = nullptr;
    const adaattn_status_t status = adaattn_plan_create(context, &call.desc, nullptr, &plan);
    EXPECT_EQ(plan != nullptr, status == ADAATTN_SUCCESS);
    adaattn_plan_destroy(plan);
    return status;
  });
  EXPECT_GE(allocations, 2);  // the plan and the back-end's half of it
}

TEST_F(OutOfMemory, OneCallAttentionFailsCleanlyAndLeavesTheOutputsAlone) {
  Call call;
  ASSERT_EQ(adaattn_set_option(context, ADAATTN_OPTION_PLAN_CACHE_SIZE, 0), ADAATTN_SUCCESS);  // a new plan each time
  const int allocations = fail_each_allocation([&] {
    call.poison();
    const adaattn_status_t status = call.attention(context);
    EXPECT_EQ(call.outputs_untouched(), status != ADAATTN_SUCCESS);
    return status;
  });
  EXPECT_GE(allocations, 2);
}

TEST_F(OutOfMemory, CachedPlanNeedsNoMemory) {
  Call call;
  ASSERT_EQ(call.attention(context), ADAATTN_SUCCESS) << last_error();
  EXPECT_EQ(fail_each_allocation([&] { return call.attention(context); }), 0);
}

TEST_F(OutOfMemory, RefusalWithoutMemoryIsStillAStatus) {
  Call call;
  call.desc.heads_q = 0;
  for (int n = 0; n < 4; ++n) {
    heap = {true, 0, n, 0};
    const adaattn_status_t status = call.attention(context);
    heap.armed = false;
    EXPECT_TRUE(status == ADAATTN_ERROR_INVALID_ARGUMENT || status == ADAATTN_ERROR_OUT_OF_MEMORY) << status;
    EXPECT_NE(last_error(), "");
  }
}

}  // namespace
}  // namespace adaattn::test
