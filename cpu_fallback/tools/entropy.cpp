#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/sampling.h"
#include "cpu_fallback/attend/operands.h"
#include "cpu_fallback/tools/arena.h"
#include "cpu_fallback/tools/tools.h"

namespace adaattn::cpu {
namespace {

// Rows (queries x heads of a group) per item: enough to hide the packing of K, few enough to balance the threads.
constexpr int64_t kItemRows = 256;

int64_t ceil_to(int64_t n, int64_t by) { return (n + by - 1) / by; }

// The prefill kernel does the work, asked for entropies alone; items are runs of queries of one sequence and KV head.
struct Layout {
  int64_t group, item_queries, item_rows, chunks;

  struct Lane {
    int32_t *key_begin, *key_end;
    int64_t* row_map;
    float* entropy;
    char* scratch;
  };
  size_t lane_bytes = 0;
  uint8_t* lane_memory;
  double* sums;  // [batch, heads_kv, chunks, group]: of the entropies of a chunk's rows
  size_t scratch_bytes;

  Layout(const ToolContext& context, int64_t batch, int64_t heads_q, int64_t heads_kv, int64_t d_qk, int64_t seqlen_q,
         const EntropyParams& p, Arena& arena)
      : group(heads_q / heads_kv),
        item_queries(std::max<int64_t>(kItemRows / group, 1)),
        item_rows(item_queries * group),
        chunks(ceil_to(p.sampled ? number_of_strata(p.sample_rows, seqlen_q) : seqlen_q, item_queries)),
        scratch_bytes(context.attention.prefill_scratch(d_qk, 0, ceil_to(item_rows, kTileRows))) {
    Arena counting;
    take_lane(counting);
    lane_bytes = counting.used();
    lane_memory = arena.take<uint8_t>(static_cast<int64_t>(lane_bytes) * context.pool.num_threads());
    sums = arena.take<double>(batch * heads_kv * chunks * group);
  }

