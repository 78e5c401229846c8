#include "adaptive/plan.h"

#include <iterator>
#include <limits>
#include <utility>

#include "adaptive/bytes.h"
#include "adaptive/refuse.h"
#include "adaptive/tile_plan.h"
#include "adaptive/tile_plan_sizes.h"
#include "attend/plan.h"
#include "decide/precision.h"
#include "runtime.h"

namespace adaattn::cuda {
namespace {

using decide::Options;

bool masked(const Problem& p) { return p.window_left >= 0 || p.window_right >= 0; }

const AttendKernel* find_int8(const Problem& p, uint32_t features) {
  for (const AttendKernel* kernel : attend_kernels())
    if (kernel->phase == Phase::kInt8 && kernel->dtype == p.dtype_q && kernel->d_qk == p.d_qk && kernel->d_v == p.d_v &&
        (features & ~kernel->features) == 0)
      return kernel;
  return nullptr;
}

// Some of the tiles are left out, and heads that cannot be in 8 bits have a plan.
bool in_tiles(const Options& o) { return tiles_in_bytes(o) && o.tiles && o.min_level != decide::kDenseLevel; }

void check_options(const Options& o) {
  if (o.policy != decide::Policy::kCustom)
    refuse("adaptive.max_precision is %d; accepted for a named policy on CUDA: 0, 2 (BF16) and above",
           ADAATTN_PRECISION_I8);
  if (o.rank_mode != decide::RankMode::kOff)
    refuse("adaptive.rank_mode is %d; accepted for 8-bit attention, which does not project V: %d (OFF)",
           static_cast<int>(o.rank_mode) + ADAATTN_RANK_OFF, ADAATTN_RANK_OFF);
  if (o.verify_rows > 0 && !in_tiles(o))
    refuse("adaptive.verify_rows is %d; accepted for 8-bit attention of every tile, which CUDA does not verify: -1",
           o.verify_rows);
}

void check_shape(const Problem& p, const DeviceTraits& device) {
  if (device.compute_capability != 90)
    refuse("adaptive.max_precision is 1 (I8); accepted on devices of compute capability 9.0, this one has %d.%d",
           device.compute_capability / 10, device.compute_capability % 10);
  if (p.dtype_q == Dtype::kF32) refuse("desc.dtype_q is 1 (F32); accepted for 8-bit attention: F16, BF16");
  if (p.dtype_o != p.dtype_q) refuse("desc.dtype_o differs from desc.dtype_q; accepted for 8-bit attention: the same");
  if (p.d_qk != p.d_v || (p.d_qk != 64 && p.d_qk != 128))
    refuse("desc.head_dim_qk is %lld with desc.head_dim_v %lld; accepted for 8-bit attention: 64 or 128 for both",
           static_cast<long long>(p.d_qk), static_cast<long long>(p.d_v));
  if (p.softcap > 0) refuse("desc.softcap is %g; accepted for 8-bit attention: 0", static_cast<double>(p.softcap));
  if (!(p.scale > 0))
    refuse("desc.scale is %g; accepted for 8-bit attention: 0 (1/sqrt(head_dim_qk)) or more",
           static_cast<double>(p.scale));
  if (p.alibi) refuse("desc.flags has ALIBI; accepted for 8-bit attention: SINK");
  if (p.bias) refuse("desc.flags has BIAS; accepted for 8-bit attention: SINK");
  if (p.want_entropy) refuse("desc.outputs has ENTROPY; accepted for 8-bit attention: LSE");
  if (p.layout_kv == Layout::kPaged)
    refuse("desc.layout_kv is 4 (PAGED); accepted for 8-bit attention: BSHD, BHSD, THD");
}

PlanInfo int8_plan_info(const Problem& problem, const DeviceTraits& device);

class Int8Plan final : public AttentionPlan {
 public:
  Int8Plan(const Problem& problem, const DeviceTraits& device, int32_t device_id, std::shared_ptr<RecordPool> records)
      : problem_(problem),
        device_(device),
        device_id_(device_id),
        info_(int8_plan_info(problem, device)),
        kernel_(*find_int8(problem, masked(problem) ? kMasked : kPlain)),
        records_(std::move(records)) {
    const DeviceScope scope(device_id_);
    prepare_kernel(kernel_);
    record_ = records_->acquire();
  }
  ~Int8Plan() override { records_->release(std::move(record_)); }

  const PlanInfo& info() const override { return info_; }

  void execute(const AttnParams& params, void* workspace, size_t, adaattn_stream_t stream) override {
    const bool lengths_known = lengths_on_host(params);
    if (params.batch > 0 && params.seqlen_q > 0 && params.total_q > 0) {
      if ((call_features(params) & kUnaligned) != 0)
        refuse(
            "io.q, k, v or o has rows off a multiple of 16 bytes; accepted for 8-bit attention: rows that start on 16 "
            "bytes");
      const DeviceScope scope(device_id_);
      AttendArgs args = make_args(params, problem_, launch_of(params), nullptr);
      args.scheduler = record_.device->scheduler + 2 * (launches_++ % (std::size(record_.device->scheduler) / 2));
      args.multiprocessors = device_.multiprocessors;
      args.int8 = lay_out_int8_tables(args.p, workspace);
      check(launch_quantize(args.p, args.int8, stream), "quantize");
      check(kernel_.launch(args, stream), kernel_.name);
      if (!lengths_known) {
        args.record = record_.device;
        check(launch_report(args, stream), "report");
      }
      if (touches_record(args, kernel_)) record_.mark(stream);
    }
    count(params, lengths_known);
  }

