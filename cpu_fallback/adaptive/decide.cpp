#include <algorithm>
#include <cmath>

#include "cpu_fallback/adaptive/call.h"
#include "decide/cells.h"
#include "decide/costs.h"
#include "decide/precision.h"

namespace adaattn::cpu {
namespace {

// Exponential, masking and bookkeeping of one score, in multiply-adds.
constexpr float kScoreCost = 14;
// Panels of few rows run below the speed of whole tiles, and a probe has to look at every maximum.
constexpr float kProbeOverhead = 6;

// Root mean square error of rounding an element to bf16, relative.
constexpr float kRoundingToBf16 = 1.7e-3f;

decide::CostTable cost_table(const UnitShape& s, const decide::Options& o, const AdaptiveKernels& kernels) {
  const auto d_qk = static_cast<float>(s.d_qk);
  const float probe_width = o.probe == decide::Probe::kRank ? static_cast<float>(s.probe_rank) : d_qk;
  decide::CostTable c =
      decide::product_costs(d_qk, static_cast<float>(s.d_v), kScoreCost, probe_width + kProbeOverhead);
  if (!s.rounds) return c;
  // In units of tiles of wider products.
  for (int rank_class = 0; rank_class < decide::kRankClasses; ++rank_class) {
    c.tile[rank_class] *= kernels.bf16_cost;
    c.per_query_tile[rank_class] *= kernels.bf16_cost;
  }
  c.far_tile *= kernels.bf16_cost;
  c.probe_tile *= kernels.bf16_cost;
  c.rank_setup *= kernels.bf16_cost;
  return c;
}

decide::ByteScores byte_scores(const UnitShape& s, const AdaptiveKernels& kernels, const decide::CostTable& c) {
  decide::ByteScores bytes;
  const auto d_qk = static_cast<float>(s.d_qk);
  const float of_scores = c.tile[0] * d_qk / (d_qk + static_cast<float>(s.d_v) + kScoreCost);
  for (int rank_class = 0; rank_class < decide::kRankClasses; ++rank_class)
    bytes.tile[rank_class] = c.tile[rank_class] - (1 - kernels.byte_cost) * of_scores;
  return bytes;
}

// Means over the queries of a head, and over the keys.
struct RoundedSquares {
  float q = 0, q_step = 0, k = 0, k_step = 0;
};

RoundedSquares rounded_squares(const UnitShape& s, const Unit& unit, int64_t member) {
  double q = 0, q_step = 0, k = 0, k_step = 0;
  const int64_t tiles_q = (unit.seq.len_q + decide::kTileQ - 1) / decide::kTileQ;
  for (int64_t t = 0; t < tiles_q; ++t) {
    q += unit.query_squares[member * s.query_tiles + t];
    q_step += unit.query_steps[member * s.query_tiles + t];
  }
  for (int64_t t = 0; t < unit.keys.tiles; ++t) {
    k += unit.key_squares[t];
    k_step += unit.key_steps[t];
  }
  const double queries = static_cast<double>(std::max<int64_t>(tiles_q, 1)), keys = static_cast<double>(unit.seq.len_k);
  return {static_cast<float>(q / queries), static_cast<float>(q_step / queries), static_cast<float>(k / keys),
          static_cast<float>(k_step / keys)};
}

}  // namespace

void decide_unit(const AdaptiveCall& call, Unit& unit, const decide::HeadFeedback* feedback,
                 const decide::HeadChoice* frozen) {
  const UnitShape& s = call.shape;
  const decide::Options& o = call.problem.adaptive;
  const int64_t tiles_q = (unit.seq.len_q + decide::kTileQ - 1) / decide::kTileQ;

  bool usable = unit.finite && unit.v_spread > 0;
  decide::HeadLevels levels[64];
  decide::HeadChoice choices[64];
  for (int64_t g = 0; g < s.group; ++g) {
    HeadState& head = unit.heads[g];
    head = {};
    double entropy = 0;
    int64_t blocks = 0;
    decide::HeadLevels covered;
    for (int64_t t = 0; t < tiles_q; ++t) {
      const decide::TileLevels& tile = unit.tile_levels[g * s.query_tiles + t];
      usable = usable && tile.usable;
      decide::add_block(tile, &head.levels);
      if (s.masked && tile.row.begin < tile.row.end) covered.kept[o.min_level] += unit.covered[g * s.query_tiles + t];
      if (tile.row.begin >= tile.row.end) continue;
      entropy += tile.entropy;
      ++blocks;
    }
    head.entropy = blocks > 0 ? entropy / static_cast<double>(blocks) : 0;
    head.tiles = static_cast<int64_t>(head.levels.tiles);
    covered.tiles = head.levels.tiles;
    // All masses alike: peaks and needles would follow noise.
    if (s.masked && !decide::is_selective(covered, o.min_level)) head.levels.kept[o.min_level] = head.levels.tiles;
  }

  if (usable && unit.rank_class > 0) {
    double captured = 0;
    for (int64_t t = 0; t < unit.keys.tiles; ++t) captured += unit.captured[t];
    const double total = static_cast<double>(unit.v_spread) * unit.v_spread * static_cast<double>(unit.seq.len_k);
    unit.rank_energy = static_cast<float>(std::min(1.0, captured / total));
    unit.errors.rank_allowed[unit.rank_class] = true;
    unit.errors.rank_error[unit.rank_class] = std::sqrt(1.0f - unit.rank_energy);
  }
  const decide::CostTable costs = cost_table(s, o, call.kernels);
  decide::ByteScores bytes = byte_scores(s, call.kernels, costs);
  if (usable && s.rounds) {
    // Scores, as those of bytes do (precision.h); and weights and V.
    float most = 0;
    for (int64_t g = 0; g < s.group; ++g) {
      const RoundedSquares x = rounded_squares(s, unit, g);
      most = std::max(most, x.q * x.k);
    }
    const float of_scores = call.params.scale * kRoundingToBf16 * std::sqrt(2 * most / static_cast<float>(s.d_qk));
    unit.errors.round_error = decide::quadrature(of_scores, 2 * kRoundingToBf16);
  }
  // The narrower products of dense heads would not be exact.
  const bool too_narrow = !(unit.errors.round_error <= o.tolerance);
  decide::Options options = o;
  options.tiles = o.tiles && usable;
  // Groups larger than the local arrays choose in pieces, which at worst share the rank less well.
  for (int64_t first = 0; first < s.group; first += 64) {
    const int64_t count = std::min<int64_t>(64, s.group - first);
    for (int64_t g = 0; g < count; ++g) levels[g] = unit.heads[first + g].levels;
    if (frozen != nullptr) {
      for (int64_t g = 0; g < count; ++g) choices[g] = frozen[first + g];
    } else {
      decide::choose_group(options, costs, unit.errors, levels, feedback + first, static_cast<int>(count),
                           unit.keys.tiles, choices);
    }
    for (int64_t g = 0; g < count; ++g) {
      HeadState& head = unit.heads[first + g];
      if (frozen == nullptr && s.bytes && usable) {
        const RoundedSquares x = rounded_squares(s, unit, first + g);
        bytes.round_error = std::sqrt(decide::byte_variance(call.params.scale, x.q, x.q_step, x.k, x.k_step));
        decide::take_bytes(options, costs, unit.errors, levels[g], bytes, feedback[first + g], &choices[g]);
      }
      head.choice = choices[g];
      head.refused = decide::is_refused(options, unit.errors, levels[g], choices[g], feedback[first + g]);
      if (!usable || too_narrow || (choices[g].rank_class != 0 && choices[g].rank_class != unit.rank_class))
        head.choice = {};
      head.round_error =
          head.choice.bytes ? decide::quadrature(unit.errors.round_error, bytes.round_error) : unit.errors.round_error;
    }
  }
}

void mask_of_level(const decide::TileLevels& levels, int level, const TileMasses& x, uint32_t keep_peak, int64_t words,
                   uint64_t* mask) {
  std::fill(mask, mask + words, uint64_t{0});
  for (int32_t t = levels.row.begin; t < levels.row.end; ++t) {
    const int32_t i = t - levels.row.begin;
    if (decide::keeps_tile(levels, level, t, x.mass[i], x.peak[i], keep_peak)) mask[t / 64] |= uint64_t{1} << t % 64;
  }
}

void tile_mask(const AdaptiveCall& call, const Unit& unit, int64_t member, int64_t tile, const TileMasses& x,
               uint64_t* mask) {
  const UnitShape& s = call.shape;
  const decide::Options& o = call.problem.adaptive;
  const int64_t index = member * s.query_tiles + tile;
  const decide::TileLevels& levels = unit.tile_levels[index];
  const int level = unit.heads[member].choice.level;
  if (levels.row.begin >= levels.row.end) {
    std::fill(mask, mask + s.mask_words, uint64_t{0});
  } else if (s.masked && level == o.min_level) {
    std::copy_n(unit.masks + index * s.mask_words, s.mask_words, mask);
  } else {
    // Levels without a search keep everything.
    if (!s.masked) weigh_tiles(call, unit, member, tile, x);
    mask_of_level(levels, level, x, o.keep_peak, s.mask_words, mask);
  }
}

}  // namespace adaattn::cpu
