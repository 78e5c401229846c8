// Every row of kernels/instances.def, forced and seen to have run, against the oracle.
#include <cuda_runtime_api.h>

#include "attend/plan.h"
#include "attention/fixture.h"
#include "core/validate.h"
#include "gpu/device.h"
#include "runtime.h"

namespace adaattn::test {
namespace {

using cuda::AttendKernel;
using cuda::Phase;

class EveryKernel : public testing::TestWithParam<const AttendKernel*> {
 protected:
  void SetUp() override {
    if (const std::string reason = missing(kCuda); !reason.empty()) GTEST_SKIP() << reason;
  }
};

// A device like this one on which the kernel is the first choice.
cuda::DeviceTraits traits_for(const AttendKernel& kernel) {
  cudaDeviceProp properties{};
  require(cudaGetDeviceProperties(&properties, 0));
  cuda::DeviceTraits traits;
  const int actual = properties.major * 10 + properties.minor;
  traits.compute_capability = kernel.arch < 90 ? std::min(actual, 89) : actual;
  traits.multiprocessors = properties.multiProcessorCount;
  traits.l2_bytes = properties.l2CacheSize;
  traits.shared_bytes = static_cast<int64_t>(properties.sharedMemPerBlockOptin);
  return traits;
}

AttentionCase case_for(const AttendKernel& kernel, bool ragged, bool causal) {
  const std::string name = kernel.name;
  const auto has = [&](const char* word) { return name.find(word) != std::string::npos; };
  AttentionCase c = {.name = "Row", .batch = 2, .heads_q = 4, .heads_kv = 2, .seqlen_q = 200, .seqlen_k = 333};
  c.d_qk = kernel.d_qk - (ragged ? 8 : 0);
  c.d_v = kernel.d_v - (ragged ? 8 : 0);
  if (causal) c.mask = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT;
  if (has("_softcap")) c.softcap = 20;
  if (kernel.phase == Phase::kDecode) c.seqlen_q = 3;
  if (has("_extras") && kernel.dtype != Dtype::kF32) {
    c.flags = ADAATTN_FLAG_ALIBI;
    c.softcap = 20;
  }
  if (has("_paged")) {
    c.layout_kv = ADAATTN_LAYOUT_PAGED;
    c.page_size = 16;
    c.used_k = {333, 150};
  }
  return c;
}

void run_row(const AttendKernel& kernel, const AttentionCase& c) {
  SCOPED_TRACE(describe(c));
  const Dtypes dtypes = kernel.dtype == Dtype::kF32 ? kF32All : kernel.dtype == Dtype::kF16 ? kF16All : kBf16All;
  AttentionData data(c, dtypes, run_seed(), ADAATTN_OUTPUT_LSE);
  if (kernel.phase == Phase::kTf32) data.desc.math = ADAATTN_MATH_FAST_F32;
  const Problem problem = problem_from(data.desc, Use::kAttention);
  const auto records = std::make_shared<cuda::RecordPool>();
  const auto plan = cuda::make_plan(problem, traits_for(kernel), 0, records);
  ASSERT_EQ(plan->info().kernel, kernel.name);
  const DeviceMemory workspace(plan->info().workspace_bytes);
  data.upload(ADAATTN_DEVICE_CUDA);
  const adaattn_io_t io = data.io(ADAATTN_DEVICE_CUDA);
  const AttnParams params = attention_from(problem, io, {ADAATTN_DEVICE_CUDA, 0, nullptr}, {});
  plan->execute(params, workspace.data(), workspace.bytes(), nullptr);
  data.download(ADAATTN_DEVICE_CUDA);
  const auto expected = reference::attention(data.desc, data.io());
  if (kernel.phase == Phase::kTf32) {
    EXPECT_TRUE(matches(data, expected, {2e-3, 5e-3, 5e-3}));
  } else {
    EXPECT_TRUE(matches(data, expected));
  }
  const PlanCounters counters = plan->counters(true, false);
  EXPECT_EQ(counters.query_rows, expected.query_rows);
  EXPECT_EQ(counters.score_pairs, expected.score_pairs);
}

TEST_P(EveryKernel, AgreesWithTheOracle) {
  const AttendKernel& kernel = *GetParam();
  for (const bool causal : {false, true}) {
    if (causal && (kernel.features & cuda::kMasked) == 0) continue;
    // Without a mask a plain instance of the same shape is the better choice.
    if (!causal && kernel.arch == 90 && (kernel.features & cuda::kMasked) != 0 && kernel.d_qk % 96 != 0) continue;
    run_row(kernel, case_for(kernel, false, causal));
    if ((kernel.features & cuda::kRagged) != 0 && !testing::Test::HasFatalFailure())
      run_row(kernel, case_for(kernel, true, causal));
  }
}

std::vector<const AttendKernel*> rows() {
  std::vector<const AttendKernel*> list;
  for (const AttendKernel* kernel : cuda::attend_kernels())
    if (kernel->phase != Phase::kEntropy) list.push_back(kernel);  // no plan runs those
  return list;
}

INSTANTIATE_TEST_SUITE_P(Table, EveryKernel, testing::ValuesIn(rows()),
                         [](const auto& info) { return std::string(info.param->name); });

}  // namespace
}  // namespace adaattn::test
