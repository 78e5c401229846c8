// What the tests of adaptive plans on a CUDA device share.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "adaptive/structured.h"
#include "attention/fixture.h"
#include "gpu/device.h"

namespace adaattn::test {

class TilePlans : public OnHopper {};

inline AttentionCase causal_case(int64_t seqlen) {
  AttentionCase c = {.name = "Causal", .batch = 2, .heads_q = 4, .heads_kv = 2, .seqlen_q = seqlen, .seqlen_k = seqlen};
  c.d_qk = c.d_v = 128;
  c.mask = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT;
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
