#include "adaptive/tile_plan.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <utility>

#include "adaptive/analyze.h"
#include "adaptive/tile_tally.h"
#include "attend/plan.h"
#include "attend/sm90/walk.h"
#include "common/pairs.h"
#include "core/error.h"
#include "runtime.h"

namespace adaattn::cuda {
namespace {

using decide::Options;

constexpr int64_t kHeadDim = 128;
// Masks that exist at a time; longer problems are computed in waves of query tiles.
constexpr size_t kMaskBytes = size_t{64} << 20;

size_t whole(size_t bytes) { return (bytes + 255) / 256 * 256; }

template <class... Arguments>
[[noreturn]] void refuse(const char* format, const Arguments&... arguments) {
  fail(ADAATTN_ERROR_NOT_SUPPORTED, format, arguments...);
}

Problem exact_problem(const Problem& problem) {
  Problem exact = problem;
  exact.adaptive = {};
  return exact;
}

// What block statistics cannot see, or too short to be worth looking at.
bool always_exact(const Problem& p) {
  return p.softcap > 0 || p.alibi || p.bias || p.max_seqlen_q * (p.heads_q / p.heads_kv) <= 16 ||
         p.max_seqlen_k < 4 * decide::kTileK;
}

// There is no probe here, nor feedback: the named policies keep the mass instead that bounds the reference model's loss
// without them (context 8192, two texts: at most +0.04, +0.15 and +0.82 per cent; 0.98 0.93 0.85: +0.04, +0.54, +1.36).
Options device_options(const Options& given) {
  Options o = given;
  o.probe = decide::Probe::kOff;
  if (given.policy == decide::Policy::kCustom) return o;
  const double mass = given.policy == decide::Policy::kQuality ? 0.98
                      : given.policy == decide::Policy::kSpeed ? 0.90
                                                               : 0.95;
  o.min_level = std::max(o.min_level, decide::level_for_mass(mass));
  return o;
}

void check_options(const Options& o) {
  if (o.recompute)
    refuse("adaptive.on_exceed is %d; CUDA contexts do not verify: set ADAATTN_ON_EXCEED_REPORT (%d)",
           ADAATTN_ON_EXCEED_RECOMPUTE, ADAATTN_ON_EXCEED_REPORT);
  if (o.policy != decide::Policy::kCustom) return;
  if (o.probe != decide::Probe::kOff)
    refuse("adaptive.probe is %d; CUDA contexts have no probe: set ADAATTN_PROBE_OFF (%d)",
           static_cast<int>(o.probe) + ADAATTN_PROBE_OFF, ADAATTN_PROBE_OFF);
  if (o.verify_rows > 0) refuse("adaptive.verify_rows is %d; CUDA contexts do not verify: set -1", o.verify_rows);
}

void check_shape(const Problem& p, const DeviceTraits& device) {
  if (device.compute_capability != 90)
    refuse("adaptive.policy: skipping tiles needs a device of compute capability 9.0, this one has %d.%d",
           device.compute_capability / 10, device.compute_capability % 10);
  if (p.dtype_q != Dtype::kBF16 || p.dtype_o != Dtype::kBF16)
    refuse("dtype_q: adaptive attention on CUDA takes and writes BF16");
  if (p.d_qk != kHeadDim || p.d_v != kHeadDim)
    refuse("head_dim_qk: %lld with head_dim_v %lld; adaptive attention on CUDA takes 128 for both",
           static_cast<long long>(p.d_qk), static_cast<long long>(p.d_v));
  if (!(p.scale > 0)) refuse("scale: %g; adaptive attention on CUDA takes scales > 0", static_cast<double>(p.scale));
  if (p.want_entropy) refuse("outputs: ENTROPY; adaptive attention on CUDA does not compute it for every row");
  if (p.layout_kv == Layout::kPaged) refuse("layout_kv: PAGED; adaptive attention on CUDA takes BSHD, BHSD and THD");
}

size_t workspace_bytes(const TableShape& s, bool far_field) {
  const int64_t items = int64_t{s.batch} * s.heads_q * s.wave_tiles;
  return whole(analyze_bytes(s)) +
         (far_field ? whole(static_cast<size_t>(items) * sm90::kWalkShares * sizeof(float)) : 0);
}

// As many query tiles at a time as the masks' bound and the caller's limit leave room for.
TableShape shape_of(const Problem& problem) {
  const Options& o = problem.adaptive;
  TableShape s = table_shape(problem, 0);
  const size_t mask_bytes =
      size_t{8} * static_cast<size_t>(s.batch) * static_cast<size_t>(s.heads_q) * static_cast<size_t>(s.mask_words);
  s.wave_tiles = std::clamp<int32_t>(static_cast<int32_t>(std::min(kMaskBytes / mask_bytes, size_t{1} << 24)), 1,
                                     std::max(s.query_tiles, 1));
  if (o.max_workspace_bytes == 0) return s;
  while (s.wave_tiles > 1 && workspace_bytes(s, o.far_field) > o.max_workspace_bytes)
    s.wave_tiles = (s.wave_tiles + 1) / 2;
  if (workspace_bytes(s, o.far_field) > o.max_workspace_bytes)
    refuse("adaptive.max_workspace_bytes is %llu; the tables of this problem take %zu",
           static_cast<unsigned long long>(o.max_workspace_bytes), workspace_bytes(s, o.far_field));
  return s;
}

// Device memory that lasts as long as a plan, zero at first, and a stream to look at it that waits for no other.
class PlanMemory {
 public:
  explicit PlanMemory(size_t bytes) {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "the adaptive plan's stream");
    check(cudaMalloc(&data_, bytes), "the adaptive plan's memory");
    clear(data_, bytes);
  }
  ~PlanMemory() {
    cudaFree(data_);  // waits for the work that may still use it
    cudaStreamDestroy(stream_);
  }
  PlanMemory(const PlanMemory&) = delete;
  PlanMemory& operator=(const PlanMemory&) = delete;
  template <typename T>
  T* take(size_t count) {
    T* const array = reinterpret_cast<T*>(static_cast<char*>(data_) + used_);
    used_ += whole(count * sizeof(T));
    return array;
  }
  void read(void* host, const void* device, size_t bytes) const {
    check(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream_), "reading the plan's statistics");
    check(cudaStreamSynchronize(stream_), "reading the plan's statistics");
  }
  void clear(void* device, size_t bytes) const {
    check(cudaMemsetAsync(device, 0, bytes, stream_), "clearing the plan's memory");
    check(cudaStreamSynchronize(stream_), "clearing the plan's memory");
  }

