// Calls captured into CUDA graphs.
#include <cmath>
#include <functional>

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
           .used_k = {400, 1, 33}},
          {.name = "PagedPrefill",
           .batch = 2,
           .heads_q = 4,
           .heads_kv = 2,
           .seqlen_q = 150,
           .seqlen_k = 256,
           .d_qk = 64,
           .layout_kv = ADAATTN_LAYOUT_PAGED,
           .page_size = 64,
           .mask = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT,
           .used_k = {256, 170}}};
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

// A context's first plan allocates; a capture in which that is tried is lost.
TEST_F(Capture, OneCallAttentionIsRefusedAndLeavesTheCaptureUsable) {
  const AttentionCase c = captured_cases()[0];
  const Context context(kCuda);
  AttentionData data(c, kBf16All, run_seed());
  data.upload(kDevice);
  const adaattn_io_t io = data.io(kDevice);
  const Stream stream;
  require(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeGlobal));
  EXPECT_EQ(adaattn_attention(context.get(), &data.desc, nullptr, &io, stream.get()), ADAATTN_ERROR_CAPTURE);
  cudaGraph_t graph = nullptr;
  require(cudaStreamEndCapture(stream.get(), &graph));
  require(cudaGraphDestroy(graph));
  EXPECT_TRUE(succeeded(adaattn_attention(context.get(), &data.desc, nullptr, &io, stream.get())));
  stream.wait();
  data.download(kDevice);
  EXPECT_TRUE(matches(data, reference::attention(data.desc, data.io())));
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

// A call with a workspace, made twice: at once, and captured and replayed.
using ToolCall = std::function<adaattn_status_t(void* workspace, size_t bytes, adaattn_stream_t stream)>;

std::vector<std::vector<std::byte>> results(const std::vector<Tensor>& outputs) {
  std::vector<std::vector<std::byte>> bytes;
  for (const Tensor& output : outputs) {
    output.download(kDevice, 0);
    bytes.push_back(output.bytes());
  }
  return bytes;
}

void expect_replay_repeats(const ToolCall& call, size_t bytes, std::vector<Tensor> outputs) {
  const DeviceMemory workspace(bytes);
  void* const memory = bytes > 0 ? workspace.data() : nullptr;
  const Stream stream;
  const auto poison = [&] {
    for (Tensor& output : outputs) {
      output.fill(output.dtype() == ADAATTN_DTYPE_I32 ? -7 : std::nan(""));
      output.upload(kDevice, 0);
    }
  };
  poison();
  const auto poisoned = results(outputs);
  ASSERT_TRUE(succeeded(call(memory, bytes, stream.get())));
  stream.wait();
  const auto expected = results(outputs);
  for (size_t i = 0; i < outputs.size(); ++i) EXPECT_NE(expected[i], poisoned[i]) << i;

  poison();
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replay = nullptr;
  require(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeGlobal));
  const adaattn_status_t status = call(memory, bytes, stream.get());
  require(cudaStreamEndCapture(stream.get(), &graph));
  ASSERT_TRUE(succeeded(status));
  EXPECT_EQ(results(outputs), poisoned) << "computed while it was captured";
  require(cudaGraphInstantiate(&replay, graph, 0));
  require(cudaGraphLaunch(replay, stream.get()));
  stream.wait();
  EXPECT_EQ(results(outputs), expected);
  require(cudaGraphExecDestroy(replay));
  require(cudaGraphDestroy(graph));
}

