#include "attend/plan.h"

#include <algorithm>
#include <bit>
#include <iterator>
#include <utility>

#include "common/pairs.h"
#include "core/error.h"
#include "decide/tile_mass.h"
#include "runtime.h"

namespace adaattn::cuda {
namespace {

constexpr int64_t kOpenWindow = int64_t{1} << 30;

// tokens: of one sequence or page, or of all packed ones.
bool on_16_bytes(const Operand& x, int64_t batch, int64_t tokens, int64_t heads) {
  const int64_t size = dtype_size(x.dtype);
  const auto whole = [&](int64_t stride, int64_t extent) { return extent <= 1 || stride * size % 16 == 0; };
  if (tokens > 1 && x.stride_s <= 0) return false;  // TMA steps forward only
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride_b >= 0 && x.stride_h >= 0 &&
         whole(x.stride_b, batch) && whole(x.stride_s, tokens) && whole(x.stride_h, heads);
}

bool aligned(const AttnParams& p) {
  const int64_t pages = p.block_table != nullptr ? p.num_pages : p.batch;
  const int64_t queries = p.cu_seqlens_q != nullptr ? p.total_q : p.seqlen_q;
  const int64_t slots = p.block_table != nullptr ? p.page_size : p.cu_seqlens_k != nullptr ? p.total_k : p.seqlen_k;
  return on_16_bytes(p.q, p.batch, queries, p.heads_q) && on_16_bytes(p.k, pages, slots, p.heads_kv) &&
         (p.v.data == nullptr || on_16_bytes(p.v, pages, slots, p.heads_kv)) &&
         (p.o.data == nullptr || (p.o.dtype != p.q.dtype && p.k.dtype != Dtype::kE4M3) ||
          on_16_bytes(p.o, p.batch, queries, p.heads_q)) &&
         (p.k.dtype != Dtype::kE4M3 || p.d_qk % 4 == 0);
}

class Plan final : public AttentionPlan {
 public:
  Plan(const Problem& problem, const DeviceTraits& device, int32_t device_id, std::shared_ptr<RecordPool> records)
      : problem_(problem),
        device_(device),
        device_id_(device_id),
        info_(plan_info(problem, device)),
        records_(std::move(records)) {
    const DeviceScope scope(device_id_);
    for (const AttendKernel* kernel : candidates(problem, device)) prepare_kernel(*kernel);
    record_ = records_->acquire();
  }
  ~Plan() override { records_->release(std::move(record_)); }

  const PlanInfo& info() const override { return info_; }

  void execute(const AttnParams& params, void* workspace, size_t workspace_bytes, adaattn_stream_t stream) override {
    if (params.batch > 0 && params.seqlen_q > 0 && params.total_q > 0) {
      const DeviceScope scope(device_id_);
      const uint32_t features = features_of(problem_) | call_features(params);
      const Extent extent{params.batch, params.seqlen_q, params.seqlen_k, params.total_q};
      const Launch launch =
          choose(problem_, extent, features, device_, workspace == nullptr ? 0 : static_cast<int64_t>(workspace_bytes));
      AttendArgs args = make_args(params, problem_, launch, workspace);
      args.scheduler = record_.device->scheduler + 2 * (launches_ % (std::size(record_.device->scheduler) / 2));
      if (launch.kernel->phase == Phase::kDecode || launch.joined)
        args.scheduler = launch.joined ? record_.arrivals[launches_ % kArrivalSets] : nullptr;
      ++launches_;
      args.multiprocessors = device_.multiprocessors;
      args.overlap_grids = device_.compute_capability >= 90;
      if (lengths_on_device(params)) args.record = record_.device;
      check(launch.kernel->launch(args, stream), launch.kernel->name);
      if (args.record != nullptr && !launch.kernel->reports) check(launch_report(args, stream), "report");
      if (launch.splits > 1 && !launch.joined) check(launch_combine(args, stream), "combine");
      if (touches_record(args, *launch.kernel)) record_.mark(stream);
      if (!lengths_on_device(params)) add_lengths(counters_, params);
    }
    ++counters_.calls;
  }

  PlanCounters counters(bool wait, bool reset) override {
    const DeviceScope scope(device_id_);
    // A captured call may be replayed on any stream, so only the device knows when the plan's work is done.
    if (wait) check(cudaDeviceSynchronize(), "waiting for the plan's work");
    PlanCounters out = counters_;
    add_record(out, records_->read(record_, reset));
    if (reset) counters_ = {};
    return out;
  }

