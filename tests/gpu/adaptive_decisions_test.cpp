// The decisions of the device against the host's code on the same statistics, bit for bit.
#include <algorithm>
#include <map>

#include "decide/needles.h"
#include "gpu/analysis.h"

namespace adaattn::test {
namespace {

class AdaptiveDecisions : public OnTheDevice {};

// The host's walk over the device's statistics.
struct HostDecisions {
  std::vector<decide::TileLevels> levels;
  std::vector<decide::HeadLevels> head_levels;
  std::vector<decide::HeadChoice> choice;
  std::vector<uint64_t> mask;  // [heads, query_tiles, mask_words]
  uint64_t skipped = 0, needles = 0;
};

decide::TileRow row_of(const AttnParams& p, const Sequence& seq, int64_t tile, float* visible) {
  int64_t lowest = seq.len_k, highest = 0, begin_max = 0, end_min = seq.len_k, seen = 0, n = 0;
  for (int64_t i = tile * kTileQ; i < std::min((tile + 1) * kTileQ, seq.len_q); ++i, ++n) {
    const KeyRange range = visible_keys(p, seq, i);
    begin_max = std::max(begin_max, range.begin);
    end_min = std::min(end_min, range.end);
    if (range.begin >= range.end) continue;
    lowest = std::min(lowest, range.begin);
    highest = std::max(highest, range.end);
    seen += range.end - range.begin;
  }
  decide::TileRow row;
  if (lowest >= highest) return row;
  row.begin = static_cast<int32_t>(lowest / kTileK);
  row.end = static_cast<int32_t>((highest + kTileK - 1) / kTileK);
  row.full_begin = static_cast<int32_t>((begin_max + kTileK - 1) / kTileK);
  row.full_end = static_cast<int32_t>(end_min / kTileK);
  *visible = static_cast<float>(seen) / static_cast<float>(n);
  return row;
}

// The key tiles that finer cells keep.
class Needles {
 public:
  explicit Needles(const Analysis& a) : a_(a) {
    const TableShape& s = a.args.shape;
    if (!s.needles) return;
    const int64_t cells = a.units() * cuda::key_cells_of_unit(s), rows = a.heads() * s.query_tiles * kRows;
    keys_ = a.copy(a.args.tables.needle_keys, cells * decide::kNeedlesOfCell * s.d_qk);
    key_scales_ = a.copy(a.args.tables.needle_key_scales, cells);
    queries_ = a.copy(a.args.tables.needle_queries, rows * s.d_qk);
    query_scales_ = a.copy(a.args.tables.needle_query_scales, rows);
  }

  // Of each tile of the row, from its first on. cells: of the query tile's blocks.
  std::vector<bool> find(int64_t b, int64_t h, int64_t tile, const decide::TileRow& row,
                         const std::vector<decide::CellRow>& cells) const {
    const TableShape& s = a_.args.shape;
    std::vector<bool> found(static_cast<size_t>(row.end - row.begin));
    for (int64_t r = 0; r < kRows; ++r) {
      if (tile * kTileQ + r * decide::kNeedleRows >= sequence_of(a_.host, b).len_q) break;
      const int64_t query = ((b * s.heads_q + h) * s.query_tiles + tile) * kRows + r;
      const float limit = decide::needle_limit(cells[static_cast<size_t>(r * kCells / kRows)],
                                               query_scales_[static_cast<size_t>(query)], a_.args.log2_needle);
      const int32_t first = std::max(row.begin, row.full_begin), last = std::min(row.end, row.full_end);
      for (int64_t n = first * kNeedles; n < last * kNeedles; ++n)
        if (is_needle(b, h, query, n, limit)) found[static_cast<size_t>(n / kNeedles - row.begin)] = true;
    }
    return found;
  }

 private:
  static constexpr int64_t kRows = decide::kNeedleRowsOfTile, kNeedles = kCells * decide::kNeedlesOfCell;

  bool is_needle(int64_t b, int64_t h, int64_t query, int64_t needle, float limit) const {
    const TableShape& s = a_.args.shape;
    const int64_t cells = cuda::key_cells_of_unit(s), unit = b * s.heads_kv + h / s.group;
    const int8_t* q = queries_.data() + query * s.d_qk;
    const int8_t* k = keys_.data() + (unit * cells * decide::kNeedlesOfCell + needle) * s.d_qk;
    int32_t dot = 0;
    for (int64_t x = 0; x < s.d_qk; ++x) dot += q[x] * k[x];
    const auto cell = static_cast<size_t>(unit * cells + needle / decide::kNeedlesOfCell);
    return decide::is_needle(dot, key_scales_[cell], limit);
  }

