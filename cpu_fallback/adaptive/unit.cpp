#include "cpu_fallback/adaptive/unit.h"

#include <algorithm>

#include "cpu_fallback/adaptive/statistics.h"
#include "decide/cells.h"

namespace adaattn::cpu {
namespace {

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Rows of whole cache lines, one more than needed, so that rows of a power-of-two length do not share cache sets.
int64_t padded(int64_t width) { return divide_up(width, 16) * 16 + 16; }

}  // namespace

UnitShape unit_shape(const Problem& problem, const AdaptiveKernels& kernels, int64_t exact_tiles) {
  const decide::Options& o = problem.adaptive;
  UnitShape s;
  s.packs = kernels.pack_keys != nullptr;
  s.rounds = s.packs && problem.dtype_kv != Dtype::kBF16;
  s.bytes = kernels.pack_bytes != nullptr && o.min_precision <= decide::Precision::kI8;
  s.precision = s.packs ? decide::Precision::kBF16 : static_cast<decide::Precision>(input_precision(problem.dtype_kv));
  s.masked = o.tiles && o.keep_peak != 0;
  s.needles = s.masked && o.needle_mass > 0;
  s.d_qk = problem.d_qk;
  s.d_v = problem.d_v;
  s.exact_tiles = exact_tiles;
  s.group = problem.heads_q / problem.heads_kv;
  s.heads = std::min(s.group, kernels.heads_together);
  s.len_k = problem.max_seqlen_k;
  s.key_tiles = divide_up(s.len_k, decide::kTileK);
  s.key_groups = divide_up(s.len_k, decide::kGroupK);
  s.query_tiles = divide_up(problem.max_seqlen_q, decide::kTileQ);
  s.direct = s.packs && !s.rounds && s.masked && !o.far_field && s.d_qk % 32 == 0 && s.d_v % 32 == 0;
  s.mask_words = divide_up(s.key_tiles, 64);
  s.dropped_floats = o.remainder > 0 ? decide::kCellsOfTile * dropped_stride(s.d_v) : 0;
  if (s.needles) {
    s.needle_block_bytes = static_cast<int64_t>(kernels.needle_block_bytes(s.d_qk));
    s.needle_row_bytes = static_cast<int64_t>(kernels.needle_row_bytes(s.d_qk));
  }
  s.k_stride = padded(s.d_qk);
  s.v_stride = padded(s.d_v);
  s.group_k_stride = padded(2 * s.d_qk + 1);
  for (int rank_class = 1; rank_class < decide::kRankClasses; ++rank_class) {
    const int64_t rank = decide::rank_of_class(rank_class);
    // Over half of d_v, what a projection saves hardly pays for finding it.
    if (o.rank_mode != decide::RankMode::kOff && 2 * rank <= s.d_v) s.max_rank = std::max(s.max_rank, rank);
  }
  s.low_stride = s.max_rank > 0 ? padded(s.max_rank) : 0;
  s.probe_rank = o.probe == decide::Probe::kRank ? o.probe_rank : 0;
  if (s.probe_rank > 0) s.probe_tile_bytes = static_cast<int64_t>(kernels.probe_tile_bytes(s.probe_rank));
  return s;
}

void lay_out_unit(const UnitShape& s, const decide::Options& o, Arena& arena, Unit& u) {
  const int64_t wide_rows = s.packs ? 0 : s.len_k;
  u.k = arena.take<float>(wide_rows * s.k_stride);
  u.v = arena.take<float>(wide_rows * s.v_stride);
  u.v_low = arena.take<float>(wide_rows * s.low_stride);
  const int64_t packed_tiles = s.packs ? s.key_tiles : 0;
  u.packed_k = arena.take<uint16_t>(packed_tiles * packed_elements(s.d_qk));
  u.packed_v = arena.take<uint32_t>(packed_tiles * packed_elements(s.d_v) / 2);
  u.packed_v_low = arena.take<uint32_t>(packed_tiles * packed_elements(s.max_rank) / 2);
  u.packed_groups = arena.take<uint16_t>(packed_tiles * (decide::kTileK / decide::kGroupK) * 2 * packed_width(s.d_qk));
  u.probe_tiles = arena.take<char>(s.key_tiles * s.probe_tile_bytes);
  u.group_k = arena.take<float>(s.key_groups * s.group_k_stride);
  u.group_v = arena.take<float>(s.key_groups * s.v_stride);
  u.group_v_low = arena.take<float>(s.key_groups * s.low_stride);
  u.k_mean = arena.take<float>(s.d_qk);
  u.v_mean = arena.take<float>(s.d_v);
  u.basis = arena.take<float>(s.d_v * s.max_rank);
  u.probe_basis = arena.take<float>((s.probe_rank + 1) * s.d_qk);
  u.probe_key_basis = arena.take<float>(s.d_qk * padded_rank(s.probe_rank));
  const int64_t key_cells = divide_up(s.key_tiles * decide::kCellsOfTile, kCellBlock) * kCellBlock;
  const int64_t query_cells = s.group * s.query_tiles * decide::kCellsOfTile;
  u.key_cells = arena.take<float>(key_cells * s.d_qk);
  u.key_scales = arena.take<float>(key_cells);
  u.query_cells = arena.take<float>(query_cells * s.d_qk);
  u.query_scales = arena.take<float>(query_cells);
  u.needle_means = arena.take<float>(s.needles ? s.key_tiles * kNeedleLanes * s.d_qk : 0);
  u.needle_blocks = arena.take<char>(s.key_tiles * s.needle_block_bytes);
  u.needle_scales = arena.take<float>(s.needles ? s.key_tiles * decide::kCellsOfTile : 0);
  u.masks = arena.take<uint64_t>(s.masked ? s.group * s.query_tiles * s.mask_words : 0);
  u.covered = arena.take<uint32_t>(s.masked ? s.group * s.query_tiles : 0);
  u.dropped = arena.take<float>(s.masked ? s.group * s.query_tiles * s.dropped_floats : 0);
  const bool rounds = s.rounds || s.bytes;
  u.byte_tiles = arena.take<char>(s.bytes ? s.key_tiles * byte_tile_bytes(s.d_qk) : 0);
  u.key_squares = arena.take<double>(rounds ? s.key_tiles : 0);
  u.key_steps = arena.take<double>(rounds ? s.key_tiles : 0);
  u.query_squares = arena.take<float>(rounds ? s.group * s.query_tiles : 0);
  u.query_steps = arena.take<float>(rounds ? s.group * s.query_tiles : 0);
  u.within = arena.take<double>(s.key_tiles);
  u.captured = arena.take<double>(s.key_tiles);
  u.tile_finite = arena.take<uint8_t>(s.key_tiles);
  u.tile_levels = arena.take<decide::TileLevels>(s.group * s.query_tiles);
  u.results = arena.take<AdaptiveTileResult>(s.group * s.query_tiles);
  u.heads = arena.take<HeadState>(s.group);
  u.exact_rows = arena.take<float>(o.verify_rows * s.group * s.d_v);

  u.keys = {};
  u.keys.d_qk = s.d_qk;
  u.keys.d_v = s.d_v;
  u.keys.k = u.k;
  u.keys.k_stride = s.k_stride;
  u.keys.v = u.v;
  u.keys.v_stride = s.v_stride;
  u.keys.v_low = u.v_low;
  u.keys.v_low_stride = s.low_stride;
  u.keys.packed_k = u.packed_k;
  u.keys.byte_tiles = s.bytes ? u.byte_tiles : nullptr;
  u.keys.packed_v = u.packed_v;
  u.keys.packed_v_low = u.packed_v_low;
  u.keys.packed_groups = u.packed_groups;
  u.keys.k_mean = u.k_mean;
  u.keys.basis = u.basis;
  u.keys.v_mean = u.v_mean;
  u.keys.group_k = u.group_k;
  u.keys.group_k_stride = s.group_k_stride;
  u.keys.group_v = u.group_v;
  u.keys.group_v_low = u.group_v_low;
  u.keys.probe_tile_bytes = s.probe_tile_bytes;
  u.keys.probe_basis = u.probe_basis;
}

}  // namespace adaattn::cpu
