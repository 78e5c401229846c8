// What a caller is promised about exact attention, one test for each sentence.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <map>
#include <mutex>

#include "acceptance/tools.h"

namespace adaattn::test {
namespace {

class Promise : public OnEveryTarget {};
ADAATTN_ON_EVERY_TARGET(Promise);

TEST_P(Promise, DecodeOfOneQueryAndOneKeyReturnsTheValue) {
  for (const Dtypes& dtypes : uniform_dtypes()) {
    const AttentionCase c = {.name = "OneByOne", .batch = 2, .heads_q = 4, .heads_kv = 4};
    AttentionData data(c, dtypes, run_seed());
    run(Context(target()), data);
    EXPECT_TRUE(close(data.o.values(), data.v.values(), 0, dtypes.o == ADAATTN_DTYPE_F32 ? 1e-6 : 0, "o"));
    for (double entropy : data.entropy.values()) EXPECT_NEAR(entropy, 0, 1e-6);
  }
}

// With 2 queries and 4 keys: the last query stands at the last key, or the first query at the first key.
TEST_P(Promise, BothCausalAlignmentsAsDocumented) {
  AttentionCase c = {.name = "Aligned", .seqlen_q = 2, .seqlen_k = 4};
  c.mask = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT;
  AttentionData data(c, kF32All, run_seed());
  data.q.fill(0.0);  // equal weights: the LSE counts keys
  run(Context(target()), data);
  EXPECT_NEAR(data.lse.get({0, 0, 0}), std::log(3), 1e-6);
  EXPECT_NEAR(data.lse.get({0, 0, 1}), std::log(4), 1e-6);
  data.desc.mask = ADAATTN_MASK_CAUSAL_TOP_LEFT;
  run(Context(target()), data);
  EXPECT_NEAR(data.lse.get({0, 0, 0}), std::log(1), 1e-6);
  EXPECT_NEAR(data.lse.get({0, 0, 1}), std::log(2), 1e-6);
}

struct PeakMemory {
  std::mutex mutex;
  size_t live = 0, peak = 0;
};

void* counted_alloc(void* user, size_t bytes, size_t alignment, adaattn_stream_t) {
  auto* self = static_cast<PeakMemory*>(user);
  const std::lock_guard lock(self->mutex);
  self->live += bytes;
  self->peak = std::max(self->peak, self->live);
  return std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
}

void counted_free(void* user, void* memory, size_t bytes, adaattn_stream_t) {
  auto* self = static_cast<PeakMemory*>(user);
  const std::lock_guard lock(self->mutex);
  self->live -= bytes;
  std::free(memory);
}

TEST_P(Promise, ExtraMemoryGrowsWithTheLengthAndNotItsSquare) {
  if (!kOnCpu) GTEST_SKIP() << "the hook of this test hands out host memory";
  size_t previous = 0;
  for (int64_t s : {512, 1024, 2048, 4096}) {
    PeakMemory memory;
    adaattn_config_t config;
    ASSERT_EQ(adaattn_config_init(&config, sizeof config), ADAATTN_SUCCESS);
    config.isa = target().isa;
    config.num_threads = 2;
    config.alloc = counted_alloc;
    config.free = counted_free;
    config.alloc_user = &memory;
    const Context context(config);
    const AttentionCase c = {.name = "Growing", .seqlen_q = s, .seqlen_k = s, .d_qk = 16};
    AttentionData data(c, kF32All, run_seed());
    run(context, data);
    EXPECT_LT(memory.peak, static_cast<size_t>(s * s) * sizeof(float) / 2) << "of the size of the scores at " << s;
    if (previous > 0) {
      EXPECT_LE(static_cast<double>(memory.peak), 2.1 * static_cast<double>(previous)) << s;
    }
    previous = std::max<size_t>(memory.peak, 1);
  }
}

// ---- Wrong arguments are refused with the field named, and the context works on.

class Refused : public testing::Test {
 protected:
  void expect_refused(adaattn_attn_desc_t desc, const std::string& field) {
    adaattn_plan_t* plan = nullptr;
    const adaattn_status_t status = adaattn_plan_create(context_.get(), &desc, nullptr, &plan);
    EXPECT_GE(status, 1000);
    EXPECT_LT(status, 2000) << adaattn_status_name(status);
    EXPECT_EQ(plan, nullptr);
    EXPECT_NE(last_error().find(field), std::string::npos) << last_error();
    char reason[512];
    EXPECT_EQ(adaattn_check_support(context_.get(), &desc, nullptr, reason, sizeof reason), status);
    EXPECT_NE(std::string(reason).find(field), std::string::npos) << reason;
  }
  ~Refused() override {
    AttentionData data(invariant_cases()[1], kF32All, run_seed());
    const auto expected = reference::attention(data.desc, data.io());
    EXPECT_TRUE(succeeded(attention(context_, data)));
    EXPECT_TRUE(matches(data, expected)) << "after a refused call";
  }
  adaattn_attn_desc_t good() { return make_desc(invariant_cases()[0], kF32All); }

