// The walk over key tiles that some heads keep, with bf16 products: heads that share keys go together, so that a tile
// that several of them keep comes into second-level cache once.
#pragma once

#include "cpu_fallback/isa/adaptive_scratch-inl.h"

namespace adaattn::cpu {
namespace {

// Tiles of [at, end) that some head keeps, in order; a mask of null keeps all.
struct KeptTiles {
  const uint64_t* const* masks;
  int64_t heads, at, end;

  HWY_INLINE bool keeps(int64_t head, int64_t tile) const {
    return masks[head] == nullptr || tile_bit(masks[head], tile);
  }

  HWY_INLINE int64_t next() {
    for (; at < end; ++at) {
      for (int64_t h = 0; h < heads; ++h) {
        if (keeps(h, at)) return at++;
      }
    }
    return -1;
  }
};

// Brings the tiles to come into second-level cache, some lines with each group of keys: skipped tiles lie between them,
// over which the processor does not look ahead.
struct TilePrefetch : NothingElse {
  const char *k, *v;
  int64_t k_bytes, v_bytes;  // of a tile
  const int64_t* tiles = nullptr;
  int64_t count = 0, quota = 0;  // tiles; lines with each group
  int64_t at = 0, line = 0;      // tile, line of its K and V
  // Rows that are read or written when the walk has ended.
  static constexpr int64_t kMostRows = 2 * kMostHeads, kRowLines = 8;
  RowBytes rows[kMostRows];
  bool written[kMostRows];
  int64_t row_sets = 0, set = 0, row = 0, column = 0;

  // Panels whose queries are bytes.
  const Panel* panels = nullptr;
  const ByteQueries* byte_q = nullptr;
  int64_t panels_of_head = 0;
  bool of_bytes[kMostHeads] = {};  // heads
  const char* byte_tiles = nullptr;
  int64_t width = 0;  // of a row

  // Null: bf16.
  HWY_INLINE const ByteQueries* queries(const Panel& p) const {
    const int64_t at = &p - panels;
    return of_bytes[at / panels_of_head] ? byte_q + at : nullptr;
  }

#if defined(ADAATTN_UNIT_AMX)
  static_assert(kTileKeys % kScoreKeys == 0);
  HWY_INLINE void multiply(const ByteQueries& q, int64_t key, int64_t keys, float* s, float* factors) const {
    const char* tile = byte_tiles + key / kTileKeys * (kByteTileHead + kTileKeys * width);
    const int64_t row = key % kTileKeys;
    for (int64_t j = 0; j < keys; j += kStepKeys) factors[j / kStepKeys] = byte_head(tile).scale[(row + j) / kStepKeys];
    multiply_bytes(byte_rows(tile) + row * width, keys, q.q, width, s);
  }
#else
  HWY_INLINE void multiply(const ByteQueries& q, int64_t key, int64_t keys, float* s, float* max) const {
    for (int v = 0; v < kPanelVectors; ++v) hn::Store(hn::Set(kF32, -infinity()), kF32, max + v * kLanes);
    for (const int64_t last = key + keys; key < last;) {
      const int64_t row = key % kTileKeys, n = kTileKeys - row < last - key ? kTileKeys - row : last - key;
      score_bytes(byte_tiles + key / kTileKeys * (kByteTileHead + kTileKeys * width), row, n, width, q, s, max);
      s += n * kPanel;
      key += n;
    }
  }
#endif
  static_assert(kStepKeys == decide::kGroupK);

  HWY_INLINE void add_rows(const RowBytes& more, bool write) {
    if (more.rows == 0) return;
    rows[row_sets] = more;
    written[row_sets++] = write;
  }

  HWY_INLINE void touch_rows() {
    for (int64_t i = 0; i < kRowLines && set < row_sets; ++i) {
      const char* from = rows[set].first + row * rows[set].stride + column;
      if (written[set]) {
        __builtin_prefetch(from, 1, 2);
      } else {
        _mm_prefetch(from, _MM_HINT_T1);
      }
      column += 64;
      if (column < rows[set].bytes) continue;
      column = 0;
      if (++row < rows[set].rows) continue;
      row = 0;
      ++set;
    }
  }

  // Over `groups` groups.
  HWY_INLINE void start(const int64_t* to_come, int64_t n, int64_t groups) {
    finish();
    tiles = to_come;
    count = n;
    at = line = 0;
    const int64_t lines = n * ((k_bytes + v_bytes) / 64);
    quota = groups > 0 ? (lines + groups - 1) / groups : lines;
    quota = round_up(quota, kLines);
  }

  HWY_INLINE void finish() {
    while (at < count) touch_tiles();
  }

  HWY_INLINE void before_group() {
    touch_tiles();
    touch_rows();
  }

  // The second line of a pair comes with the first.
  static constexpr int64_t kLines = 2;

  HWY_INLINE void touch_tiles() {
    const int64_t k_lines = k_bytes / 64, lines = (k_bytes + v_bytes) / 64;
    for (int64_t left = quota; left > 0 && at < count;) {
      const char* from =
          line < k_lines ? k + tiles[at] * k_bytes + line * 64 : v + tiles[at] * v_bytes + (line - k_lines) * 64;
      _mm_prefetch(from, _MM_HINT_T1);
      line += kLines;
      left -= kLines;
      if (line < lines) continue;
      line = 0;
      ++at;
    }
  }
};

// Scores are taken in groups of keys. Only where tiles are whole groups does it not matter to a head which tiles of the
// others stand between its own.
constexpr int64_t kHeadsTogether = kTileKeys % kScoreKeys == 0 ? kMostHeads : 1;

// The visible keys of every head's panels: some tiles at a time, for one panel after another.
struct KeptRuns {
  static constexpr int64_t kMostTiles = 4;
  KeptTiles tiles;
  Panel* panels;
  int64_t panels_of_head, len;
  TilePrefetch& prefetch;
  int64_t* kept;  // of each head
  int64_t now[kMostTiles], to_come[kMostTiles];
  int64_t count = 0, next_count = 0, panel = 0, at = 0;

