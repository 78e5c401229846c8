// Adaptive attention in waves of query tiles: over a million tokens, where nothing grows faster than the sequence, and
// for many heads.
#include <cmath>
#include <cstring>
#include <vector>

#include "gpu/tile_plans.h"
#include "support/random.h"

namespace adaattn::test {
namespace {

constexpr int64_t kLength = int64_t{1} << 20, kDim = 128, kQueryHeads = 2, kTopics = 97;

uint16_t bf16_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x8000u) >> 16);
}

float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Rows of one topic in a row, each its topic's direction and some noise.
std::vector<uint16_t> rows(int64_t heads, int64_t run, int64_t turn, float strength, float noise, uint64_t seed) {
  Random random(7);  // the same directions for queries and keys
  std::vector<float> topics(static_cast<size_t>(kTopics * kDim)), pattern((size_t{1} << 16) + 1);
  for (float& x : topics) x = static_cast<float>(random.normal());
  Random own(seed);
  for (float& x : pattern) x = noise * static_cast<float>(own.normal());
  std::vector<uint16_t> out(static_cast<size_t>(kLength * heads * kDim));
  size_t at = 0;
  for (int64_t row = 0; row < kLength; ++row)
    for (int64_t h = 0; h < heads; ++h) {
      const float* const topic = topics.data() + (row / run * turn + h) % kTopics * kDim;
      for (int64_t c = 0; c < kDim; ++c, ++at) out[at] = bf16_bits(strength * topic[c] + pattern[at % pattern.size()]);
    }
  return out;
}

adaattn_tensor_t view(const DeviceMemory& memory, int64_t heads) {
  adaattn_tensor_t t;
  const int64_t shape[] = {1, kLength, heads, kDim};
  EXPECT_TRUE(
      succeeded(adaattn_tensor_init(&t, memory.data(), ADAATTN_DTYPE_BF16, ADAATTN_DEVICE_CUDA, 0, 4, shape, nullptr)));
  return t;
}

std::vector<uint16_t> download(const DeviceMemory& memory) {
  std::vector<uint16_t> host(memory.bytes() / 2);
  require(cudaMemcpy(host.data(), memory.data(), memory.bytes(), cudaMemcpyDeviceToHost));
  return host;
}

TEST_F(TilePlans, AMillionTokensGoInWaves) {
  const Context context(kCuda);
  const DeviceMemory q(kLength * kQueryHeads * kDim * 2), k(kLength * kDim * 2), v(kLength * kDim * 2);
  const DeviceMemory o(q.bytes()), exact(q.bytes());
  const auto fill = [](const DeviceMemory& to, const std::vector<uint16_t>& from) {
    require(cudaMemcpy(to.data(), from.data(), to.bytes(), cudaMemcpyHostToDevice));
  };
  fill(q, rows(kQueryHeads, 128, 3, 1.5f, 1.0f, run_seed()));
  fill(k, rows(1, 128, 5, 0.5f, 1.0f, run_seed() + 1));
  fill(v, rows(1, 128, 5, 1.0f, 0.5f, run_seed() + 2));

  adaattn_attn_desc_t desc;
  ASSERT_TRUE(succeeded(adaattn_attn_desc_init(&desc, sizeof desc)));
  desc.max_batch = 1;
  desc.max_seqlen_q = desc.max_seqlen_k = kLength;
  desc.heads_q = kQueryHeads;
  desc.heads_kv = 1;
  desc.head_dim_qk = kDim;
  desc.dtype_q = ADAATTN_DTYPE_BF16;
  desc.mask = ADAATTN_MASK_CAUSAL;
  adaattn_io_t io;
  ASSERT_TRUE(succeeded(adaattn_io_init(&io, sizeof io)));
  io.q = view(q, kQueryHeads);
  io.k = view(k, 1);
  io.v = view(v, 1);
  io.o = view(exact, kQueryHeads);
  ASSERT_TRUE(succeeded(adaattn_attention(context.get(), &desc, nullptr, &io, nullptr)));
  io.o = view(o, kQueryHeads);

  adaattn_adaptive_desc_t adaptive = adaptive_desc(ADAATTN_POLICY_SPEED);
  const size_t whole = workspace_size(AdaptivePlan(context, desc, adaptive));
  EXPECT_LT(whole, static_cast<size_t>(kLength) * 1536);
  adaptive.max_workspace_bytes = whole - 1;
  const AdaptivePlan plan(context, desc, adaptive);
  const DeviceMemory workspace(workspace_size(plan));
  EXPECT_LT(workspace.bytes(), whole);
  for (int call = 0; call < 2; ++call)
    ASSERT_TRUE(succeeded(adaattn_plan_execute(plan.get(), &io, workspace.data(), workspace.bytes(), nullptr)));
  const adaattn_plan_stats_t stats = plan.stats();
  const uint64_t tiles = kLength / 128 * (kLength / 128 + 1) / 2;
  EXPECT_EQ(stats.tiles, 2 * kQueryHeads * tiles);
  EXPECT_LT(static_cast<double>(stats.tiles_kept), 0.2 * static_cast<double>(stats.tiles));
  EXPECT_EQ(stats.heads_dense, 0u);

  const std::vector<uint16_t> ours = download(o), theirs = download(exact), values = download(v);
  double spread = 0;
  for (int64_t c = 0; c < kDim; ++c) {
    double mean = 0, square = 0;
    constexpr int64_t kStep = 101;
    for (int64_t j = 0; j < kLength; j += kStep) {
      const auto x = static_cast<double>(from_bf16(values[static_cast<size_t>(j * kDim + c)]));
      mean += x;
      square += x * x;
    }
    const auto count = static_cast<double>((kLength + kStep - 1) / kStep);
    spread += square / count - mean * mean / (count * count);
  }
  for (int64_t h = 0; h < kQueryHeads; ++h) {
    double error = 0;
    for (int64_t i = 0; i < kLength; ++i)
      for (int64_t c = 0; c < kDim; ++c) {
        const auto at = static_cast<size_t>((i * kQueryHeads + h) * kDim + c);
        const auto x = static_cast<double>(from_bf16(ours[at]) - from_bf16(theirs[at]));
        error += x * x;
      }
    EXPECT_LE(std::sqrt(error / kLength / spread), 0.4) << "head " << h;
  }
}

// Shares of what is left out are tables of key tiles by query tiles: however many heads a plan is for, they are there,
// and a row has its one more key.
TEST_F(TilePlans, WhatIsLeftOutStandsInRowsOfAPlanForManyHeadsToo) {
  const Context context(kCuda);
  AttentionCase c = causal_case(10000);
  c.batch = 1;
  AttentionData data = structured(c);
  const adaattn_adaptive_desc_t quality = adaptive_desc(ADAATTN_POLICY_QUALITY);
  adaattn_attn_desc_t desc = data.desc;
  desc.max_seqlen_q = desc.max_seqlen_k = 16384;
  const AdaptivePlan one(context, desc, quality);
  desc.max_batch = 1024;
  const AdaptivePlan many(context, desc, quality);
  ASSERT_NO_FATAL_FAILURE(execute(one, data));
  AttentionData again = with_own_outputs(data);
  ASSERT_NO_FATAL_FAILURE(execute(many, again));
  EXPECT_TRUE(same_outputs(data, again));
  EXPECT_EQ(many.stats().tiles_kept, one.stats().tiles_kept);
  EXPECT_LT(many.stats().tiles_kept, many.stats().tiles);
}

}  // namespace
}  // namespace adaattn::test
