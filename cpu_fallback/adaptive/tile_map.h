// Which key tiles the newest call of an adaptive plan computed exactly: one bit per tile, kept beside the statistics.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "backend.h"
#include "cpu_fallback/adaptive/unit.h"

namespace adaattn::cpu {

// Key tiles with any key that a query tile sees; begin >= end: none.
struct TileRange {
  int64_t begin = 0, end = 0;
};
TileRange visible_tiles(const AttnParams& params, const Sequence& seq, int64_t query_tile);

class TileMaps {
 public:
  // Without the constructor's memory read() says that the plan keeps no maps. All memory is taken here.
  TileMaps() = default;
  TileMaps(const Problem& problem, const UnitShape& shape);

  // Forgets the previous call and notes what the queries of this one see.
  void begin_call(const AttnParams& params);
  // Bits of a unit's query heads, [group][query_tiles][words]; null if no maps are kept.
  uint64_t* bits_of_unit(int64_t b, int64_t kv_head);
  // all_exact: the head was computed without looking at its tiles.
  TileMap read(int64_t b, int64_t head, bool all_exact) const;

 private:
  struct Extent {
    int64_t query_tiles = 0, key_tiles = 0;
  };
  int64_t heads_q_ = 0, group_ = 1, query_tiles_ = 0, words_ = 0;
  size_t wanted_bytes_ = 0;
  std::vector<uint64_t> bits_;      // [max_batch][heads_q][query_tiles][words]
  std::vector<TileRange> visible_;  // [max_batch][query_tiles]
  std::vector<Extent> extents_;     // [max_batch]
};

}  // namespace adaattn::cpu
