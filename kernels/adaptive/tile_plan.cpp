#include "adaptive/tile_plan.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <optional>
#include <utility>

#include "adaptive/bytes.h"
#include "adaptive/plan_memory.h"
#include "adaptive/refuse.h"
#include "adaptive/tile_plan_sizes.h"
#include "adaptive/tile_statistics.h"
#include "attend/plan.h"
#include "attend/sm90/dense_round.h"
#include "attend/sm90/walk.h"
#include "common/pairs.h"
#include "decide/fixed_math.h"
#include "runtime.h"

namespace adaattn::cuda {
namespace {

class TilePlan final : public AttentionPlan {
 public:
  TilePlan(const Problem& problem, const DeviceTraits& device, int32_t device_id, std::shared_ptr<RecordPool> records)
      : problem_(problem),
        device_(device),
        device_id_(device_id),
        info_(tile_plan_info(problem, device)),
        exact_plan_(make_plan(exact_problem(problem), device, device_id, records)) {
    if (always_exact(problem)) return;
    records_ = std::move(records);
    problem_.adaptive = device_options(problem);
    sizes_ = tile_plan_sizes(problem_, device);
    costs_ = device_costs(sizes_.shape, problem_.adaptive);
    const DeviceScope scope(device_id_);
    sm90::prepare_walk();
    sm90::prepare_dense_round();
    prepare_analyze();
    prepare_verify();
    prepare_tally();
    take_memory();
    record_ = records_->acquire();
  }
  ~TilePlan() override {
    if (records_ != nullptr) records_->release(std::move(record_));
  }

  const PlanInfo& info() const override { return info_; }

  void execute(const AttnParams& params, void* workspace, size_t bytes, adaattn_stream_t stream) override {
    newest_batch_ = params.batch;
    if (memory_ == nullptr) {
      exact_plan_->execute(params, workspace, bytes, stream);
      add_exact_call(params, problem_.dtype_q, &exact_counters_);
      return;
    }
    ++calls_;
    if (params.batch == 0 || params.seqlen_q == 0 || params.total_q == 0) return;
    if ((call_features(params) & kUnaligned) != 0)
      refuse(
          "io.q, k, v or o has rows off a multiple of 16 bytes; accepted for policies on CUDA: rows that start on 16 "
          "bytes");
    const DeviceScope scope(device_id_);
    Launch launch;
    AttendArgs common = make_args(params, problem_, launch, nullptr);
    const AnalyzeArgs args = analyze_args(common.p, workspace);
    const std::optional<AttendArgs> round = dense_round(params);
    const Prospect prospect = look_ahead(params, round.has_value(), stream);
    if (prospect.exact_calls > 0) {
      const bool looks = prospect.exact_calls == 1;
      if (looks) {
        analyze(args, stream);
        decide_heads(args, stream);
      }
      check(launch_exact_begin(args, stream), "statistics");
      if (round)
        check(sm90::launch_dense_round(*round, {}, stream), "the exact kernel");
      else
        exact_plan_->execute(params, workspace, bytes, stream);
      check(launch_exact_end(args, targets_, looks, stream), "statistics");
    } else {
      run(args, workspace, prospect.not_exact ? std::nullopt : round, stream);
    }
    ++runs_;
    if (lengths_on_host(params)) {
      rows_ += static_cast<uint64_t>(params.batch * params.seqlen_q * params.heads_q);
      pairs_ += static_cast<uint64_t>(params.batch * params.heads_q * visible_pairs(params, sequence_of(params, 0)));
    } else {
      common.record = record_.device;
      check(launch_report(common, stream), "report");
    }
    record_.mark(stream);
  }

  PlanCounters counters(bool wait, bool reset) override;
  std::vector<HeadRecord> head_records() override;
  TileMap tile_map(int64_t batch, int64_t head) override;

 private:
  void take_memory();
  AnalyzeArgs analyze_args(const AttnParams& p, void* workspace) const;
  void run(AnalyzeArgs args, void* workspace, const std::optional<AttendArgs>& round, cudaStream_t stream);
  std::optional<AttendArgs> dense_round(const AttnParams& p);
  // What the host knows of the call at hand: for how many calls, this one among them, all units are computed exactly;
  // that they are not.
  struct Prospect {
    uint64_t exact_calls = 0;
    bool not_exact = false;
  };
  Prospect look_ahead(const AttnParams& p, bool has_round, cudaStream_t stream);
  uint32_t* next_counters() {
    return record_.device->scheduler + 2 * (launches_++ % (std::size(record_.device->scheduler) / 2));
  }
  template <typename T>
  std::vector<T> read(const T* device, size_t count) const {
    std::vector<T> host(count);
    if (count > 0) memory_->read(host.data(), device, count * sizeof(T));
    return host;
  }