 private:
  cudaStream_t stream_ = nullptr;
  void* data_ = nullptr;
  size_t used_ = 0;
};

class TilePlan final : public AttentionPlan {
 public:
  TilePlan(const Problem& problem, const DeviceTraits& device, int32_t device_id, std::shared_ptr<RecordPool> records)
      : problem_(problem), device_(device), device_id_(device_id), info_(tile_plan_info(problem, device)) {
    if (always_exact(problem)) {
      exact_plan_ = make_plan(exact_problem(problem), device, device_id, std::move(records));
      return;
    }
    records_ = std::move(records);
    problem_.adaptive = device_options(problem.adaptive);
    shape_ = shape_of(problem_);
    const DeviceScope scope(device_id_);
    sm90::prepare_walk();
    const size_t units = static_cast<size_t>(shape_.batch) * static_cast<size_t>(shape_.heads_kv);
    const size_t heads = static_cast<size_t>(shape_.batch) * static_cast<size_t>(shape_.heads_q);
    const size_t basis = std::max<size_t>(1, state_basis_doubles(shape_));
    memory_ = std::make_unique<PlanMemory>(whole(basis * sizeof(double)) + whole(units * sizeof(int32_t)) +
                                           whole(heads * sizeof(HeadTally)) +
                                           whole(heads * sizeof(decide::HeadChoice)) + whole(sizeof(TileTotals)));
    state_.basis = memory_->take<double>(basis);
    state_.warm = memory_->take<int32_t>(units);
    tallies_ = memory_->take<HeadTally>(heads);
    frozen_choices_ = memory_->take<decide::HeadChoice>(heads);
    totals_ = memory_->take<TileTotals>(1);
    record_ = records_->acquire();
  }
  ~TilePlan() override {
    if (records_ != nullptr) records_->release(std::move(record_));
  }

  const PlanInfo& info() const override { return info_; }

