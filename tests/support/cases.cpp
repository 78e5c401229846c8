#include "support/cases.h"

#include <algorithm>
#include <numeric>

namespace adaattn::test {
namespace {

constexpr adaattn_mask_t kBottomRight = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT;
constexpr adaattn_mask_t kTopLeft = ADAATTN_MASK_CAUSAL_TOP_LEFT;
constexpr adaattn_layout_t kBHSD = ADAATTN_LAYOUT_BHSD;
constexpr adaattn_layout_t kTHD = ADAATTN_LAYOUT_THD;
constexpr adaattn_layout_t kPaged = ADAATTN_LAYOUT_PAGED;
constexpr uint32_t kAlibi = ADAATTN_FLAG_ALIBI, kSink = ADAATTN_FLAG_SINK;

std::vector<AttentionCase> make_cases() {
  // clang-format off
  std::vector<AttentionCase> cases = {
      // Shapes.
      {.name = "OneQueryOneKey", .reduced = true},
      {.name = "Square", .batch = 2, .heads_q = 3, .heads_kv = 3, .seqlen_q = 128, .seqlen_k = 128},
      {.name = "PrimeSizes", .batch = 3, .heads_q = 5, .heads_kv = 5, .seqlen_q = 31, .seqlen_k = 37, .d_qk = 17,
       .d_v = 19, .reduced = true},
      {.name = "NoQuery", .batch = 2, .heads_q = 2, .heads_kv = 1, .seqlen_q = 0, .seqlen_k = 5, .reduced = true},
      {.name = "NoKey", .batch = 2, .heads_q = 2, .heads_kv = 1, .seqlen_q = 5, .seqlen_k = 0, .reduced = true},
      {.name = "NoKeyWithSink", .heads_q = 2, .heads_kv = 2, .seqlen_q = 3, .seqlen_k = 0, .flags = kSink},
      {.name = "FiveThousandKeys", .seqlen_q = 3, .seqlen_k = 5000},
      {.name = "FiveThousandKeysCausal", .seqlen_q = 70, .seqlen_k = 5000, .d_qk = 32, .mask = kBottomRight},
      {.name = "HeadsFirst", .batch = 2, .heads_q = 4, .heads_kv = 2, .seqlen_q = 45, .seqlen_k = 77, .layout_q = kBHSD,
       .layout_kv = kBHSD, .mask = kBottomRight, .reduced = true},
      {.name = "QueriesTokenFirstKeysHeadFirst", .batch = 2, .heads_q = 4, .heads_kv = 2, .seqlen_q = 21,
       .seqlen_k = 30, .layout_kv = kBHSD},
      // Value width.
      {.name = "LatentAttentionWidths", .heads_q = 2, .heads_kv = 2, .seqlen_q = 65, .seqlen_k = 130, .d_qk = 192,
       .d_v = 128, .mask = kBottomRight},
      {.name = "ValuesWiderThanKeys", .heads_q = 2, .heads_kv = 1, .seqlen_q = 20, .seqlen_k = 50, .d_qk = 24,
       .d_v = 512},
      {.name = "ValuesOfWidthOne", .heads_q = 2, .heads_kv = 2, .seqlen_q = 40, .seqlen_k = 41, .d_qk = 128, .d_v = 1},
      {.name = "KeysOfWidthOne", .heads_q = 2, .heads_kv = 2, .seqlen_q = 40, .seqlen_k = 41, .d_qk = 1, .d_v = 64},
      // Heads.
      {.name = "GroupedHeads", .batch = 2, .heads_q = 8, .heads_kv = 2, .seqlen_q = 50, .seqlen_k = 70, .d_qk = 40,
       .mask = kBottomRight, .reduced = true},
      {.name = "OneKeyHead", .heads_q = 7, .heads_kv = 1, .seqlen_q = 33, .seqlen_k = 65, .d_qk = 80},
      {.name = "GroupOfSixteen", .heads_q = 32, .heads_kv = 2, .seqlen_q = 3, .seqlen_k = 90, .mask = kBottomRight},
      // Decode: few queries, many keys.
      {.name = "Decode", .batch = 2, .heads_q = 8, .heads_kv = 8, .seqlen_k = 300, .d_qk = 128, .reduced = true},
      {.name = "DecodeGrouped", .batch = 2, .heads_q = 32, .heads_kv = 8, .seqlen_k = 1000, .d_qk = 128,
       .mask = kBottomRight},
      {.name = "DecodeOneKeyHeadOddGroup", .heads_q = 5, .heads_kv = 1, .seqlen_k = 777, .d_qk = 96},
      {.name = "DecodeFourTokens", .batch = 2, .heads_q = 8, .heads_kv = 4, .seqlen_q = 4, .seqlen_k = 513,
       .mask = kBottomRight, .reduced = true},
      {.name = "DecodeEveryFeature", .batch = 2, .heads_q = 6, .heads_kv = 2, .seqlen_q = 1, .seqlen_k = 400,
       .d_qk = 80, .d_v = 48, .mask = kBottomRight, .window_left = 250, .scale = 0.2, .softcap = 5,
       .flags = kAlibi | kSink, .bias = Bias::kFull, .used_k = {400, 123}},
      {.name = "DecodeWithWindow", .heads_q = 4, .heads_kv = 2, .seqlen_k = 600, .mask = kBottomRight,
       .window_left = 99},
      {.name = "DecodeFromNarrowStart", .batch = 3, .heads_q = 4, .heads_kv = 2, .seqlen_k = 64, .mask = kBottomRight,
       .used_k = {0, 1, 2}, .reduced = true},
      // Masks.
      {.name = "CausalBottomRightShorterQuery", .heads_q = 2, .heads_kv = 2, .seqlen_q = 30, .seqlen_k = 200,
       .mask = kBottomRight, .reduced = true},
      {.name = "CausalBottomRightLongerQuery", .heads_q = 2, .heads_kv = 2, .seqlen_q = 200, .seqlen_k = 30,
       .mask = kBottomRight, .reduced = true},
      {.name = "CausalTopLeftShorterQuery", .heads_q = 2, .heads_kv = 2, .seqlen_q = 30, .seqlen_k = 200,
       .mask = kTopLeft, .reduced = true},
      {.name = "CausalTopLeftLongerQuery", .heads_q = 2, .heads_kv = 2, .seqlen_q = 200, .seqlen_k = 30,
       .mask = kTopLeft},
      {.name = "WindowBothSides", .heads_q = 2, .heads_kv = 2, .seqlen_q = 300, .seqlen_k = 300, .window_left = 20,
       .window_right = 30, .reduced = true},
      {.name = "WindowLeftOnly", .seqlen_q = 200, .seqlen_k = 260, .window_left = 17},
      {.name = "WindowRightOnly", .seqlen_q = 200, .seqlen_k = 260, .window_right = 17},
      {.name = "WindowOfOneKey", .seqlen_q = 150, .seqlen_k = 150, .window_left = 0, .window_right = 0},
      {.name = "WindowWiderThanTheKeys", .seqlen_q = 20, .seqlen_k = 30, .window_left = 1000, .window_right = 1000},
      {.name = "WindowCausalBottomRight", .heads_q = 2, .heads_kv = 1, .seqlen_q = 270, .seqlen_k = 500,
       .mask = kBottomRight, .window_left = 128},
      {.name = "WindowCausalTopLeft", .heads_q = 2, .heads_kv = 1, .seqlen_q = 270, .seqlen_k = 200, .mask = kTopLeft,
       .window_left = 33},
      {.name = "WindowPastTheLastKey", .seqlen_q = 300, .seqlen_k = 50, .mask = kTopLeft, .window_left = 10,
       .reduced = true},
      {.name = "WindowSkipsTheFirstTile", .seqlen_q = 40, .seqlen_k = 1000, .window_left = 5, .window_right = 5},
      // Score functions.
      {.name = "ScaleGiven", .heads_q = 2, .heads_kv = 2, .seqlen_q = 40, .seqlen_k = 60, .scale = 0.31},
      {.name = "Softcap", .heads_q = 2, .heads_kv = 2, .seqlen_q = 140, .seqlen_k = 200, .mask = kBottomRight,
       .scale = 0.5, .softcap = 3, .reduced = true},
      {.name = "Alibi", .batch = 2, .heads_q = 3, .heads_kv = 3, .seqlen_q = 70, .seqlen_k = 200, .flags = kAlibi,
       .reduced = true},
      {.name = "AlibiTopLeftPerBatch", .batch = 2, .heads_q = 3, .heads_kv = 1, .seqlen_q = 100, .seqlen_k = 200,
       .mask = kTopLeft, .flags = kAlibi, .alibi_per_batch = true},
      {.name = "Sinks", .batch = 2, .heads_q = 4, .heads_kv = 2, .seqlen_q = 100, .seqlen_k = 130, .mask = kBottomRight,
       .flags = kSink, .reduced = true},
      {.name = "SinksWithEmptyRows", .heads_q = 2, .heads_kv = 2, .seqlen_q = 150, .seqlen_k = 20, .mask = kBottomRight,
       .flags = kSink},
      {.name = "BiasFull", .batch = 2, .heads_q = 3, .heads_kv = 3, .seqlen_q = 50, .seqlen_k = 200,
       .bias = Bias::kFull, .reduced = true},
      {.name = "BiasPerHead", .batch = 2, .heads_q = 4, .heads_kv = 2, .seqlen_q = 50, .seqlen_k = 70,
       .mask = kBottomRight, .bias = Bias::kPerHead},
      {.name = "BiasPerKey", .batch = 2, .heads_q = 2, .heads_kv = 2, .seqlen_q = 50, .seqlen_k = 200,
       .bias = Bias::kPerKey},
      {.name = "BiasPerQuery", .batch = 2, .heads_q = 2, .heads_kv = 2, .seqlen_q = 50, .seqlen_k = 70,
       .bias = Bias::kPerQuery},
      {.name = "BiasKeyMajor", .batch = 2, .heads_q = 2, .heads_kv = 2, .seqlen_q = 33, .seqlen_k = 67,
       .bias = Bias::kKeyMajor},
      {.name = "BiasOfMinusInfinity", .batch = 3, .heads_q = 2, .heads_kv = 2, .seqlen_q = 50, .seqlen_k = 200,
       .bias = Bias::kPadding, .reduced = true},
      {.name = "EveryScoreFunction", .batch = 2, .heads_q = 4, .heads_kv = 2, .seqlen_q = 140, .seqlen_k = 210,
       .d_qk = 80, .d_v = 48, .mask = kBottomRight, .window_left = 150, .scale = 0.2, .softcap = 4,
       .flags = kAlibi | kSink, .bias = Bias::kFull, .reduced = true},
      // Lengths.
      {.name = "KeyLengths", .batch = 4, .heads_q = 2, .heads_kv = 2, .seqlen_q = 40, .seqlen_k = 200,
       .used_k = {200, 0, 1, 129}, .reduced = true},
      {.name = "KeyLengthsCausal", .batch = 4, .heads_q = 2, .heads_kv = 1, .seqlen_q = 40, .seqlen_k = 200,
       .mask = kBottomRight, .used_k = {7, 0, 40, 193}},
      {.name = "Packed", .heads_q = 4, .heads_kv = 2, .layout_q = kTHD, .layout_kv = kTHD, .mask = kBottomRight,
       .lens_q = {5, 0, 130, 1, 64}, .lens_k = {5, 0, 130, 1, 64}, .reduced = true},
      {.name = "PackedDifferentLengths", .heads_q = 2, .heads_kv = 2, .layout_q = kTHD, .layout_kv = kTHD,
       .mask = kBottomRight, .lens_q = {1, 17, 0, 40, 3, 129}, .lens_k = {33, 17, 9, 0, 250, 20}, .slack_tokens = 3},
      {.name = "PackedEveryFeature", .heads_q = 4, .heads_kv = 2, .d_qk = 40, .d_v = 24, .layout_q = kTHD,
       .layout_kv = kTHD, .mask = kTopLeft, .window_left = 30, .scale = 0.3, .softcap = 4, .flags = kAlibi | kSink,
       .bias = Bias::kFull, .alibi_per_batch = true, .lens_q = {20, 3, 60}, .lens_k = {50, 0, 77}},
      {.name = "PackedWithKeyLengths", .heads_q = 2, .heads_kv = 2, .layout_q = kTHD, .layout_kv = kTHD,
       .lens_q = {20, 3, 60}, .lens_k = {50, 9, 77}, .used_k = {20, 0, 77}},
      {.name = "PackedAllEmpty", .heads_q = 2, .heads_kv = 2, .layout_q = kTHD, .layout_kv = kTHD, .lens_q = {0, 0},
       .lens_k = {0, 0}},
      {.name = "PackedDecode", .heads_q = 8, .heads_kv = 2, .d_qk = 128, .layout_q = kTHD, .layout_kv = kTHD,
       .mask = kBottomRight, .lens_q = {1, 1, 1, 1}, .lens_k = {300, 1, 77, 512}},
      // Pages.
      {.name = "PagedDecode", .batch = 3, .heads_q = 8, .heads_kv = 2, .seqlen_q = 1, .seqlen_k = 400, .d_qk = 128,
       .layout_kv = kPaged, .page_size = 16, .mask = kBottomRight, .used_k = {400, 1, 33}, .reduced = true},
      {.name = "PagedPrefill", .batch = 2, .heads_q = 4, .heads_kv = 2, .seqlen_q = 70, .seqlen_k = 200,
       .layout_kv = kPaged, .page_size = 64, .mask = kBottomRight, .used_k = {200, 70}},
      {.name = "PagesOfOneToken", .batch = 2, .heads_q = 2, .heads_kv = 1, .seqlen_q = 3, .seqlen_k = 40,
       .layout_kv = kPaged, .page_size = 1, .used_k = {40, 0}},
      {.name = "PagesOfSeventeenTokens", .batch = 2, .heads_q = 2, .heads_kv = 2, .seqlen_q = 20, .seqlen_k = 230,
       .d_qk = 40, .layout_kv = kPaged, .page_size = 17, .mask = kBottomRight, .used_k = {230, 17}},
      {.name = "PageLargerThanATile", .heads_q = 2, .heads_kv = 2, .seqlen_q = 5, .seqlen_k = 600, .layout_kv = kPaged,
       .page_size = 256, .used_k = {515}},
      {.name = "PagedPackedQueries", .heads_q = 4, .heads_kv = 2, .seqlen_k = 130, .layout_q = kTHD,
       .layout_kv = kPaged, .page_size = 32, .mask = kBottomRight, .lens_q = {1, 40, 0, 3}, .used_k = {130, 64, 9, 3},
       .reduced = true},
      {.name = "PagedEveryFeature", .batch = 2, .heads_q = 4, .heads_kv = 2, .seqlen_q = 6, .seqlen_k = 200, .d_qk = 80,
       .d_v = 40, .layout_q = kBHSD, .layout_kv = kPaged, .page_size = 16, .mask = kBottomRight, .window_left = 100,
       .softcap = 6, .flags = kAlibi | kSink, .bias = Bias::kPerHead, .used_k = {200, 99}},
      // Memory.
      {.name = "PaddedRows", .batch = 2, .heads_q = 4, .heads_kv = 2, .seqlen_q = 40, .seqlen_k = 50, .d_qk = 40,
       .mask = kBottomRight, .storage = Storage::kPadded, .reduced = true},
      {.name = "PaddedRowsHeadsFirst", .batch = 2, .heads_q = 4, .heads_kv = 2, .seqlen_q = 33, .seqlen_k = 150,
       .d_qk = 67, .layout_q = kBHSD, .layout_kv = kBHSD, .storage = Storage::kPadded},
      {.name = "PaddedDecode", .batch = 2, .heads_q = 4, .heads_kv = 2, .seqlen_q = 1, .seqlen_k = 350, .d_qk = 33,
       .storage = Storage::kPadded},
      {.name = "PaddedPages", .batch = 2, .heads_q = 4, .heads_kv = 2, .seqlen_q = 2, .seqlen_k = 90, .d_qk = 48,
       .layout_kv = kPaged, .page_size = 16, .used_k = {90, 31}, .storage = Storage::kPadded},
      {.name = "FusedProjection", .batch = 2, .heads_q = 4, .heads_kv = 2, .seqlen_q = 60, .seqlen_k = 60,
       .mask = kBottomRight, .storage = Storage::kFused, .reduced = true},
      {.name = "FusedProjectionPacked", .heads_q = 4, .heads_kv = 2, .layout_q = kTHD, .layout_kv = kTHD,
       .mask = kBottomRight, .lens_q = {20, 41, 7}, .lens_k = {20, 41, 7}, .storage = Storage::kFused},
      {.name = "HeadsOutermostInMemory", .batch = 2, .heads_q = 4, .heads_kv = 2, .seqlen_q = 30, .seqlen_k = 40,
       .storage = Storage::kHeadsFirst},
      {.name = "KeysSharedByTheBatch", .batch = 3, .heads_q = 2, .heads_kv = 2, .seqlen_q = 30, .seqlen_k = 60,
       .storage = Storage::kBroadcastBatch, .reduced = true},
      {.name = "KeysSharedByTheHeads", .batch = 2, .heads_q = 4, .heads_kv = 4, .seqlen_q = 30, .seqlen_k = 60,
       .storage = Storage::kBroadcastHeads},
      {.name = "OneKeyRepeated", .heads_q = 2, .heads_kv = 2, .seqlen_q = 30, .seqlen_k = 60,
       .storage = Storage::kBroadcastTokens},
      // Magnitudes.
      {.name = "InputsTimesHundred", .heads_q = 2, .heads_kv = 2, .seqlen_q = 40, .seqlen_k = 60, .input_scale = 100},
      {.name = "InputsOverHundred", .heads_q = 2, .heads_kv = 2, .seqlen_q = 40, .seqlen_k = 60, .input_scale = 0.01},
  };
  // clang-format on
  for (int64_t s : {127, 128, 129, 191, 192, 193})
    cases.push_back({.name = "CausalTileEdge" + std::to_string(s),
                     .heads_q = 2,
                     .heads_kv = 1,
                     .seqlen_q = s,
                     .seqlen_k = s,
                     .mask = kBottomRight,
                     .reduced = s == 129});
  for (int64_t q : {127, 129})
    for (int64_t k : {191, 193, 383, 385})
      cases.push_back(
          {.name = "FullTileEdge" + std::to_string(q) + "By" + std::to_string(k), .seqlen_q = q, .seqlen_k = k});
  for (int64_t q : {2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65})
    cases.push_back({.name = "Queries" + std::to_string(q),
                     .heads_q = 4,
                     .heads_kv = 2,
                     .seqlen_q = q,
                     .seqlen_k = 66,
                     .d_qk = 32,
                     .mask = kBottomRight});
  for (int64_t d : {1, 3, 17, 40, 64, 80, 96, 128, 160, 192, 256, 512}) {
    cases.push_back({.name = "HeadDim" + std::to_string(d),
                     .heads_q = 2,
                     .heads_kv = 1,
                     .seqlen_q = 33,
                     .seqlen_k = 70,
                     .d_qk = d,
                     .mask = kBottomRight,
                     .reduced = d == 3 || d == 256});
    cases.push_back({.name = "DecodeHeadDim" + std::to_string(d),
                     .heads_q = 4,
                     .heads_kv = 1,
                     .seqlen_q = 1,
                     .seqlen_k = 70,
                     .d_qk = d});
  }
  return cases;
}

constexpr adaattn_dtype_t kF32 = ADAATTN_DTYPE_F32, kF16 = ADAATTN_DTYPE_F16, kBF16 = ADAATTN_DTYPE_BF16,
                          kE4M3 = ADAATTN_DTYPE_E4M3;

}  // namespace

const std::vector<AttentionCase>& attention_cases() {
  static const std::vector<AttentionCase> cases = make_cases();
  return cases;
}

const std::vector<Dtypes>& uniform_dtypes() {
  static const std::vector<Dtypes> list = {
      {"f32", kF32, kF32, kF32}, {"f16", kF16, kF16, kF16}, {"bf16", kBF16, kBF16, kBF16}};
  return list;
}

const std::vector<Dtypes>& mixed_dtypes() {
  static const std::vector<Dtypes> list = {{"f32_kv_bf16", kF32, kBF16, kF32},   {"f32_kv_f16", kF32, kF16, kF32},
                                           {"bf16_kv_f32", kBF16, kF32, kBF16},  {"bf16_kv_f16", kBF16, kF16, kBF16},
                                           {"bf16_out_f32", kBF16, kBF16, kF32}, {"f16_out_f32", kF16, kF16, kF32},
                                           {"f32_out_bf16", kF32, kF32, kBF16},  {"f32_out_f16", kF32, kF32, kF16}};
  return list;
}

const std::vector<Dtypes>& e4m3_dtypes() {
  static const std::vector<Dtypes> list = [] {
    std::vector<Dtypes> all = e4m3_cache_dtypes();
    all.push_back({"e4m3", kE4M3, kE4M3, kBF16});
    all.push_back({"e4m3_blocks", kE4M3, kE4M3, kF32, 64});
    return all;
  }();
  return list;
}

const std::vector<Dtypes>& e4m3_cache_dtypes() {
  static const std::vector<Dtypes> list = {{"bf16_kv_e4m3", kBF16, kE4M3, kBF16},
                                           {"f16_kv_e4m3_blocks", kF16, kE4M3, kF16, 128}};
  return list;
}

adaattn_attn_desc_t make_desc(const AttentionCase& c, const Dtypes& dtypes, uint32_t outputs) {
  adaattn_attn_desc_t desc;
  adaattn_attn_desc_init(&desc, sizeof desc);
  const auto largest = [](const std::vector<int32_t>& lens) {
    return lens.empty() ? int64_t{0} : int64_t{*std::max_element(lens.begin(), lens.end())};
  };
  const bool packed = c.layout_q == ADAATTN_LAYOUT_THD;
  desc.max_batch = packed ? static_cast<int64_t>(c.lens_q.size()) : c.batch;
  desc.max_seqlen_q = packed ? largest(c.lens_q) : c.seqlen_q;
  desc.max_seqlen_k = c.layout_kv == ADAATTN_LAYOUT_THD ? largest(c.lens_k) : c.seqlen_k;
  if (packed) desc.max_total_q = std::accumulate(c.lens_q.begin(), c.lens_q.end(), int64_t{0}) + c.slack_tokens;
  if (c.layout_kv == ADAATTN_LAYOUT_PAGED) {
    desc.page_size = c.page_size;
    desc.max_seqlen_k = (c.seqlen_k + c.page_size - 1) / c.page_size * c.page_size;
  }
  desc.heads_q = c.heads_q;
  desc.heads_kv = c.heads_kv;
  desc.head_dim_qk = c.d_qk;
  desc.head_dim_v = c.d_v;
  desc.dtype_q = dtypes.q;
  desc.dtype_kv = dtypes.kv;
  desc.dtype_o = dtypes.o;
  desc.layout_q = c.layout_q;
  desc.layout_kv = c.layout_kv;
  desc.mask = c.mask;
  desc.window_left = c.window_left;
  desc.window_right = c.window_right;
  desc.scale = c.scale;
  desc.softcap = c.softcap;
  desc.flags = c.flags | (c.bias != Bias::kNone ? ADAATTN_FLAG_BIAS : 0);
  desc.outputs = outputs;
  desc.descale_block = dtypes.descale_block;
  return desc;
}

}  // namespace adaattn::test