  Problem problem_;
  DeviceTraits device_;
  int32_t device_id_;
  PlanInfo info_;
  std::unique_ptr<AttentionPlan> exact_plan_;
  std::shared_ptr<RecordPool> records_;
  RecordSlot record_;
  TilePlanSizes sizes_;
  decide::CostTable costs_;
  std::unique_ptr<Outlook> outlook_;
  // Null: every call is the exact plan's. Freed before the outlook, since that waits for the work that writes to it.
  std::unique_ptr<PlanMemory> memory_;
  AdaptiveState state_;
  TallyTargets targets_;
  uint64_t calls_ = 0, launches_ = 0, rows_ = 0, pairs_ = 0;
  uint64_t runs_ = 0;        // calls of the device, whatever statistics were reset
  uint64_t same_since_ = 0;  // the first of the newest runs of equal extents
  int64_t same_batch_ = 0, same_q_ = 0, same_k_ = 0;
  int64_t newest_batch_ = 0;
  bool captured_ = false;
  AdaptiveCounters exact_counters_;
};

void TilePlan::take_memory() {
  const TableShape& s = sizes_.shape;
  const size_t units = static_cast<size_t>(s.batch) * static_cast<size_t>(s.heads_kv);
  const size_t heads = static_cast<size_t>(s.batch) * static_cast<size_t>(s.heads_q);
  const size_t map = tile_map_bytes(s), basis = std::max<size_t>(1, state_basis_doubles(s));
  const size_t ranges = map > 0 ? heads * static_cast<size_t>(s.query_tiles) : 0;
  // Twice: to learn how much it is, and to take it.
  const auto lay_out = [&](PlanMemory& memory) {
    state_.basis = memory.take<double>(basis);
    state_.warm = memory.take<int32_t>(units);
    state_.probe_basis = memory.take<double>(std::max<size_t>(1, probe_basis_doubles(s)));
    state_.probe_warm = memory.take<int32_t>(units);
    state_.dense_calls = memory.take<int32_t>(units);
    state_.dense_left = memory.take<int32_t>(units);
    state_.feedback = memory.take<decide::HeadFeedback>(heads);
    state_.calls = memory.take<unsigned long long>(1);
    state_.clock = memory.take<StageClock>(1);
    targets_.heads = memory.take<HeadTally>(heads);
    targets_.totals = memory.take<TileTotals>(1);
    targets_.newest = memory.take<TileTotals>(1);
    targets_.ctas = memory.take<uint32_t>(1);
    targets_.map = memory.take<uint64_t>(map / sizeof(uint64_t));
    targets_.map_ranges = memory.take<decide::TileRow>(ranges);
    state_.frozen = memory.take<decide::HeadChoice>(heads);
    state_.chosen = memory.take<int32_t>(units);
  };
  PlanMemory measure;
  lay_out(measure);
  memory_ = std::make_unique<PlanMemory>(measure.used());
  lay_out(*memory_);
  const std::vector<decide::HeadFeedback> start(heads);
  memory_->write(state_.feedback, start.data(), heads * sizeof start[0]);
  if (map == 0) targets_.map = nullptr;
  const decide::Options& o = problem_.adaptive;
  if (!o.feedback || o.verify_rows == 0) state_.feedback = nullptr;
  if (o.freeze)
    state_.dense_calls = state_.dense_left = nullptr;
  else
    state_.frozen = nullptr;
  outlook_ = std::make_unique<Outlook>();
  targets_.outlook = outlook_->device();
}

AnalyzeArgs TilePlan::analyze_args(const AttnParams& p, void* workspace) const {
  AnalyzeArgs args;
  args.p = p;
  args.shape = sizes_.shape;
  args.options = problem_.adaptive;
  args.costs = costs_;
  args.bytes = device_bytes();
  args.tables = analyze_layout(sizes_.shape, workspace);
  args.state = state_;
  args.scale_log2 = p.scale * 1.4426950408889634f;
  args.keep_peak = problem_.adaptive.keep_peak;
  if (args.shape.needles) args.log2_needle = decide::fixed_log2(args.options.needle_mass);  // as on the CPU
  args.compensation = problem_.adaptive.remainder;
  args.multiprocessors = device_.multiprocessors;
  return args;
}

// What computes the calls that find every unit among those computed exactly. By the extents alone: a kernel of other
// blocks than the walk's, for which the device decides in each call, or else whichever the host takes of the walk with
// full masks and the exact plan's kernel, which gives the same bits.
std::optional<AttendArgs> TilePlan::dense_round(const AttnParams& p) {
  if (problem_.adaptive.freeze) return std::nullopt;
  const Extent extent{p.batch, p.seqlen_q, p.seqlen_k, p.total_q};
  const Launch launch = choose(problem_, extent, features_of(problem_) | call_features(p), device_, 0);
  if (!sm90::has_dense_round(*launch.kernel)) return std::nullopt;
  AttendArgs args = make_args(p, problem_, launch, nullptr);
  args.scheduler = next_counters();
  args.multiprocessors = device_.multiprocessors;
  return args;
}

// The device said how many calls are exact when some earlier call ended; what it says later about the calls until then
// is the same, and so is what it does itself: results do not depend on when the host reads it, only whether kernels are
// launched that would leave at once.
TilePlan::Prospect TilePlan::look_ahead(const AttnParams& p, bool has_round, cudaStream_t stream) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &capture), "stream");
  // Replays of a captured call advance the device's count of calls behind the host's back.
  captured_ = captured_ || capture != cudaStreamCaptureStatusNone;
  if (p.batch != same_batch_ || p.seqlen_q != same_q_ || p.seqlen_k != same_k_ || !lengths_on_host(p)) {
    same_since_ = runs_;
    same_batch_ = p.batch;
    same_q_ = p.seqlen_q;
    same_k_ = lengths_on_host(p) ? p.seqlen_k : -1;
  }
  if (captured_ || problem_.adaptive.freeze || (!has_round && exact_plan_->info().splits != 1)) return {};
  const uint64_t word = outlook_->read(), calls = word >> kOutlookBits, ahead = word & ((1u << kOutlookBits) - 1);
  // The look behind it came after the extents changed.
  const bool known = runs_ >= calls && calls + ahead > same_since_ + kDenseCalls;
  return {.exact_calls = known && calls + ahead > runs_ ? calls + ahead - runs_ : 0,
          .not_exact = calls == runs_ && ahead == 0 && calls > same_since_};
}

