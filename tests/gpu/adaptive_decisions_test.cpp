// The decisions of the device against the host's code on the same statistics, bit for bit.
#include <algorithm>
#include <map>

#include "gpu/host_decisions.h"

namespace adaattn::test {
namespace {

class AdaptiveDecisions : public OnTheDevice {};

void expect_same(const decide::HeadChoice& a, const decide::HeadChoice& b) {
  EXPECT_EQ(a.level, b.level);
  EXPECT_EQ(a.rank_class, b.rank_class);
  EXPECT_EQ(a.dense, b.dense);
  EXPECT_EQ(a.bytes, b.bytes);
  EXPECT_EQ(decide::bits_of(a.predicted_error), decide::bits_of(b.predicted_error));
  EXPECT_EQ(decide::bits_of(a.predicted_cost), decide::bits_of(b.predicted_cost));
}

// Every decision of the device, wave by wave; returns what is skipped, and what is kept for a needle alone.
struct Counts {
  uint64_t skipped, needles;
};
Counts expect_same_decisions(Analysis& a) {
  a.run();
  const TableShape& s = a.args.shape;
  const HostDecisions want = decide_on_host(a);
  const auto levels = a.copy(a.args.tables.levels, a.heads() * s.query_tiles);
  const auto ranges = a.copy(a.args.tables.tile_range, a.heads() * s.query_tiles);
  const auto head_levels = a.copy(a.args.tables.head_levels, a.heads());
  const auto choice = a.copy(a.args.tables.choice, a.heads());
  if (!a.feedback.empty()) {
    const auto feedback = a.copy(a.args.state.feedback, a.heads());
    for (size_t h = 0; h < feedback.size(); ++h)
      for (int rank_class = 0; rank_class < decide::kRankClasses; ++rank_class)
        EXPECT_EQ(feedback[h].multiplier[rank_class], want.feedback[h].multiplier[rank_class])
            << "head " << h << " class " << rank_class;
  }
  for (int64_t b = 0; b < a.host.batch; ++b) {
    const int64_t tiles_q = (sequence_of(a.host, b).len_q + kTileQ - 1) / kTileQ;
    for (int64_t head = b * s.heads_q; head < (b + 1) * s.heads_q; ++head) {
      SCOPED_TRACE("head " + std::to_string(head));
      for (int64_t tile = 0; tile < tiles_q; ++tile) {
        const size_t at = static_cast<size_t>(head * s.query_tiles + tile);
        const decide::TileLevels &got = levels[at], &expected = want.levels[at];
        EXPECT_EQ(std::memcmp(&got.row, &expected.row, sizeof got.row), 0);
        EXPECT_EQ(std::memcmp(&ranges[at], &expected.row, sizeof got.row), 0);
        if (expected.row.begin >= expected.row.end) continue;
        EXPECT_EQ(got.usable, expected.usable);
        EXPECT_EQ(decide::bits_of(got.log2_max), decide::bits_of(expected.log2_max));
        EXPECT_NEAR(got.entropy, expected.entropy, 1e-5);
        for (int level = 0; level < decide::kLevels; ++level) {
          EXPECT_EQ(got.threshold[level], expected.threshold[level]);
          EXPECT_EQ(got.kept[level], expected.kept[level]);
          EXPECT_EQ(got.dropped[level], expected.dropped[level]);
        }
      }
      const size_t at = static_cast<size_t>(head);
      EXPECT_EQ(std::memcmp(&head_levels[at], &want.head_levels[at], sizeof head_levels[at]), 0);
      expect_same(choice[at], want.choice[at]);
    }
  }
  for (int32_t first = 0; first < s.query_tiles; first += s.wave_tiles) {
    a.schedule(first);
    const auto mask = a.copy(a.args.tables.mask, a.heads() * s.wave_tiles * s.mask_words);
    const auto kept = a.copy(a.args.tables.kept, a.heads() * s.wave_tiles);
    const int lists = s.bytes ? cuda::kWorkLists : decide::kRankClasses;
    const auto work = a.copy(a.args.tables.work, lists * a.heads() * s.wave_tiles);
    const auto count = a.copy(a.args.tables.work_count, lists);
    std::map<uint32_t, int> listed;
    for (int list = 0; list < lists; ++list) {
      int32_t before = s.key_tiles + 1;
      int64_t section = 0;
      const int32_t coarse = s.key_tiles / cuda::kWorkBuckets + 1;
      for (uint32_t i = 0; i < count[static_cast<size_t>(list)]; ++i) {
        const uint32_t item = work[static_cast<size_t>(list * a.heads() * s.wave_tiles + i)];
        ++listed[item];
        const int64_t of_item = item / static_cast<uint32_t>(s.wave_tiles * s.group) / a.section_units();
        EXPECT_GE(of_item, section);
        if (of_item != section) before = s.key_tiles + 1;
        section = of_item;
        EXPECT_EQ(cuda::list_of(choice[item / static_cast<uint32_t>(s.wave_tiles)]), list);
        const decide::HeadChoice& chosen = choice[item / static_cast<uint32_t>(s.wave_tiles)];
        const decide::TileLevels& measured = levels[static_cast<size_t>(
            item / static_cast<uint32_t>(s.wave_tiles) * static_cast<uint32_t>(s.query_tiles) +
            static_cast<uint32_t>(first) + item % static_cast<uint32_t>(s.wave_tiles))];
        const auto counted = static_cast<int32_t>(
            chosen.dense ? static_cast<uint32_t>(measured.row.end - measured.row.begin) : measured.kept[chosen.level]);
        EXPECT_LT(counted, before + coarse);
        before = counted;
      }
    }
    size_t expected_items = 0;
    for (int64_t b = 0; b < a.host.batch; ++b) {
      const int64_t tiles_q = (sequence_of(a.host, b).len_q + kTileQ - 1) / kTileQ;
      for (int64_t head = b * s.heads_q; head < (b + 1) * s.heads_q; ++head)
        for (int64_t tile = first; tile < std::min<int64_t>(first + s.wave_tiles, tiles_q); ++tile) {
          const int64_t item = head * s.wave_tiles + tile - first;
          ++expected_items;
          EXPECT_EQ(listed[static_cast<uint32_t>(item)], 1);
          int32_t bits = 0;
          for (int64_t w = 0; w < s.mask_words; ++w) {
            const uint64_t word = mask[static_cast<size_t>(item * s.mask_words + w)];
            EXPECT_EQ(word, want.mask[static_cast<size_t>((head * s.query_tiles + tile) * s.mask_words + w)]);
            bits += __builtin_popcountll(word);
          }
          EXPECT_EQ(kept[static_cast<size_t>(item)], bits);
        }
    }
    EXPECT_EQ(listed.size(), expected_items);
  }
  return {want.skipped, want.needles};
}

TEST_F(AdaptiveDecisions, AreThoseOfTheHostOnTheSameStatistics) {
  uint64_t skipped = 0;
  int64_t cache = int64_t{25} << 20;
  uint32_t keep_peak = 0;
  const auto check = [&](const AttentionCase& c, const Dtypes& dtypes, adaattn_policy_t policy, int32_t wave,
                         double topic) {
    SCOPED_TRACE(describe(c) + " " + dtypes.name + " policy " + std::to_string(policy));
    AttentionData data(c, dtypes, run_seed());
    make_structured(data, {.topic = topic}, run_seed());
    Analysis a(data, policy, wave);
    a.args.cache_bytes = cache;
    a.args.keep_peak = keep_peak;
    const uint64_t here = expect_same_decisions(a).skipped;
    skipped += here;
    return here;
  };
  for (const adaattn_policy_t policy : {ADAATTN_POLICY_QUALITY, ADAATTN_POLICY_BALANCED, ADAATTN_POLICY_SPEED})
    check(base_case(), kBf16All, policy, 0, 2.0);
  EXPECT_GT(skipped, 100u);
  EXPECT_EQ(check(base_case(), kBf16All, ADAATTN_POLICY_QUALITY, 0, 0.0), 0u);

  AttentionCase c = base_case();
  for (const int64_t units : {1, 3}) {  // of a section
    cache = units * 12 * kTileK * (128 + 128) * 2;
    check(c, kBf16All, ADAATTN_POLICY_SPEED, 0, 2.0);
  }
  const uint64_t without = check(c, kF16All, ADAATTN_POLICY_SPEED, 3, 2.0);
  keep_peak = (1u << 24) / 100;
  const uint64_t with = check(c, kF16All, ADAATTN_POLICY_SPEED, 3, 2.0);
  EXPECT_LT(with, without);
  EXPECT_GT(with, 0u);
  c.mask = ADAATTN_MASK_NONE;
  c.seqlen_q = 700;
  c.d_qk = 64;
  check(c, kBf16All, ADAATTN_POLICY_SPEED, 0, 2.0);
  c = base_case();
  c.window_left = 900;
  c.window_right = 0;
  c.mask = ADAATTN_MASK_NONE;
  check(c, kBf16All, ADAATTN_POLICY_SPEED, 5, 2.0);
  c = base_case();
  c.layout_q = c.layout_kv = ADAATTN_LAYOUT_THD;
  c.batch = 3;
  c.lens_q = {700, 0, 1290};
  c.lens_k = {1100, 640, 1290};
  check(c, kBf16All, ADAATTN_POLICY_SPEED, 0, 2.0);
  c = base_case();
  c.batch = 1;
  c.heads_q = 70;
  c.heads_kv = 1;
  c.seqlen_q = c.seqlen_k = 640;
  c.d_qk = c.d_v = 64;
  check(c, kBf16All, ADAATTN_POLICY_SPEED, 0, 2.0);
  c = base_case();
  c.layout_kv = ADAATTN_LAYOUT_PAGED;
  c.page_size = 16;
  c.used_k = {1500, 1037};
  check(c, kBf16All, ADAATTN_POLICY_SPEED, 0, 2.0);
}

// Heads that their multipliers refuse, and what those become.
TEST_F(AdaptiveDecisions, OnMultipliersAreThoseOfTheHost) {
  for (const Rules rules : {Rules::kTiles, Rules::kAll}) {
    SCOPED_TRACE(rules == Rules::kTiles ? "tiles" : "all");
    AttentionData data(base_case(), kBf16All, run_seed());
    make_structured(data, {.topic = 2.0}, run_seed());
    Analysis a(data, ADAATTN_POLICY_SPEED, 0, false, rules);
    a.args.keep_peak = rules == Rules::kTiles ? static_cast<uint32_t>(0x1p24 * 0.05) : 0;
    // Predictions without multipliers, at the lowest level.
    a.args.options.tolerance = 100;
    a.run();
    float most = 0;
    for (const decide::HeadChoice& choice : a.copy(a.args.tables.choice, a.heads()))
      most = std::max(most, choice.predicted_error);
    a.args.options.tolerance = std::max(4 * most, 1e-6f);
    a.feedback.resize(static_cast<size_t>(a.heads()));
    for (size_t h = 0; h < a.feedback.size(); ++h)
      for (float& x : a.feedback[h].multiplier) x = h % 3 == 0 ? 16.0f : h % 3 == 1 ? 1.0f : 0.0625f;
    expect_same_decisions(a);
    int rested = 0;
    const auto after = a.copy(a.args.state.feedback, a.heads());
    for (size_t h = 0; h < after.size(); ++h) {
      rested += after[h].multiplier[0] != a.feedback[h].multiplier[0];
      EXPECT_TRUE(h % 3 == 0 || after[h].multiplier[0] == a.feedback[h].multiplier[0]);
    }
    // With ranks and more levels there may be one that even those multipliers allow.
    if (rules == Rules::kTiles) {
      EXPECT_GT(rested, 0);
    }
  }
}

// By the gain, where other kernels than today's would have it, and where nothing wider is allowed.
TEST_F(AdaptiveDecisions, OnBytesAreThoseOfTheHost) {
  struct Bytes {
    float tile, round_error, per_query_tile, per_head;  // the last for a key tile
    decide::Precision most;
    float tolerance;
  };
  constexpr Bytes kGain = {0.5f, 0.01f, 0.1f, 0.01f, decide::Precision::kBF16, 1},
                  kLittle = {0.95f, 0.01f, 0, 0, decide::Precision::kBF16, 1},
                  kOnly = {0.74f, 0.0375f, 3.4f, 2.35f, decide::Precision::kI8, 1},
                  kOver = {0.74f, 0.0375f, 3.4f, 2.35f, decide::Precision::kI8, 0.03f};
  // Heads in bytes of all heads.
  const auto check = [](const AttentionCase& c, const Bytes& kind, double topic, int32_t wave) {
    SCOPED_TRACE(describe(c) + " topic " + std::to_string(topic) + " tolerance " + std::to_string(kind.tolerance));
    AttentionData data(c, kBf16All, run_seed());
    make_structured(data, {.topic = topic}, run_seed());
    Analysis a(data, ADAATTN_POLICY_SPEED, wave, false, Rules::kBytes);
    for (float& tile : a.args.bytes.tile) tile = kind.tile;
    a.args.bytes.per_query_tile = kind.per_query_tile;
    a.args.bytes.per_head = kind.per_head;
    a.args.bytes.round_error = kind.round_error;
    a.args.options.min_precision = decide::Precision::kI8;
    a.args.options.max_precision = kind.most;
    a.args.options.tolerance = kind.tolerance;
    a.feedback.resize(static_cast<size_t>(a.heads()));
    for (size_t h = 0; h < a.feedback.size(); ++h)
      for (float& x : a.feedback[h].multiplier) x = h % 3 == 0 ? 4.0f : 1.0f;
    const uint64_t skipped = expect_same_decisions(a).skipped;
    double taken = 0;
    for (const decide::HeadChoice& choice : a.copy(a.args.tables.choice, a.heads())) taken += choice.bytes ? 1 : 0;
    return std::pair{taken / static_cast<double>(a.heads()), skipped};
  };
  const AttentionCase c = base_case();
  EXPECT_GT(check(c, kGain, 2, 0).first, 0);
  EXPECT_GT(check(c, kGain, 0, 3).first, 0);  // dense heads among them
  EXPECT_EQ(check(c, kLittle, 2, 0).first, 0);
  const auto [only, skipped] = check(c, kOnly, 2, 0);
  EXPECT_EQ(only, 1);
  EXPECT_GT(skipped, 100u);
  EXPECT_EQ(check(c, kOver, 2, 3), (std::pair{1.0, uint64_t{0}}));
  AttentionCase wide = c;  // more query heads of a KV head than choose together
  wide.batch = 1;
  wide.heads_q = 70;
  wide.heads_kv = 1;
  wide.seqlen_q = wide.seqlen_k = 520;
  EXPECT_EQ(check(wide, kOnly, 2, 0).first, 1);
  AttentionCase packed = c;
  packed.layout_q = packed.layout_kv = ADAATTN_LAYOUT_THD;
  packed.batch = 3;
  packed.lens_q = {700, 0, 1290};
  packed.lens_k = {1100, 640, 1290};
  EXPECT_GT(check(packed, kOnly, 2, 3).first, 0);
}

TEST_F(AdaptiveDecisions, BySharesAreThoseOfTheHostOnTheSameStatistics) {
  uint64_t skipped = 0;
  const auto check = [&](const AttentionCase& c, int32_t wave, double share, double topic) {
    SCOPED_TRACE(describe(c) + " share " + std::to_string(share));
    AttentionData data(c, kBf16All, run_seed());
    make_structured(data, {.topic = topic}, run_seed());
    Analysis a(data, ADAATTN_POLICY_SPEED, wave, false, Rules::kTiles);
    a.args.keep_peak = static_cast<uint32_t>(share * 0x1p24);
    const uint64_t here = expect_same_decisions(a).skipped;
    skipped += here;
    return here;
  };
  AttentionCase c = base_case();
  EXPECT_LT(check(c, 0, 0.005, 2.0), check(c, 0, 0.05, 2.0));
  EXPECT_EQ(check(c, 0, 0.01, 0.0), 0u);  // dense
  check(c, 5, 0.01, 2.0);
  c.seqlen_q = c.seqlen_k = 5000;
  c.batch = 1;
  check(c, 0, 0.01, 2.0);
  c = base_case();
  c.window_left = 900;
  c.window_right = 0;
  c.mask = ADAATTN_MASK_NONE;
  check(c, 3, 0.01, 2.0);
  c = base_case();
  c.layout_q = c.layout_kv = ADAATTN_LAYOUT_THD;
  c.batch = 3;
  c.lens_q = {700, 0, 1290};
  c.lens_k = {1100, 640, 1290};
  check(c, 0, 0.01, 2.0);
  c = base_case();
  c.batch = 5;
  c.heads_q = 3;
  c.heads_kv = 1;
  c.seqlen_q = c.seqlen_k = 900;
  check(c, 0, 0.01, 2.0);
  EXPECT_GT(skipped, 100u);
}

TEST_F(AdaptiveDecisions, OnNeedlesAreThoseOfTheHostOnTheSameStatistics) {
  const auto check = [&](const AttentionCase& c, const Dtypes& dtypes, int32_t wave, float share) {
    SCOPED_TRACE(describe(c) + " " + dtypes.name + " share " + std::to_string(share));
    AttentionData data(c, dtypes, run_seed());
    make_structured(data, {.topic = 2.0}, run_seed());
    Analysis a(data, ADAATTN_POLICY_SPEED, wave, false, Rules::kNeedles);
    a.args.log2_needle = std::log2(share);
    return expect_same_decisions(a);
  };
  AttentionCase c = base_case();
  const Counts many = check(c, kBf16All, 0, 0.01f), few = check(c, kBf16All, 0, 0.1f);
  EXPECT_GT(few.needles, 0u);
  EXPECT_GT(few.skipped, 0u);
  EXPECT_GT(many.needles, few.needles);
  check(c, kBf16All, 3, 0.01f);
  c.mask = ADAATTN_MASK_NONE;
  c.seqlen_q = 700;
  EXPECT_GT(check(c, kBf16All, 0, 0.01f).needles, 0u);
  c = base_case();
  c.window_left = 900;
  c.window_right = 0;
  c.mask = ADAATTN_MASK_NONE;
  check(c, kBf16All, 5, 0.01f);
  c = base_case();
  c.layout_q = c.layout_kv = ADAATTN_LAYOUT_THD;
  c.batch = 3;
  c.lens_q = {700, 0, 1290};
  c.lens_k = {1100, 640, 1290};
  check(c, kBf16All, 0, 0.01f);
  c = base_case();
  c.layout_q = c.layout_kv = ADAATTN_LAYOUT_BHSD;
  c.used_k = {1500, 1037};
  check(c, kBf16All, 0, 0.01f);
  c = base_case();
  c.batch = 5;
  c.heads_q = 3;
  c.heads_kv = 1;
  c.seqlen_q = c.seqlen_k = 900;
  check(c, kBf16All, 0, 0.01f);
  c = base_case();  // so many keys that three CTAs of levels fill a multiprocessor, and two
  c.batch = 1;
  c.seqlen_q = 300;
  for (const int64_t keys : {32000, 36000}) {
    c.seqlen_k = keys;
    check(c, kBf16All, 0, 0.01f);
  }
}

}  // namespace
}  // namespace adaattn::test
