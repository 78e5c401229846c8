#include "cpu_fallback/attend/plan.h"

#include <algorithm>
#include <atomic>
#include <new>

#include "core/error.h"
#include "cpu_fallback/attend/layout.h"
#include "cpu_fallback/attend/operands.h"
#include "cpu_fallback/isa/registry.h"

namespace adaattn::cpu {
namespace {

void check_problem(const Problem& p) {
  const auto floating = [](Dtype dtype) {
    return dtype == Dtype::kF32 || dtype == Dtype::kF16 || dtype == Dtype::kBF16;
  };
  const struct {
    const char* name;
    Dtype dtype;
  } dtypes[] = {{"dtype_q", p.dtype_q}, {"dtype_kv", p.dtype_kv}, {"dtype_o", p.dtype_o}};
  for (const auto& [name, dtype] : dtypes)
    if (!floating(dtype))
      fail(ADAATTN_ERROR_NOT_SUPPORTED, "desc.%s is %d; accepted on the CPU: F32, F16, BF16", name,
           static_cast<int>(dtype));
  // Key indices and positions are 32-bit inside the kernels.
  constexpr int64_t kLimit = int64_t{1} << 30;
  const struct {
    const char* name;
    int64_t value;
  } sizes[] = {{"max_seqlen_q", p.max_seqlen_q}, {"max_seqlen_k", p.max_seqlen_k}};
  for (const auto& [name, value] : sizes)
    if (value > kLimit)
      fail(ADAATTN_ERROR_NOT_SUPPORTED, "desc.%s is %lld; accepted on the CPU: at most %lld", name,
           static_cast<long long>(value), static_cast<long long>(kLimit));
}

const char* prefill_name(const Problem& p, const KernelTable& kernels) {
  const auto narrow = [&](Dtype dtype) { return dtype == Dtype::kBF16 || (p.fast_f32 && dtype == Dtype::kF32); };
  const bool bf16 = kernels.prefill_bf16_name != nullptr && narrow(p.dtype_q) && narrow(p.dtype_kv);
  return bf16 ? kernels.prefill_bf16_name : kernels.prefill_name;
}

char* align_up(void* p) {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(p) + 63) & ~static_cast<uintptr_t>(63));
}

float* partials_of(char* unit_memory) { return reinterpret_cast<float*>(unit_memory + kUnitHeader); }

class CpuAttentionPlan final : public AttentionPlan {
 public:
  CpuAttentionPlan(const Problem& problem, adaattn_isa_t isa, ThreadPool& pool)
      : problem_(problem),
        kernels_(*kernels_of(isa)),
        pool_(pool),
        lanes_(pool.num_threads()),
        info_(select_attention(problem, isa, pool.num_threads())),
        layout_(lay_out_work(problem, kernels_, lanes_)) {}

  const PlanInfo& info() const override { return info_; }

  void execute(const AttnParams& params, void* workspace, size_t workspace_bytes, adaattn_stream_t) override {
    if (workspace_bytes < info_.workspace_bytes)
      fail(ADAATTN_ERROR_WORKSPACE_TOO_SMALL, "workspace_bytes is %zu; accepted: %zu or more", workspace_bytes,
           info_.workspace_bytes);
    char* memory = align_up(workspace);
    prefill(params, memory);
    decode(params, memory);
    count(params);
  }

  PlanCounters counters(bool, bool reset) override {
    const PlanCounters result = counters_;
    if (reset) counters_ = {};
    return result;
  }

 private:
  void prefill(const AttnParams& p, char* memory);
  void decode(const AttnParams& p, char* memory);
  void count(const AttnParams& p);
  int64_t heads_per_item(const AttnParams& p, int64_t splits) const;

  Problem problem_;
  const KernelTable& kernels_;
  ThreadPool& pool_;
  int64_t lanes_;
  PlanInfo info_;
  WorkLayout layout_;
  PlanCounters counters_;
};

