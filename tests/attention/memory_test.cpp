// Nothing outside the tensors is touched: each lies between unmapped pages, inputs are read-only. This also sees what
// address sanitizers miss: masked, gathered and tile accesses.
#include <algorithm>
#include <deque>

#include "attention/fixture.h"
#include "reference/number.h"
#include "support/guard_pages.h"

namespace adaattn::test {
namespace {

using Edge = GuardedMemory::Edge;

// Moves every tensor of data into guarded memory of exactly its extent.
class GuardedData {
 public:
  GuardedData(AttentionData data, Edge edge) : data_(std::move(data)), edge_(edge) {
    for (Tensor* input : {&data_.q, &data_.k, &data_.v, &data_.bias, &data_.alibi_slopes, &data_.sinks,
                          &data_.cu_seqlens_q, &data_.cu_seqlens_k, &data_.seqused_k, &data_.block_table})
      move(*input, true);
    for (Tensor* output : {&data_.o, &data_.lse, &data_.entropy}) move(*output, false);
  }
  AttentionData& data() { return data_; }

 private:
  void move(Tensor& tensor, bool read_only) {
    if (!tensor.present() || tensor.elements() == 0) return;
    int64_t last = 0;
    for (size_t i = 0; i < tensor.shape().size(); ++i) last += (tensor.shape()[i] - 1) * tensor.host().stride[i];
    const auto bytes = static_cast<size_t>((last + 1) * reference::size_of(tensor.dtype()));
    GuardedMemory& memory = memory_.emplace_back(bytes, edge_);
    const std::vector<int64_t> stride(tensor.host().stride, tensor.host().stride + tensor.shape().size());
    Tensor moved(std::make_shared<Buffer>(memory.data(), bytes), tensor.dtype(), tensor.shape(), stride);
    moved.for_each([&](const auto& index, int64_t) { moved.set(index, tensor.get(index)); });
    if (read_only) memory.protect();
    tensor = moved;
  }

  AttentionData data_;
  Edge edge_;
  std::deque<GuardedMemory> memory_;
};

class Memory : public OnEveryTarget {};
ADAATTN_ON_EVERY_TARGET(Memory);

// Small shapes in every kernel, with tails of every kind.
std::vector<AttentionCase> guarded_cases() {
  constexpr uint32_t kBoth = ADAATTN_FLAG_ALIBI | ADAATTN_FLAG_SINK;
  std::vector<AttentionCase> cases = {
      {.name = "Bias", .heads_q = 2, .heads_kv = 1, .seqlen_q = 5, .seqlen_k = 19, .d_qk = 24, .bias = Bias::kFull},
      {.name = "BiasDecode",
       .heads_q = 2,
       .heads_kv = 1,
       .seqlen_q = 1,
       .seqlen_k = 19,
       .d_qk = 24,
       .flags = kBoth,
       .bias = Bias::kPerKey},
      {.name = "Packed",
       .heads_q = 2,
       .heads_kv = 1,
       .d_qk = 20,
       .layout_q = ADAATTN_LAYOUT_THD,
       .layout_kv = ADAATTN_LAYOUT_THD,
       .mask = ADAATTN_MASK_CAUSAL,
       .flags = kBoth,
       .lens_q = {3, 17, 1},
       .lens_k = {5, 17, 40}},
      {.name = "Paged",
       .batch = 2,
       .heads_q = 2,
       .heads_kv = 1,
       .seqlen_q = 1,
       .seqlen_k = 21,
       .d_qk = 20,
       .layout_kv = ADAATTN_LAYOUT_PAGED,
       .page_size = 7,
       .used_k = {21, 3}},
      {.name = "PagedPrefill",
       .batch = 2,
       .heads_q = 2,
       .heads_kv = 1,
       .seqlen_q = 9,
       .seqlen_k = 21,
       .d_qk = 20,
       .layout_kv = ADAATTN_LAYOUT_PAGED,
       .page_size = 7,
       .used_k = {21, 3}},
      {.name = "PaddedRows",
       .heads_q = 2,
       .heads_kv = 2,
       .seqlen_q = 7,
       .seqlen_k = 13,
       .d_qk = 17,
       .storage = Storage::kPadded},
      {.name = "HeadsFirst",
       .heads_q = 2,
       .heads_kv = 2,
       .seqlen_q = 7,
       .seqlen_k = 13,
       .d_qk = 15,
       .layout_q = ADAATTN_LAYOUT_BHSD,
       .layout_kv = ADAATTN_LAYOUT_BHSD},
      {.name = "TwoTiles", .seqlen_q = 131, .seqlen_k = 195, .d_qk = 31, .d_v = 33},
  };
  for (int64_t d : {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 65, 130})
    for (int64_t q : {1, 3, 16, 18})
      for (int64_t k : {1, 5, 16, 33})
        cases.push_back({.name = "Tail",
                         .heads_q = 2,
                         .heads_kv = 1,
                         .seqlen_q = q,
                         .seqlen_k = k,
                         .d_qk = d,
                         .d_v = d > 60 ? 9 : 0,
                         .mask = k > 16 ? ADAATTN_MASK_CAUSAL : ADAATTN_MASK_NONE});
  return cases;
}

TEST_P(Memory, NothingOutsideTheTensorsIsReadOrWritten) {
  if (!kOnCpu) GTEST_SKIP() << "guard pages protect host memory only";
  const Context context(target());
  for (const AttentionCase& c : guarded_cases()) {
    for (const Dtypes& dtypes : uniform_dtypes()) {
      for (Edge edge : {Edge::kEnd, Edge::kBegin}) {
        SCOPED_TRACE(describe(c) + " " + dtypes.name + (edge == Edge::kEnd ? " end" : " begin"));
        GuardedData guarded(AttentionData(c, dtypes, run_seed()), edge);
        AttentionData& data = guarded.data();
        const Plan plan(context, data.desc);
        GuardedMemory workspace(plan.workspace_size(), edge);
        const adaattn_io_t io = data.io();
        ASSERT_TRUE(succeeded(adaattn_plan_execute(plan.get(), &io, workspace.data(), plan.workspace_size(), nullptr)));
        EXPECT_TRUE(matches(data, reference::attention(data.desc, data.io()), weights_of(target())));
      }
    }
  }
}

// Memory must not grow with the square of the length: the scores are never stored.
TEST_P(Memory, WorkspaceGrowsAtMostWithTheLength) {
  const Context context(target());
  size_t previous = 0;
  for (int64_t s = 1024; s <= 65536; s *= 2) {
    AttentionCase c = {.name = "Long", .batch = 1, .heads_q = 8, .heads_kv = 8, .seqlen_q = s, .seqlen_k = s};
    const size_t bytes = Plan(context, make_desc(c, kF32All)).workspace_size();
    if (s > 1024) {
      EXPECT_LE(static_cast<double>(bytes), 2.1 * static_cast<double>(previous)) << s;
    }
    previous = std::max<size_t>(bytes, 1 << 20);
  }
}

}  // namespace
}  // namespace adaattn::test