TEST_F(Capture, MergeAndToolsGiveTheSameBitsAsCalls) {
  const Context context(kCuda);
  Random random(run_seed());
  const auto drawn = [&](const std::vector<int64_t>& shape) {
    Tensor t(ADAATTN_DTYPE_F32, shape);
    t.fill([&] { return random.normal(); });
    t.upload(kDevice, 0);
    return t;
  };
  const auto empty = [](adaattn_dtype_t dtype, const std::vector<int64_t>& shape) { return Tensor(dtype, shape); };
  const auto view = [](const Tensor& t) { return t.on(kDevice, 0); };
  {
    SCOPED_TRACE("merge");
    const Tensor o_a = drawn({2, 5, 3, 16}), o_b = drawn({2, 5, 3, 16}), lse_a = drawn({2, 3, 5}),
                 lse_b = drawn({2, 3, 5});
    const Tensor o = empty(ADAATTN_DTYPE_F32, {2, 5, 3, 16}), lse = empty(ADAATTN_DTYPE_F32, {2, 3, 5});
    expect_replay_repeats(
        [&](void*, size_t, adaattn_stream_t stream) {
          const adaattn_tensor_t v[] = {view(o_a), view(lse_a), view(o_b), view(lse_b), view(o), view(lse)};
          return adaattn_merge(context.get(), &v[0], &v[1], &v[2], &v[3], &v[4], &v[5], stream);
        },
        0, {o, lse});
  }
  const Tensor a = drawn({2, 70, 40});
  const adaattn_tensor_t av = view(a);
  size_t bytes = 0;
  {
    SCOPED_TRACE("effective rank");
    const Tensor ranks = empty(ADAATTN_DTYPE_I32, {2}), values = empty(ADAATTN_DTYPE_F32, {2, 40});
    ASSERT_TRUE(succeeded(adaattn_effective_rank_workspace_size(context.get(), &av, &bytes)));
    expect_replay_repeats(
        [&](void* workspace, size_t size, adaattn_stream_t stream) {
          const adaattn_tensor_t rv = view(ranks), sv = view(values);
          return adaattn_effective_rank(context.get(), &av, 0.9, &rv, &sv, workspace, size, stream);
        },
        bytes, {ranks, values});
  }
  {
    SCOPED_TRACE("spectral norm");
    const Tensor norms = empty(ADAATTN_DTYPE_F32, {2});
    ASSERT_TRUE(succeeded(adaattn_spectral_norm_workspace_size(context.get(), &av, &bytes)));
    expect_replay_repeats(
        [&](void* workspace, size_t size, adaattn_stream_t stream) {
          const adaattn_tensor_t nv = view(norms);
          return adaattn_spectral_norm(context.get(), &av, 0, 0, 3, &nv, workspace, size, stream);
        },
        bytes, {norms});
  }
  {
    SCOPED_TRACE("projection");
    const Tensor basis = drawn({2, 40, 9}), y = empty(ADAATTN_DTYPE_F32, {2, 70, 9}),
                 rows = empty(ADAATTN_DTYPE_F32, {2, 70});
    const adaattn_tensor_t bv = view(basis);
    expect_replay_repeats(
        [&](void*, size_t, adaattn_stream_t stream) {
          const adaattn_tensor_t yv = view(y), rv = view(rows);
          return adaattn_low_rank_project(context.get(), &av, &bv, nullptr, &yv, &rv, nullptr, stream);
        },
        0, {y, rows});
  }
  {
    SCOPED_TRACE("entropy");
    AttentionData data(captured_cases()[0], kBf16All, run_seed());
    adaattn_entropy_desc_t desc;
    adaattn_entropy_desc_init(&desc, sizeof desc);
    adaattn_attn_desc_t attn = data.desc;
    attn.outputs = 0;
    const Tensor heads = empty(ADAATTN_DTYPE_F32, {2, 4});
    data.upload(kDevice);
    ASSERT_TRUE(succeeded(adaattn_entropy_workspace_size(context.get(), &attn, &desc, &bytes)));
    expect_replay_repeats(
        [&](void* workspace, size_t size, adaattn_stream_t stream) {
          adaattn_io_t io = data.io(kDevice);
          io.v = io.o = io.lse = io.entropy = adaattn_tensor_t{};
          const adaattn_tensor_t hv = view(heads);
          return adaattn_entropy(context.get(), &attn, &desc, &io, &hv, workspace, size, stream);
        },
        bytes, {heads});
  }
}

// The one tool without a workspace that would have to allocate.
TEST_F(Capture, ProjectionsResidualIsRefused) {
  const Context context(kCuda);
  Tensor a(ADAATTN_DTYPE_F32, {70, 40}), basis(ADAATTN_DTYPE_F32, {40, 9}), residual(ADAATTN_DTYPE_F32, {1});
  for (Tensor* t : {&a, &basis, &residual}) {
    t->fill(0.5);
    t->upload(kDevice, 0);
  }
  const adaattn_tensor_t av = a.on(kDevice, 0), bv = basis.on(kDevice, 0), rv = residual.on(kDevice, 0);
  const Stream stream;
  require(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal));
  EXPECT_EQ(adaattn_low_rank_project(context.get(), &av, &bv, nullptr, nullptr, nullptr, &rv, stream.get()),
            ADAATTN_ERROR_CAPTURE);
  cudaGraph_t graph = nullptr;
  require(cudaStreamEndCapture(stream.get(), &graph));
  require(cudaGraphDestroy(graph));
  EXPECT_TRUE(
      succeeded(adaattn_low_rank_project(context.get(), &av, &bv, nullptr, nullptr, nullptr, &rv, stream.get())));
  stream.wait();
}

}  // namespace
}  // namespace adaattn::test
