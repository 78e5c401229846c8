#include <algorithm>
#include <cmath>

#include "cpu_fallback/adaptive/call.h"
#include "decide/cells.h"

namespace adaattn::cpu {
namespace {

struct AttendScratch {
  int32_t *begin, *end;
  uint64_t* mask;
  TileMasses masses;
  char* kernel;
};

AttendScratch lay_out_attend(Arena& arena, const UnitShape& s, const KernelTable& exact,
                             const AdaptiveKernels& kernels) {
  AttendScratch x;
  x.begin = arena.take<int32_t>(s.exact_tiles * kTileRows);
  x.end = arena.take<int32_t>(s.exact_tiles * kTileRows);
  x.mask = arena.take<uint64_t>(s.heads * s.mask_words);
  x.masses = take_masses(arena, s);
  x.kernel =
      arena.take<char>(static_cast<int64_t>(std::max(exact.prefill_scratch(s.d_qk, s.d_v, s.exact_tiles),
                                                     kernels.tile_scratch(s.d_qk, s.d_v, s.probe_rank, s.heads))));
  return x;
}

float* take_rows(Arena& arena, const UnitShape& s) { return arena.take<float>(decide::kTileQ * s.d_v); }

}  // namespace

size_t attend_scratch(const UnitShape& s, const decide::Options&, const KernelTable& exact,
                      const AdaptiveKernels& kernels) {
  Arena arena;
  lay_out_attend(arena, s, exact, kernels);
  take_rows(arena, s);
  return arena.used() + Arena::kAlignment;
}

void attend_exact_rows(const AdaptiveCall& call, const Unit& unit, const AttendItem& item, char* scratch) {
  const UnitShape& s = call.shape;
  Arena arena(scratch);
  const AttendScratch x = lay_out_attend(arena, s, call.exact, call.kernels);
  const bool all = item.member == kAllHeads;
  const int64_t group = all ? s.group : 1, head = unit.kv_head * s.group + (all ? 0 : item.member);
  PrefillArgs args;
  args.rows = row_operands(call.params, unit.b, unit.seq, head, group);
  args.k = key_operand(call.params, call.params.k, unit.b, unit.seq, unit.kv_head);
  args.v = key_operand(call.params, call.params.v, unit.b, unit.seq, unit.kv_head);
  args.row_begin = item.row_begin;
  args.row_count = item.row_count;
  fill_ranges(call.params, unit.seq, group, args.row_begin, args.row_count, x.begin, x.end);
  args.key_begin = x.begin;
  args.key_end = x.end;
  args.scratch = x.kernel;
  call.exact.prefill(args);
}

void attend_query_tile(const AdaptiveCall& call, Unit& unit, const AttendItem& item, const AttendItem* next,
                       char* scratch) {
  const UnitShape& s = call.shape;
  const decide::Options& o = call.problem.adaptive;
  const int64_t tile = item.row_begin / decide::kTileQ, words = s.mask_words;
  Arena arena(scratch);
  const AttendScratch x = lay_out_attend(arena, s, call.exact, call.kernels);
  AdaptiveTileArgs heads[kMostHeads];
  AdaptiveTileResult results[kMostHeads];
  int64_t members[kMostHeads], count = 0;
  fill_ranges(call.params, unit.seq, 1, item.row_begin, item.row_count, x.begin, x.end);
  for (int64_t member = item.member; member < item.member + item.members; ++member) {
    const decide::HeadChoice& choice = unit.heads[member].choice;
    if (choice.dense) continue;
    const decide::TileLevels& levels = unit.tile_levels[member * s.query_tiles + tile];
    AdaptiveTileArgs& args = heads[count];
    args.rows = row_operands(call.params, unit.b, unit.seq, unit.kv_head * s.group + member, 1);
    args.row_begin = item.row_begin;
    args.row_count = item.row_count;
    args.key_begin = x.begin;
    args.key_end = x.end;
    args.keys = unit.keys;
    args.keys.rank = decide::rank_of_class(choice.rank_class);
    args.mask = x.mask + count * words;
    tile_mask(call, unit, member, tile, x.masses, args.mask);
    args.tile_begin = levels.row.begin;
    args.tile_end = levels.row.end;
    args.probe = o.probe != decide::Probe::kOff && choice.level != decide::kDenseLevel;
    args.log2_needle = std::log2(o.needle_share);
    args.bytes = choice.bytes;
    args.far_field = o.far_field;
    if (s.masked && s.dropped_floats > 0 && choice.level == o.min_level) {
      args.dropped = unit.dropped + (member * s.query_tiles + tile) * s.dropped_floats;
      args.remainder = o.remainder;
      for (int64_t t = args.tile_begin; t < args.tile_end; ++t)
        args.dropped_keys += tile_bit(args.mask, t) ? 0 : decide::kTileK;
    }
    args.scratch = x.kernel;
    if (next != nullptr && count < next->members) {
      const Operand q = row_operands(call.params, unit.b, unit.seq, unit.kv_head * s.group + next->member + count, 1).q;
      const int64_t stride = q.stride_s * static_cast<int64_t>(dtype_size(q.dtype));
      args.next_q = {static_cast<const char*>(q.data) + next->row_begin * stride, stride, next->row_count,
                     s.d_qk * static_cast<int64_t>(dtype_size(q.dtype))};
    }
    members[count++] = member;
  }
  if (count == 0) return;
  call.kernels.tiles(heads, count, results);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t index = members[i] * s.query_tiles + tile;
    unit.results[index] = results[i];
    if (unit.map != nullptr) std::copy_n(heads[i].mask, words, unit.map + index * words);
  }
}

