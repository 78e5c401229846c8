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

class Attention {
 public:
  // isa: an ADAATTN_ISA_* the processor has; AUTO takes the best. config and pool must outlive this object.
  Attention(const ModelConfig& config, DType dtype, adaattn_isa_t isa, ThreadPool& pool);

  // o [rows, heads, head_dim] from q of the same shape, over the first start + seqlen keys of each sequence.
  void run(const Step& step, const void* q, const KvSlot& kv, void* o);

  // The kernel and instruction set that a step like this runs.
  adaattn_plan_info_t describe(const Step& step, int64_t capacity);

 private:
  adaattn::Plan& plan_for(const Step& step, int64_t capacity);

  const ModelConfig& config_;
  DType dtype_;
  adaattn::Context context_;
  std::map<std::tuple<int64_t, int64_t, int64_t>, adaattn::Plan> plans_;  // by batch, seqlen and capacity
  std::vector<std::byte> workspace_;                                      // of the largest of them
};

// The names that --isa takes and reports have, "auto" for the library's choice.
const std::map<std::string, adaattn_isa_t>& isa_names();

}  // namespace generate