void CpuAttentionPlan::prefill(const AttnParams& p, char* memory) {
  const int64_t group = p.heads_q / p.heads_kv;
  if (is_decode(p.seqlen_q, group) || p.seqlen_q == 0) return;
  const int64_t pairs = p.batch * p.heads_kv;
  // Smaller items where there are few of them; results do not depend on it.
  const int64_t lanes = std::min<int64_t>(lanes_, pool_.num_threads());
  int64_t tiles = layout_.tiles;
  const auto items_of = [&](int64_t t) { return pairs * ceil_div(p.seqlen_q * group, t * kTileRows); };
  while (tiles > 1 && lanes > 1 && items_of(tiles) < 4 * lanes) tiles = (tiles + 1) / 2;
  const int64_t item_rows = tiles * kTileRows;
  const int64_t chunks = ceil_div(p.seqlen_q * group, item_rows);

  pool_.for_each(
      pairs * chunks,
      [&](int64_t lane, int64_t item) {
        // One head after another, so that its K and V are still in second-level cache for the next item, and the last
        // rows first: under a causal mask they are the longest.
        const int64_t pair = item / chunks, chunk = chunks - 1 - item % chunks;
        const int64_t b = pair / p.heads_kv, head = pair % p.heads_kv;
        const Sequence s = sequence_of(p, b);
        if (is_decode(s.len_q, group)) return;
        PrefillArgs args;
        args.row_begin = chunk * item_rows;
        args.row_count = std::min(s.len_q * group - args.row_begin, item_rows);
        if (args.row_count <= 0) return;
        args.rows = row_operands(p, b, s, head * group, group);
        args.k = key_operand(p, p.k, b, s, head);
        args.v = key_operand(p, p.v, b, s, head);
        char* scratch = memory + lane * layout_.lane_bytes;
        int32_t* begin = reinterpret_cast<int32_t*>(scratch);
        int32_t* end = begin + item_rows;
        fill_ranges(p, s, group, args.row_begin, args.row_count, begin, end);
        args.key_begin = begin;
        args.key_end = end;
        args.scratch = scratch + layout_.ranges_bytes;
        kernels_.prefill(args);
      },
      lanes_);
}

// KV heads that a decode item takes. Neighbours in memory are read together where a token's heads are adjacent; fewer
// where there would be too few items. Results do not depend on it.
int64_t CpuAttentionPlan::heads_per_item(const AttnParams& p, int64_t splits) const {
  const int64_t group = p.heads_q / p.heads_kv;
  const bool token_major = p.k.stride_h < p.k.stride_s;
  int64_t heads = token_major ? kDecodeItemRows / (ceil_div(decode_rows(p.seqlen_q, group), 4) * 4) : 1;
  heads = std::clamp<int64_t>(heads, 1, p.heads_kv);
  const int64_t lanes = std::min<int64_t>(lanes_, pool_.num_threads());
  while (heads > 1 && lanes > 1 && p.batch * ceil_div(p.heads_kv, heads) * splits < 4 * lanes) heads = (heads + 1) / 2;
  return heads;
}

