// The mask-walking kernels against a float64 oracle that walks the same masks and centroids.
#include <cstring>
#include <ostream>
#include <sstream>
#include <string>
#include <tuple>

#include "attend/plan.h"
#include "gpu/walk_problem.h"

namespace adaattn::test {

void PrintTo(const WalkShape& s, std::ostream* out) { *out << s.name; }

namespace {

class MaskWalk : public OnHopper, public testing::WithParamInterface<WalkShape> {};

struct Limits {
  double row, all;  // error of a row and of all, relative
  double lse;
};
// bf16 rounding of the weights, of O and, in a basis, of O before the product with it.
constexpr Limits kBf16 = {2e-2, 4e-3, 2e-3};
// As int8_test.cpp, where rows of few keys have half a step of e4m3: 6 per cent.
constexpr Limits kBytes = {0.16, 4.7e-2, 8e-2};

void expect_oracle(WalkProblem& x, const Limits& limits = kBf16) {
  const WalkShape& s = x.s;
  double error = 0, norm = 0;
  int64_t rows = 0;
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t h = 0; h < s.heads_q; ++h) {
      double far = 0, far_written = 0;
      for (int64_t i = 0; i < x.len_q(b); ++i) {
        const int64_t tile = i / decide::kTileQ, at = x.q_row(b, h, i);
        if (tile < s.first_tile || tile >= s.first_tile + x.items_of_head()) {
          ASSERT_TRUE(std::isnan(x.lse->host[at])) << "a query tile outside the wave was written";
          continue;
        }
        const WalkProblem::Row want = x.oracle(b, h, i);
        double row_error = 0, row_norm = 0;
        for (int64_t c = 0; c < WalkProblem::kD; ++c) {
          const double got = __bfloat162float(x.o->host[at * WalkProblem::kD + c]);
          row_error += (got - want.o[c]) * (got - want.o[c]);
          row_norm += want.o[c] * want.o[c];
        }
        ASSERT_LE(std::sqrt(row_error), limits.row * std::sqrt(row_norm)) << "b " << b << " h " << h << " i " << i;
        if (std::isinf(want.lse)) {
          ASSERT_EQ(x.lse->host[at], -INFINITY) << i;
        } else {
          ASSERT_NEAR(x.lse->host[at], want.lse, limits.lse) << "b " << b << " h " << h << " i " << i;
        }
        error += row_error;
        norm += row_norm;
        far += want.far;
        ++rows;
      }
      for (int64_t tile = s.first_tile; tile * decide::kTileQ < x.len_q(b) && tile < s.first_tile + x.items_of_head();
           ++tile)
        for (int w = 0; w < cuda::sm90::kWalkShares; ++w)
          far_written += x.far_share->host[x.item(b, h, tile) * cuda::sm90::kWalkShares + w];
      EXPECT_NEAR(far_written, far, 1e-2 * far + 1e-3) << "share of the far field, b " << b << " h " << h;
    }
  EXPECT_GT(rows, 0);
  EXPECT_LE(std::sqrt(error), limits.all * std::sqrt(norm));
  EXPECT_EQ(x.counters->host, (std::vector<uint32_t>{0, 0}));
}

void expect_found(const WalkProblem& x) {
  constexpr double kSlack = 1e-3;  // of a share: rounding of scores and sums
  const cuda::TableShape& t = x.tables.shape;
  for (int64_t b = 0; b < x.s.batch; ++b)
    for (int64_t h = 0; h < x.s.heads_q; ++h)
      for (int64_t tile = x.s.first_tile; tile < x.s.first_tile + x.items_of_head(); ++tile) {
        if (tile * decide::kTileQ >= x.len_q(b)) continue;
        SCOPED_TRACE(testing::Message() << "b " << b << " h " << h << " query tile " << tile);
        const std::vector<WalkProblem::Swept> swept = x.sweep(b, h, tile);
        const int64_t item = x.item(b, h, tile);
        int32_t found = 0;
        for (const WalkProblem::Swept& key : swept) {
          const int64_t word = item * t.mask_words + key.tile / 64;
          const bool computed = x.mask->host[word] >> key.tile % 64 & 1;
          found += computed;
          if (computed) {
            ASSERT_GE(key.of_kept, x.s.needle * (1 - kSlack)) << key.tile;
          } else {
            ASSERT_LT(key.of_all, x.s.needle * (1 + kSlack)) << key.tile;
          }
        }
        ASSERT_EQ(x.found->host[item], found);
      }
}

TEST_P(MaskWalk, AgreesWithTheOracleThatWalksTheSameTiles) {
  for (const int rank_class : {0, 1, 2, 3}) {
    for (const bool far_field : {false, true}) {
      WalkShape s = GetParam();
      if (rank_class != 0) s.classes = {rank_class};
      s.far_field = far_field;
      SCOPED_TRACE(testing::Message() << "class " << rank_class << (far_field ? ", far field" : ""));
      WalkProblem x(s, run_seed());
      x.run();
      ASSERT_NO_FATAL_FAILURE(expect_oracle(x));
    }
  }
}

TEST_P(MaskWalk, InEightBitsAgreesWithTheOracleThatWalksTheSameTiles) {
  WalkShape s = GetParam();
  s.classes = {cuda::kByteList};
  WalkProblem x(s, run_seed());
  x.run();
  expect_oracle(x, kBytes);
}

TEST_P(MaskWalk, RowsHaveOneMoreKeyForWhatTheirTileLeavesOut) {
  WalkShape s = GetParam();
  s.remainder = true;
  WalkProblem x(s, run_seed());
  x.run();
  expect_oracle(x);
}

// Of the tiles that are not kept those are computed too in which a key has the share of a needle, and no others: at
// least all whose key holds it of all that the row is given, at most those whose key holds it of the kept keys alone.
TEST_P(MaskWalk, TilesWithAKeyThatHoldsTheShareAreTakenIn) {
  for (const auto& [rank_class, far_field, needle, columns] : {std::tuple{0, false, 0.05, 0},
                                                               {0, true, 0.02, 0},
                                                               {1, true, 0.05, 0},
                                                               {2, false, 0.02, 0},
                                                               {3, true, 0.02, 0},
                                                               {0, false, 0.05, 32},
                                                               {0, true, 0.1, 64},
                                                               {1, true, 0.05, 64},
                                                               {2, false, 0.05, 32},
                                                               {3, true, 0.1, 32}}) {
    WalkShape s = GetParam();
    if (rank_class != 0) s.classes = {rank_class};
    s.far_field = far_field;
    s.needle = needle;
    s.probe_columns = columns;
    SCOPED_TRACE(testing::Message() << "class " << rank_class << (far_field ? ", far field" : "") << ", by " << columns
                                    << " columns");
    WalkProblem x(s, run_seed());
    x.run();
    ASSERT_NO_FATAL_FAILURE(expect_oracle(x));
    ASSERT_NO_FATAL_FAILURE(expect_found(x));
  }
}

std::vector<WalkShape> walk_shapes() {
  return {
      {.name = "OneTile", .seqlen_q = 128, .seqlen_k = 128},
      {.name = "OneRowOneKey", .seqlen_q = 1, .seqlen_k = 1, .window_right = 0},
      {.name = "CausalHalf",
       .batch = 2,
       .heads_q = 6,
       .heads_kv = 2,
       .seqlen_q = 640,
       .seqlen_k = 640,
       .window_right = 0},
      {.name = "CausalForcedTilesOnly", .heads_q = 3, .seqlen_q = 900, .seqlen_k = 900, .window_right = 0, .kept = 0},
      {.name = "CausalRaggedShorterQueries", .heads_q = 2, .seqlen_q = 300, .seqlen_k = 777, .window_right = 0},
      {.name = "CausalMoreQueriesThanKeys", .heads_q = 2, .seqlen_q = 500, .seqlen_k = 200, .window_right = 0},
      {.name = "FullRagged", .heads_q = 4, .heads_kv = 2, .seqlen_q = 333, .seqlen_k = 1111, .kept = 0.3},
      {.name = "Window",
       .heads_q = 2,
       .seqlen_q = 1500,
       .seqlen_k = 1500,
       .window_left = 700,
       .window_right = 0,
       .kept = 0.4},
      {.name = "NarrowWindow", .heads_q = 2, .seqlen_q = 700, .seqlen_k = 700, .window_left = 60, .window_right = 20},
      {.name = "WordsAndBlocksOfCentroids", .heads_q = 2, .seqlen_q = 130, .seqlen_k = 17000, .kept = 0.1},
      {.name = "UsedKeys",
       .batch = 3,
       .heads_q = 2,
       .seqlen_q = 260,
       .seqlen_k = 600,
       .window_right = 0,
       .lens_k = {600, 401, 0}},
      {.name = "Packed",
       .batch = 4,
       .heads_q = 2,
       .seqlen_q = 700,
       .seqlen_k = 700,
       .window_right = 0,
       .lens_q = {300, 0, 700, 129},
       .lens_k = {300, 50, 700, 333}},
  };
}
INSTANTIATE_TEST_SUITE_P(Table, MaskWalk, testing::ValuesIn(walk_shapes()),
                         [](const auto& info) { return std::string(info.param.name); });

class MaskWalks : public OnHopper {};

// How many elements differ in a bit, and the first of them.
std::string differing(const std::vector<Bf16>& a, const std::vector<Bf16>& b) {
  int64_t count = 0;
  std::ostringstream where;
  for (size_t i = 0; i < a.size(); ++i) {
    if (__bfloat16_as_ushort(a[i]) == __bfloat16_as_ushort(b[i])) continue;
    if (++count <= 40)
      where << " [" << i / WalkProblem::kD << ", " << i % WalkProblem::kD << "] " << __bfloat162float(a[i]) << " and "
            << __bfloat162float(b[i]);
  }
  return count == 0 ? "" : std::to_string(count) + ":" + where.str();
}

WalkShape mixed_shape() {
  return {.name = "Mixed",
          .batch = 2,
          .heads_q = 8,
          .heads_kv = 4,
          .seqlen_q = 513,
          .seqlen_k = 513,
          .window_right = 0,
          .kept = 0.3};
}

TEST_F(MaskWalks, ClassesOfDifferentRanksShareACall) {
  WalkShape s = mixed_shape();
  s.far_field = true;
  s.classes = {0, 3, 1, 2, 0};
  WalkProblem x(s, run_seed());
  x.run();
  expect_oracle(x);
}

TEST_F(MaskWalks, AWaveOfQueryTilesLeavesTheOthersAlone) {
  for (const int rank_class : {0, 2, cuda::kByteList}) {
    const bool bytes = rank_class == cuda::kByteList;
    WalkProblem x({.name = "Wave",
                   .heads_q = 2,
                   .seqlen_q = 1000,
                   .seqlen_k = 1000,
                   .window_right = 0,
                   .kept = 0.3,
                   .far_field = !bytes,
                   .max_rank = 64,
                   .classes = {rank_class},
                   .first_tile = 3,
                   .wave_tiles = 2},
                  run_seed());
    x.run();
    expect_oracle(x, bytes ? kBytes : kBf16);
  }
}

// Of the kernel that takes every tile, which has no masks and lists.
void expect_bits_of(const char* name, const WalkShape& shape) {
  const cuda::AttendKernel* whole = nullptr;
  for (const cuda::AttendKernel* row : cuda::attend_kernels())
    if (std::string(row->name) == name) whole = row;
  ASSERT_NE(whole, nullptr);
  cuda::prepare_kernel(*whole);
  WalkProblem x(shape, run_seed());
  for (int round = 0; round < 20; ++round) {
    x.o->upload();
    x.lse->upload();
    x.run();
    const std::vector<Bf16> walked = x.o->host;
    const std::vector<float> walked_lse = x.lse->host;
    cuda::AttendArgs args;
    args.p = x.params;
    args.m_tiles = x.tables.shape.query_tiles;
    args.heads = x.tables.shape.heads_q;
    args.group = x.tables.shape.group;
    args.section = 8;
    args.causal_order = true;
    args.scheduler = x.counters->data();
    args.multiprocessors = 132;
    if (whole->phase == cuda::Phase::kInt8) args.int8 = x.quantize();
    require(whole->launch(args, nullptr));
    x.o->download();
    x.lse->download();
    const auto bits = [](const Bf16& a, const Bf16& b) { return __bfloat16_as_ushort(a) == __bfloat16_as_ushort(b); };
    ASSERT_TRUE(std::equal(walked.begin(), walked.end(), x.o->host.begin(), bits)) << "round " << round;
    ASSERT_EQ(walked_lse, x.lse->host);
  }
}

TEST_F(MaskWalks, AProbeThatFindsNothingLeavesTheBits) {
  for (const int rank_class : {0, 2}) {
    WalkShape s = {.name = "FindsNothing",
                   .batch = 2,
                   .heads_q = 12,
                   .heads_kv = 4,
                   .seqlen_q = 1200,
                   .seqlen_k = 1333,
                   .window_right = 0,
                   .kept = 0.3,
                   .multiprocessors = 60,
                   .classes = {rank_class}};
    WalkProblem without(s, run_seed());
    without.run();
    s.needle = 8;  // more than any key can hold
    WalkProblem with(s, run_seed());
    with.run();
    EXPECT_EQ(without.lse->host, with.lse->host);
    EXPECT_EQ(differing(without.o->host, with.o->host), "");
    EXPECT_EQ(with.mask->host, without.mask->host);
  }
}

WalkShape all_tiles() {
  return {.name = "All",
          .batch = 2,
          .heads_q = 12,
          .heads_kv = 4,
          .seqlen_q = 1200,
          .seqlen_k = 1333,
          .window_right = 0,
          .kept = 1};
}

TEST_F(MaskWalks, AllTilesKeptIsTheExactKernelBitForBit) {
  WalkShape s = all_tiles();
  s.far_field = true;
  expect_bits_of("sm90_forward_bf16_d128_masked", s);
}

TEST_F(MaskWalks, AllTilesKeptInEightBitsIsTheKernelOfEveryTileBitForBit) {
  WalkShape s = all_tiles();
  s.classes = {cuda::kByteList};
  expect_bits_of("sm90_int8_bf16_d128_masked", s);
  s.window_left = 500;
  expect_bits_of("sm90_int8_bf16_d128_masked", s);
}

TEST_F(MaskWalks, HeadsInEightBitsShareACallWithOthers) {
  WalkShape s = mixed_shape();
  s.classes = {0, cuda::kByteList, cuda::kByteList};
  WalkProblem x(s, run_seed());
  x.run();
  expect_oracle(x, kBytes);
}

TEST_F(MaskWalks, RunsOfOneProblemAgreeBitForBit) {
  struct Kind {
    int rank_class;
    bool far_field, remainder;
    double needle;
    int probe_columns;
  };
  for (const Kind& kind : {Kind{0, true, false, 0, 0}, Kind{1, true, false, 0, 0}, Kind{3, true, false, 0, 0},
                           Kind{0, false, false, 0, 0}, Kind{0, false, true, 0, 0}, Kind{0, false, false, 0.02, 0},
                           Kind{0, true, false, 0.02, 0}, Kind{2, true, false, 0.02, 0}, Kind{0, true, false, 0.1, 32},
                           Kind{1, false, false, 0.1, 64}, Kind{cuda::kByteList, false, false, 0, 0}}) {
    SCOPED_TRACE(testing::Message() << "class " << kind.rank_class << (kind.far_field ? ", far field" : "")
                                    << (kind.remainder ? ", remainder" : "") << (kind.needle > 0 ? ", probe" : ""));
    WalkProblem x({.name = "Repeat",
                   .batch = 2,
                   .heads_q = 12,
                   .heads_kv = 4,
                   .seqlen_q = 1200,
                   .seqlen_k = 1200,
                   .window_right = 0,
                   .kept = 0.3,
                   .far_field = kind.far_field,
                   .remainder = kind.remainder,
                   .needle = kind.needle,
                   .probe_columns = kind.probe_columns,
                   .multiprocessors = 60,
                   .classes = {kind.rank_class}},
                  run_seed());
    x.run();
    const std::vector<float> first = x.lse->host;
    const std::vector<Bf16> first_o = x.o->host;
    const std::vector<int32_t> first_found = x.found->host;
    EXPECT_EQ(std::count_if(first_found.begin(), first_found.end(), [](int32_t n) { return n > 0; }) > 0,
              kind.needle > 0);
    for (int round = 0; round < 30; ++round) {
      x.run();
      ASSERT_EQ(first, x.lse->host) << round;
      ASSERT_EQ(differing(first_o, x.o->host), "") << round;
      ASSERT_EQ(first_found, x.found->host) << round;
    }
  }
}

}  // namespace
}  // namespace adaattn::test
