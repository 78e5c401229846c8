#include "cpu_fallback/adaptive/tile_map.h"

#include <algorithm>

#include "core/error.h"
#include "cpu_fallback/adaptive/call.h"
#include "cpu_fallback/attend/layout.h"

namespace adaattn::cpu {
namespace {

constexpr size_t kMaxBytes = size_t{16} << 20;

}  // namespace

TileRange visible_tiles(const AttnParams& params, const Sequence& seq, int64_t query_tile) {
  const int64_t first = query_tile * decide::kTileQ;
  int64_t lowest = seq.len_k, highest = 0;
  for (int64_t i = first; i < std::min(first + decide::kTileQ, seq.len_q); ++i) {
    const KeyRange range = visible_keys(params, seq, i);
    if (range.begin >= range.end) continue;
    lowest = std::min(lowest, range.begin);
    highest = std::max(highest, range.end);
  }
  if (lowest >= highest) return {};
  return {lowest / decide::kTileK, ceil_div(highest, decide::kTileK)};
}

TileMaps::TileMaps(const Problem& problem, const UnitShape& shape)
    : heads_q_(problem.heads_q), group_(shape.group), query_tiles_(shape.query_tiles), words_(shape.mask_words) {
  // In floating point: the product of maxima that a descriptor may name need not fit an integer.
  const double bytes = 8.0 * static_cast<double>(problem.max_batch) * static_cast<double>(heads_q_) *
                       static_cast<double>(query_tiles_) * static_cast<double>(words_);
  wanted_bytes_ = static_cast<size_t>(std::min(bytes, 1e18));
  if (wanted_bytes_ > kMaxBytes) return;
  bits_.resize(wanted_bytes_ / sizeof(uint64_t));
  visible_.resize(static_cast<size_t>(problem.max_batch * query_tiles_));
  extents_.resize(static_cast<size_t>(problem.max_batch));
}

void TileMaps::begin_call(const AttnParams& params) {
  if (bits_.empty()) return;
  std::fill(extents_.begin(), extents_.end(), Extent{});
  for (int64_t b = 0; b < params.batch; ++b) {
    const Sequence seq = sequence_of(params, b);
    Extent& extent = extents_[static_cast<size_t>(b)];
    extent = {ceil_div(seq.len_q, decide::kTileQ), ceil_div(seq.len_k, decide::kTileK)};
    for (int64_t t = 0; t < extent.query_tiles; ++t)
      visible_[static_cast<size_t>(b * query_tiles_ + t)] = visible_tiles(params, seq, t);
  }
}

uint64_t* TileMaps::bits_of_unit(int64_t b, int64_t kv_head) {
  if (bits_.empty()) return nullptr;
  return bits_.data() + (b * heads_q_ + kv_head * group_) * query_tiles_ * words_;
}

TileMap TileMaps::read(int64_t b, int64_t head, bool all_exact) const {
  if (bits_.empty())
    fail(ADAATTN_ERROR_NOT_SUPPORTED,
         "plan has tile maps of %zu bytes; accepted: one whose maps of all heads at its maxima take at most %zu",
         wanted_bytes_, kMaxBytes);
  const Extent& extent = extents_[static_cast<size_t>(b)];
  TileMap map;
  map.query_tiles = extent.query_tiles;
  map.key_tiles = extent.key_tiles;
  map.tiles.resize(static_cast<size_t>(map.query_tiles * map.key_tiles));
  for (int64_t t = 0; t < map.query_tiles; ++t) {
    const TileRange& seen = visible_[static_cast<size_t>(b * query_tiles_ + t)];
    const uint64_t* bits = bits_.data() + ((b * heads_q_ + head) * query_tiles_ + t) * words_;
    uint8_t* row = map.tiles.data() + t * map.key_tiles;
    for (int64_t k = seen.begin; k < seen.end; ++k) row[k] = all_exact || tile_bit(bits, k) ? 2 : 1;
  }
  return map;
}

}  // namespace adaattn::cpu
