// What the tests of adaptive plans on a CUDA device share.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "adaptive/structured.h"
#include "attention/fixture.h"
#include "gpu/device.h"
#include "support/random.h"

namespace adaattn::test {

class TilePlans : public OnHopper {};

inline AttentionCase causal_case(int64_t seqlen) {
  AttentionCase c = {.name = "Causal", .batch = 2, .heads_q = 4, .heads_kv = 2, .seqlen_q = seqlen, .seqlen_k = seqlen};
  c.d_qk = c.d_v = 128;
  c.mask = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT;
  return c;
}

// Sequences of different lengths in a call: packed, with used lengths, and queries at the end of more keys.
inline std::vector<AttentionCase> cases_of_lengths() {
  AttentionCase packed = causal_case(1500);
  packed.name = "Packed";
  packed.batch = 3;
  packed.layout_q = packed.layout_kv = ADAATTN_LAYOUT_THD;
  packed.lens_q = {1500, 700, 129};
  packed.lens_k = {1500, 900, 129};
  AttentionCase used = causal_case(1400);
  used.name = "Used";
  used.used_k = {1400, 777};
  AttentionCase chunk = causal_case(1900);
  chunk.name = "Chunk";
  chunk.seqlen_q = 700;
  return {packed, used, chunk};
}

// Two short packed sequences of few heads, for the sanitizers.
inline AttentionCase small_case() {
  AttentionCase c = causal_case(700);
  c.heads_q = 2;
  c.heads_kv = 1;
  c.layout_q = c.layout_kv = ADAATTN_LAYOUT_THD;
  c.lens_q = {700, 300};
  c.lens_k = {700, 520};
  return c;
}

inline AttentionData structured(const AttentionCase& c, const Structure& structure = {}, uint64_t offset = 0) {
  AttentionData data(c, kBf16All, run_seed() + offset, ADAATTN_OUTPUT_LSE);
  make_structured(data, structure, run_seed() + offset + 1);
  return data;
}

inline size_t workspace_size(const AdaptivePlan& plan) {
  size_t bytes = 0;
  EXPECT_TRUE(succeeded(adaattn_plan_workspace_size(plan.get(), &bytes)));
  return bytes;
}

// Executes with a workspace full of NaN.
inline void execute(const AdaptivePlan& plan, AttentionData& data) {
  const DeviceMemory workspace(workspace_size(plan));
  data.poison_outputs();
  data.upload(kDevice);
  const adaattn_io_t io = data.io(kDevice);
  ASSERT_TRUE(succeeded(adaattn_plan_execute(plan.get(), &io, workspace.data(), workspace.bytes(), nullptr)));
  require(cudaDeviceSynchronize());
  data.download(kDevice);
}

// A captured call of a plan on the device's copy of some data, whose numbers may change between its replays.
class ReplayedCall {
 public:
  ReplayedCall(const AdaptivePlan& plan, AttentionData& data) : data_(data), workspace_(workspace_size(plan)) {
    data.upload(kDevice);
    const adaattn_io_t io = data.io(kDevice);
    graph_ = std::make_unique<Graph>(plan.get(), io, workspace_, stream_, cudaStreamCaptureModeThreadLocal);
  }
  void run() {
    data_.poison_outputs();
    data_.upload(kDevice);
    graph_->launch(stream_);
    stream_.wait();
    data_.download(kDevice);
  }

 private:
  AttentionData& data_;
  DeviceMemory workspace_;
  Stream stream_;
  std::unique_ptr<Graph> graph_;
};

// A key of sequence 0 and KV head 0 to which all rows of the first two query heads attend and that means of blocks do
// not show.
inline void plant_lone_key(AttentionData& data, int64_t rows) {
  Random random(run_seed() + 7);
  for (int64_t x = 0; x < 128; ++x) {
    const double sign = random.normal() < 0 ? -1 : 1;
    const auto at = data.key_index(0, 450, 0, x);
    data.k.set(at, 3 * sign);
    data.v.set(at, 3 * sign);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t h = 0; h < 2; ++h) {
        const auto query = data.query_index(0, i, h, x);
        data.q.set(query, data.q.get(query) + sign);
      }
  }
}

inline void copy_inputs(const AttentionData& from, AttentionData& to) {
  for (auto [x, y] : {std::pair{&to.q, &from.q}, {&to.k, &from.k}, {&to.v, &from.v}})
    x->for_each([x = x, y = y](const std::vector<int64_t>& index, int64_t) { x->set(index, y->get(index)); });
}

inline uint64_t causal_tiles(const AttentionCase& c) {
  const auto blocks = static_cast<uint64_t>((c.seqlen_q + 127) / 128);
  return static_cast<uint64_t>(c.batch * c.heads_q) * blocks * (blocks + 1) / 2;
}

inline adaattn_adaptive_desc_t custom_desc(double tile_mass) {
  adaattn_adaptive_desc_t adaptive = adaptive_desc(ADAATTN_POLICY_CUSTOM);
  adaptive.tile_mass = tile_mass;
  adaptive.tolerance = 1;
  adaptive.probe = ADAATTN_PROBE_OFF;
  return adaptive;
}

}  // namespace adaattn::test