  HWY_INLINE void fetch() {
    next_count = 0;
    while (next_count < kMostTiles) {
      const int64_t tile = tiles.next();
      if (tile < 0) break;
      to_come[next_count++] = tile;
    }
  }

  // The next tiles; false: there are none.
  HWY_INLINE bool advance() {
    if (next_count == 0) return false;
    count = next_count;
    for (int64_t i = 0; i < count; ++i) now[i] = to_come[i];
    fetch();
    int64_t of_heads = 0;
    for (int64_t h = 0; h < tiles.heads; ++h) {
      int64_t n = 0;
      for (int64_t i = 0; i < count; ++i) n += tiles.keeps(h, now[i]) ? 1 : 0;
      kept[h] += n;
      of_heads += n;
    }
    constexpr int64_t kGroups = (kTileKeys + kScoreKeys - 1) / kScoreKeys;
    prefetch.start(to_come, next_count, of_heads * panels_of_head * kGroups);
    panel = at = 0;
    return true;
  }

  HWY_INLINE bool next(KeyRun& run) {
    while (true) {
      if (panel == tiles.heads * panels_of_head || count == 0) {
        if (!advance()) return false;
      }
      const int64_t head = panel / panels_of_head;
      Panel& p = panels[panel];
      while (at < count) {
        if (!tiles.keeps(head, now[at])) {
          ++at;
          continue;
        }
        const int64_t first = now[at] * kTileKeys;
        int64_t last = first + kTileKeys;
        for (++at; at < count && now[at] * kTileKeys == last && tiles.keeps(head, now[at]); ++at) last += kTileKeys;
        last = last < len ? last : len;
        const int64_t begin = p.first > first ? p.first / kStepKeys * kStepKeys : first;
        const int64_t end = p.last < last ? p.last : last;
        if (begin >= end || p.first >= p.last) continue;
        run = {&p, begin, end};
        return true;
      }
      at = 0;
      ++panel;
    }
  }
};

// The tiles of [first, last) that are in the heads' masks (null: all) for panels_of_head panels of each; adds the
// number of tiles of each head to `kept`.
HWY_INLINE void exact_tiles(const AdaptiveTileArgs* each, TileScratch& x, const Values& values, int64_t heads,
                            int64_t panels_of_head, const uint64_t* const* masks, int64_t first, int64_t last,
                            int64_t* kept) {
  const AdaptiveTileArgs& args = each[0];
  const int64_t width = round_up(values.width, 32);
  TilePrefetch prefetch;
  prefetch.k = reinterpret_cast<const char*>(args.keys.packed_k);
  prefetch.v = reinterpret_cast<const char*>(values.packed);
  prefetch.k_bytes = packed_elements(args.rows.d_qk) * 2;
  prefetch.v_bytes = kTileKeys * width * 2;
  bool all_bytes = true;
  for (int64_t h = 0; h < heads; ++h) {
    prefetch.of_bytes[h] = each[h].bytes;
    all_bytes = all_bytes && each[h].bytes;
  }
  prefetch.panels = x.panels;
  prefetch.byte_q = x.byte_q;
  prefetch.panels_of_head = panels_of_head;
  prefetch.byte_tiles = args.keys.byte_tiles;
  prefetch.width = byte_width(args.rows.d_qk);
  if (all_bytes) {
    prefetch.k = args.keys.byte_tiles;
    prefetch.k_bytes = byte_tile_bytes(args.rows.d_qk);
  }
  if (args.row_count == kTileRows) {
    for (int64_t h = 0; h < heads; ++h) {
      const RowOperands& rows = each[h].rows;
      if (rows.group == 1)
        prefetch.add_rows({row_address(rows.o, 1, args.row_begin), rows.o.stride_s * element_bytes(rows.o.dtype),
                           args.row_count, rows.d_v * element_bytes(rows.o.dtype)},
                          true);
    }
    for (int64_t h = 0; h < heads; ++h) prefetch.add_rows(each[h].next_q, false);
  }
  KeptRuns runs{{masks, heads, first, last}, x.panels, panels_of_head, args.keys.len, prefetch, kept, {}, {}};
  runs.fetch();
  walk_keys(KeyWalk<TilePrefetch, KeptRuns>{.k = args.keys.packed_k,
                                            .vt = values.packed,
                                            .origin = 0,
                                            .d_qk = round_up(args.rows.d_qk, 32),
                                            .d_v = width,
                                            .s = x.s,
                                            .block_max = x.block_max,
                                            .factor = score_rule(args.rows).query_factor,
                                            .extra = prefetch,
                                            .runs = runs},
            args.rows.entropy.data != nullptr);
}

// The largest score of each query over a tile's 128 keys.
HWY_INLINE void tile_maximum(const AdaptiveTileArgs& args, TileScratch& x, int64_t panel, int64_t tile) {
  const int64_t d = round_up(args.rows.d_qk, 32);
  multiply_scores(args.keys.packed_k + tile * kTileKeys * d, d, kTileKeys, x.words[panel], d, x.s);
  scale_scores(x.s, kTileKeys, score_rule(args.rows).query_factor);
  block_maximum(x.s, kTileKeys, x.block_max);
}

}  // namespace
}  // namespace adaattn::cpu
