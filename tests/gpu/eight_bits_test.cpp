// 8-bit attention through the public functions: what is refused, graphs, statistics.
#include "gpu/eight_bits.h"

#include <cmath>

#include "attention/fixture.h"
#include "gpu/device.h"

namespace adaattn::test {
namespace {

class EightBits : public OnTheDevice {};

class EightBitPlan {
 public:
  EightBitPlan(const Context& context, const adaattn_attn_desc_t& desc) {
    const adaattn_adaptive_desc_t adaptive = eight_bits();
    EXPECT_TRUE(succeeded(adaattn_plan_create(context.get(), &desc, &adaptive, &plan_)));
  }
  ~EightBitPlan() { adaattn_plan_destroy(plan_); }
  EightBitPlan(const EightBitPlan&) = delete;
  EightBitPlan& operator=(const EightBitPlan&) = delete;
  adaattn_plan_t* get() const { return plan_; }
  size_t workspace_size() const {
    size_t bytes = 0;
    EXPECT_TRUE(succeeded(adaattn_plan_workspace_size(plan_, &bytes)));
    return bytes;
  }
  adaattn_plan_stats_t stats() const {
    adaattn_plan_stats_t stats{};
    stats.struct_size = sizeof stats;
    EXPECT_TRUE(succeeded(adaattn_plan_get_stats(plan_, ADAATTN_STATS_WAIT, &stats)));
    return stats;
  }

