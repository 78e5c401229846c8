// Contexts on the devices and instruction sets under test.
#pragma once

#include <gtest/gtest.h>

#include <ostream>
#include <string>
#include <vector>

#include "adaattn/adaattn.h"
#include "support/attention_data.h"
#include "support/compare.h"

namespace adaattn::test {

// A device, on the CPU with an instruction set.
struct Target {
  std::string name;  // "avx512", "cuda"
  adaattn_device_t device = ADAATTN_DEVICE_CPU;
  adaattn_isa_t isa = ADAATTN_ISA_AUTO;
};

// Kernels with bf16 products round the weights: tensor cores, tiles, and AVX-512 where the processor has vdpbf16ps.
inline Weights weights_of(const Target& target) {
  if (target.device != ADAATTN_DEVICE_CPU) return Weights::kInputTypeOrF16;
  const bool rounds =
      target.isa == ADAATTN_ISA_AMX || target.isa == ADAATTN_ISA_AVX512 || target.isa == ADAATTN_ISA_AUTO;
  return rounds ? Weights::kInputType : Weights::kFloat;
}

inline void PrintTo(const Target& target, std::ostream* out) { *out << target.name; }

// Every target of this build's architecture, whether or not this machine has it.
const std::vector<Target>& all_targets(adaattn_device_t device);
// "" or why this machine cannot run it.
std::string missing(const Target& target);
std::vector<Target> available_targets(adaattn_device_t device);
// The available ones; where there is none, all of them, so that the tests exist and are skipped with the reason.
std::vector<Target> listed_targets(adaattn_device_t device);

std::string last_error();

class Context {
 public:
  // Throws with the library's text if the context cannot be made.
  explicit Context(const Target& target = {}, int32_t num_threads = 2);
  explicit Context(const adaattn_config_t& config);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
  adaattn_context_t* get() const { return context_; }
  adaattn_device_t device() const { return device_; }

 private:
  adaattn_context_t* context_ = nullptr;
  adaattn_device_t device_;
};

class Plan {
 public:
  Plan(const Context& context, const adaattn_attn_desc_t& desc);
  ~Plan();
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  adaattn_plan_t* get() const { return plan_; }
  size_t workspace_size() const;
  adaattn_plan_stats_t stats(uint32_t flags = ADAATTN_STATS_WAIT) const;
  adaattn_plan_info_t info() const;
  // Uploads, executes with the library's own workspace, downloads.
  adaattn_status_t execute(const AttentionData& data) const;

 private:
  adaattn_plan_t* plan_ = nullptr;
  adaattn_device_t device_;
};

// One call of adaattn_attention, with the data uploaded before and the outputs downloaded after.
adaattn_status_t attention(const Context& context, const AttentionData& data);

// EXPECT_EQ-like check of a status that prints the library's text.
testing::AssertionResult succeeded(adaattn_status_t status);

}  // namespace adaattn::test