  PlanCounters counters(bool wait, bool reset) override {
    const DeviceScope scope(device_id_);
    if (wait) check(cudaDeviceSynchronize(), "waiting for the plan's work");
    PlanCounters out = counters_;
    add_record(out, records_->read(record_, reset));
    AdaptiveCounters& a = out.adaptive;
    a.tiles += out.visible_tiles;
    a.tiles_kept = a.tiles;
    a.flops_done = 2.0 * static_cast<double>(problem_.d_qk + problem_.d_v) * static_cast<double>(out.score_pairs);
    if (reset) counters_ = {};
    return out;
  }

  std::vector<HeadRecord> head_records() override {
    std::vector<HeadRecord> list;
    for (int64_t b = 0; b < newest_batch_; ++b)
      for (int64_t h = 0; h < problem_.heads_q; ++h) {
        HeadRecord record;
        record.batch = b;
        record.head = h;
        record.predicted_error = double{kByteRoundError};
        record.measured_error = std::numeric_limits<double>::quiet_NaN();
        record.rank_v = problem_.d_v;
        record.precision = ADAATTN_PRECISION_I8;
        record.dense = false;
        list.push_back(record);
      }
    return list;
  }

 private:
  Launch launch_of(const AttnParams& p) const {
    Launch launch;
    launch.kernel = &kernel_;
    launch.m_tiles = static_cast<int32_t>((p.seqlen_q + kernel_.tile_q - 1) / kernel_.tile_q);
    const int64_t group = p.heads_q / p.heads_kv;
    launch.section = section_of(device_, p.batch * p.heads_q, p.seqlen_k * (p.d_qk + p.d_v) / group, group);
    return launch;
  }

  void count(const AttnParams& p, bool lengths_known) {
    const int64_t heads = p.batch * p.heads_q;
    ++counters_.calls;
    newest_batch_ = p.batch;
    AdaptiveCounters& a = counters_.adaptive;
    a.heads += static_cast<uint64_t>(heads);
    a.heads_i8 += static_cast<uint64_t>(heads);
    a.rank_v_sum += static_cast<double>(heads * p.d_v);
    a.predicted_error_sum += static_cast<double>(heads) * double{kByteRoundError};
    if (!lengths_known) return;  // the device counts the rest
    add_lengths(counters_, p);
    a.tiles += tiles_of_call(p);
  }

  Problem problem_;
  DeviceTraits device_;
  int32_t device_id_;
  PlanInfo info_;
  const AttendKernel& kernel_;
  std::shared_ptr<RecordPool> records_;
  RecordSlot record_;
  PlanCounters counters_;
  uint64_t launches_ = 0;
  int64_t newest_batch_ = 0;
};

PlanInfo int8_plan_info(const Problem& problem, const DeviceTraits& device) {
  check_options(problem.adaptive);
  check_shape(problem, device);
  Problem exact = problem;
  exact.adaptive = {};
  check_problem(exact, device);
  const AttendKernel* kernel = find_int8(problem, masked(problem) ? kMasked : kPlain);
  if (kernel == nullptr || static_cast<int64_t>(kernel->shared_bytes) > device.shared_bytes)
    refuse(
        "adaptive.max_precision is 1 (I8); accepted in this build, which has no 8-bit kernel of head_dim %lld: 0, 2 "
        "and above",
        static_cast<long long>(problem.d_qk));
  PlanInfo info;
  info.kernel = kernel->name;
  info.isa = "sm_90a";
  info.tile_q = kernel->tile_q;
  info.tile_k = kernel->tile_k;
  info.capture_safe = true;
  info.deterministic = true;
  info.exact = false;
  info.workspace_bytes =
      int8_tables_bytes(problem.max_batch, problem.heads_kv, problem.max_seqlen_k, problem.d_qk, problem.d_v);
  const uint64_t limit = problem.adaptive.max_workspace_bytes;
  if (limit != 0 && info.workspace_bytes > limit)
    refuse("adaptive.max_workspace_bytes is %llu; accepted: 0 (no limit), or at least %zu for K and V in 8 bits",
           static_cast<unsigned long long>(limit), info.workspace_bytes);
  return info;
}

bool every_tile_in_8_bits(const Options& o) { return decide::only_bytes(o) && !in_tiles(o); }

}  // namespace

PlanInfo adaptive_plan_info(const Problem& problem, const DeviceTraits& device) {
  if (every_tile_in_8_bits(problem.adaptive)) return int8_plan_info(problem, device);
  if (decide::only_bytes(problem.adaptive)) {
    check_options(problem.adaptive);
    check_shape(problem, device);
  }
  return tile_plan_info(problem, device);
}

std::unique_ptr<AttentionPlan> make_adaptive_plan(const Problem& problem, const DeviceTraits& device, int32_t device_id,
                                                  std::shared_ptr<RecordPool> records) {
  if (!every_tile_in_8_bits(problem.adaptive)) return make_tile_plan(problem, device, device_id, std::move(records));
  return std::make_unique<Int8Plan>(problem, device, device_id, std::move(records));
}

}  // namespace adaattn::cuda
