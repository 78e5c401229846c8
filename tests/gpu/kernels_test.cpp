// Every row of kernels/instances.def, forced and seen to have run, against the oracle.
#include <cuda_runtime_api.h>

#include <algorithm>

#include "attend/plan.h"
#include "attend/select.h"
#include "attention/fixture.h"
#include "backend.h"
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

// A device like this one on which the kernel is the first choice; multiprocessors 0: as many as this one has.
cuda::DeviceTraits traits_for(const AttendKernel& kernel, int multiprocessors) {
  cudaDeviceProp properties{};
  require(cudaGetDeviceProperties(&properties, 0));
  cuda::DeviceTraits traits;
  const int actual = properties.major * 10 + properties.minor;
  traits.compute_capability = kernel.arch < 90 ? std::min(actual, 89) : actual;
  traits.multiprocessors = multiprocessors > 0 ? multiprocessors : properties.multiProcessorCount;
  traits.l2_bytes = properties.l2CacheSize;
  traits.shared_bytes = static_cast<int64_t>(properties.sharedMemPerBlockOptin);
  return traits;
}

AttentionCase case_for(const AttendKernel& kernel, bool ragged, bool causal) {
  const std::string name = kernel.name;
  const auto has = [&](const char* word) { return name.find(word) != std::string::npos; };
  AttentionCase c = {.name = "Row", .batch = 2, .heads_q = 4, .heads_kv = 2, .seqlen_q = 200, .seqlen_k = 333};
  const int less = kernel.dtype == Dtype::kE4M3 ? 16 : 8;  // rows still start on 16 bytes
  c.d_qk = kernel.d_qk - (ragged ? less : 0);
  c.d_v = kernel.d_v - (ragged ? less : 0);
  if (causal) c.mask = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT;
  if (has("_softcap")) c.softcap = 20;
  if (kernel.phase == Phase::kDecode) c.seqlen_q = 3;
  if (has("_split")) c.seqlen_q = 37, c.seqlen_k = 2100;
  if (has("_extras") && kernel.dtype != Dtype::kF32) {
    c.flags = ADAATTN_FLAG_ALIBI;
    c.softcap = 20;
  }
  if (has("_paged")) {
    c.layout_kv = ADAATTN_LAYOUT_PAGED;
    c.page_size = 16;
    c.used_k = {static_cast<int32_t>(c.seqlen_k), 150};
  }
  return c;
}

bool has_plain_instance(const AttendKernel& kernel) {
  for (const AttendKernel* other : cuda::attend_kernels())
    if (other->arch == kernel.arch && other->phase == kernel.phase && other->dtype == kernel.dtype &&
        other->d_qk == kernel.d_qk && other->d_v == kernel.d_v && (other->features & cuda::kMasked) == 0)
      return true;
  return false;
}