  void execute(const AttnParams& params, void* workspace, size_t bytes, adaattn_stream_t stream) override {
    if (exact_plan_ != nullptr) {
      exact_plan_->execute(params, workspace, bytes, stream);
      count_exact(params);
      return;
    }
    ++calls_;
    newest_batch_ = params.batch;
    if (params.batch == 0 || params.seqlen_q == 0 || params.total_q == 0) return;
    if ((call_features(params) & kUnaligned) != 0)
      refuse("q, k, v, o: adaptive attention on CUDA needs rows that start on 16 bytes");
    const DeviceScope scope(device_id_);
    Launch launch;
    AttendArgs common = make_args(params, problem_, launch, nullptr);
    run(common.p, workspace, stream);
    const bool lengths_on_host =
        params.cu_seqlens_q == nullptr && params.cu_seqlens_k == nullptr && params.seqused_k == nullptr;
    if (lengths_on_host) {
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
  TileMap tile_map(int64_t, int64_t) override {
    refuse("adaptive plans on CUDA keep no tile maps; a CPU context does");
  }

 private:
  void run(const AttnParams& p, void* workspace, cudaStream_t stream);
  void count_exact(const AttnParams& p);

  Problem problem_;
  DeviceTraits device_;
  int32_t device_id_;
  PlanInfo info_;
  std::unique_ptr<AttentionPlan> exact_plan_;
  std::shared_ptr<RecordPool> records_;
  RecordSlot record_;
  TableShape shape_;
  std::unique_ptr<PlanMemory> memory_;
  AdaptiveState state_;
  HeadTally* tallies_ = nullptr;
  decide::HeadChoice* frozen_choices_ = nullptr;
  TileTotals* totals_ = nullptr;
  uint64_t calls_ = 0, launches_ = 0, rows_ = 0, pairs_ = 0;
  int64_t newest_batch_ = 0;
  bool frozen_ = false;
  AdaptiveCounters exact_counters_;
};

void TilePlan::run(const AttnParams& p, void* workspace, cudaStream_t stream) {
  const Options& o = problem_.adaptive;
  AnalyzeArgs args;
  args.p = p;
  args.shape = shape_;
  args.options = o;
  args.costs = device_costs(shape_, o);
  args.tables = analyze_layout(shape_, workspace);
  args.state = state_;
  args.scale_log2 = p.scale * 1.4426950408889634f;
  float* const far_share =
      o.far_field ? reinterpret_cast<float*>(static_cast<char*>(workspace) + whole(analyze_bytes(shape_))) : nullptr;
  const int64_t units = int64_t{shape_.batch} * shape_.heads_kv, heads = int64_t{shape_.batch} * shape_.heads_q;
  // A frozen plan starts its bases anew every call, so that the same input gives the same bits.
  if (o.freeze) check(cudaMemsetAsync(state_.warm, 0, static_cast<size_t>(units) * sizeof(int32_t), stream), "analyze");
  // Centroids of tiles beyond a shorter sequence's end are read with weight 0.
  if (o.far_field && (p.cu_seqlens_k != nullptr || p.seqused_k != nullptr ||
                      p.seqlen_k <= int64_t{shape_.key_tiles - 1} * decide::kTileK)) {
    const size_t groups = static_cast<size_t>(units * shape_.key_groups()) * sizeof(__nv_bfloat16);
    check(cudaMemsetAsync(args.tables.group_v, 0, groups * static_cast<size_t>(shape_.d_v), stream), "analyze");
    if (shape_.max_rank > 0)
      check(cudaMemsetAsync(args.tables.group_v_low, 0, groups * static_cast<size_t>(shape_.max_rank), stream),
            "analyze");
  }
  analyze(args, stream);
  decide_heads(args, stream);
  if (o.freeze) {
    const size_t bytes = static_cast<size_t>(heads) * sizeof(decide::HeadChoice);
    void* const to = frozen_ ? static_cast<void*>(args.tables.choice) : frozen_choices_;
    const void* const from = frozen_ ? static_cast<const void*>(frozen_choices_) : args.tables.choice;
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream), "frozen decisions");
    frozen_ = true;
  }

  sm90::WalkCall walk;
  walk.p = p;
  walk.far_field = o.far_field;
  walk.far_share = far_share;
  walk.multiprocessors = device_.multiprocessors;
  const int32_t query_tiles = static_cast<int32_t>((p.seqlen_q + decide::kTileQ - 1) / decide::kTileQ);
  for (int32_t first = 0; first < query_tiles; first += shape_.wave_tiles) {
    write_schedule(args, first, stream);
    walk.tables = tables_of(args, first);
    for (int c = 0; c < decide::kRankClasses; ++c) {
      if (c != 0 && decide::rank_of_class(c) > shape_.max_rank) continue;
      walk.rank_class = c;
      walk.counters = record_.device->scheduler + 2 * (launches_++ % (std::size(record_.device->scheduler) / 2));
      check(sm90::launch_walk(walk, stream), "walk");
    }
    check(launch_tally(args, first, far_share, tallies_, stream), "statistics");
  }
  check(launch_total(args, tallies_, totals_, stream), "statistics");
}

void TilePlan::count_exact(const AttnParams& p) {
  newest_batch_ = p.batch;
  const uint64_t heads = static_cast<uint64_t>(p.batch * p.heads_q);
  AdaptiveCounters& a = exact_counters_;
  a.heads += heads;
  a.heads_dense += heads;
  (problem_.dtype_q == Dtype::kF32   ? a.heads_f32
   : problem_.dtype_q == Dtype::kF16 ? a.heads_f16
                                     : a.heads_bf16) += heads;
  a.rank_v_sum += static_cast<double>(heads) * static_cast<double>(p.d_v);
  a.entropy_max = 1;
  a.entropy_sum += static_cast<double>(heads);
}