  Context context_{available_targets(kDevice).front()};
};

TEST_F(Refused, QueryHeadsNotAMultipleOfKeyHeads) {
  auto desc = good();
  desc.heads_q = 7;
  expect_refused(desc, "heads_q");
}

TEST_F(Refused, NegativeSizes) {
  auto desc = good();
  desc.max_seqlen_k = -1;
  expect_refused(desc, "max_seqlen_k");
  desc = good();
  desc.max_batch = -3;
  expect_refused(desc, "max_batch");
  desc = good();
  desc.head_dim_qk = -64;
  expect_refused(desc, "head_dim_qk");
}

TEST_F(Refused, NumbersThatAreNone) {
  auto desc = good();
  desc.scale = std::numeric_limits<double>::quiet_NaN();
  expect_refused(desc, "scale");
  desc = good();
  desc.softcap = std::numeric_limits<double>::infinity();
  expect_refused(desc, "softcap");
}

TEST_F(Refused, NaNToleranceAndThreshold) {
  const Tensor a(ADAATTN_DTYPE_F32, {1, 4, 4});
  const Tensor norm(ADAATTN_DTYPE_F32, {1}), rank(std::vector<int32_t>{-7});
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const auto id = context_.device();
  const adaattn_tensor_t view = a.on(id, 0), out = norm.on(id, 0), ranks = rank.on(id, 0);
  EXPECT_EQ(adaattn_spectral_norm(context_.get(), &view, nan, 0, 1, &out, nullptr, 0, nullptr),
            ADAATTN_ERROR_INVALID_ARGUMENT);
  EXPECT_NE(last_error().find("tolerance"), std::string::npos) << last_error();
  EXPECT_EQ(adaattn_effective_rank(context_.get(), &view, nan, &ranks, nullptr, nullptr, 0, nullptr),
            ADAATTN_ERROR_INVALID_ARGUMENT);
  EXPECT_NE(last_error().find("threshold"), std::string::npos) << last_error();
  EXPECT_EQ(rank.get({0}), -7);
}

TEST_F(Refused, RanksOutsideTheMatrix) {
  for (int64_t rank : {int64_t{0}, int64_t{-2}, int64_t{7}}) {
    const Tensor a(ADAATTN_DTYPE_F32, {8, 6}), s(ADAATTN_DTYPE_F32, {6});
    adaattn_low_rank_desc_t desc;
    ASSERT_EQ(adaattn_low_rank_desc_init(&desc, sizeof desc), ADAATTN_SUCCESS);
    desc.rows = 8;
    desc.cols = 6;
    desc.rank = rank;
    const auto id = context_.device();
    const adaattn_tensor_t view = a.on(id, 0), out = s.on(id, 0);
    const adaattn_status_t status =
        adaattn_low_rank(context_.get(), &desc, &view, nullptr, &out, nullptr, nullptr, 0, nullptr);
    EXPECT_GE(status, 1000);
    EXPECT_LT(status, 2000);
    EXPECT_NE(last_error().find("rank"), std::string::npos) << last_error();
  }
}

}  // namespace
}  // namespace adaattn::test
