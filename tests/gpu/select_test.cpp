// Which kernel a call gets, and how its tiles are handed out. Needs no device.
#include "attend/select.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "attend/plan.h"
#include "core/validate.h"
#include "support/attention_data.h"
#include "support/cases.h"

namespace adaattn::test {
namespace {

constexpr cuda::DeviceTraits kHopper = {
    .compute_capability = 90, .multiprocessors = 132, .l2_bytes = int64_t{50} << 20, .shared_bytes = 232448};

Problem causal(int64_t batch, int64_t heads, int64_t seqlen) {
  Problem p;
  p.max_batch = batch;
  p.max_seqlen_q = p.max_seqlen_k = seqlen;
  p.max_total_q = batch * seqlen;
  p.heads_q = p.heads_kv = heads;
  p.d_qk = p.d_v = 128;
  p.dtype_q = p.dtype_kv = p.dtype_o = Dtype::kBF16;
  p.window_right = 0;
  p.scale = 0.1f;
  return p;
}

cuda::Extent extent_of(const Problem& p) { return {p.max_batch, p.max_seqlen_q, p.max_seqlen_k, p.max_total_q}; }

std::string chosen(const Problem& p, uint32_t more = 0, const cuda::DeviceTraits& device = kHopper) {
  return cuda::choose(p, extent_of(p), cuda::features_of(p) | more, device, 0).kernel->name;
}

constexpr const char kTall[] = "sm90_forward_bf16_d128_tall", kMasked[] = "sm90_forward_bf16_d128_masked";

TEST(TallTiles, GetTheirKernelFrom512KeysOn) {
  EXPECT_EQ(chosen(causal(32, 16, 511)), kMasked);
  EXPECT_EQ(chosen(causal(32, 16, 512)), kTall);
  EXPECT_EQ(chosen(causal(16, 16, 1024)), kTall);
  EXPECT_EQ(chosen(causal(8, 16, 2048)), kTall);
  EXPECT_EQ(chosen(causal(2, 16, 8192)), kTall);
  EXPECT_EQ(chosen(causal(1, 1, 131072)), kTall);
}

TEST(TallTiles, AreThreeForEachTwoMultiprocessorsOfCausalCalls) {
  EXPECT_EQ(chosen(causal(1, 33, 1024)), kTall);  // 6 tiles a head
  EXPECT_EQ(chosen(causal(1, 32, 1024)), kMasked);
  cuda::DeviceTraits more = kHopper;
  more.multiprocessors = 133;
  EXPECT_EQ(chosen(causal(1, 33, 1024), 0, more), kMasked);
}

TEST(TallTiles, WithoutAMaskSaveRounds) {
  const auto full = [](int64_t batch, int64_t heads, int64_t seqlen) {
    Problem p = causal(batch, heads, seqlen);
    p.window_right = -1;
    return chosen(p);
  };
  const char* const plain = "sm90_forward_bf16_d128_plain";
  EXPECT_EQ(full(2, 16, 8192), kTall);  // 11 rounds of 192 rows, 16 of 128
  EXPECT_EQ(full(1, 64, 8192), kTall);
  EXPECT_EQ(full(1, 3, 8192), kTall);  // one, two
  EXPECT_EQ(full(1, 2, 8192), plain);  // one, one
  EXPECT_EQ(full(1, 4, 8192), plain);  // two, two
  EXPECT_EQ(full(21, 16, 768), kTall);
  EXPECT_EQ(full(21, 16, 511), plain);
}

TEST(TallTiles, HaveAtMostTwoKeysForEachQuery) {
  Problem p = causal(16, 16, 1024);
  p.max_seqlen_k = 2048;
  EXPECT_EQ(chosen(p), kTall);
  p.max_seqlen_k = 2049;
  EXPECT_EQ(chosen(p), kMasked);
  p.max_seqlen_k = 600;
  EXPECT_EQ(chosen(p), kTall);
}

TEST(TallTiles, MayBePackedGroupedInF16OrOfFewerColumns) {
  Problem p = causal(16, 16, 1024);
  p.layout_q = p.layout_kv = Layout::kTHD;
  EXPECT_EQ(chosen(p), kTall);
  p.max_total_q = 12 * 192;  // few tiles of sequences that could be long
  EXPECT_EQ(chosen(p), kMasked);
  p = causal(16, 16, 1024);
  p.heads_kv = 2;
  EXPECT_EQ(chosen(p), kTall);
  p.sink = true;
  p.off_top_left = true;
  EXPECT_EQ(chosen(p), kTall);
  p.d_qk = 112;
  EXPECT_EQ(chosen(p), kTall);
  p.dtype_q = p.dtype_kv = p.dtype_o = Dtype::kF16;
  EXPECT_EQ(chosen(p), "sm90_forward_f16_d128_tall");
}

TEST(TallTiles, AreLeftToOthersWhereItWasNotSeenToWin) {
  const Problem base = causal(16, 16, 1024);
  Problem p = base;
  p.window_left = 500;
  EXPECT_EQ(chosen(p), kMasked);
  p = base;
  p.window_right = 5;
  EXPECT_EQ(chosen(p), kMasked);
  p = base;
  p.softcap = 20;
  EXPECT_EQ(chosen(p), "sm90_forward_bf16_d128_softcap");
  for (const int64_t d : {64, 96, 192, 256}) {
    p = base;
    p.d_qk = p.d_v = d;
    EXPECT_EQ(chosen(p), "sm90_forward_bf16_d" + std::to_string(d) + "_masked");
  }
  p = base;
  p.d_v = 64;
  EXPECT_EQ(chosen(p), "sm90_forward_bf16_d128v64_masked");
  EXPECT_EQ(chosen(base, cuda::kUnaligned).substr(0, 5), "sm80_");
  cuda::DeviceTraits ampere = kHopper;
  ampere.compute_capability = 80;
  EXPECT_EQ(chosen(base, 0, ampere).substr(0, 5), "sm80_");
}

// Nothing is loaded on first use, which might be a capture.
TEST(TallTiles, KernelsAreLoadedWithThePlan) {
  const auto prepared = [](const Problem& p, const char* name) {
    const std::vector<const cuda::AttendKernel*> list = cuda::candidates(p, kHopper);
    return std::any_of(list.begin(), list.end(), [&](const auto* kernel) { return name == std::string(kernel->name); });
  };
  for (const int64_t seqlen : {300, 1024, 100000}) {
    EXPECT_TRUE(prepared(causal(16, 16, seqlen), kTall));
    EXPECT_TRUE(prepared(causal(16, 16, seqlen), kMasked));
  }
  Problem p = causal(16, 16, 1024);
  p.d_qk = p.d_v = 64;
  EXPECT_FALSE(prepared(p, kTall));
}

// Heads whose keys fit the cache, of at most five tiles for each two multiprocessors.
TEST(Sections, OfFewTilesHoldAllPairs) {
  const auto section = [](int64_t heads, int64_t seqlen) {
    const Problem p = causal(1, heads, seqlen);
    return cuda::choose(p, extent_of(p), cuda::features_of(p), kHopper, 0).section;
  };
  EXPECT_EQ(section(6, 4096), 6);
  EXPECT_EQ(section(7, 8192), 7);
  EXPECT_EQ(section(8, 8192), 2);
  EXPECT_EQ(section(3, 32768), 1);
}

TEST(Sections, DivideThePairsEvenly) {
  EXPECT_EQ(cuda::even_section(128, 25, 1), 16);
  EXPECT_EQ(cuda::even_section(16, 3, 1), 2);
  EXPECT_EQ(cuda::even_section(17, 6, 1), 6);  // 6, 6, 5
  EXPECT_EQ(cuda::even_section(64, 50, 8), 32);
  EXPECT_EQ(cuda::even_section(64, 3, 8), 2);  // a group does not fit
  EXPECT_EQ(cuda::even_section(5, 100, 1), 5);
  EXPECT_EQ(cuda::even_section(1, 0, 1), 1);
}

// Keys and values in E4M3: what the products of a call are computed in, and by which instance.
TEST(Selection, FactorsOfBlocksLeaveTheProductsInE4m3) {
  cuda::DeviceTraits device{90, 132, 50 << 20, 227 << 10};
  AttentionCase c = {.name = "Cache", .batch = 2, .heads_q = 16, .heads_kv = 8, .seqlen_q = 4096, .seqlen_k = 4096};
  c.d_qk = 128;
  Dtypes dtypes = {"e4m3", ADAATTN_DTYPE_E4M3, ADAATTN_DTYPE_E4M3, ADAATTN_DTYPE_BF16};
  const auto chosen = [&] {
    return std::string(
        cuda::plan_info(problem_from(make_desc(c, dtypes, ADAATTN_OUTPUT_LSE), Use::kAttention), device).kernel);
  };
  const auto causal = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT;
  EXPECT_EQ(chosen(), "sm90_e4m3_e4m3_d128_plain");
  c.mask = causal;
  EXPECT_EQ(chosen(), "sm90_e4m3_e4m3_d128_masked");
  for (const int64_t descale_block : {64, 128, 192, 8192}) {
    dtypes.descale_block = descale_block;
    c.mask = ADAATTN_MASK_NONE;
    EXPECT_EQ(chosen(), "sm90_e4m3_e4m3_d128_blocks");
    c.mask = causal;
    EXPECT_EQ(chosen(), "sm90_e4m3_e4m3_d128_maskedblocks");
  }
  // Wider queries, pages, keys worth splitting and other architectures: the portable kernels widen.
  const auto portable = [&] { return chosen().substr(0, 12) == "sm80_forward"; };
  AttentionCase few = c;
  few.batch = 1;
  few.heads_q = few.heads_kv = 4;
  few.seqlen_q = 300;
  std::swap(c, few);
  EXPECT_TRUE(portable());
  std::swap(c, few);
  dtypes.q = ADAATTN_DTYPE_BF16;
  EXPECT_TRUE(portable());
  dtypes.q = ADAATTN_DTYPE_E4M3;
  device.compute_capability = 89;
  EXPECT_TRUE(portable());
  device.compute_capability = 90;
  c.layout_kv = ADAATTN_LAYOUT_PAGED;
  c.page_size = 64;
  EXPECT_TRUE(portable());
}

TEST(Selection, TilesLeftOverComeInPartsWhereThatSavesHalfARound) {
  const cuda::DeviceTraits device{90, 132, 50 << 20, 227 << 10};
  const Dtypes dtypes = {"e4m3", ADAATTN_DTYPE_E4M3, ADAATTN_DTYPE_E4M3, ADAATTN_DTYPE_BF16};
  const auto splits = [&](int64_t batch, int64_t seqlen, adaattn_mask_t mask, int64_t bytes) {
    const AttentionCase c = {.name = "Tail",
                             .batch = batch,
                             .heads_q = 16,
                             .heads_kv = 16,
                             .seqlen_q = seqlen,
                             .seqlen_k = seqlen,
                             .d_qk = 128,
                             .mask = mask};
    const Problem problem = problem_from(make_desc(c, dtypes, 0), Use::kAttention);
    const cuda::Extent extent{batch, seqlen, seqlen, batch * seqlen};
    EXPECT_GE(cuda::partial_capacity(problem, device), bytes);
    return cuda::choose(problem, extent, cuda::features_of(problem), device, bytes).splits;
  };
  constexpr int64_t kEnough = 13 << 20;
  EXPECT_EQ(splits(2, 8192, ADAATTN_MASK_NONE, kEnough), 2);   // 1376 tiles, 56 left over
  EXPECT_EQ(splits(1, 16384, ADAATTN_MASK_NONE, kEnough), 2);  // the same
  EXPECT_EQ(splits(1, 16384, ADAATTN_MASK_NONE, 1 << 20), 1);
  EXPECT_EQ(splits(4, 4096, ADAATTN_MASK_NONE, kEnough), 1);  // 88 left over
  EXPECT_EQ(splits(2, 8192, ADAATTN_MASK_CAUSAL, 0), 1);
}

}  // namespace
}  // namespace adaattn::test
