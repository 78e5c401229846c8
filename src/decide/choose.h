// The choice of a kernel class per head: which rank of V, which mass level, or dense. Small tables in, a few integers
// out; the same code on the host and on the device.
//
// Error model (relative to the spread of V, err of adaattn.h). Skipped tiles and the projection of V are coherent over
// keys and add linearly; roundings are independent and add in quadrature:
//   predicted = f (e_rank + dropped * D) + sqrt(e_round^2)
// f is the head's feedback multiplier (feedback.h), D the spread that a dropped tile's replacement misses.
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "decide/feedback.h"
#include "decide/fixed_math.h"
#include "decide/policy.h"
#include "decide/tile_levels.h"
#include "decide/tile_mass.h"

namespace adaattn::decide {

// Ranks of V that the kernels offer; 0 stands for V as it is.
constexpr int kRankClasses = 4;
ADAATTN_HD inline int rank_of_class(int rank_class) { return rank_class == 0 ? 0 : 128 - 32 * rank_class; }  // 96 64 32

// What a back-end's kernels cost, in units of one exact tile of the problem at hand.
struct CostTable {
  float tile[kRankClasses] = {1, 1, 1, 1};  // one kept tile
  float far_tile = 0;                       // one skipped tile represented by its centroids
  float probe_tile = 0;                     // one skipped tile swept by the probe
  float per_query_tile[kRankClasses] = {};  // up-projection and schedule, per query block
  float rank_setup = 0;                     // projecting one key tile of V, per KV head
};

// Counted over the query blocks of one query head.
struct HeadLevels {
  uint64_t query_tiles = 0;
  uint64_t tiles = 0;           // tiles with any visible key
  uint64_t kept[kLevels] = {};  // tiles computed exactly at each level
  // Sum over query blocks of (dropped mass in units of 2^-16)^2.
  uint64_t dropped_sq[kLevels] = {};
};

ADAATTN_HD inline void add_block(const TileLevels& block, HeadLevels* head) {
  const int64_t tiles = block.row.end - block.row.begin;
  if (tiles <= 0) return;
  head->query_tiles += 1;
  head->tiles += static_cast<uint64_t>(tiles);
  for (int level = 0; level < kLevels; ++level) {
    head->kept[level] += block.kept[level];
    head->dropped_sq[level] += static_cast<uint64_t>(block.dropped[level]) * block.dropped[level];
  }
}

struct GroupErrors {
  float rank_error[kRankClasses] = {};  // e_rank of each class; [0] is 0
  bool rank_allowed[kRankClasses] = {true, false, false, false};
  float drop_spread = 1;  // RMS of tile means of V around the head's mean, relative to the spread of V
  float far_spread = 0;   // RMS of keys around their 32-key centroid, relative
  float round_error = 0;  // e_round of the arithmetic in use
};

// A head's multipliers on the predicted error, learned from what verify measures (feedback.h). One per rank class: what
// projecting V costs says nothing about what skipping tiles does.
struct HeadFeedback {
  float multiplier[kRankClasses] = {1, 1, 1, 1};
};

struct HeadChoice {
  int32_t level = kDenseLevel;
  int32_t rank_class = 0;
  bool dense = true;   // nothing is worth skipping: the exact kernel runs
  bool bytes = false;  // products in 8 bits: precision.h
  float predicted_error = 0;
  float predicted_cost = 0;  // in exact tiles
};

ADAATTN_HD inline float dropped_rms(const HeadLevels& h, int level) {
  if (h.query_tiles == 0 || h.dropped_sq[level] == 0) return 0.0f;
  const float mean = static_cast<float>(h.dropped_sq[level]) / static_cast<float>(h.query_tiles);
  return fixed_exp2(0.5f * fixed_log2(mean) - 16.0f);
}

ADAATTN_HD inline float level_cost(const Options& o, const CostTable& c, const HeadLevels& h, int level, int rank) {
  const float kept = static_cast<float>(h.kept[level]);
  const float skipped = static_cast<float>(h.tiles - h.kept[level]);
  float per_skipped = o.far_field ? c.far_tile : 0.0f;
  if (o.probe != Probe::kOff) per_skipped += c.probe_tile;
  return kept * c.tile[rank] + skipped * per_skipped + static_cast<float>(h.query_tiles) * c.per_query_tile[rank];
}

ADAATTN_HD inline float level_error(const Options& o, const GroupErrors& e, const HeadLevels& h, int level, int rank,
                                    float feedback) {
  const float spread = o.far_field ? e.far_spread : e.drop_spread;
  const float coherent = e.rank_error[rank] + dropped_rms(h, level) * spread;
  return fixed_fma(feedback, coherent, e.round_error);
}

// Whether a level keeps markedly fewer tiles than its share of the mass. Where all masses are alike (random input) the
// estimates do not say which tiles matter, and a choice among them would follow noise.
ADAATTN_HD inline bool is_selective(const HeadLevels& h, int level) {
  return 100 * (h.kept[level] << 16) < 95 * h.tiles * level_mass(level);
}

// The cheapest mass level of one head at a rank that stays within the tolerance; false if there is none. The exact
// class at the dense level is always within it.
ADAATTN_HD inline bool best_level(const Options& o, const CostTable& c, const GroupErrors& e, const HeadLevels& h,
                                  int rank, float feedback, HeadChoice* choice) {
  bool found = false;
  for (int level = o.tiles ? o.min_level : kDenseLevel; level <= kDenseLevel; ++level) {
    if (level < kDenseLevel && !is_selective(h, level)) continue;
    const float error = level_error(o, e, h, level, rank, feedback);
    if (error > o.tolerance && !(level == kDenseLevel && rank == 0)) continue;
    const float cost = level_cost(o, c, h, level, rank);
    if (found && cost >= choice->predicted_cost) continue;
    *choice = {level, rank, false, false, error, cost};
    found = true;
  }
  return found;
}

// Whether a head skips nothing because even the lowest level's prediction at V's full rank is over the tolerance.
ADAATTN_HD inline bool is_refused(const Options& o, const GroupErrors& e, const HeadLevels& h, const HeadChoice& choice,
                                  const HeadFeedback& feedback) {
  return o.tiles && choice.level == kDenseLevel && is_selective(h, o.min_level) &&
         level_error(o, e, h, o.min_level, 0, feedback.multiplier[0]) > o.tolerance;
}

// After each call that decided so: the multiplier that is_refused() goes by, whichever rank the head took.
ADAATTN_HD inline void rest_refused(HeadFeedback* feedback) {
  feedback->multiplier[0] = rested_feedback(feedback->multiplier[0]);
}

// A gain under this factor is not worth a different kernel.
constexpr float kMinGain = 1.15f;

// Chooses for the `group` query heads of one KV head: they share the rank, each has its own level.
ADAATTN_HD inline void choose_group(const Options& o, const CostTable& c, const GroupErrors& e, const HeadLevels* heads,
                                    const HeadFeedback* feedback, int group, int64_t key_tiles, HeadChoice* out) {
  float best_cost = 0, dense_cost = 0;
  for (int h = 0; h < group; ++h) dense_cost += static_cast<float>(heads[h].tiles);
  int best_rank = -1;
  for (int rank = 0; rank < kRankClasses; ++rank) {
    if (!e.rank_allowed[rank]) continue;
    bool feasible = true;
    float cost = rank == 0 ? 0.0f : static_cast<float>(key_tiles) * c.rank_setup;
    for (int h = 0; h < group && feasible; ++h) {
      HeadChoice choice;
      feasible = best_level(o, c, e, heads[h], rank, feedback[h].multiplier[rank], &choice);
      cost += choice.predicted_cost;
    }
    if (feasible && (best_rank < 0 || cost < best_cost)) {
      best_rank = rank;
      best_cost = cost;
    }
  }
  const bool dense = best_rank < 0 || best_cost * kMinGain > dense_cost;
  for (int h = 0; h < group; ++h) {
    HeadChoice choice;
    choice.predicted_cost = static_cast<float>(heads[h].tiles);
    choice.predicted_error = e.round_error;
    if (!dense) best_level(o, c, e, heads[h], best_rank, feedback[h].multiplier[best_rank], &choice);
    out[h] = choice;
  }
}

}  // namespace adaattn::decide