// round: what computes the call if the device finds all units among those computed exactly; then the walk has no lists.
void TilePlan::run(AnalyzeArgs args, void* workspace, const std::optional<AttendArgs>& round, cudaStream_t stream) {
  const decide::Options& o = problem_.adaptive;
  const TableShape& s = sizes_.shape;
  char* const space = static_cast<char*>(workspace);
  float* const far_share = o.far_field ? reinterpret_cast<float*>(space + sizes_.far_share) : nullptr;
  int32_t* const found = o.probe != decide::Probe::kOff ? reinterpret_cast<int32_t*>(space + sizes_.found) : nullptr;
  const int64_t units = int64_t{s.batch} * s.heads_kv;
  // While no call was captured, the device's count of calls is the host's.
  const bool verifies =
      sizes_.verify.rows > 0 && (captured_ || runs_ % static_cast<uint64_t>(sizes_.verify.every) == 0);
  auto* const parts = verifies ? reinterpret_cast<VerifyPart*>(space + sizes_.verify_parts) : nullptr;
  // A frozen plan starts its bases anew every call, so that the same input gives the same bits.
  if (o.freeze)
    for (int32_t* warm : {state_.warm, state_.probe_warm})
      check(cudaMemsetAsync(warm, 0, static_cast<size_t>(units) * sizeof(int32_t), stream), "analyze");
  if (round) args.dense_units = static_cast<int32_t>(args.p.batch) * s.heads_kv;
  analyze(args, stream);
  decide_heads(args, stream);

  sm90::WalkCall walk;
  walk.p = args.p;
  walk.far_field = o.far_field;
  walk.far_share = far_share;
  walk.found = found;
  walk.mask = args.tables.mask;
  walk.log2_needle = std::log2(o.needle_share);
  walk.multiprocessors = device_.multiprocessors;
  bool recomputes = false;
  const Int8Tables bytes = s.bytes ? lay_out_int8_tables(args.p, space + sizes_.bytes) : Int8Tables{};
  const auto launch_class = [&](int list, int32_t first_tile) {
    walk.tables = tables_of(args, first_tile);
    if (recomputes) walk.tables.remainder = nullptr;
    walk.bytes = list == kByteList ? bytes : Int8Tables{};
    walk.rank_class = list == kByteList ? 0 : list;
    walk.counters = next_counters();
    check(sm90::launch_walk(walk, stream), "walk");
  };
  const int32_t query_tiles = static_cast<int32_t>((args.p.seqlen_q + decide::kTileQ - 1) / decide::kTileQ);
  for (int32_t first = 0; first < query_tiles; first += s.wave_tiles) {
    write_schedule(args, first, stream);
    if (first == 0 && round)
      check(sm90::launch_dense_round(*round, {state_.dense_left, args.dense_units}, stream), "the exact kernel");
    for (int c = 0; c < decide::kRankClasses; ++c)
      if (c == 0 || decide::rank_of_class(c) <= s.max_rank) launch_class(c, first);
    if (s.bytes && first == 0) check(launch_quantize_chosen(args.p, bytes, args.tables.choice, stream), "quantize");
    if (s.bytes) launch_class(kByteList, first);
    const bool ends = first + s.wave_tiles >= query_tiles;
    if (ends && parts != nullptr) check(launch_exact_rows(args, sizes_.verify, parts, stream), "verify");
    check(launch_tally(args, first, {far_share, found}, targets_, sizes_.verify, parts, ends, stream), "statistics");
  }
  if (parts == nullptr || !o.recompute) return;
  walk.far_field = false;
  walk.far_share = nullptr;
  walk.found = nullptr;
  recomputes = true;
  for (int32_t first = 0; first < query_tiles; first += s.wave_tiles) {
    write_exact_schedule(args, first, stream);
    launch_class(0, first);
  }
  check(launch_recompute_end(args, targets_, stream), "statistics");
}