  Lane take_lane(Arena& arena) const {
    Lane lane;
    lane.key_begin = arena.take<int32_t>(item_rows);
    lane.key_end = arena.take<int32_t>(item_rows);
    lane.row_map = arena.take<int64_t>(item_rows);
    lane.entropy = arena.take<float>(item_rows);
    lane.scratch = arena.take<char>(static_cast<int64_t>(scratch_bytes));
    return lane;
  }
  Lane lane(int64_t index) const {
    Arena arena(lane_memory + static_cast<size_t>(index) * lane_bytes);
    return take_lane(arena);
  }
};

int64_t queries_of(const EntropyParams& p, const Sequence& s) {
  return p.sampled ? number_of_strata(p.sample_rows, s.len_q) : s.len_q;
}

float* row_output(const AttnParams& p, const Sequence& s, int64_t b, int64_t head, int64_t query) {
  return static_cast<float*>(p.entropy.data) + b * p.entropy.stride_b + (s.q_start + query) * p.entropy.stride_s +
         head * p.entropy.stride_h;
}

// Entropies of queries [first, first + count) of the chunk's list for every head of a group.
void run_item(const ToolContext& context, const EntropyParams& p, const Layout& w, const Layout::Lane& lane, int64_t b,
              int64_t head_kv, int64_t first, int64_t count, double* sums) {
  const AttnParams& attn = p.attn;
  const Sequence s = sequence_of(attn, b);
  const int64_t head0 = head_kv * w.group, strata = queries_of(p, s);
  PrefillArgs args;
  args.row_count = count * w.group;
  args.rows = row_operands(attn, b, s, head0, w.group);
  args.rows.d_v = 0;
  args.rows.sinks = nullptr;  // the distribution over real keys
  args.k = key_operand(attn, attn.k, b, s, head_kv);
  args.row_map = lane.row_map;
  args.key_begin = lane.key_begin;
  args.key_end = lane.key_end;
  args.scratch = lane.scratch;
  args.row_entropy = lane.entropy;
  for (int64_t at = 0; at < args.row_count; ++at) {
    const int64_t head = at % w.group, nth = first + at / w.group;
    const int64_t query = p.sampled ? sampled_row(p.seed, b, head0 + head, attn.heads_q, nth, strata, s.len_q) : nth;
    const KeyRange range = visible_keys(attn, s, query);
    lane.row_map[at] = query * w.group + head;
    lane.key_begin[at] = static_cast<int32_t>(range.begin);
    lane.key_end[at] = static_cast<int32_t>(range.end);
  }
  context.attention.prefill(args);
  for (int64_t at = 0; at < args.row_count; ++at) {
    const int64_t head = at % w.group, keys = lane.key_end[at] - lane.key_begin[at];
    // Rounding may leave the sum a hair below zero.
    double entropy = lane.entropy[at] < 0 ? 0 : lane.entropy[at];
    if (p.normalized) entropy = keys < 2 ? 0 : entropy / std::log(static_cast<double>(keys));
    sums[head] += entropy;
    if (attn.entropy.data != nullptr)
      *row_output(attn, s, b, head0 + head, lane.row_map[at] / w.group) = static_cast<float>(entropy);
  }
}

}  // namespace

size_t entropy_workspace(const ToolContext& context, const Problem& problem, const EntropyParams& params) {
  constexpr int64_t kLimit = int64_t{1} << 30;  // key indices and positions are 32-bit inside the kernel
  if (problem.max_seqlen_q > kLimit || problem.max_seqlen_k > kLimit)
    fail(ADAATTN_ERROR_NOT_SUPPORTED,
         "attn.max_seqlen_q is %lld and attn.max_seqlen_k %lld; accepted on the CPU: at most %lld",
         static_cast<long long>(problem.max_seqlen_q), static_cast<long long>(problem.max_seqlen_k),
         static_cast<long long>(kLimit));
  Arena arena;
  Layout(context, problem.max_batch, problem.heads_q, problem.heads_kv, problem.d_qk, problem.max_seqlen_q, params,
         arena);
  return Arena::size_for(arena.used());
}

void entropy(const ToolContext& context, const EntropyParams& p, void* workspace) {
  const AttnParams& attn = p.attn;
  Arena arena(workspace);
  const Layout w(context, attn.batch, attn.heads_q, attn.heads_kv, attn.d_qk, attn.seqlen_q, p, arena);
  const int64_t pairs = attn.batch * attn.heads_kv;
  context.pool.for_each(pairs * w.chunks, [&](int64_t lane, int64_t item) {
    // The last rows first: under a causal mask they are the longest.
    const int64_t chunk = w.chunks - 1 - item / pairs, pair = item % pairs, b = pair / attn.heads_kv;
    double* const sums = w.sums + (pair * w.chunks + chunk) * w.group;
    std::fill_n(sums, w.group, 0.0);
    const int64_t first = chunk * w.item_queries;
    const int64_t count = std::min(queries_of(p, sequence_of(attn, b)) - first, w.item_queries);
    if (count > 0) run_item(context, p, w, w.lane(lane), b, pair % attn.heads_kv, first, count, sums);
  });
  if (p.head_entropy == nullptr) return;
  for (int64_t b = 0; b < attn.batch; ++b) {
    const int64_t queries = queries_of(p, sequence_of(attn, b));
    for (int64_t head = 0; head < attn.heads_q; ++head) {
      const int64_t pair = b * attn.heads_kv + head / w.group;
      double sum = 0;
      for (int64_t chunk = 0; chunk < w.chunks; ++chunk)
        sum += w.sums[(pair * w.chunks + chunk) * w.group + head % w.group];
      p.head_entropy[b * p.head_stride_b + head * p.head_stride_h] =
          queries == 0 ? 0.0f : static_cast<float>(sum / static_cast<double>(queries));
    }
  }
}

}  // namespace adaattn::cpu
