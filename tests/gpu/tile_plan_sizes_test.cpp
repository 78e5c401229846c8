// What adaptive plans on CUDA ask of memory; needs no device.
#include "adaptive/tile_plan_sizes.h"

#include <gtest/gtest.h>

#include "adaptive/structured.h"
#include "core/adaptive_options.h"
#include "core/error.h"

namespace adaattn::test {
namespace {

using cuda::TilePlanSizes;

constexpr cuda::DeviceTraits kHopper = {90, 132, int64_t{50} << 20, 227 << 10};

Problem problem_of(int64_t seqlen, const adaattn_adaptive_desc_t& adaptive, int64_t heads_kv = 2) {
  Problem p;
  p.max_batch = 1;
  p.max_seqlen_q = p.max_seqlen_k = seqlen;
  p.heads_q = 4 * heads_kv;
  p.heads_kv = heads_kv;
  p.d_qk = p.d_v = 128;
  p.dtype_q = p.dtype_kv = p.dtype_o = Dtype::kBF16;
  p.window_right = 0;
  p.adaptive = resolve_options(adaptive, p);
  p.adaptive = cuda::device_options(p);
  return p;
}

TilePlanSizes sizes_of(int64_t seqlen, const adaattn_adaptive_desc_t& adaptive) {
  return cuda::tile_plan_sizes(problem_of(seqlen, adaptive), kHopper);
}

std::vector<adaattn_adaptive_desc_t> every_kind() {
  adaattn_adaptive_desc_t custom = adaptive_desc(ADAATTN_POLICY_CUSTOM);
  custom.probe = ADAATTN_PROBE_OFF;
  custom.tile_mass = 0.8;
  custom.rank_mode = ADAATTN_RANK_OFF;  // how much its decomposition needs is asked of a device
  adaattn_adaptive_desc_t bytes = custom, probing = custom;
  bytes.far_field = ADAATTN_SWITCH_OFF;
  bytes.min_precision = bytes.max_precision = ADAATTN_PRECISION_I8;
  probing.probe = ADAATTN_PROBE_FULL;
  return {adaptive_desc(ADAATTN_POLICY_QUALITY),
          adaptive_desc(ADAATTN_POLICY_BALANCED),
          adaptive_desc(ADAATTN_POLICY_SPEED),
          custom,
          bytes,
          probing};
}

// Masks, codes and shares of tiles grow with its square, up to a bound that no length moves.
TEST(TilePlanSizes, GrowWithTheLengthAndNotWithItsSquare) {
  constexpr double kBound = 112 << 20;
  for (const adaattn_adaptive_desc_t& adaptive : every_kind())
    for (int64_t seqlen = 8192; seqlen <= int64_t{1} << 21; seqlen *= 2) {
      SCOPED_TRACE(testing::Message() << "policy " << adaptive.policy << " seqlen " << seqlen);
      const auto bytes = static_cast<double>(sizes_of(seqlen, adaptive).workspace_bytes);
      const auto twice = static_cast<double>(sizes_of(2 * seqlen, adaptive).workspace_bytes);
      EXPECT_LT(twice, 2 * bytes + kBound);
      const double per_key = 256 + (adaptive.max_precision == ADAATTN_PRECISION_I8 ? 2 * (128 + 128) + 2 : 0);
      EXPECT_LT(twice, 2 * per_key * static_cast<double>(seqlen) + kBound);
    }
}

// docs/adaptive.md, "In an engine on CUDA".
TEST(TilePlanSizes, AreThoseOfTheGuide) {
  constexpr double kMiB = 1 << 20;
  for (const auto& [seqlen, mebibytes] : {std::pair{8192, 14}, {32768, 30}, {131072, 128}, {1048576, 740}}) {
    size_t largest = 0;
    for (const adaattn_policy_t policy : {ADAATTN_POLICY_QUALITY, ADAATTN_POLICY_BALANCED, ADAATTN_POLICY_SPEED})
      largest = std::max(largest,
                         cuda::tile_plan_sizes(problem_of(seqlen, adaptive_desc(policy), 8), kHopper).workspace_bytes);
    EXPECT_LE(static_cast<double>(largest) / kMiB, mebibytes) << seqlen;
    EXPECT_GE(static_cast<double>(largest) / kMiB, 0.75 * mebibytes) << seqlen;
  }
}

// Any limit that is not refused is kept to, in waves of query tiles; the text of a refusal has the least that serves.
TEST(TilePlanSizes, KeepToTheLimit) {
  for (adaattn_adaptive_desc_t adaptive : every_kind())
    for (const int64_t seqlen : {int64_t{4096}, int64_t{100000}, int64_t{1} << 20}) {
      SCOPED_TRACE(testing::Message() << "policy " << adaptive.policy << " seqlen " << seqlen);
      adaptive.max_workspace_bytes = 0;
      const TilePlanSizes whole = sizes_of(seqlen, adaptive);
      EXPECT_GE(whole.shape.wave_tiles, 1);
      adaptive.max_workspace_bytes = 1;
      size_t least = 0;
      try {
        sizes_of(seqlen, adaptive);
        FAIL() << "not refused";
      } catch (const Error& error) {
        const std::string text = error.what();
        ASSERT_NE(text.find("adaptive.max_workspace_bytes"), std::string::npos) << text;
        least = std::stoull(text.substr(text.find("at least ") + 9));
      }
      ASSERT_LE(least, whole.workspace_bytes);
      for (const size_t limit : {least, (least + whole.workspace_bytes) / 2, whole.workspace_bytes}) {
        adaptive.max_workspace_bytes = limit;
        const TilePlanSizes sizes = sizes_of(seqlen, adaptive);
        EXPECT_LE(sizes.workspace_bytes, limit);
        EXPECT_GE(sizes.shape.wave_tiles, 1);
      }
      EXPECT_EQ(sizes_of(seqlen, adaptive).shape.wave_tiles, whole.shape.wave_tiles);
    }
}

// What the device's kernels get: SPEED goes by cells alone below 8704 keys, and they stop growing before those
// of other rules do (MisleadingInputs.DuplicatedTokens).
TEST(TilePlanOptions, SpeedGoesByCellsInShortContexts) {
  const auto options = [](int64_t seqlen) { return problem_of(seqlen, adaptive_desc(ADAATTN_POLICY_SPEED)).adaptive; };
  for (const int64_t seqlen : {512, 1024, 2048, 4096, 8192, 8703}) {
    EXPECT_EQ(options(seqlen).needle_mass, 0) << seqlen;
    EXPECT_LE(options(seqlen).keep_peak * 0x1p-24, 0.02) << seqlen;
  }
  EXPECT_NEAR(options(1024).keep_peak * 0x1p-24, 0.02, 1e-6);
  EXPECT_NEAR(options(8192).keep_peak * 0x1p-24, 0.007, 1e-4);
  for (const int64_t seqlen : {8704, 16384}) EXPECT_GT(options(seqlen).needle_mass, 0) << seqlen;
}

}  // namespace
}  // namespace adaattn::test