 private:
  adaattn_plan_t* plan_ = nullptr;
};

AttentionCase small_case() {
  AttentionCase c = {.name = "Small", .batch = 2, .heads_q = 4, .heads_kv = 2, .seqlen_q = 200, .seqlen_k = 300};
  c.d_qk = 128;
  return c;
}

double relative_error(const AttentionData& data) {
  const auto expected = reference::attention(data.desc, data.io());
  double wrong = 0, all = 0;
  data.o.for_each([&](const std::vector<int64_t>& index, int64_t flat) {
    const double e = expected.o[static_cast<size_t>(flat)];
    if (std::isnan(e)) return;
    wrong += std::pow(data.o.get(index) - e, 2);
    all += e * e;
  });
  return std::sqrt(wrong / all);
}

TEST_F(EightBits, WhatIsNotServedIsRefusedByName) {
  struct Refusal {
    const char* text;
    void (*change)(adaattn_attn_desc_t& desc, adaattn_adaptive_desc_t& adaptive);
  };
  const Refusal refusals[] = {
      {"adaptive.rank_mode", [](adaattn_attn_desc_t&, adaattn_adaptive_desc_t& a) { a.rank_mode = 0; }},
      {"adaptive.verify_rows", [](adaattn_attn_desc_t&, adaattn_adaptive_desc_t& a) { a.verify_rows = 8; }},
      {"adaptive.max_workspace_bytes",
       [](adaattn_attn_desc_t&, adaattn_adaptive_desc_t& a) { a.max_workspace_bytes = 1000; }},
      {"head_dim_qk is 96", [](adaattn_attn_desc_t& d, adaattn_adaptive_desc_t&) { d.head_dim_qk = 96; }},
      {"head_dim_v 64", [](adaattn_attn_desc_t& d, adaattn_adaptive_desc_t&) { d.head_dim_v = 64; }},
      {"dtype_q is 1 (F32)", [](adaattn_attn_desc_t& d,
                                adaattn_adaptive_desc_t&) { d.dtype_q = d.dtype_kv = d.dtype_o = ADAATTN_DTYPE_F32; }},
      {"dtype_o", [](adaattn_attn_desc_t& d, adaattn_adaptive_desc_t&) { d.dtype_o = ADAATTN_DTYPE_F32; }},
      {"softcap", [](adaattn_attn_desc_t& d, adaattn_adaptive_desc_t&) { d.softcap = 30; }},
      {"ALIBI", [](adaattn_attn_desc_t& d, adaattn_adaptive_desc_t&) { d.flags = ADAATTN_FLAG_ALIBI; }},
      {"BIAS", [](adaattn_attn_desc_t& d, adaattn_adaptive_desc_t&) { d.flags = ADAATTN_FLAG_BIAS; }},
      {"ENTROPY", [](adaattn_attn_desc_t& d, adaattn_adaptive_desc_t&) { d.outputs = ADAATTN_OUTPUT_ENTROPY; }},
      {"PAGED",
       [](adaattn_attn_desc_t& d, adaattn_adaptive_desc_t&) {
         d.layout_kv = ADAATTN_LAYOUT_PAGED;
         d.page_size = 16;
       }},
  };
  const Context context(kCuda);
  const adaattn_attn_desc_t good = make_desc(small_case(), kBf16All, 0);
  adaattn_adaptive_desc_t adaptive = eight_bits();
  char reason[512] = {};
  EXPECT_TRUE(succeeded(adaattn_check_support(context.get(), &good, &adaptive, reason, sizeof reason)));
  for (const Refusal& refusal : refusals) {
    adaattn_attn_desc_t desc = good;
    adaptive = eight_bits();
    refusal.change(desc, adaptive);
    EXPECT_EQ(adaattn_check_support(context.get(), &desc, &adaptive, reason, sizeof reason),
              ADAATTN_ERROR_NOT_SUPPORTED)
        << refusal.text;
    EXPECT_NE(std::string(reason).find(refusal.text), std::string::npos) << reason << "; expected " << refusal.text;
    EXPECT_NE(std::string(reason).find("; accepted"), std::string::npos) << reason;
  }
}

TEST_F(EightBits, RowsThatDoNotStartOn16BytesAreRefused) {
  AttentionCase c = small_case();
  c.storage = Storage::kPadded;
  const Context context(kCuda);
  AttentionData data(c, kBf16All, run_seed(), 0);
  const EightBitPlan plan(context, data.desc);
  data.upload(kDevice);
  const adaattn_io_t io = data.io(kDevice);
  EXPECT_EQ(adaattn_plan_execute(plan.get(), &io, nullptr, 0, nullptr), ADAATTN_ERROR_NOT_SUPPORTED);
  EXPECT_NE(last_error().find("16 bytes"), std::string::npos) << last_error();
}

TEST_F(EightBits, ReplaysQuantiseTheInputsOfThatMoment) {
  const AttentionCase c = small_case();
  const Context context(kCuda);
  AttentionData data(c, kBf16All, run_seed(), 0);
  const EightBitPlan plan(context, data.desc);
  const DeviceMemory workspace(plan.workspace_size());
  data.upload(kDevice);
  const adaattn_io_t io = data.io(kDevice);
  const Stream stream;
  const Graph graph(plan.get(), io, workspace, stream);
  for (uint64_t round = 0; round < 3; ++round) {
    Random random(run_seed() + round);
    for (Tensor* t : {&data.q, &data.k, &data.v}) t->fill([&] { return random.normal(); });
    data.poison_outputs();
    data.upload(kDevice);
    require(cudaMemset(workspace.data(), 0xff, workspace.bytes()));
    require(cudaDeviceSynchronize());
    graph.launch(stream);
    stream.wait();
    data.download(kDevice);
    EXPECT_LE(relative_error(data), 4.7e-2) << "round " << round;
  }
}

TEST_F(EightBits, StatisticsCountHeadsAndTiles) {
  AttentionCase dense = small_case(), packed = small_case();
  dense.mask = packed.mask = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT;
  packed.layout_q = packed.layout_kv = ADAATTN_LAYOUT_THD;
  packed.lens_q = {200, 200};
  packed.lens_k = {300, 300};
  for (const AttentionCase& c : {dense, packed}) {
    SCOPED_TRACE(describe(c));
    const Context context(kCuda);
    AttentionData data(c, kBf16All, run_seed(), 0);
    const EightBitPlan plan(context, data.desc);
    data.upload(kDevice);
    const adaattn_io_t io = data.io(kDevice);
    for (int call = 0; call < 2; ++call)
      ASSERT_TRUE(succeeded(adaattn_plan_execute(plan.get(), &io, nullptr, 0, nullptr)));
    const adaattn_plan_stats_t stats = plan.stats();
    EXPECT_EQ(stats.calls, 2u);
    EXPECT_EQ(stats.heads, 2u * 2 * 4);
    EXPECT_EQ(stats.heads_i8, stats.heads);
    EXPECT_EQ(stats.heads_bf16 + stats.heads_f16 + stats.heads_f32 + stats.heads_dense + stats.heads_low_rank, 0u);
    // Rows 0 to 127 end at keys 101 to 228, the others at 229 to 300: two tiles, then three.
    EXPECT_EQ(stats.tiles, stats.heads * 5);
    EXPECT_EQ(stats.tiles_kept, stats.tiles);
    EXPECT_DOUBLE_EQ(stats.flops_done, stats.flops);
    EXPECT_DOUBLE_EQ(stats.rank_v_sum, static_cast<double>(stats.heads) * 128);
    size_t count = 0;
    std::vector<adaattn_head_stats_t> heads(8);
    ASSERT_TRUE(succeeded(
        adaattn_plan_get_head_stats(plan.get(), heads.data(), sizeof(adaattn_head_stats_t), heads.size(), &count)));
    EXPECT_EQ(count, 8u);
    for (const adaattn_head_stats_t& head : heads) {
      EXPECT_EQ(head.precision, ADAATTN_PRECISION_I8);
      EXPECT_EQ(head.dense, 0);
      EXPECT_EQ(head.kept_tiles, 1);
    }
    adaattn_plan_info_t info{};
    info.struct_size = sizeof info;
    ASSERT_TRUE(succeeded(adaattn_plan_get_info(plan.get(), &info)));
    EXPECT_EQ(std::string(info.kernel), "sm90_int8_bf16_d128_masked");
    EXPECT_EQ(info.exact, 0);
    EXPECT_EQ(info.capture_safe, 1);
  }
}

}  // namespace
}  // namespace adaattn::test