void run_row(const AttendKernel& kernel, const AttentionCase& c, const Dtypes& dtypes, int multiprocessors = 0) {
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

void run_row(const AttendKernel& kernel, const AttentionCase& c, int multiprocessors = 0) {
  for (const Dtypes& dtypes : dtypes_of(kernel)) {
    SCOPED_TRACE(dtypes.name);
    run_row(kernel, c, dtypes, multiprocessors);
    if (testing::Test::HasFatalFailure()) return;
  }
}

TEST_P(EveryKernel, AgreesWithTheOracle) {
  const AttendKernel& kernel = *GetParam();
  for (const bool causal : {false, true}) {
    if (causal && (kernel.features & cuda::kMasked) == 0) continue;
    // Without a mask a plain instance of the same shape is the better choice where keys are not split.
    if (!causal && kernel.arch == 90 && (kernel.features & cuda::kMasked) != 0 &&
        (kernel.features & cuda::kSplit) == 0 && has_plain_instance(kernel))
      continue;
    run_row(kernel, case_for(kernel, false, causal));
    if ((kernel.features & cuda::kRagged) != 0 && !testing::Test::HasFatalFailure())
      run_row(kernel, case_for(kernel, true, causal));
  }
}

class DecodeKernel : public EveryKernel {};

// Few parts are joined by the last CTA of their tile, many by a grid of their own.
TEST_P(DecodeKernel, JoinsSplitKeysEitherWay) {
  const AttendKernel& kernel = *GetParam();
  AttentionCase c = case_for(kernel, false, true);
  c.batch = 3;
  if (!c.used_k.empty()) c.used_k = {333, 150, 7};
  for (const int multiprocessors : {13, 48, 1000}) run_row(kernel, c, multiprocessors);
}

// Runs of keys within a page, keys of their own pages, and blocks cut off by a window or by the end of a sequence.
TEST_P(DecodeKernel, ReadsPagesOfAnySize) {
  const AttendKernel& kernel = *GetParam();
  int round = 0;
  for (const int page_size : {1, 16, 8, 17, 48, 64, 256}) {
    AttentionCase c = case_for(kernel, round == 1, true);
    c.batch = 3;
    c.layout_kv = ADAATTN_LAYOUT_PAGED;
    c.page_size = page_size;
    c.used_k = {333, 197, 5};
    if (round % 2 == 0) c.window_left = 101;
    run_row(kernel, c, round % 3 == 0 ? 13 : 0);
    if (HasFatalFailure()) return;
    ++round;
  }
}

// Prefill from 8-bit caches is half as fast: decode takes drafts of several tiles of rows too.
class EightBitDecodeKernel : public EveryKernel {};

TEST_P(EightBitDecodeKernel, TakesUpTo64Rows) {
  const AttendKernel& kernel = *GetParam();
  for (const Dtypes& dtypes : dtypes_of(kernel)) {
    if (dtypes.q == ADAATTN_DTYPE_E4M3) continue;
    for (const int64_t seqlen_q : {9, 16, 32}) {
      AttentionCase c = case_for(kernel, false, true);
      c.seqlen_q = seqlen_q;
      for (const int multiprocessors : {13, 48, 1000}) run_row(kernel, c, dtypes, multiprocessors);
      if (HasFatalFailure()) return;
    }
  }
}

// Hopper kernels that split keys and put the heads of a group into the rows of one tile.
class SplitKernels : public EveryKernel {};

std::vector<AttentionCase> split_cases() {
  const auto causal = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT;
  return {
      {.name = "EightHeads", .heads_q = 8, .heads_kv = 1, .seqlen_q = 37, .seqlen_k = 3000, .mask = causal},
      {.name = "Sinks", .heads_q = 16, .heads_kv = 2, .seqlen_q = 5, .seqlen_k = 5000, .flags = ADAATTN_FLAG_SINK},
      {.name = "PackedAlone",
       .batch = 40,
       .heads_q = 8,
       .heads_kv = 2,
       .seqlen_q = 20,
       .seqlen_k = 300,
       .mask = causal},
      {.name = "PackedWithSinks",
       .batch = 40,
       .heads_q = 8,
       .heads_kv = 2,
       .seqlen_q = 33,
       .seqlen_k = 200,
       .mask = causal,
       .flags = ADAATTN_FLAG_SINK},
      {.name = "Window",
       .heads_q = 4,
       .heads_kv = 1,
       .seqlen_q = 64,
       .seqlen_k = 4096,
       .window_left = 100,
       .window_right = 3},
      {.name = "GroupOfThree", .heads_q = 3, .heads_kv = 1, .seqlen_q = 100, .seqlen_k = 2500, .mask = causal},
      {.name = "OneHead", .heads_q = 1, .heads_kv = 1, .seqlen_q = 129, .seqlen_k = 2100},
      {.name = "GroupOf64", .heads_q = 64, .heads_kv = 1, .seqlen_q = 9, .seqlen_k = 2049, .mask = causal},
      {.name = "UsedKeys",
       .batch = 2,
       .heads_q = 4,
       .heads_kv = 2,
       .seqlen_q = 50,
       .seqlen_k = 3000,
       .mask = causal,
       .used_k = {2999, 40}},
      {.name = "Lengths",
       .batch = 4,
       .heads_q = 8,
       .heads_kv = 2,
       .layout_q = ADAATTN_LAYOUT_THD,
       .layout_kv = ADAATTN_LAYOUT_THD,
       .mask = causal,
       .lens_q = {30, 7, 0, 65},
       .lens_k = {2500, 100, 50, 0}},
  };
}

// The same keys in pages, short of the left side of a window: keys before it may be in no page any more.
AttentionCase in_pages(AttentionCase c, int64_t page_size) {
  c.layout_kv = ADAATTN_LAYOUT_PAGED;
  c.page_size = page_size;
  c.window_left = -1;
  if (!c.lens_k.empty()) c.seqlen_k = *std::max_element(c.lens_k.begin(), c.lens_k.end());
  if (c.used_k.empty()) c.used_k = c.lens_k;
  c.lens_k.clear();
  if (c.used_k.empty()) c.used_k.assign(static_cast<size_t>(c.batch), static_cast<int32_t>(c.seqlen_k));
  return c;
}

TEST_P(SplitKernels, AgreeWithTheOracleOnPartsAndGroups) {
  const bool paged = (GetParam()->features & cuda::kPaged) != 0;
  constexpr int64_t kPageSizes[] = {16, 48, 64, 256};
  size_t round = 0;
  for (AttentionCase c : split_cases()) {
    c.d_qk = GetParam()->d_qk;
    c.d_v = GetParam()->d_v;
    run_row(*GetParam(), paged ? in_pages(c, kPageSizes[round++ % std::size(kPageSizes)]) : c);
    if (testing::Test::HasFatalFailure()) return;
  }
}

class MaskedHopperKernels : public EveryKernel {};

// Tiles of 128 and 192 rows whose last warpgroups have no rows, see fewer blocks than the others or none at all, and
// several tiles for each CTA.
std::vector<AttentionCase> edge_cases() {
  AttentionCase c = {.name = "Edge", .batch = 2, .heads_q = 3, .heads_kv = 3};
  c.mask = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT;
  std::vector<AttentionCase> cases;
  for (const auto& [seqlen_q, seqlen_k, window_left] : std::initializer_list<std::array<int64_t, 3>>{
           {450, 450, -1}, {450, 130, -1}, {193, 64, -1}, {200, 1000, -1}, {700, 700, 100}, {385, 385, 0}}) {
    c.seqlen_q = seqlen_q;
    c.seqlen_k = seqlen_k;
    c.window_left = window_left;
    cases.push_back(c);
  }
  c.layout_q = c.layout_kv = ADAATTN_LAYOUT_THD;
  c.batch = 5;
  c.window_left = -1;
  c.lens_q = {450, 0, 7, 200, 129};
  c.lens_k = {450, 10, 0, 100, 400};
  cases.push_back(c);
  return cases;
}

TEST_P(MaskedHopperKernels, AgreeWithTheOracleAtTheEdgesOfTheirTiles) {
  for (AttentionCase c : edge_cases()) {
    c.d_qk = GetParam()->d_qk;
    c.d_v = GetParam()->d_v;
    if ((GetParam()->features & cuda::kSoftcap) != 0) c.softcap = 20;
    run_row(*GetParam(), c, 3);
    if (testing::Test::HasFatalFailure()) return;
  }
}

class PersistentKernels : public OnTheDevice {};

// Two launches of one plan at a time.
void overlap(const AttentionCase& c) {
  AttentionData one(c, kBf16All, run_seed(), 0), two(c, kBf16All, run_seed() + 1, 0);
  const Problem problem = problem_from(one.desc, Use::kAttention);
  const auto backend = make_cuda_backend({});
  const auto plan = backend->make_plan(problem);
  const DeviceMemory first_space(plan->info().workspace_bytes), second_space(plan->info().workspace_bytes);
  const Stream first, second;
  const auto run = [&](const AttentionData& data, const DeviceMemory& workspace, const Stream& stream) {
    const AttnParams params =
        attention_from(problem, data.io(ADAATTN_DEVICE_CUDA), {ADAATTN_DEVICE_CUDA, 0, nullptr}, {});
    plan->execute(params, workspace.data(), workspace.bytes(), stream.get());
  };
  const auto outputs = [&] {
    one.download(ADAATTN_DEVICE_CUDA);
    two.download(ADAATTN_DEVICE_CUDA);
    return std::pair(one.o.values(), two.o.values());
  };
  const auto upload = [&] {
    one.poison_outputs();
    two.poison_outputs();
    one.upload(ADAATTN_DEVICE_CUDA);
    two.upload(ADAATTN_DEVICE_CUDA);
  };
  upload();
  run(one, first_space, first);
  first.wait();
  run(two, second_space, second);
  second.wait();
  const auto alone = outputs();
  upload();
  for (int i = 0; i < 30; ++i) {
    run(one, first_space, first);
    run(two, second_space, second);
  }
  first.wait();
  second.wait();
  EXPECT_EQ(outputs(), alone);
}

// Tile counters belong to a launch: more tiles than SMs.
TEST_F(PersistentKernels, LaunchesOfOnePlanMayOverlapOnTwoStreams) {
  AttentionCase c = {.name = "Overlap", .batch = 2, .heads_q = 16, .heads_kv = 16, .seqlen_q = 1024, .seqlen_k = 1024};
  c.d_qk = c.d_v = 128;
  c.mask = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT;
  overlap(c);
}

// Arrival counters belong to a launch too.
TEST_F(PersistentKernels, DecodeOfOnePlanMayOverlapOnTwoStreams) {
  AttentionCase c = {.name = "Overlap", .batch = 1, .heads_q = 32, .heads_kv = 8, .seqlen_q = 1, .seqlen_k = 4096};
  c.d_qk = c.d_v = 128;
  overlap(c);
}

TEST(Sections, DivideThePairsEvenly) {
  EXPECT_EQ(cuda::even_section(128, 25, 1), 16);
  EXPECT_EQ(cuda::even_section(16, 3, 1), 2);
  EXPECT_EQ(cuda::even_section(17, 6, 1), 6);  // 6, 6, 5
  EXPECT_EQ(cuda::even_section(64, 50, 8), 32);
  EXPECT_EQ(cuda::even_section(64, 3, 8), 2);  // a group does not fit
  EXPECT_EQ(cuda::even_section(5, 100, 1), 5);
  EXPECT_EQ(cuda::even_section(1, 0, 1), 1);
}

std::vector<const AttendKernel*> rows(std::initializer_list<Phase> phases) {
  std::vector<const AttendKernel*> list;
  for (const AttendKernel* kernel : cuda::attend_kernels())
    if ((kernel->dtype != Dtype::kE4M3 || kernel->arch < 90) &&
        std::find(phases.begin(), phases.end(), kernel->phase) != phases.end())
      list.push_back(kernel);
  return list;
}

std::vector<const AttendKernel*> split_rows() {
  std::vector<const AttendKernel*> list = rows({Phase::kForward});
  std::erase_if(
      list, [](const AttendKernel* kernel) { return kernel->arch != 90 || (kernel->features & cuda::kSplit) == 0; });
  return list;
}

std::vector<const AttendKernel*> masked_hopper_rows() {
  std::vector<const AttendKernel*> list = rows({Phase::kForward});
  std::erase_if(list, [](const AttendKernel* kernel) {
    return kernel->arch != 90 || (kernel->features & cuda::kMasked) == 0 || (kernel->features & cuda::kSplit) != 0;
  });
  return list;
}

std::vector<const AttendKernel*> eight_bit_decode_rows() {
  std::vector<const AttendKernel*> list = rows({Phase::kDecode});
  std::erase_if(list, [](const AttendKernel* kernel) { return kernel->dtype != Dtype::kE4M3; });
  return list;
}

std::string name_of(const testing::TestParamInfo<const AttendKernel*>& info) { return info.param->name; }

// No exact plan runs the phases that are not listed. Hopper kernels with products in E4M3 are run by E4m3.*, with the
// error that 8 bits allow.
INSTANTIATE_TEST_SUITE_P(Table, EveryKernel,
                         testing::ValuesIn(rows({Phase::kForward, Phase::kDecode, Phase::kExactF32, Phase::kTf32})),
                         name_of);
INSTANTIATE_TEST_SUITE_P(Table, DecodeKernel, testing::ValuesIn(rows({Phase::kDecode})), name_of);
INSTANTIATE_TEST_SUITE_P(Table, MaskedHopperKernels, testing::ValuesIn(masked_hopper_rows()), name_of);
INSTANTIATE_TEST_SUITE_P(Table, EightBitDecodeKernel, testing::ValuesIn(eight_bit_decode_rows()), name_of);
INSTANTIATE_TEST_SUITE_P(Table, SplitKernels, testing::ValuesIn(split_rows()), name_of);

}  // namespace
}  // namespace adaattn::test