void CpuAttentionPlan::decode(const AttnParams& p, char* memory) {
  const int64_t group = p.heads_q / p.heads_kv;
  if (p.seqlen_q == 0) return;
  const int64_t splits = std::max<int64_t>(ceil_div(p.seqlen_k, kSplitKeys), 1);
  const int64_t heads = heads_per_item(p, splits), head_groups = ceil_div(p.heads_kv, heads);
  const int64_t row_chunks = ceil_div(group, kDecodeRows);
  const int64_t items_per_sequence = head_groups * row_chunks * splits;
  char* partials = memory + lanes_ * layout_.lane_bytes;

  for (int64_t first = 0; first < p.batch; first += layout_.wave_sequences) {
    const int64_t wave = std::min(p.batch - first, layout_.wave_sequences);
    // A unit is one KV head's row chunk. Its memory starts with the number of its splits that are done.
    const auto unit_memory = [&](int64_t b, int64_t row_chunk, int64_t head) {
      return partials + (((b - first) * row_chunks + row_chunk) * p.heads_kv + head) * layout_.unit_bytes;
    };
    for (int64_t unit = 0; unit < wave * row_chunks * p.heads_kv; ++unit)
      new (partials + unit * layout_.unit_bytes) std::atomic<int64_t>(0);

    pool_.for_each(
        wave * items_per_sequence,
        [&](int64_t lane, int64_t item) {
          const int64_t b = first + item / items_per_sequence, split = item % splits;
          const int64_t row_chunk = item / splits % row_chunks;
          const int64_t head = item / (splits * row_chunks) % head_groups * heads;
          const Sequence s = sequence_of(p, b);
          if (s.len_q == 0 || !is_decode(s.len_q, group)) return;
          const int64_t used_splits = std::max<int64_t>(ceil_div(s.len_k, kSplitKeys), 1);
          if (split >= used_splits) return;
          DecodeArgs args;
          args.row_begin = row_chunk * kDecodeRows;
          args.row_count = std::min(s.len_q * group - args.row_begin, kDecodeRows);
          if (args.row_count <= 0) return;
          args.rows = row_operands(p, b, s, head * group, group);
          args.k = key_operand(p, p.k, b, s, head);
          args.v = key_operand(p, p.v, b, s, head);
          args.heads = std::min(heads, p.heads_kv - head);
          args.k_head_stride = p.k.stride_h * dtype_size(p.k.dtype);
          args.v_head_stride = p.v.stride_h * dtype_size(p.v.dtype);
          char* scratch = memory + lane * layout_.lane_bytes;
          int32_t* begin = reinterpret_cast<int32_t*>(scratch);
          int32_t* end = begin + kDecodeRows;
          fill_ranges(p, s, group, args.row_begin, args.row_count, begin, end);
          args.key_begin = begin;
          args.key_end = end;
          args.split_begin = split * kSplitKeys;
          args.split_end = std::min(args.split_begin + kSplitKeys, s.len_k);
          args.scratch = scratch + layout_.ranges_bytes;
          const int64_t split_floats = args.row_count * partial_floats(p.d_v);
          args.partial = partials_of(unit_memory(b, row_chunk, head)) + split * split_floats;
          args.partial_head_stride = layout_.unit_bytes / static_cast<int64_t>(sizeof(float));
          kernels_.decode(args);

          for (int64_t h = head; h < head + args.heads; ++h) {
            // Whoever finishes a unit's last split joins them, always in key order.
            char* unit = unit_memory(b, row_chunk, h);
            auto* done = std::launder(reinterpret_cast<std::atomic<int64_t>*>(unit));
            if (done->fetch_add(1, std::memory_order_acq_rel) + 1 != used_splits) continue;
            CombineArgs join;
            join.rows = row_operands(p, b, s, h * group, group);
            join.row_begin = args.row_begin;
            join.row_count = args.row_count;
            join.partials = partials_of(unit);
            join.splits = used_splits;
            join.scratch = args.scratch;
            kernels_.combine(join);
          }
        },
        lanes_);
  }
}

void CpuAttentionPlan::count(const AttnParams& p) {
  ++counters_.calls;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence_of(p, b);
    counters_.query_rows += static_cast<uint64_t>(s.len_q * p.heads_q);
    counters_.score_pairs += static_cast<uint64_t>(visible_pairs(p, s) * p.heads_q);
    if (counters_.violation.field == Field::kNone) counters_.violation = check_sequence(p, b);
  }
}

}  // namespace

PlanInfo select_attention(const Problem& problem, adaattn_isa_t isa, int32_t num_threads) {
  check_problem(problem);
  const KernelTable& kernels = *kernels_of(isa);
  const WorkLayout layout = lay_out_work(problem, kernels, num_threads);
  const int64_t group = problem.heads_q / problem.heads_kv;
  const bool decodes = is_decode(problem.max_seqlen_q, group);
  PlanInfo info;
  info.kernel = decodes ? kernels.decode_name : prefill_name(problem, kernels);
  info.isa = isa_name(isa);
  info.tile_q = static_cast<int32_t>(decodes ? std::min(problem.max_seqlen_q * group, kDecodeRows) : kTileRows);
  info.tile_k = static_cast<int32_t>(decodes ? kSplitKeys : kKeyBlock);
  info.splits = static_cast<int32_t>(decodes ? layout.splits : 1);
  info.workspace_bytes = static_cast<size_t>(layout.workspace_bytes);
  return info;
}

std::unique_ptr<AttentionPlan> make_attention_plan(const Problem& problem, adaattn_isa_t isa, ThreadPool& pool) {
  check_problem(problem);
  return std::make_unique<CpuAttentionPlan>(problem, isa, pool);
}

}  // namespace adaattn::cpu