PlanCounters TilePlan::counters(bool wait, bool reset) {
  if (exact_plan_ != nullptr) {
    PlanCounters out = exact_plan_->counters(wait, reset);
    out.adaptive = exact_counters_;
    if (reset) exact_counters_ = {};
    return out;
  }
  const DeviceScope scope(device_id_);
  if (wait) check(cudaDeviceSynchronize(), "waiting for the plan's work");
  const PlanRecord snapshot = records_->read(record_, reset);
  TileTotals t;
  memory_->read(&t, totals_, sizeof t);
  PlanCounters out;
  out.calls = calls_;
  out.query_rows = rows_ + snapshot.query_rows;
  out.score_pairs = pairs_ + snapshot.score_pairs;
  out.violation.field = static_cast<Field>(snapshot.violation >> 32);
  out.violation.value = static_cast<int32_t>(snapshot.violation & 0xffffffffu);
  out.violation.index = static_cast<int64_t>(snapshot.violation_index);
  AdaptiveCounters& a = out.adaptive;
  a.heads = a.heads_bf16 = t.heads;
  a.heads_dense = t.heads_dense;
  a.heads_low_rank = t.heads_low_rank;
  a.tiles = t.tiles;
  a.tiles_kept = t.kept;
  a.flops_done = t.flops;
  a.rank_v_sum = t.rank_v_sum;
  a.entropy_sum = t.entropy_sum;
  a.entropy_min = t.entropy_min;
  a.entropy_max = t.entropy_max;
  a.predicted_error_sum = t.predicted_sum;
  a.dropped_mass_sum = t.far_sum;
  if (reset) {
    memory_->clear(totals_, sizeof t);
    calls_ = rows_ = pairs_ = 0;
  }
  return out;
}

std::vector<HeadRecord> TilePlan::head_records() {
  const size_t heads = static_cast<size_t>(newest_batch_ * problem_.heads_q);
  std::vector<HeadRecord> list(heads);
  std::vector<HeadTally> tallies(heads);
  if (exact_plan_ == nullptr && heads > 0) {
    const DeviceScope scope(device_id_);
    check(cudaDeviceSynchronize(), "waiting for the plan's work");
    memory_->read(tallies.data(), tallies_, heads * sizeof(HeadTally));
  }
  for (size_t i = 0; i < heads; ++i) {
    HeadRecord& record = list[i];
    const HeadTally& tally = tallies[i];
    record.batch = static_cast<int64_t>(i) / problem_.heads_q;
    record.head = static_cast<int64_t>(i) % problem_.heads_q;
    record.measured_error = std::numeric_limits<double>::quiet_NaN();
    record.rank_v = problem_.d_v;
    record.precision = problem_.dtype_q == Dtype::kF32   ? ADAATTN_PRECISION_F32
                       : problem_.dtype_q == Dtype::kF16 ? ADAATTN_PRECISION_F16
                                                         : ADAATTN_PRECISION_BF16;
    record.entropy = 1;
    if (exact_plan_ != nullptr) continue;
    record.entropy = static_cast<double>(tally.entropy);
    record.kept_tiles = tally.tiles > 0 ? static_cast<double>(tally.kept) / static_cast<double>(tally.tiles) : 1;
    record.dropped_mass = tally.rows > 0 ? tally.far_share / static_cast<double>(tally.rows) : 0;
    record.predicted_error = static_cast<double>(tally.predicted_error);
    record.dense = tally.dense != 0;
    if (tally.rank_class != 0) record.rank_v = decide::rank_of_class(tally.rank_class);
    record.rank_energy = static_cast<double>(tally.rank_energy);
  }
  return list;
}

}  // namespace

PlanInfo tile_plan_info(const Problem& problem, const DeviceTraits& device) {
  check_options(problem.adaptive);
  PlanInfo info = plan_info(exact_problem(problem), device);
  if (always_exact(problem)) return info;
  check_shape(problem, device);
  Problem with_options = problem;
  with_options.adaptive = device_options(problem.adaptive);
  info.kernel = "sm90_walk_bf16_d128";
  info.isa = "sm_90a";
  info.tile_q = decide::kTileQ;
  info.tile_k = decide::kTileK;
  info.splits = 1;
  info.exact = false;
  info.workspace_bytes = workspace_bytes(shape_of(with_options), with_options.adaptive.far_field);
  return info;
}

std::unique_ptr<AttentionPlan> make_tile_plan(const Problem& problem, const DeviceTraits& device, int32_t device_id,
                                              std::shared_ptr<RecordPool> records) {
  return std::make_unique<TilePlan>(problem, device, device_id, std::move(records));
}

}  // namespace adaattn::cuda