SpreadRows sampled_rows(const AdaptiveCall& call, const Unit& unit) {
  const decide::Options& o = call.problem.adaptive;
  return spread_rows(call.call_index + o.seed, o.verify_rows, unit.seq.len_q);
}

namespace {

// Calls compute() for up to kTileQ of the sampled rows at a time: args.row_begin, row_count and the keys' ranges are
// filled.
template <class Args, class Compute>
void for_sampled_tiles(const AdaptiveCall& call, const Unit& unit, const SpreadRows& sample, const AttendScratch& x,
                       Args& args, const Compute& compute) {
  const int64_t group = call.shape.group, total = sample.count * group;
  args.key_begin = x.begin;
  args.key_end = x.end;
  args.scratch = x.kernel;
  for (args.row_begin = 0; args.row_begin < total; args.row_begin += decide::kTileQ) {
    args.row_count = std::min<int64_t>(decide::kTileQ, total - args.row_begin);
    for (int64_t r = 0; r < args.row_count; ++r)
      fill_ranges(call.params, unit.seq, 1, sample.first + (args.row_begin + r) / group * sample.step, 1, x.begin + r,
                  x.end + r);
    compute();
  }
}

// From K and V themselves.
void compute_wide_rows(const AdaptiveCall& call, const Unit& unit, const RowOperands& rows, const SpreadRows& sample,
                       const AttendScratch& x) {
  PrefillArgs args;
  args.rows = rows;
  args.k = key_operand(call.params, call.params.k, unit.b, unit.seq, unit.kv_head);
  args.v = key_operand(call.params, call.params.v, unit.b, unit.seq, unit.kv_head);
  for_sampled_tiles(call, unit, sample, x, args, [&] { call.exact.prefill(args); });
}

}  // namespace

void compute_exact_rows(const AdaptiveCall& call, Unit& unit, char* scratch) {
  const UnitShape& s = call.shape;
  const SpreadRows sample = sampled_rows(call, unit);
  Arena arena(scratch);
  const AttendScratch x = lay_out_attend(arena, s, call.exact, call.kernels);
  AdaptiveTileArgs args;
  args.rows = row_operands(call.params, unit.b, unit.seq, unit.kv_head * s.group, s.group);
  args.rows.q.data =
      static_cast<char*>(args.rows.q.data) + sample.first * args.rows.q.stride_s * dtype_size(args.rows.q.dtype);
  args.rows.q.stride_s *= sample.step;
  args.rows.o = {unit.exact_rows, 0, s.group * s.d_v, s.d_v, Dtype::kF32};
  args.rows.lse = args.rows.entropy = {};
  if (s.rounds) {
    compute_wide_rows(call, unit, args.rows, sample, x);
    return;
  }
  // Every tile, from the keys as analyze left them.
  args.keys = unit.keys;
  args.keys.rank = 0;
  std::fill(x.mask, x.mask + s.mask_words, ~uint64_t{0});
  args.mask = x.mask;
  args.tile_end = unit.keys.tiles;
  for_sampled_tiles(call, unit, sample, x, args, [&] {
    AdaptiveTileResult unused;
    call.kernels.tiles(&args, 1, &unused);
  });
}

void measure_error(const AdaptiveCall& call, Unit& unit, char* scratch) {
  const UnitShape& s = call.shape;
  const SpreadRows sample = sampled_rows(call, unit);
  Arena arena(scratch);
  lay_out_attend(arena, s, call.exact, call.kernels);
  float* row = take_rows(arena, s);
  for (int64_t g = 0; g < s.group; ++g) {
    HeadState& head = unit.heads[g];
    const RowOperands rows = row_operands(call.params, unit.b, unit.seq, unit.kv_head * s.group + g, 1);
    double sum = 0, worst = 0;
    for (int64_t i = 0; i < sample.count; ++i) {
      call.kernels.load_rows(rows.o, 1, sample.first + i * sample.step, 1, s.d_v, 1.0f, row);
      const float* exact = unit.exact_rows + (i * s.group + g) * s.d_v;
      double square = 0;
      for (int64_t c = 0; c < s.d_v; ++c) {
        const double shift = static_cast<double>(row[c]) - exact[c];
        square += shift * shift;
      }
      sum += square;
      worst = std::max(worst, square);
    }
    head.measured_error = std::sqrt(sum / static_cast<double>(sample.count)) / unit.v_spread;
    head.measured_row_max = std::sqrt(worst) / unit.v_spread;
  }
}

}  // namespace adaattn::cpu
