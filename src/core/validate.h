// From the C structs, current version, to the numbers the back-ends read. Every function throws Error naming the field
// as the caller wrote it, the value and what would be accepted. Nothing here reads tensor memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "adaattn/adaattn.h"
#include "core/problem.h"
#include "core/tool_params.h"

namespace adaattn {

class Backend;

// The device that every tensor of a call has to be on.
struct DeviceScope {
  adaattn_device_t device = ADAATTN_DEVICE_CPU;
  int32_t device_id = 0;
  const Backend* pointer_check = nullptr;  // null: pointers are trusted
};

// The caller's workspace, checked for overlap like an output; data null: none.
struct Workspace {
  const void* data = nullptr;
  size_t bytes = 0;
};

const char* device_name(adaattn_device_t device);
void check_device(adaattn_device_t device, const char* field);

// What a descriptor is used for: the entropy tool has no v, o and lse, and calls the descriptor attn.
enum class Use { kAttention, kEntropy };

// Windows that hide nothing at the maxima become open, so that equal problems compare equal.
Problem problem_from(const adaattn_attn_desc_t& desc, Use use);

// In the result the stride of a dimension of extent 1 is 0 (the caller's may be anything).
AttnParams attention_from(const Problem& problem, const adaattn_io_t& io, const DeviceScope& scope,
                          const Workspace& workspace);

MergeParams merge_from(const adaattn_tensor_t& o_a, const adaattn_tensor_t& lse_a, const adaattn_tensor_t& o_b,
                       const adaattn_tensor_t& lse_b, const adaattn_tensor_t& o, const adaattn_tensor_t* lse,
                       const DeviceScope& scope);

// Mode and sampling only: what a workspace query knows.
EntropyParams entropy_from(const adaattn_entropy_desc_t& desc);
EntropyParams entropy_from(const Problem& problem, const adaattn_entropy_desc_t& desc, const adaattn_io_t& io,
                           const adaattn_tensor_t* head_entropy, const DeviceScope& scope, const Workspace& workspace);

// The shapes alone, for a workspace query; data pointers are null.
LowRankParams low_rank_from(const adaattn_low_rank_desc_t& desc);
LowRankParams low_rank_from(const adaattn_low_rank_desc_t& desc, const adaattn_tensor_t& a, const adaattn_tensor_t* u,
                            const adaattn_tensor_t& s, const adaattn_tensor_t* v, const DeviceScope& scope,
                            const Workspace& workspace);

ProjectParams project_from(const adaattn_tensor_t& a, const adaattn_tensor_t& basis, const adaattn_tensor_t* mean,
                           const adaattn_tensor_t* y, const adaattn_tensor_t* row_residual,
                           const adaattn_tensor_t* residual, const DeviceScope& scope);

EffectiveRankParams effective_rank_from(const adaattn_tensor_t& a);
EffectiveRankParams effective_rank_from(const adaattn_tensor_t& a, double threshold, const adaattn_tensor_t& ranks,
                                        const adaattn_tensor_t* singular_values, const DeviceScope& scope,
                                        const Workspace& workspace);

SpectralNormParams spectral_norm_from(const adaattn_tensor_t& a);
SpectralNormParams spectral_norm_from(const adaattn_tensor_t& a, double tolerance, int64_t max_iterations,
                                      uint64_t seed, const adaattn_tensor_t& norms, const DeviceScope& scope,
                                      const Workspace& workspace);

}  // namespace adaattn
