// What a back-end must offer. src/capi validates and calls; cpu_fallback/ and kernels/ implement. Failures are thrown
// as Error. A Backend serves one device and may be called from several threads; an AttentionPlan is called from one
// at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "adaattn/adaattn.h"
#include "core/allocator.h"
#include "core/attn_params.h"
#include "core/error.h"
#include "core/problem.h"
#include "core/tool_params.h"

namespace adaattn {

struct PlanInfo {
  std::string kernel, isa;
  int32_t tile_q = 0, tile_k = 0, splits = 1;
  bool capture_safe = false, deterministic = true, exact = true;
  size_t workspace_bytes = 0;
};

// Sums of an adaptive plan, as adaattn_plan_stats_t has them. "heads" are (sequence, query head) pairs.
struct AdaptiveCounters {
  uint64_t heads = 0, heads_dense = 0, heads_low_rank = 0;
  uint64_t heads_f32 = 0, heads_f16 = 0, heads_bf16 = 0, heads_i8 = 0;
  uint64_t tiles = 0, tiles_kept = 0, tiles_probed_in = 0;
  double flops_done = 0;
  double rank_v_sum = 0;
  double entropy_sum = 0, entropy_min = 0, entropy_max = 0;
  double predicted_error_sum = 0, dropped_mass_sum = 0;
  uint64_t verified_heads = 0, verified_rows = 0;
  double measured_error_sum = 0, measured_error_max = 0, measured_row_error_max = 0;
  uint64_t heads_over_tolerance = 0, heads_recomputed = 0;
  double seconds_analyze = 0, seconds_decide = 0, seconds_attend = 0, seconds_verify = 0;
};

struct PlanCounters {
  uint64_t calls = 0, query_rows = 0, score_pairs = 0;
  uint64_t visible_tiles = 0;  // 128 x 128 with a visible pair, times query heads, where a device counted them
  Violation violation;
  AdaptiveCounters adaptive;
};

// The newest call's decisions for one head, as adaattn_head_stats_t has them.
struct HeadRecord {
  int64_t batch = 0, head = 0;
  double entropy = 0, kept_tiles = 1, dropped_mass = 0;
  double predicted_error = 0, measured_error = 0, feedback = 1;
  int64_t rank_v = 0;
  double rank_energy = 1;
  adaattn_precision_t precision = ADAATTN_PRECISION_DEFAULT;
  bool dense = true;
};

// The newest call's tiles of one head, row-major, as adaattn_plan_get_tile_map() has them.
struct TileMap {
  int64_t query_tiles = 0, key_tiles = 0;
  std::vector<uint8_t> tiles;
};

// The back-end's half of a plan: the kernel that its selector chose and the state that belongs to the plan.
class AttentionPlan {
 public:
  virtual ~AttentionPlan() = default;
  virtual const PlanInfo& info() const = 0;
  // params lies within the plan's Problem. workspace holds at least info().workspace_bytes.
  virtual void execute(const AttnParams& params, void* workspace, size_t workspace_bytes, adaattn_stream_t stream) = 0;
  virtual PlanCounters counters(bool wait, bool reset) = 0;
  // Of the newest call, heads fastest; empty for an exact plan.
  virtual std::vector<HeadRecord> head_records() { return {}; }
  // batch and head lie within the plan's Problem.
  virtual TileMap tile_map(int64_t /*batch*/, int64_t /*head*/) {
    fail(ADAATTN_ERROR_NOT_SUPPORTED, "plan computes every tile exactly; accepted: one that skips tiles");
  }
};

struct BackendConfig {
  int32_t device_id = 0;
  int32_t num_threads = 0;
  adaattn_isa_t isa = ADAATTN_ISA_AUTO;
  adaattn_parallel_for_fn parallel_for = nullptr;
  void* parallel_for_user = nullptr;
  Allocator allocator;  // alloc null: the back-end's own
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual adaattn_device_t device() const = 0;
  virtual int32_t device_id() const = 0;
  virtual const Allocator& allocator() const = 0;  // never null inside
  // Refuses streams, memory and capture states that the device cannot serve; capture = a workspace would have to be
  // allocated while the stream is being captured.
  virtual void check_stream(adaattn_stream_t stream, bool will_allocate) const = 0;
  // Refuses (WRONG_DEVICE, naming the field) a pointer that this device cannot read.
  virtual void check_pointer(const void* pointer, const char* field) const = 0;
  virtual void set_option(adaattn_option_t option, int64_t value) = 0;  // NUM_THREADS, ISA
  virtual int64_t get_option(adaattn_option_t option) const = 0;

  // The selector: throws ADAATTN_ERROR_NOT_SUPPORTED with the reason, or returns what a plan would run.
  virtual PlanInfo select(const Problem& problem) const = 0;
  virtual std::unique_ptr<AttentionPlan> make_plan(const Problem& problem) = 0;

  virtual void merge(const MergeParams& params, adaattn_stream_t stream) = 0;
  // problem's maxima bound the call.
  virtual size_t entropy_workspace(const Problem& problem, const EntropyParams& params) const = 0;
  virtual void entropy(const EntropyParams& params, void* workspace, size_t bytes, adaattn_stream_t stream) = 0;
  // The workspace queries read shapes only: data pointers may be null.
  virtual size_t low_rank_workspace(const LowRankParams& params) const = 0;
  virtual void low_rank(const LowRankParams& params, void* workspace, size_t bytes, adaattn_stream_t stream) = 0;
  virtual void low_rank_project(const ProjectParams& params, adaattn_stream_t stream) = 0;
  virtual size_t effective_rank_workspace(const EffectiveRankParams& params) const = 0;
  virtual void effective_rank(const EffectiveRankParams& params, void* workspace, size_t bytes,
                              adaattn_stream_t stream) = 0;
  virtual size_t spectral_norm_workspace(const SpectralNormParams& params) const = 0;
  virtual void spectral_norm(const SpectralNormParams& params, void* workspace, size_t bytes,
                             adaattn_stream_t stream) = 0;
};

// The factories. cuda_* exist only in builds with ADAATTN_WITH_CUDA; device_count says in `reason` why it is 0.
std::unique_ptr<Backend> make_cpu_backend(const BackendConfig& config);
void cpu_device_info(adaattn_device_info_t* info);  // every field but struct_size
std::string cpu_build_info();
std::unique_ptr<Backend> make_cuda_backend(const BackendConfig& config);
int32_t cuda_device_count(std::string* reason, adaattn_status_t* why);
void cuda_device_info(int32_t device_id, adaattn_device_info_t* info);
std::string cuda_build_info();

}  // namespace adaattn