  const Analysis& a_;
  std::vector<int8_t> keys_, queries_;
  std::vector<float> key_scales_, query_scales_;
};

HostDecisions decide_on_host(const Analysis& a) {
  const TableShape& s = a.args.shape;
  const int64_t d = s.d_qk, key_cells_each = cuda::key_cells_of_unit(s);
  const auto key_cells = a.copy(a.args.tables.key_cells, a.units() * key_cells_each * d);
  const auto key_scales = a.copy(a.args.tables.key_scales, a.units() * key_cells_each);
  const auto query_cells = a.copy(a.args.tables.query_cells, a.heads() * s.query_tiles * kCells * d);
  const auto query_scales = a.copy(a.args.tables.query_scales, a.heads() * s.query_tiles * kCells);
  const auto stats = a.copy(a.args.tables.units, a.units());
  HostDecisions out;
  out.levels.resize(static_cast<size_t>(a.heads() * s.query_tiles));
  out.head_levels.resize(static_cast<size_t>(a.heads()));
  out.choice.resize(static_cast<size_t>(a.heads()));
  out.mask.resize(static_cast<size_t>(a.heads() * s.query_tiles * s.mask_words));
  std::vector<uint32_t> mass(static_cast<size_t>(s.key_tiles)), peak(mass.size());
  std::vector<decide::CellRow> cell_rows(kCells);  // of the query tile weighed last
  const Needles needles(a);
  // Masses and peaks of the tiles of a row, from its first on; false if some score is not finite.
  const auto weigh = [&](int64_t b, int64_t h, int64_t tile, const decide::TileRow& row) {
    const Sequence seq = sequence_of(a.host, b);
    const int64_t unit = b * s.heads_kv + h / s.group, first = row.begin * kCells, last = row.end * kCells;
    std::fill(mass.begin(), mass.end(), 0);
    std::fill(peak.begin(), peak.end(), 0);
    std::vector<float> score(static_cast<size_t>(last - first));
    bool finite = true;
    for (int64_t block = tile * kCells; block < (tile + 1) * kCells && block * decide::kCell < seq.len_q; ++block) {
      const auto of_query = static_cast<size_t>((b * s.heads_q + h) * s.query_tiles * kCells + block);
      finite = finite && std::isfinite(query_scales[of_query]);
      const auto keys_of = [&](int64_t g) {
        return static_cast<int>(std::clamp<int64_t>(seq.len_k - g * decide::kCell, 0, decide::kCell));
      };
      decide::CellRow cells;
      cells.top = -INFINITY;
      for (int64_t g = first; g < last; ++g) {
        if (keys_of(g) == 0) continue;
        const auto of_key = static_cast<size_t>(unit * key_cells_each + g);
        int32_t dot = 0;
        for (int64_t x = 0; x < d; ++x)
          dot += query_cells[of_query * static_cast<size_t>(d) + static_cast<size_t>(x)] *
                 key_cells[of_key * static_cast<size_t>(d) + static_cast<size_t>(x)];
        float& own = score[static_cast<size_t>(g - first)];
        own = decide::cell_score(dot, query_scales[of_query], key_scales[of_key], keys_of(g));
        finite = finite && std::isfinite(own);
        cells.top = std::max(cells.top, own);
      }
      if (!finite) return false;
      uint64_t sum = 0;
      const auto mass_of = [&](int64_t g) {
        return keys_of(g) == 0 ? 0 : decide::integer_mass(score[static_cast<size_t>(g - first)], cells.top);
      };
      for (int64_t g = first; g < last; ++g) sum += mass_of(g);
      cells.inverse = 1.0f / static_cast<float>(sum);
      cell_rows[static_cast<size_t>(block % kCells)] = cells;
      for (int64_t t = row.begin; t < row.end; ++t) {
        uint32_t of_tile = 0, top = 0;
        for (int64_t g = t * kCells; g < (t + 1) * kCells; ++g) {
          of_tile += mass_of(g);
          top = std::max(top, mass_of(g));
        }
        const auto at = static_cast<size_t>(t - row.begin);
        mass[at] += decide::tile_share(of_tile, cells.inverse);
        peak[at] = std::max(peak[at], decide::cell_share(top, cells.inverse));
      }
    }
    return true;
  };
  // A needle's tile gets a peak that nothing else has.
  constexpr uint32_t kNeedle = UINT32_MAX;
  const uint32_t keep_peak = a.args.keep_peak != 0 || !s.needles ? a.args.keep_peak : kNeedle;
  const auto mark_needles = [&](int64_t b, int64_t h, int64_t tile, const decide::TileRow& row) {
    if (!s.needles) return;
    const std::vector<bool> found = needles.find(b, h, tile, row, cell_rows);
    for (size_t i = 0; i < found.size(); ++i)
      if (found[i]) peak[i] = kNeedle;
  };
  for (int64_t b = 0; b < a.host.batch; ++b) {
    const Sequence seq = sequence_of(a.host, b);
    for (int64_t h = 0; h < s.heads_q; ++h)
      for (int64_t tile = 0; tile * kTileQ < seq.len_q; ++tile) {
        float visible = 0;
        decide::TileLevels& levels = out.levels[static_cast<size_t>((b * s.heads_q + h) * s.query_tiles + tile)];
        levels.row = row_of(a.host, seq, tile, &visible);
        if (levels.row.begin < levels.row.end) {
          levels.usable = weigh(b, h, tile, levels.row);
          if (levels.usable) {
            mark_needles(b, h, tile, levels.row);
            decide::measure_cells(mass.data(), peak.data(), keep_peak, visible, &levels, 0,
                                  s.by_shares ? 1 : decide::kDenseLevel);
          }
        }
        decide::add_block(levels, &out.head_levels[static_cast<size_t>(b * s.heads_q + h)]);
      }
    for (int64_t kv = 0; kv < s.heads_kv; ++kv) {
      const cuda::UnitStats& u = stats[static_cast<size_t>(b * s.heads_kv + kv)];
      decide::Options options = a.args.options;
      options.tiles = options.tiles && u.usable != 0;
      const std::vector<decide::HeadFeedback> feedback(static_cast<size_t>(s.group));
      const size_t first = static_cast<size_t>(b * s.heads_q + kv * s.group);
      for (int piece = 0; piece < s.group; piece += 64)
        decide::choose_group(options, a.args.costs, u.errors, &out.head_levels[first + static_cast<size_t>(piece)],
                             feedback.data(), std::min(64, s.group - piece), (seq.len_k + kTileK - 1) / kTileK,
                             &out.choice[first + static_cast<size_t>(piece)]);
      for (size_t g = first; g < first + static_cast<size_t>(s.group) && u.usable == 0; ++g) out.choice[g] = {};
    }
    for (int64_t h = 0; h < s.heads_q; ++h)
      for (int64_t tile = 0; tile * kTileQ < seq.len_q; ++tile) {
        const int64_t index = (b * s.heads_q + h) * s.query_tiles + tile;
        const decide::TileLevels& levels = out.levels[static_cast<size_t>(index)];
        const decide::HeadChoice& choice = out.choice[static_cast<size_t>(b * s.heads_q + h)];
        if (levels.row.begin >= levels.row.end) continue;
        if (weigh(b, h, tile, levels.row)) mark_needles(b, h, tile, levels.row);
        for (int32_t t = levels.row.begin; t < levels.row.end; ++t) {
          const auto at = static_cast<size_t>(t - levels.row.begin);
          const bool keep = choice.dense || decide::keeps_tile(levels, choice.level, t, mass[at], peak[at], keep_peak);
          if (peak[at] == kNeedle && !choice.dense &&
              !decide::keeps_tile(levels, choice.level, t, mass[at], 0, keep_peak))
            ++out.needles;
          if (keep)
            out.mask[static_cast<size_t>(index * s.mask_words + t / 64)] |= uint64_t{1} << t % 64;
          else
            ++out.skipped;
        }
      }
  }
  return out;
}

void expect_same(const decide::HeadChoice& a, const decide::HeadChoice& b) {
  EXPECT_EQ(a.level, b.level);
  EXPECT_EQ(a.rank_class, b.rank_class);
  EXPECT_EQ(a.dense, b.dense);
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
    const auto work = a.copy(a.args.tables.work, decide::kRankClasses * a.heads() * s.wave_tiles);
    const auto count = a.copy(a.args.tables.work_count, decide::kRankClasses);
    std::map<uint32_t, int> listed;
    for (int rank_class = 0; rank_class < decide::kRankClasses; ++rank_class) {
      int32_t before = s.key_tiles + 1;
      int64_t section = 0;
      const int32_t coarse = s.key_tiles / cuda::kWorkBuckets + 1;
      for (uint32_t i = 0; i < count[static_cast<size_t>(rank_class)]; ++i) {
        const uint32_t item = work[static_cast<size_t>(rank_class * a.heads() * s.wave_tiles + i)];
        ++listed[item];
        const int64_t of_item = item / static_cast<uint32_t>(s.wave_tiles * s.group) / a.section_units();
        EXPECT_GE(of_item, section);
        if (of_item != section) before = s.key_tiles + 1;
        section = of_item;
        EXPECT_EQ(choice[item / static_cast<uint32_t>(s.wave_tiles)].rank_class, rank_class);
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
  c = base_case();  // so many keys that two CTAs fill a multiprocessor
  c.batch = 1;
  c.seqlen_q = 300;
  c.seqlen_k = 32000;
  check(c, kBf16All, 0, 0.01f);
}

}  // namespace
}  // namespace adaattn::test
