#include "gpu/kernel_rows.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <memory>

#include "attend/select.h"
#include "backend.h"
#include "core/validate.h"
#include "runtime.h"

namespace adaattn::test {

using cuda::AttendKernel;
using cuda::Phase;

namespace {

cuda::DeviceTraits traits_for(const AttendKernel& kernel, int multiprocessors) {
  cuda::DeviceTraits traits = device_traits(multiprocessors);
  if (kernel.arch < 90) traits.compute_capability = std::min(traits.compute_capability, 89);
  return traits;
}

}  // namespace

cuda::DeviceTraits device_traits(int multiprocessors) {
  cudaDeviceProp properties{};
  require(cudaGetDeviceProperties(&properties, 0));
  cuda::DeviceTraits traits;
  traits.compute_capability = properties.major * 10 + properties.minor;
  traits.multiprocessors = multiprocessors > 0 ? multiprocessors : properties.multiProcessorCount;
  traits.l2_bytes = properties.l2CacheSize;
  traits.shared_bytes = static_cast<int64_t>(properties.sharedMemPerBlockOptin);
  return traits;
}

std::vector<const AttendKernel*> rows(std::initializer_list<Phase> phases) {
  std::vector<const AttendKernel*> list;
  for (const AttendKernel* kernel : cuda::attend_kernels())
    if ((kernel->dtype != Dtype::kE4M3 || kernel->arch < 90) &&
        std::find(phases.begin(), phases.end(), kernel->phase) != phases.end())
      list.push_back(kernel);
  return list;
}

void run_row(const AttendKernel& kernel, const AttentionCase& c, const Dtypes& dtypes, int multiprocessors) {
  SCOPED_TRACE(describe(c) + ", multiprocessors " + std::to_string(multiprocessors));
  AttentionData data(c, dtypes, run_seed(), ADAATTN_OUTPUT_LSE);
  if (kernel.phase == Phase::kTf32) data.desc.math = ADAATTN_MATH_FAST_F32;
  const Problem problem = problem_from(data.desc, Use::kAttention);
  const auto records = std::make_shared<cuda::RecordPool>();
  const auto plan = cuda::make_plan(problem, traits_for(kernel, multiprocessors), 0, records);
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
    EXPECT_TRUE(matches(data, expected, Weights::kInputTypeOrF16));
  }
  const PlanCounters counters = plan->counters(true, false);
  EXPECT_EQ(counters.query_rows, expected.query_rows);
  EXPECT_EQ(counters.score_pairs, expected.score_pairs);
}

std::vector<Dtypes> dtypes_of(const AttendKernel& kernel) {
  switch (kernel.dtype) {
    case Dtype::kF32:
      return {kF32All};
    case Dtype::kF16:
      return {kF16All};
    case Dtype::kE4M3:
      return e4m3_dtypes();
    default:
      return {kBf16All};
  }
}

void run_row(const AttendKernel& kernel, const AttentionCase& c, int multiprocessors) {
  for (const Dtypes& dtypes : dtypes_of(kernel)) {
    SCOPED_TRACE(dtypes.name);
    run_row(kernel, c, dtypes, multiprocessors);
    if (testing::Test::HasFatalFailure()) return;
  }
}

void run_alone(const AttendKernel& kernel, const AttentionCase& c, int multiprocessors, int section, int again) {
  for (const Dtypes& dtypes : dtypes_of(kernel)) {
    SCOPED_TRACE(describe(c) + ", " + dtypes.name + ", multiprocessors " + std::to_string(multiprocessors) +
                 ", section " + std::to_string(section));
    AttentionData data(c, dtypes, run_seed(), ADAATTN_OUTPUT_LSE);
    const Problem problem = problem_from(data.desc, Use::kAttention);
    cuda::prepare_kernel(kernel);
    data.poison_outputs();
    data.upload(ADAATTN_DEVICE_CUDA);
    const adaattn_io_t io = data.io(ADAATTN_DEVICE_CUDA);
    const AttnParams params = attention_from(problem, io, {ADAATTN_DEVICE_CUDA, 0, nullptr}, {});
    cuda::Launch launch{.kernel = &kernel, .section = section};
    launch.m_tiles = static_cast<int32_t>((params.seqlen_q + kernel.tile_q - 1) / kernel.tile_q);
    cuda::AttendArgs args = cuda::make_args(params, problem, launch, nullptr);
    const DeviceMemory counters(2 * sizeof(uint32_t));
    require(cudaMemset(counters.data(), 0, counters.bytes()));
    args.scheduler = static_cast<uint32_t*>(counters.data());
    args.multiprocessors = multiprocessors;
    require(kernel.launch(args, nullptr));
    require(cudaDeviceSynchronize());
    data.download(ADAATTN_DEVICE_CUDA);
    EXPECT_TRUE(matches(data, reference::attention(data.desc, data.io()), Weights::kInputTypeOrF16));
    uint32_t left[2] = {1, 1};
    require(cudaMemcpy(left, counters.data(), sizeof left, cudaMemcpyDefault));
    EXPECT_EQ(left[0], 0u);
    EXPECT_EQ(left[1], 0u);
    if (testing::Test::HasFailure()) return;
    const std::vector<double> o = data.o.values(), lse = data.lse.values();
    for (int i = 1; i <= again; ++i) {
      args.section = 1 + (section + i) % static_cast<int>(c.batch * c.heads_q);
      data.poison_outputs();
      data.o.upload(ADAATTN_DEVICE_CUDA, 0);
      data.lse.upload(ADAATTN_DEVICE_CUDA, 0);
      require(kernel.launch(args, nullptr));
      require(cudaDeviceSynchronize());
      data.download(ADAATTN_DEVICE_CUDA);
      ASSERT_EQ(data.o.values(), o) << "launch " << i;
      ASSERT_EQ(data.lse.values(), lse) << "launch " << i;
    }
  }
}

}  // namespace adaattn::test
