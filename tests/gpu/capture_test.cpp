// Calls captured into CUDA graphs.
#include <cmath>

#include "attention/fixture.h"
#include "gpu/device.h"

namespace adaattn::test {
namespace {

class Capture : public OnTheDevice {};

// Shapes with and without split keys, lengths on the host and on the device.
std::vector<AttentionCase> captured_cases() {
  return {{.name = "Prefill", .batch = 2, .heads_q = 4, .heads_kv = 2, .seqlen_q = 150, .seqlen_k = 210, .d_qk = 64},
          {.name = "Decode", .batch = 2, .heads_q = 8, .heads_kv = 2, .seqlen_q = 1, .seqlen_k = 2000, .d_qk = 128},
          {.name = "PagedDecode",
           .batch = 3,
           .heads_q = 8,
           .heads_kv = 2,
           .seqlen_q = 1,
           .seqlen_k = 400,
           .d_qk = 128,
           .layout_kv = ADAATTN_LAYOUT_PAGED,
           .page_size = 16,
           .mask = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT,
           .used_k = {400, 1, 33}}};
}

TEST_F(Capture, ReplayReadsTheInputsOfThatMoment) {
  for (const AttentionCase& c : captured_cases()) {
    for (const Dtypes& dtypes : {kBf16All, kF32All}) {
      SCOPED_TRACE(describe(c) + " " + dtypes.name);
      const Context context(kCuda);
      AttentionData data(c, dtypes, run_seed());
      const Plan plan(context, data.desc);
      const DeviceMemory workspace(plan.workspace_size());
      data.upload(kDevice);
      const adaattn_io_t io = data.io(kDevice);
      const Stream stream;
      const Graph graph(plan.get(), io, workspace, stream);

      for (uint64_t round = 0; round < 3; ++round) {
        const AttentionData fresh(c, dtypes, run_seed() + 1 + round);
        for (auto [to, from] : {std::pair{&data.q, &fresh.q}, {&data.k, &fresh.k}, {&data.v, &fresh.v}})
          to->for_each([&](const std::vector<int64_t>& index, int64_t) {
            // Pages that no sequence uses hold NaN, and they are others in the fresh data.
            if (const double x = from->get(index); !std::isnan(x)) to->set(index, x);
          });
        data.poison_outputs();
        data.upload(kDevice);
        graph.launch(stream);
        stream.wait();
        data.download(kDevice);
        EXPECT_TRUE(matches(data, reference::attention(data.desc, data.io()))) << "round " << round;
      }
    }
  }
}

TEST_F(Capture, WithoutAWorkspaceIsRefusedAndLeavesTheCaptureUsable) {
  const AttentionCase c = captured_cases()[1];
  const Context context(kCuda);
  AttentionData data(c, kBf16All, run_seed());
  const Plan plan(context, data.desc);
  ASSERT_GT(plan.workspace_size(), 0u);
  const DeviceMemory workspace(plan.workspace_size());
  data.upload(kDevice);
  const adaattn_io_t io = data.io(kDevice);
  const Stream stream;
  require(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal));
  EXPECT_EQ(adaattn_plan_execute(plan.get(), &io, nullptr, 0, stream.get()), ADAATTN_ERROR_CAPTURE);
  EXPECT_NE(last_error().find("workspace"), std::string::npos) << last_error();
  EXPECT_TRUE(succeeded(adaattn_plan_execute(plan.get(), &io, workspace.data(), workspace.bytes(), stream.get())));
  cudaGraph_t graph = nullptr;
  require(cudaStreamEndCapture(stream.get(), &graph));
  size_t nodes = 0;
  require(cudaGraphGetNodes(graph, nullptr, &nodes));
  EXPECT_GT(nodes, 0u);
  require(cudaGraphDestroy(graph));
}

TEST_F(Capture, CountersOfReplaysAreReadFromTheDevice) {
  const AttentionCase c = captured_cases()[2];
  const Context context(kCuda);
  AttentionData data(c, kBf16All, run_seed());
  const Plan plan(context, data.desc);
  const DeviceMemory workspace(plan.workspace_size());
  data.upload(kDevice);
  const adaattn_io_t io = data.io(kDevice);
  const Stream stream;
  const Graph graph(plan.get(), io, workspace, stream, cudaStreamCaptureModeThreadLocal);
  for (int i = 0; i < 4; ++i) graph.launch(stream);
  EXPECT_EQ(plan.stats().query_rows, 4u * 3 * 8);
}

}  // namespace
}  // namespace adaattn::test
