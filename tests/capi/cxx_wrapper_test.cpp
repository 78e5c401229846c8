// adaattn.hpp in code with exceptions; cxx_no_exceptions.cpp is its other half.
#include <gtest/gtest.h>

#include <type_traits>
#include <vector>

#include "adaattn/adaattn.hpp"

// What code compiled with -fno-exceptions saw; "" when all was as it should be.
const char* check_wrapper_without_exceptions();

namespace {

static_assert(!std::is_copy_constructible_v<adaattn::Context> &&
              std::is_nothrow_move_constructible_v<adaattn::Context>);
static_assert(!std::is_copy_constructible_v<adaattn::Plan> && std::is_nothrow_move_assignable_v<adaattn::Plan>);

struct Problem {
  Problem() {
    desc.max_batch = 1;
    desc.max_seqlen_q = desc.max_seqlen_k = 2;
    desc.heads_q = desc.heads_kv = 1;
    desc.head_dim_qk = 2;
    desc.dtype_q = ADAATTN_DTYPE_F32;
    io.q = adaattn::tensor(q.data(), {1, 2, 1, 2});
    io.k = adaattn::tensor(k.data(), {1, 2, 1, 2});
    io.v = adaattn::tensor(v.data(), {1, 2, 1, 2});
    io.o = adaattn::tensor(o.data(), {1, 2, 1, 2});
  }
  // Equal scores: each query gets the mean of v.
  const std::vector<float> q = {0, 0, 0, 0}, k = {1, 2, 3, 4}, v = {1, 10, 3, 30};
  std::vector<float> o = {-1, -1, -1, -1};
  adaattn::AttnDesc desc;
  adaattn::Io io;
};

TEST(CxxWrapper, ComputesInOneCallAndThroughAPlan) {
  Problem problem;
  adaattn::Context context = adaattn::Context::create().value();
  context.attention(problem.desc, problem.io).or_throw();
  EXPECT_EQ(problem.o, (std::vector<float>{2, 20, 2, 20}));

  problem.o.assign(4, -1);
  const adaattn::Plan plan = context.make_plan(problem.desc).value();
  std::vector<char> workspace(plan.workspace_size().value() + 1);
  plan.execute(problem.io, {workspace.data(), workspace.size()}).or_throw();
  EXPECT_EQ(problem.o, (std::vector<float>{2, 20, 2, 20}));
  EXPECT_EQ(plan.stats().value().calls, 1u);
  EXPECT_NE(plan.info().value().kernel[0], '\0');
}

TEST(CxxWrapper, TileMapHasAnEntryForEachTile) {
  adaattn::AttnDesc desc;
  desc.max_batch = 1;
  desc.max_seqlen_q = desc.max_seqlen_k = 640;
  desc.heads_q = desc.heads_kv = 1;
  desc.head_dim_qk = 8;
  desc.dtype_q = ADAATTN_DTYPE_F32;
  desc.mask = ADAATTN_MASK_CAUSAL;
  const std::vector<float> ones(640 * 8, 1.0f);
  std::vector<float> o(ones.size());
  adaattn::Io io;
  io.q = io.k = io.v = adaattn::tensor(ones.data(), {1, 640, 1, 8});
  io.o = adaattn::tensor(o.data(), {1, 640, 1, 8});
  adaattn::AdaptiveDesc adaptive;
  adaptive.policy = ADAATTN_POLICY_BALANCED;
  adaattn::Context context = adaattn::Context::create().value();
  const adaattn::Plan plan = context.make_plan(desc, &adaptive).value();
  plan.execute(io).or_throw();
  const adaattn::TileMap map = plan.tile_map(0, 0).value();
  EXPECT_EQ(map.query_tiles, 5);
  EXPECT_EQ(map.key_tiles, 5);
  ASSERT_EQ(map.tiles.size(), 25u);
  EXPECT_EQ(map.tiles[0], 2);
  EXPECT_EQ(map.tiles[1], 0);

  EXPECT_EQ(context.make_plan(desc).value().tile_map(0, 0).status().code(), ADAATTN_ERROR_NOT_SUPPORTED);
}

TEST(CxxWrapper, PoliciesReachOneCallAttentionAndCheckSupport) {
  Problem problem;
  const adaattn::Context context = adaattn::Context::create().value();
  adaattn::AdaptiveDesc adaptive;
  adaptive.policy = ADAATTN_POLICY_QUALITY;
  EXPECT_TRUE(context.check_support(problem.desc, &adaptive).ok());
  context.attention(problem.desc, problem.io, nullptr, &adaptive).or_throw();
  EXPECT_EQ(problem.o, (std::vector<float>{2, 20, 2, 20}));
  adaptive.tolerance = -1;
  for (const adaattn::Status& status : {context.check_support(problem.desc, &adaptive),
                                        context.attention(problem.desc, problem.io, nullptr, &adaptive)})
    EXPECT_NE(status.text().find("adaptive.tolerance is -1"), std::string::npos) << status.text();
}

TEST(CxxWrapper, PlanKeepsItsContextAlive) {
  Problem problem;
  auto context = std::make_unique<adaattn::Context>(adaattn::Context::create().value());
  adaattn::Plan plan = context->make_plan(problem.desc).value();
  context.reset();
  adaattn::Plan moved = std::move(plan);
  EXPECT_TRUE(moved.execute(problem.io).ok());
  adaattn::Context other = adaattn::Context::create().value();
  moved = other.make_plan(problem.desc).value();
  EXPECT_TRUE(moved.execute(problem.io).ok());
}

TEST(CxxWrapper, FailuresCarryStatusAndText) {
  Problem problem;
  const adaattn::Context context = adaattn::Context::create().value();
  problem.desc.heads_q = 0;
  const adaattn::Status status = context.attention(problem.desc, problem.io);
  EXPECT_FALSE(status.ok());
  EXPECT_EQ(status.code(), ADAATTN_ERROR_INVALID_ARGUMENT);
  EXPECT_STREQ(status.name(), "ADAATTN_ERROR_INVALID_ARGUMENT");
  EXPECT_NE(status.text().find("desc.heads_q is 0"), std::string::npos) << status.text();
  EXPECT_FALSE(context.make_plan(problem.desc));
  try {
    (void)context.make_plan(problem.desc).value();
    FAIL() << "no exception";
  } catch (const adaattn::Error& e) {
    EXPECT_EQ(e.code(), ADAATTN_ERROR_INVALID_ARGUMENT);
    EXPECT_NE(std::string(e.what()).find("desc.heads_q"), std::string::npos) << e.what();
  }
  EXPECT_EQ(adaattn::device_info({ADAATTN_DEVICE_CPU, 5}).status().code(), ADAATTN_ERROR_NO_DEVICE);
}

TEST(CxxWrapper, TensorsThatCannotBeAreRefusedByTheCall) {
  Problem problem;
  const adaattn::Context context = adaattn::Context::create().value();
  problem.io.q = adaattn::tensor(problem.q.data(), {1, 1, 2, 1, 2});
  EXPECT_EQ(context.attention(problem.desc, problem.io).code(), ADAATTN_ERROR_INVALID_SHAPE);
  problem.io.q = adaattn::tensor(problem.q.data(), {1, 2, 1, 2}, {4, 2, 1});
  EXPECT_EQ(context.attention(problem.desc, problem.io).code(), ADAATTN_ERROR_INVALID_SHAPE);
  EXPECT_EQ(adaattn::tensor_from_dlpack(nullptr).status().code(), ADAATTN_ERROR_NULL_POINTER);
  problem.io.q = adaattn::tensor(problem.q.data(), {1, 2, 1, 2}, {4, 2, 2, 1});
  EXPECT_TRUE(context.attention(problem.desc, problem.io).ok());
}

TEST(CxxWrapper, OptionsAndDevices) {
  const adaattn::Context context = adaattn::Context::create().value();
  EXPECT_TRUE(context.set_option(ADAATTN_OPTION_PLAN_CACHE_SIZE, 3).ok());
  EXPECT_EQ(context.get_option(ADAATTN_OPTION_PLAN_CACHE_SIZE).value(), 3);
  EXPECT_EQ(adaattn::device_count(ADAATTN_DEVICE_CPU).value(), 1);
  EXPECT_GE(adaattn::device_info().value().compute_units, 1);
}

TEST(CxxWrapper, WorksWithoutExceptions) { EXPECT_STREQ(check_wrapper_without_exceptions(), ""); }

}  // namespace
