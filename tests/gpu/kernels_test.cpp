// Every row of kernels/instances.def, and what several calls of one plan share.
#include <algorithm>

#include "attend/select.h"
#include "attend/tall_features.h"
#include "backend.h"
#include "core/validate.h"
#include "gpu/kernel_rows.h"

namespace adaattn::test {
namespace {

using cuda::AttendKernel;
using cuda::Phase;

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
  if (has("_tall")) c.seqlen_q = 400, c.seqlen_k = 600;
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

TEST_P(EveryKernel, AgreesWithTheOracle) {
  const AttendKernel& kernel = *GetParam();
  for (const bool causal : {false, true}) {
    if (causal && (kernel.features & cuda::kMasked) == 0) continue;
    // Without a mask a plain instance of the same shape is the better choice where keys are not split.
    if (!causal && kernel.arch == 90 && (kernel.features & cuda::kMasked) != 0 &&
        (kernel.features & cuda::kSplit) == 0 && has_plain_instance(kernel))
      continue;
    const int multiprocessors = (kernel.features & cuda::kTall) != 0 ? 8 : 0;  // of many tiles
    run_row(kernel, case_for(kernel, false, causal), multiprocessors);
    if ((kernel.features & cuda::kRagged) != 0 && !testing::Test::HasFatalFailure())
      run_row(kernel, case_for(kernel, true, causal), multiprocessors);
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

class PersistentKernels : public OnTheDevice {};

// Two launches of one plan at a time.
void overlap(const AttentionCase& c, const Dtypes& dtypes = kBf16All) {
  AttentionData one(c, dtypes, run_seed(), 0), two(c, dtypes, run_seed() + 1, 0);
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

// And those of tiles in two parts.
TEST_F(PersistentKernels, TilesInPartsOfOnePlanMayOverlapOnTwoStreams) {
  AttentionCase c = {.name = "Overlap", .batch = 1, .heads_q = 140, .heads_kv = 4, .seqlen_q = 40, .seqlen_k = 2100};
  c.d_qk = c.d_v = 128;
  overlap(c, {"e4m3", ADAATTN_DTYPE_E4M3, ADAATTN_DTYPE_E4M3, ADAATTN_DTYPE_BF16});
}

std::vector<const AttendKernel*> eight_bit_decode_rows() {
  std::vector<const AttendKernel*> list = rows({Phase::kDecode});
  std::erase_if(list, [](const AttendKernel* kernel) { return kernel->dtype != Dtype::kE4M3; });
  return list;
}

// No exact plan runs the phases that are not listed.
INSTANTIATE_TEST_SUITE_P(Table, EveryKernel,
                         testing::ValuesIn(rows({Phase::kForward, Phase::kDecode, Phase::kExactF32, Phase::kTf32})),
                         kernel_name);
INSTANTIATE_TEST_SUITE_P(Table, DecodeKernel, testing::ValuesIn(rows({Phase::kDecode})), kernel_name);
INSTANTIATE_TEST_SUITE_P(Table, EightBitDecodeKernel, testing::ValuesIn(eight_bit_decode_rows()), kernel_name);

}  // namespace
}  // namespace adaattn::test
