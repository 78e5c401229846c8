// Hopper forward kernels at the edges of their tiles, with split keys and grouped heads, against the oracle.
#include <algorithm>

#include "attend/tall_features.h"
#include "gpu/kernel_rows.h"

namespace adaattn::test {
namespace {

using cuda::AttendKernel;
using cuda::Phase;

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
class PlainHopperKernels : public EveryKernel {};

AttentionCase with_lengths(AttentionCase c, std::vector<int32_t> lens_q, std::vector<int32_t> lens_k) {
  c.layout_q = c.layout_kv = ADAATTN_LAYOUT_THD;
  c.batch = static_cast<int64_t>(lens_q.size());
  c.lens_q = std::move(lens_q);
  c.lens_k = std::move(lens_k);
  return c;
}

AttentionCase edge_case() { return {.name = "Edge", .batch = 2, .heads_q = 3, .heads_kv = 3}; }

// Tiles of 128 and 192 rows whose last warpgroups have no rows, see fewer blocks than the others or none at all, and
// several tiles for each CTA; both alignments, windows of each side, a single row or key, sinks and groups, and scores
// so far apart that one key has all the weight.
std::vector<AttentionCase> masked_edge_cases() {
  constexpr auto kNone = ADAATTN_MASK_NONE, kBottomRight = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT,
                 kTopLeft = ADAATTN_MASK_CAUSAL_TOP_LEFT;
  std::vector<AttentionCase> cases;
  struct Edge {
    adaattn_mask_t mask;
    int64_t seqlen_q, seqlen_k, window_left = -1, window_right = -1;
  };
  for (const Edge& edge : std::initializer_list<Edge>{{kBottomRight, 450, 450},
                                                      {kBottomRight, 450, 130},
                                                      {kBottomRight, 193, 64},
                                                      {kBottomRight, 200, 1000},
                                                      {kBottomRight, 700, 700, 100},
                                                      {kBottomRight, 385, 385, 0},
                                                      {kBottomRight, 200, 1},
                                                      {kTopLeft, 450, 300},
                                                      {kTopLeft, 200, 500},
                                                      {kTopLeft, 300, 700, 150},
                                                      {kNone, 450, 600, 100, 70},
                                                      {kNone, 300, 300, 0, 0},
                                                      {kNone, 300, 500, -1, 40}}) {
    AttentionCase c = edge_case();
    c.mask = edge.mask;
    c.seqlen_q = edge.seqlen_q;
    c.seqlen_k = edge.seqlen_k;
    c.window_left = edge.window_left;
    c.window_right = edge.window_right;
    cases.push_back(c);
  }
  AttentionCase c = edge_case();
  c.mask = kBottomRight;
  cases.push_back(with_lengths(c, {450, 0, 7, 200, 129}, {450, 10, 0, 100, 400}));
  c.name = "OneRowOneKey";
  cases.push_back(with_lengths(c, {1, 200, 1, 64}, {300, 1, 1, 65}));
  c.name = "SinksOfGroups";
  c.heads_q = 9;
  c.flags = ADAATTN_FLAG_SINK;
  c.seqlen_q = c.seqlen_k = 300;
  cases.push_back(c);
  c = edge_case();
  c.name = "FarApart";
  c.mask = kBottomRight;
  c.seqlen_q = c.seqlen_k = 450;
  c.input_scale = 30;
  cases.push_back(c);
  return cases;
}

std::vector<AttentionCase> plain_edge_cases() {
  std::vector<AttentionCase> cases;
  AttentionCase c = edge_case();
  for (const auto& [seqlen_q, seqlen_k] :
       std::initializer_list<std::pair<int64_t, int64_t>>{{450, 450}, {193, 64}, {200, 1}, {129, 177}}) {
    c.seqlen_q = seqlen_q;
    c.seqlen_k = seqlen_k;
    cases.push_back(c);
  }
  c.name = "OneRowOneKey";
  cases.push_back(with_lengths(c, {1, 200, 1, 0, 64}, {300, 1, 1, 40, 0}));
  c = edge_case();
  c.name = "UsedKeys";
  c.seqlen_q = c.seqlen_k = 300;
  c.used_k = {0, 1};
  cases.push_back(c);
  c.name = "SinksOfGroups";
  c.heads_q = 9;
  c.flags = ADAATTN_FLAG_SINK;
  c.used_k.clear();
  cases.push_back(c);
  c = edge_case();
  c.name = "FarApart";
  c.seqlen_q = c.seqlen_k = 450;
  c.input_scale = 30;
  cases.push_back(c);
  return cases;
}

void run_edges(const AttendKernel& kernel, const std::vector<AttentionCase>& cases) {
  for (AttentionCase c : cases) {
    c.d_qk = kernel.d_qk;
    c.d_v = kernel.d_v;
    if ((kernel.features & cuda::kSoftcap) != 0) c.softcap = 20;
    run_row(kernel, c, 3);
    if (testing::Test::HasFatalFailure()) return;
  }
}

TEST_P(MaskedHopperKernels, AgreeWithTheOracleAtTheEdgesOfTheirTiles) { run_edges(*GetParam(), masked_edge_cases()); }

TEST_P(PlainHopperKernels, AgreeWithTheOracleAtTheEdgesOfTheirTiles) { run_edges(*GetParam(), plain_edge_cases()); }

// Tiles are counted from a sequence's end: every number of warpgroups in its first tile, rows of its last warpgroup and
// keys of its last block; sections that divide the heads and that do not.
class TallHopperKernels : public EveryKernel {};

TEST_P(TallHopperKernels, AgreeWithTheOracleAtTheEdgesOfTheirTiles) {
  int section = 0;
  for (const std::vector<AttentionCase>& cases : {masked_edge_cases(), plain_edge_cases()})
    for (AttentionCase c : cases) {
      c.d_qk = c.d_v = 128;
      run_alone(*GetParam(), c, 3, 1 + section++ % 4);
      if (HasFailure()) return;
    }
}

TEST_P(TallHopperKernels, AgreeWithTheOracleOnSequencesOfAnyLength) {
  int section = 0;
  for (const int64_t seqlen_q : {1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 383, 384, 385, 577})
    for (const int64_t more_keys : {0, 1, 63, -64, -65, 200}) {
      if (seqlen_q + more_keys <= 0) continue;
      AttentionCase c = edge_case();
      c.heads_q = 6;
      c.d_qk = section % 2 == 0 ? 128 : 104;
      c.d_v = section % 3 == 0 ? 120 : 128;
      c.seqlen_q = seqlen_q;
      c.seqlen_k = seqlen_q + more_keys;
      c.mask = section % 5 == 4   ? ADAATTN_MASK_CAUSAL_TOP_LEFT
               : section % 5 == 3 ? ADAATTN_MASK_NONE
                                  : ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT;
      run_alone(*GetParam(), c, section % 4 == 0 ? 132 : 5, 1 + section % 7);
      ++section;
      if (HasFailure()) return;
    }
}

TEST_P(TallHopperKernels, AgreeWithTheOracleOnPackedSequencesOfAnyLength) {
  AttentionCase c = edge_case();
  c.d_qk = c.d_v = 128;
  c.mask = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT;
  std::vector<int32_t> lens_q, lens_k;
  for (const int len : {1, 64, 65, 0, 128, 129, 192, 193, 256, 320, 449, 3, 600}) {
    lens_q.push_back(len);
    lens_k.push_back(len);
  }
  run_alone(*GetParam(), with_lengths(c, lens_q, lens_k), 7, 1);
  // Fewer and more keys, and none; more sequences than a warp has lanes.
  for (int i = 0; i < 40; ++i) {
    lens_q.push_back(37 * i % 261);
    lens_k.push_back(53 * i % 311);
  }
  c.flags = ADAATTN_FLAG_SINK;
  run_alone(*GetParam(), with_lengths(c, lens_q, lens_k), 7, 1);
  c.mask = ADAATTN_MASK_CAUSAL_TOP_LEFT;
  run_alone(*GetParam(), with_lengths(c, lens_q, lens_k), 132, 1);
  c.mask = ADAATTN_MASK_NONE;
  run_alone(*GetParam(), with_lengths(c, lens_q, lens_k), 7, 1);
}

// Groups, sequences whose keys are not all used, and scores near each other or far apart.
TEST_P(TallHopperKernels, AgreeWithTheOracleOnGroupsAndFarApartScores) {
  AttentionCase c = {.name = "Groups", .batch = 3, .heads_q = 16, .heads_kv = 2, .seqlen_q = 1000, .seqlen_k = 1000};
  c.d_qk = c.d_v = 128;
  c.mask = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT;
  run_alone(*GetParam(), c, 132, 24);
  run_alone(*GetParam(), c, 132, 48);
  c.used_k = {1000, 517, 0};
  c.flags = ADAATTN_FLAG_SINK;
  run_alone(*GetParam(), c, 20, 16);
  c.used_k.clear();
  for (const double scale : {1e-3, 5.0}) {
    c.input_scale = scale;
    run_alone(*GetParam(), c, 132, 5);
  }
}

// Tiles of one block among long ones, in every order.
TEST_P(TallHopperKernels, LaunchesGiveTheSameBitsInAnyOrderOfTiles) {
  AttentionCase c = {.name = "Again", .batch = 3, .heads_q = 8, .heads_kv = 4, .seqlen_q = 450, .seqlen_k = 450};
  c.d_qk = c.d_v = 128;
  c.mask = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT;
  run_alone(*GetParam(), c, 37, 8, 60);
  c.seqlen_k = 60;  // most tiles have no keys
  run_alone(*GetParam(), c, 5, 3, 20);
  run_alone(*GetParam(), with_lengths(c, {64, 1, 450, 0, 193, 65}, {64, 1, 450, 9, 193, 65}), 11, 1, 20);
}

// Those that have, of some features, exactly the given ones.
std::vector<const AttendKernel*> hopper_rows(uint32_t of, uint32_t features) {
  std::vector<const AttendKernel*> list = rows({Phase::kForward});
  std::erase_if(list,
                [=](const AttendKernel* kernel) { return kernel->arch != 90 || (kernel->features & of) != features; });
  return list;
}

constexpr uint32_t kSplitOrMasked = cuda::kSplit | cuda::kMasked | cuda::kTall;
INSTANTIATE_TEST_SUITE_P(Table, SplitKernels, testing::ValuesIn(hopper_rows(cuda::kSplit, cuda::kSplit)), kernel_name);
INSTANTIATE_TEST_SUITE_P(Table, MaskedHopperKernels, testing::ValuesIn(hopper_rows(kSplitOrMasked, cuda::kMasked)),
                         kernel_name);
INSTANTIATE_TEST_SUITE_P(Table, TallHopperKernels, testing::ValuesIn(hopper_rows(cuda::kTall, cuda::kTall)),
                         kernel_name);
INSTANTIATE_TEST_SUITE_P(Table, PlainHopperKernels, testing::ValuesIn(hopper_rows(kSplitOrMasked, 0)), kernel_name);

}  // namespace
}  // namespace adaattn::test
