// Causal attention of a step over the keys and values so far, by libadaattn and by nothing else.
#pragma once

#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "adaattn/adaattn.hpp"
#include "engine/compute.h"
#include "engine/thread_pool.h"

namespace generate {

// How much error attention may have; the rest follows from the policy.
struct AttentionPolicy {
  adaattn_policy_t policy = ADAATTN_POLICY_EXACT;
  double tolerance = 0;  // per head, 0: the policy's own
};

// One layer and query head of the newest step, as the library judged and measured it.
struct HeadReport {
  int64_t layer = 0;
  adaattn_head_stats_t stats = {};
  adaattn::TileMap map;  // empty where the library keeps none, and for all sequences of a step but the last
};

// Adds up what plans report: counts, sums and times, and the largest of measured_error_max.
void add_stats(const adaattn_plan_stats_t& stats, adaattn_plan_stats_t* sum);

// Sums over layers and steps.
struct AttentionReport {
  double seconds = 0;  // of the device, in the library
  adaattn_plan_stats_t totals = {};
  std::vector<HeadReport> heads;
};

class Attention {
 public:
  // isa: on the CPU, an ADAATTN_ISA_* the processor has; AUTO takes the best. The references must outlive this object.
  Attention(const ModelConfig& config, DType dtype, adaattn_isa_t isa, const AttentionPolicy& policy, Compute& compute,
            ThreadPool& pool, CacheFormat cache = CacheFormat::kAsAttention);

  // Makes the plans of a step like this.
  void prepare(const Step& step, int64_t capacity);

  // o [rows, heads, head_dim] from q of the same shape, over the first start + seqlen keys of each sequence.
  void run(int64_t layer, const Step& step, const void* q, const KvSlot& kv, void* o);

  // The kernel and instruction set that a step like this runs.
  adaattn_plan_info_t describe(const Step& step, int64_t capacity);

  AttentionReport report() const;

 private:
  adaattn::Plan& plan_for(int64_t layer, const Step& step, int64_t capacity);

  const ModelConfig& config_;
  DType dtype_;
  CacheFormat cache_;
  AttentionPolicy policy_;
  Compute& compute_;
  adaattn::Context context_;
  // By layer, batch, seqlen and capacity. Exact plans serve every layer; adaptive ones hold what they learn of theirs.
  std::map<std::tuple<int64_t, int64_t, int64_t, int64_t>, adaattn::Plan> plans_;
  Buffer workspace_;  // of the largest of them
  size_t workspace_bytes_ = 0;
};

// The names that --policy takes.
const std::map<std::string, adaattn_policy_t>& policy_names();

// The names that --isa takes and reports have, "auto" for the library's choice.
const std::map<std::string, adaattn_isa_t>& isa_names();

}  // namespace generate