 private:
  Problem problem_;
  DeviceTraits device_;
  int32_t device_id_;
  PlanInfo info_;
  std::shared_ptr<RecordPool> records_;
  RecordSlot record_;
  PlanCounters counters_;  // what the host knows
  uint64_t launches_ = 0;
};

}  // namespace

void add_lengths(PlanCounters& counters, const AttnParams& p) {
  const Sequence s = sequence_of(p, 0);
  const auto heads = static_cast<uint64_t>(p.batch * p.heads_q);
  counters.query_rows += static_cast<uint64_t>(s.len_q) * heads;
  counters.score_pairs += static_cast<uint64_t>(visible_pairs(p, s)) * heads;
}

uint64_t tiles_of_call(const AttnParams& p) {
  const Sequence s = sequence_of(p, 0);
  int64_t tiles = 0;
  for (int64_t q = 0; q < s.len_q; q += decide::kTileQ) tiles += visible_tiles(p, s, q, decide::kTileQ, decide::kTileK);
  return static_cast<uint64_t>(tiles * p.batch * p.heads_q);
}

void add_record(PlanCounters& counters, const PlanRecord& record) {
  counters.query_rows += record.query_rows;
  counters.score_pairs += record.score_pairs;
  counters.visible_tiles += record.tiles;
  counters.violation.field = static_cast<Field>(record.violation >> 32);
  counters.violation.value = static_cast<int32_t>(record.violation & 0xffffffffu);
  counters.violation.index = static_cast<int64_t>(record.violation_index);
}

void prepare_kernel(const AttendKernel& kernel) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel.function), kernel.name);
  if (kernel.shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(kernel.shared_bytes)),
          kernel.name);
}

uint32_t call_features(const AttnParams& p) {
  return (aligned(p) ? 0u : kUnaligned) | (p.cu_seqlens_q != nullptr || p.seqused_k != nullptr ? kVarlen : 0u);
}

AttendArgs make_args(const AttnParams& params, const Problem& problem, const Launch& launch, void* workspace) {
  AttendArgs args;
  args.p = params;
  AttnParams& p = args.p;
  p.window_left = p.window_left >= kOpenWindow ? -1 : p.window_left;
  p.window_right = p.window_right >= kOpenWindow ? -1 : p.window_right;
  p.num_pages = std::min<int64_t>(p.num_pages, INT32_MAX);
  args.m_tiles = launch.m_tiles;
  args.pack = launch.pack;
  args.heads = static_cast<int32_t>(p.heads_q / launch.pack);
  args.splits = launch.splits;
  args.group = static_cast<int32_t>(p.heads_q / p.heads_kv);
  args.section = launch.section;
  args.causal_order = p.window_right >= 0;
  args.aligned = aligned(params);
  if (p.page_size > 0 && std::has_single_bit(static_cast<uint64_t>(p.page_size)))
    args.page_shift = std::countr_zero(static_cast<uint64_t>(p.page_size));
  if (launch.splits > 1) {
    args.partial_rows = (p.cu_seqlens_q != nullptr ? p.total_q : p.batch * p.seqlen_q) * p.heads_q;
    const int64_t rows = args.partial_rows * launch.splits;
    args.partial_o = static_cast<float*>(workspace);
    args.partial_lse = args.partial_o + rows * p.d_v;
    if (problem.want_entropy) args.partial_entropy = args.partial_lse + rows;
  }
  return args;
}

bool touches_record(const AttendArgs& args, const AttendKernel& kernel) {
  if (kernel.phase == Phase::kDecode && args.scheduler != nullptr) return true;
  // A Hopper kernel with one tile for each CTA needs no counter.
  return args.record != nullptr ||
         (kernel.arch >= 90 && args.p.batch * args.heads * args.m_tiles * args.splits > args.multiprocessors);
}

PlanInfo plan_info(const Problem& problem, const DeviceTraits& device) {
  check_problem(problem, device);
  PlanInfo info;
  const int64_t capacity = partial_capacity(problem, device);
  const Extent extent{
      problem.max_batch, problem.max_seqlen_q, problem.max_seqlen_k,
      problem.layout_q == Layout::kTHD ? problem.max_total_q : problem.max_batch * problem.max_seqlen_q};
  const Launch launch = choose(problem, extent, features_of(problem), device, capacity);
  info.kernel = launch.kernel->name;
  info.isa = launch.kernel->arch == 90 ? "sm_90a" : "sm_80";
  info.tile_q = launch.kernel->tile_q;
  info.tile_k = launch.kernel->tile_k;
  info.splits = launch.splits;
  info.capture_safe = true;
  info.deterministic = true;
  info.exact = launch.kernel->phase != Phase::kTf32;
  info.workspace_bytes = static_cast<size_t>(capacity);
  return info;
}

std::unique_ptr<AttentionPlan> make_plan(const Problem& problem, const DeviceTraits& device, int32_t device_id,
                                         std::shared_ptr<RecordPool> records) {
  return std::make_unique<Plan>(problem, device, device_id, std::move(records));
}

}  // namespace adaattn::cuda