PlanCounters TilePlan::counters(bool wait, bool reset) {
  if (memory_ == nullptr) {
    PlanCounters out = exact_plan_->counters(wait, reset);
    out.adaptive = exact_counters_;
    out.adaptive.tiles += out.visible_tiles;
    out.adaptive.tiles_kept = out.adaptive.tiles;
    out.adaptive.flops_done =
        2.0 * static_cast<double>(problem_.d_qk + problem_.d_v) * static_cast<double>(out.score_pairs);
    if (reset) exact_counters_ = {};
    return out;
  }
  const DeviceScope scope(device_id_);
  if (wait) check(cudaDeviceSynchronize(), "waiting for the plan's work");
  PlanCounters out;
  out.calls = calls_;
  out.query_rows = rows_;
  out.score_pairs = pairs_;
  add_record(out, records_->read(record_, reset));
  out.adaptive = counters_of(read(targets_.totals, 1)[0]);
  if (reset) {
    memory_->clear(targets_.totals, sizeof(TileTotals));
    calls_ = rows_ = pairs_ = 0;
  }
  return out;
}

std::vector<HeadRecord> TilePlan::head_records() {
  const size_t heads = static_cast<size_t>(newest_batch_ * problem_.heads_q);
  if (memory_ == nullptr || heads == 0) return exact_records(problem_, newest_batch_);
  const DeviceScope scope(device_id_);
  check(cudaDeviceSynchronize(), "waiting for the plan's work");
  return records_of(read(targets_.heads, heads), problem_);
}

TileMap TilePlan::tile_map(int64_t batch, int64_t head) {
  if (memory_ == nullptr) return AttentionPlan::tile_map(batch, head);
  const TableShape& s = sizes_.shape;
  if (targets_.map == nullptr)
    refuse(
        "plan has larger tile maps than are kept; accepted: one whose maps of all heads at its maxima take at most %zu "
        "bytes",
        kMaxTileMapBytes);
  if (batch >= newest_batch_) return {};
  const DeviceScope scope(device_id_);
  check(cudaDeviceSynchronize(), "waiting for the plan's work");
  const int64_t index = batch * problem_.heads_q + head, tiles = s.query_tiles;
  const HeadTally tally = read(targets_.heads + index, 1)[0];
  return map_of(tally, read(targets_.map + index * tiles * s.mask_words, static_cast<size_t>(tiles * s.mask_words)),
                read(targets_.map_ranges + index * tiles, static_cast<size_t>(tiles)), s.mask_words);
}

}  // namespace

PlanInfo tile_plan_info(const Problem& problem, const DeviceTraits& device) {
  check_tile_options(problem.adaptive);
  PlanInfo info = plan_info(exact_problem(problem), device);
  if (always_exact(problem)) return info;
  check_tile_problem(problem, device);
  Problem with_options = problem;
  with_options.adaptive = device_options(problem);
  info.kernel = tiles_in_bytes(with_options.adaptive) ? "sm90_walk_int8_bf16_d128" : "sm90_walk_bf16_d128";
  info.isa = "sm_90a";
  info.tile_q = decide::kTileQ;
  info.tile_k = decide::kTileK;
  info.splits = 1;
  info.exact = false;
  info.workspace_bytes = tile_plan_sizes(with_options, device).workspace_bytes;
  return info;
}

std::unique_ptr<AttentionPlan> make_tile_plan(const Problem& problem, const DeviceTraits& device, int32_t device_id,
                                              std::shared_ptr<RecordPool> records) {
  return std::make_unique<TilePlan>(problem, device, device_id, std::move(records));
}

}  // namespace adaattn::cuda
