// Which calls the Hopper kernel for short sequences gets. Needs no device.
#include "attend/select.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "attend/plan.h"

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

constexpr const char kShort[] = "sm90_forward_bf16_d128_short", kMasked[] = "sm90_forward_bf16_d128_masked";

TEST(ShortSequences, GetTheirKernelFrom512KeysToBelow8k) {
  EXPECT_EQ(chosen(causal(32, 16, 511)), kMasked);
  EXPECT_EQ(chosen(causal(32, 16, 512)), kShort);
  EXPECT_EQ(chosen(causal(16, 16, 1024)), kShort);
  EXPECT_EQ(chosen(causal(8, 16, 2048)), kShort);
  EXPECT_EQ(chosen(causal(2, 16, 8191)), kShort);
  EXPECT_EQ(chosen(causal(2, 16, 8192)), kMasked);
}

TEST(ShortSequences, NeedTwoTilesForEachMultiprocessor) {
  EXPECT_EQ(chosen(causal(1, 44, 1024)), kShort);  // 6 tiles a head
  EXPECT_EQ(chosen(causal(1, 43, 1024)), kMasked);
  cuda::DeviceTraits more = kHopper;
  more.multiprocessors = 144;
  EXPECT_EQ(chosen(causal(1, 44, 1024), 0, more), kMasked);
}

TEST(ShortSequences, HaveAtMostTwoKeysForEachQuery) {
  Problem p = causal(16, 16, 1024);
  p.max_seqlen_k = 2048;
  EXPECT_EQ(chosen(p), kShort);
  p.max_seqlen_k = 2049;
  EXPECT_EQ(chosen(p), kMasked);
  p.max_seqlen_k = 600;
  EXPECT_EQ(chosen(p), kShort);
}

TEST(ShortSequences, MayBePackedGroupedInF16OrOfFewerColumns) {
  Problem p = causal(16, 16, 1024);
  p.layout_q = p.layout_kv = Layout::kTHD;
  EXPECT_EQ(chosen(p), kShort);
  p.max_total_q = 16 * 192;  // few tiles of sequences that could be long
  EXPECT_EQ(chosen(p), kMasked);
  p = causal(16, 16, 1024);
  p.heads_kv = 2;
  EXPECT_EQ(chosen(p), kShort);
  p.sink = true;
  p.off_top_left = true;
  EXPECT_EQ(chosen(p), kShort);
  p.d_qk = 112;
  EXPECT_EQ(chosen(p), kShort);
  p.dtype_q = p.dtype_kv = p.dtype_o = Dtype::kF16;
  EXPECT_EQ(chosen(p), "sm90_forward_f16_d128_short");
}

TEST(ShortSequences, AreLeftToOthersWhereItWasNotSeenToWin) {
  const Problem base = causal(16, 16, 1024);
  Problem p = base;
  p.window_right = -1;
  EXPECT_EQ(chosen(p), "sm90_forward_bf16_d128_plain");
  p = base;
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

// An adaptive plan's exact calls have the bits of walking all tiles.
TEST(ShortSequences, OfAdaptivePlansKeepTheWalksBlocks) {
  Problem p = causal(16, 16, 1024);
  p.adaptive.policy = decide::Policy::kQuality;
  EXPECT_EQ(chosen(p), kMasked);
}

// Nothing is loaded on first use, which might be a capture.
TEST(ShortSequences, KernelsAreLoadedWithThePlan) {
  const auto prepared = [](const Problem& p, const char* name) {
    const std::vector<const cuda::AttendKernel*> list = cuda::candidates(p, kHopper);
    return std::any_of(list.begin(), list.end(), [&](const auto* kernel) { return name == std::string(kernel->name); });
  };
  for (const int64_t seqlen : {300, 1024, 100000}) {
    EXPECT_TRUE(prepared(causal(16, 16, seqlen), kShort));
    EXPECT_TRUE(prepared(causal(16, 16, seqlen), kMasked));
  }
  Problem p = causal(16, 16, 1024);
  p.d_qk = p.d_v = 64;
  EXPECT_FALSE(prepared(p, kShort));
}

}  // namespace
}  // namespace adaattn::test
