#include "gpu/host_decisions.h"

#include <algorithm>

#include "decide/needles.h"

namespace adaattn::test {
namespace {

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

}  // namespace

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
      const size_t first = static_cast<size_t>(b * s.heads_q + kv * s.group);
      std::vector<decide::HeadFeedback> feedback(static_cast<size_t>(s.group));
      for (size_t g = 0; g < feedback.size() && !a.feedback.empty(); ++g) feedback[g] = a.feedback[first + g];
      for (int piece = 0; piece < s.group; piece += 64)
        decide::choose_group(options, a.args.costs, u.errors, &out.head_levels[first + static_cast<size_t>(piece)],
                             &feedback[static_cast<size_t>(piece)], std::min(64, s.group - piece),
                             (seq.len_k + kTileK - 1) / kTileK, &out.choice[first + static_cast<size_t>(piece)]);
      for (size_t g = 0; g < feedback.size() && !a.feedback.empty(); ++g) {
        if (decide::is_refused(options, u.errors, out.head_levels[first + g], out.choice[first + g], feedback[g]))
          decide::rest_refused(&feedback[g]);
        out.feedback.push_back(feedback[g]);
      }
      decide::ByteScores bytes = a.args.bytes;
      bytes.per_head =
          bytes.per_head * static_cast<float>((seq.len_k + kTileK - 1) / kTileK) / static_cast<float>(s.group);
      for (size_t g = 0; g < feedback.size() && s.bytes; ++g) {
        decide::HeadChoice& choice = out.choice[first + g];
        if (decide::only_bytes(options))
          decide::put_in_bytes(out.head_levels[first + g], bytes, &choice);
        else
          decide::take_bytes(options, a.args.costs, u.errors, out.head_levels[first + g], bytes, feedback[g], &choice);
      }
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

}  // namespace adaattn::test
