// Causal attention of a step over the keys and values so far, by libadaattn and by nothing else.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "adaattn/adaattn.h"
#include "engine/compute.h"
#include "engine/thread_pool.h"

namespace generate {

class Attention {
 public:
  // isa: an ADAATTN_ISA_* the processor has; AUTO takes the best. config and pool must outlive this object.
  Attention(const ModelConfig& config, DType dtype, adaattn_isa_t isa, ThreadPool& pool);
  ~Attention();
  Attention(const Attention&) = delete;
  Attention& operator=(const Attention&) = delete;

  // o [rows, heads, head_dim] from q of the same shape, over the first start + seqlen keys of each sequence.
  void run(const Step& step, const void* q, const KvSlot& kv, void* o);

  // The kernel and instruction set that a step like this runs.
  adaattn_plan_info_t describe(const Step& step, int64_t capacity);

 private:
  struct ContextDeleter {
    void operator()(adaattn_context_t* context) const;
  };
  struct PlanDeleter {
    void operator()(adaattn_plan_t* plan) const;
  };
  using Plan = std::unique_ptr<adaattn_plan_t, PlanDeleter>;

  adaattn_plan_t* plan_for(const Step& step, int64_t capacity);

  const ModelConfig& config_;
  DType dtype_;
  std::unique_ptr<adaattn_context_t, ContextDeleter> context_;
  std::map<std::tuple<int64_t, int64_t, int64_t>, Plan> plans_;  // by batch, seqlen and capacity
  std::vector<std::byte> workspace_;
};

// The name of an instruction set as --isa and reports spell it, and back; 0 is "auto". Throws on another name.
const std::map<std::string, adaattn_isa_t>& isa_names();

}  // namespace generate
