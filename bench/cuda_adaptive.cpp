// Adaptive attention on a CUDA device against the exact plan in the same run.
#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "attention_call.h"
#include "cuda_call.h"
#include "harness.h"
#include "shapes.h"

namespace adaattn::bench {
namespace {

adaattn_adaptive_desc_t every_tile_in_8_bits() {
  adaattn_adaptive_desc_t desc;
  check(adaattn_adaptive_desc_init(&desc, sizeof desc));
  desc.policy = ADAATTN_POLICY_CUSTOM;
  desc.tile_mass = 1;
  desc.probe = ADAATTN_PROBE_OFF;
  desc.rank_mode = ADAATTN_RANK_OFF;
  desc.min_precision = desc.max_precision = ADAATTN_PRECISION_I8;
  desc.verify_rows = -1;
  return desc;
}

// A call captured as a graph, and the same with nothing but its last kernel.
class Graph {
 public:
  explicit Graph(CudaCall& call) {
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    call.run(stream);
    check(cudaStreamEndCapture(stream, &graph_));
    check(cudaStreamDestroy(stream));
    check(cudaGraphInstantiate(&whole_, graph_, 0));
    check(cudaGraphClone(&clone_, graph_));
    // Edges between overlapping grids carry data, without room for which the query fails.
    std::vector<cudaGraphNode_t> from(kMaxEdges), to(kMaxEdges);
    std::vector<cudaGraphEdgeData> data(kMaxEdges);
    size_t count = kMaxEdges;
    check(cudaGraphGetEdges(graph_, from.data(), to.data(), data.data(), &count));
    from.resize(count);
    std::sort(from.begin(), from.end());
    from.erase(std::unique(from.begin(), from.end()), from.end());
    for (cudaGraphNode_t node : from) {
      cudaGraphNode_t copy = nullptr;
      check(cudaGraphNodeFindInClone(&copy, node, clone_));
      check(cudaGraphDestroyNode(copy));
    }
    check(cudaGraphInstantiate(&last_, clone_, 0));
  }
  ~Graph() {
    cudaGraphExecDestroy(whole_);
    cudaGraphExecDestroy(last_);
    cudaGraphDestroy(clone_);
    cudaGraphDestroy(graph_);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  Timing time_whole() const {
    return measure_on_device([&](cudaStream_t stream) { check(cudaGraphLaunch(whole_, stream)); }, false);
  }
  Timing time_last() const {
    return measure_on_device([&](cudaStream_t stream) { check(cudaGraphLaunch(last_, stream)); }, false);
  }

 private:
  static constexpr size_t kMaxEdges = 64;
  cudaGraph_t graph_ = nullptr, clone_ = nullptr;
  cudaGraphExec_t whole_ = nullptr, last_ = nullptr;
};

Timing median(std::vector<Timing> times) {
  std::sort(times.begin(), times.end(), [](const Timing& a, const Timing& b) { return a.us < b.us; });
  return times[times.size() / 2];
}

// In turns: the card's clock follows its power, and that follows what ran before.
constexpr int kTurns = 3;

// All in E4M3, as an engine with an 8-bit cache calls it: no pass. One factor for a head, or for 64 keys of it.
constexpr NamedDtype kE4m3Dtypes[] = {{"e4m3", ADAATTN_DTYPE_E4M3},
                                      {"e4m3b64", ADAATTN_DTYPE_E4M3, ADAATTN_DTYPE_NONE, 64}};

// What is timed beside the exact kernel in bf16.
struct Timed {
  std::string name;
  std::shared_ptr<CudaCall> call;
  std::function<Timing()> time;
  std::vector<Timing> times = {};
};

std::vector<Timed> rows_of(const Report& report, adaattn_context_t* context, const Shape& shape) {
  std::vector<Timed> rows;
  const std::string name = "fwd/" + shape_name(shape, "bf16");
  if (report.wants(name)) {
    const adaattn_adaptive_desc_t adaptive = every_tile_in_8_bits();
    const auto call = std::make_shared<CudaCall>(context, shape, ADAATTN_DTYPE_BF16, ADAATTN_MATH_EXACT, &adaptive);
    const auto graph = std::make_shared<Graph>(*call);
    rows.push_back({name + "/int8", call, [graph] { return graph->time_whole(); }});
    rows.push_back({name + "/int8/attend", call, [graph] { return graph->time_last(); }});
  }
  for (const NamedDtype& dtype : kE4m3Dtypes) {
    const std::string of_dtype = "fwd/" + shape_name(shape, dtype.name);
    if (!report.wants(of_dtype)) continue;
    const auto call = std::make_shared<CudaCall>(context, shape, dtype, ADAATTN_MATH_EXACT);
    rows.push_back(
        {of_dtype, call, [call] { return measure_on_device([&](cudaStream_t stream) { call->run(stream); }, false); }});
  }
  return rows;
}

void run_shape(Report& report, adaattn_context_t* context, const Shape& shape) {
  std::vector<Timed> rows = rows_of(report, context, shape);
  if (rows.empty()) return;
  CudaCall exact(context, shape, ADAATTN_DTYPE_BF16, ADAATTN_MATH_EXACT);
  std::vector<Timing> exact_times;
  for (int turn = 0; turn < kTurns; ++turn) {
    exact_times.push_back(measure_on_device([&](cudaStream_t stream) { exact.run(stream); }, false));
    for (Timed& timed : rows) timed.times.push_back(timed.time());
  }
  Row row;
  row.peer = exact.kernel();
  row.peer_us = median(exact_times).us;
  row.unit = "TFLOP/s";
  const CudaCall* checked = nullptr;
  for (const Timed& timed : rows) {
    row.name = timed.name;
    row.time = median(timed.times);
    row.rate = timed.call->flops() / row.time.us * 1e-6;
    if (timed.call.get() != checked) row.error = timed.call->sampled_error();
    checked = timed.call.get();
    report.add(row);
  }
}

}  // namespace

void run_cuda_adaptive(Report& report) {
  const CudaContext context(report);
  for (const Shape& shape : cuda_int8_shapes()) run_shape(report, context.get(), shape);
}

}  // namespace adaattn::bench
