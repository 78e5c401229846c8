// What the attention tests have in common. The device is a property of the executable: each is built once per back-end
// with ADAATTN_TEST_DEVICE set.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "reference/attention.h"
#include "support/attention_data.h"
#include "support/cases.h"
#include "support/compare.h"
#include "support/context.h"
#include "support/random.h"

#ifndef ADAATTN_TEST_DEVICE
#define ADAATTN_TEST_DEVICE ADAATTN_DEVICE_CPU
#endif

namespace adaattn::test {

inline constexpr adaattn_device_t kDevice = ADAATTN_TEST_DEVICE;
inline constexpr bool kOnCpu = kDevice == ADAATTN_DEVICE_CPU;

// A test for each target of this machine; what the machine lacks is reported by ForcedIsa.
class OnEveryTarget : public testing::TestWithParam<Target> {
 protected:
  void SetUp() override {
    if (const std::string reason = missing(target()); !reason.empty()) GTEST_SKIP() << reason;
  }
  const Target& target() const { return GetParam(); }
};

inline std::string target_name(const testing::TestParamInfo<Target>& info) { return info.param.name; }

#define ADAATTN_ON_EVERY_TARGET(suite)                                                                              \
  INSTANTIATE_TEST_SUITE_P(On, suite, testing::ValuesIn(::adaattn::test::listed_targets(::adaattn::test::kDevice)), \
                           ::adaattn::test::target_name)

// "" or why a device other than the CPU, which serves everything, refuses the problem.
inline std::string unsupported(const Context& context, const adaattn_attn_desc_t& desc) {
  if (context.device() == ADAATTN_DEVICE_CPU) return "";
  char reason[256] = {};
  const adaattn_status_t status = adaattn_check_support(context.get(), &desc, nullptr, reason, sizeof reason);
  return status == ADAATTN_ERROR_NOT_SUPPORTED ? reason : "";
}

// Outputs of one adaattn_attention() call, or a failure recorded.
inline void run(const Context& context, AttentionData& data) {
  data.poison_outputs();
  ASSERT_TRUE(succeeded(attention(context, data))) << "attention";
}

// A copy with memory of its own for the outputs.
inline AttentionData with_own_outputs(const AttentionData& data) {
  AttentionData copy = data;
  const auto fresh = [](const Tensor& t) { return t.present() ? Tensor(t.dtype(), t.shape()) : t; };
  copy.o = fresh(data.o);
  copy.lse = fresh(data.lse);
  copy.entropy = fresh(data.entropy);
  copy.poison_outputs();
  return copy;
}

inline testing::AssertionResult same_outputs(const AttentionData& a, const AttentionData& b) {
  if (auto o = same_bits(a.o, b.o); !o) return o << " (o)";
  if (a.lse.present() && b.lse.present())
    if (auto lse = same_bits(a.lse, b.lse); !lse) return lse << " (lse)";
  if (a.entropy.present() && b.entropy.present())
    if (auto entropy = same_bits(a.entropy, b.entropy); !entropy) return entropy << " (entropy)";
  return testing::AssertionSuccess();
}

inline const Dtypes kF32All = {"f32", ADAATTN_DTYPE_F32, ADAATTN_DTYPE_F32, ADAATTN_DTYPE_F32};
inline const Dtypes kBf16All = {"bf16", ADAATTN_DTYPE_BF16, ADAATTN_DTYPE_BF16, ADAATTN_DTYPE_BF16};
inline const Dtypes kF16All = {"f16", ADAATTN_DTYPE_F16, ADAATTN_DTYPE_F16, ADAATTN_DTYPE_F16};

// A prefill and a decode shape for invariants: each goes through a kernel of its own.
inline std::vector<AttentionCase> invariant_cases() {
  return {{.name = "Prefill", .batch = 2, .heads_q = 4, .heads_kv = 2, .seqlen_q = 150, .seqlen_k = 210, .d_qk = 40},
          {.name = "Decode", .batch = 2, .heads_q = 8, .heads_kv = 2, .seqlen_q = 1, .seqlen_k = 300, .d_qk = 64}};
}

}  // namespace adaattn::test
