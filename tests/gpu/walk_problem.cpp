#include "gpu/walk_problem.h"

#include <numeric>

#include "decide/cells.h"

namespace adaattn::test {
namespace {

constexpr int64_t kTile = decide::kTileK, kGroup = cuda::kFarKeys, kGroups = kTile / kGroup;
constexpr double kLog2e = 1.4426950408889634;

int64_t tiles_of(int64_t length) { return (length + kTile - 1) / kTile; }

}  // namespace

void WalkProblem::lay_out() {
  const auto make = [](auto& array, int64_t count) {
    array = std::make_unique<std::decay_t<decltype(*array)>>(static_cast<size_t>(std::max<int64_t>(count, 1)));
  };
  const auto total = [](const std::vector<int32_t>& lens) {
    return std::accumulate(lens.begin(), lens.end(), int64_t{0});
  };
  AttnParams& p = params;
  p.batch = s.batch;
  p.heads_q = s.heads_q;
  p.heads_kv = s.heads_kv;
  p.d_qk = p.d_v = kD;
  p.seqlen_q = s.seqlen_q;
  p.seqlen_k = s.seqlen_k;
  p.total_q = packed_ ? total(s.lens_q) : s.batch * s.seqlen_q;
  p.total_k = packed_ ? total(s.lens_k) : s.batch * s.seqlen_k;
  p.window_left = s.window_left;
  p.window_right = s.window_right;
  p.scale = 1 / std::sqrt(static_cast<float>(kD));
  const auto operand = [&](int64_t tokens, int64_t heads) {
    return Operand{nullptr, packed_ ? 0 : tokens * heads * kD, heads * kD, kD, Dtype::kBF16};
  };
  p.q = p.o = operand(s.seqlen_q, s.heads_q);
  p.k = p.v = operand(s.seqlen_k, s.heads_kv);
  p.lse = {nullptr, packed_ ? 0 : s.seqlen_q * s.heads_q, s.heads_q, 1, Dtype::kF32};
  make(q, p.total_q * s.heads_q * kD);
  make(o, p.total_q * s.heads_q * kD);
  make(k, p.total_k * s.heads_kv * kD);
  make(v, p.total_k * s.heads_kv * kD);
  make(lse, p.total_q * s.heads_q);
  make(starts_q, s.batch + 1);
  make(starts_k, s.batch + 1);

  cuda::TableShape& t = tables.shape;
  t.batch = static_cast<int32_t>(s.batch);
  t.heads_q = static_cast<int32_t>(s.heads_q);
  t.heads_kv = static_cast<int32_t>(s.heads_kv);
  t.group = t.heads_q / t.heads_kv;
  t.d_qk = t.d_v = kD;
  t.query_tiles = static_cast<int32_t>(tiles_of(s.seqlen_q));
  t.key_tiles = static_cast<int32_t>(tiles_of(s.seqlen_k));
  t.max_rank = s.max_rank;
  t.mask_words = (t.key_tiles + 63) / 64;
  tables.first_tile = static_cast<int32_t>(s.first_tile);
  t.wave_tiles = static_cast<int32_t>(s.wave_tiles > 0 ? s.wave_tiles : t.query_tiles);
  const int64_t units = s.batch * s.heads_kv, items = s.batch * s.heads_q * t.wave_tiles;
  make(v_low, units * t.key_rows() * t.max_rank);
  make(basis, units * kD * t.max_rank);
  make(v_mean, units * kD);
  make(group_k, units * t.key_groups() * 2 * kD);
  make(group_v, units * t.key_groups() * kD);
  make(group_v_low, units * t.key_groups() * t.max_rank);
  make(mask, items * t.mask_words);
  make(kept, items);
  make(found, items);
  make(range, s.batch * s.heads_q * t.query_tiles);
  make(work, cuda::kWorkLists * items);
  make(work_count, cuda::kWorkLists);
  make(bytes, static_cast<int64_t>(cuda::int8_tables_bytes(s.batch, s.heads_kv, s.seqlen_k, kD, kD)));
  make(remainder, items * cuda::kRemainderWidth);
  make(mean_k, units * 2 * kD);
  make(far_share, items * cuda::sm90::kWalkShares);
  t.probe_columns = s.probe_columns;
  make(probe_q, s.batch * s.heads_q * t.query_rows() * s.probe_columns);
  make(probe_k, units * t.key_rows() * s.probe_columns);
  make(probe_base, s.batch * s.heads_q * t.query_rows());
  make(counters, 2);
}

void WalkProblem::fill() {
  const auto normal = [&](Mirror<Bf16>& x, double scale) {
    for (Bf16& element : x.host) element = __float2bfloat16(static_cast<float>(scale * random_.normal()));
  };
  normal(*q, s.needle > 0 && s.needle < 1 ? 1.5 : 1);  // so that some keys stand out
  normal(*k, 1);
  normal(*v, 1);
  normal(*v_low, 1);
  normal(*basis, 1 / std::sqrt(static_cast<double>(s.max_rank)));
  normal(*group_v_low, 1);
  // They need not have anything to do with Q and K.
  normal(*probe_q, std::sqrt(1.5 * kD / std::max(s.probe_columns, 1)));
  normal(*probe_k, 1.5);
  for (float& x : probe_base->host) x = static_cast<float>(random_.normal() * std::sqrt(static_cast<double>(kD)));
  for (size_t i = 0; i < remainder->host.size(); ++i)
    remainder->host[i] = static_cast<float>(
        static_cast<int64_t>(i % cuda::kRemainderWidth) < kD ? random_.normal() : 4 + 2 * random_.normal());
  // Any two rows, of which the second is as small as a rounding.
  for (size_t i = 0; i < mean_k->host.size(); ++i)
    mean_k->host[i] = __float2bfloat16(static_cast<float>(random_.normal() * (i / 8 % 2 == 0 ? 1 : 0x1p-8)));
  for (float& x : v_mean->host) x = static_cast<float>(random_.normal());
  for (Bf16& x : o->host) x = __float2bfloat16(std::nanf(""));
  std::fill(lse->host.begin(), lse->host.end(), std::nanf(""));
  std::fill(far_share->host.begin(), far_share->host.end(), s.far_field ? std::nanf("") : 0.f);
  std::fill(found->host.begin(), found->host.end(), -1);

  params.q.data = q->data();
  params.k.data = k->data();
  params.v.data = v->data();
  params.o.data = o->data();
  params.lse.data = lse->data();
  host_params = params;
  if (packed_) {
    for (int64_t b = 0; b < s.batch; ++b) {
      starts_q->host[b + 1] = starts_q->host[b] + s.lens_q[b];
      starts_k->host[b + 1] = starts_k->host[b] + s.lens_k[b];
    }
    params.cu_seqlens_q = starts_q->data();
    params.cu_seqlens_k = starts_k->data();
    host_params.cu_seqlens_q = starts_q->host.data();
    host_params.cu_seqlens_k = starts_k->host.data();
  } else if (!s.lens_k.empty()) {
    std::copy(s.lens_k.begin(), s.lens_k.end(), starts_k->host.begin());
    params.seqused_k = starts_k->data();
    host_params.seqused_k = starts_k->host.data();
    // Nothing may be read there.
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t j = s.lens_k[b]; j < s.seqlen_k; ++j)
        for (int64_t c = 0; c < s.heads_kv * kD; ++c)
          for (Mirror<Bf16>* x : {k.get(), v.get()}) set(*x, (b * s.seqlen_k + j) * s.heads_kv * kD + c, std::nan(""));
  }

  // The centroids are those of K and V; what V in the basis holds need not have anything to do with V.
  const double variance_scale = params.scale * kLog2e * std::log(2.0) / 2;
  const cuda::TableShape& t = tables.shape;
  for (int64_t b = 0; b < s.batch; ++b) {
    const int64_t len_k = sequence_of(host_params, b).len_k;
    for (int64_t h = 0; h < s.heads_kv; ++h) {
      const int64_t unit = b * s.heads_kv + h;
      for (int64_t row = len_k; row < t.key_rows(); ++row)
        for (int64_t c = 0; c < t.max_rank; ++c) set(*v_low, (unit * t.key_rows() + row) * t.max_rank + c, 0);
      for (int64_t g = 0; g < t.key_groups(); ++g) {
        const int64_t first = g * kGroup, count = std::clamp<int64_t>(len_k - first, 0, kGroup);
        for (int64_t c = 0; c < kD; ++c) {
          double sum = 0, squares = 0, sum_v = 0;
          for (int64_t j = first; j < first + count; ++j) {
            const double x = at(*k, k_row(b, h, j) * kD + c);
            sum += x;
            squares += x * x;
            sum_v += at(*v, k_row(b, h, j) * kD + c);
          }
          const double n = static_cast<double>(std::max<int64_t>(count, 1)), mean = sum / n;
          const int64_t row = unit * t.key_groups() + g;
          set(*group_k, row * 2 * kD + c, mean);
          set(*group_k, row * 2 * kD + kD + c, variance_scale * std::max(0.0, squares / n - mean * mean));
          set(*group_v, row * kD + c, sum_v / n);
        }
      }
    }
  }
}

decide::TileRow WalkProblem::visible_tiles(const Sequence& seq, int64_t tile) const {
  int64_t lowest = seq.len_k, highest = 0, begin_max = 0, end_min = seq.len_k;
  for (int64_t i = tile * kTile; i < std::min((tile + 1) * kTile, seq.len_q); ++i) {
    const KeyRange keys = visible_keys(host_params, seq, i);
    begin_max = std::max(begin_max, keys.begin);
    end_min = std::min(end_min, keys.end);
    if (keys.begin >= keys.end) continue;
    lowest = std::min(lowest, keys.begin);
    highest = std::max(highest, keys.end);
  }
  if (lowest >= highest) return {};
  return {static_cast<int32_t>(lowest / kTile), static_cast<int32_t>(tiles_of(highest)),
          static_cast<int32_t>(tiles_of(begin_max)), static_cast<int32_t>(end_min / kTile)};
}

void WalkProblem::decide_masks() {
  const cuda::TableShape& t = tables.shape;
  const int64_t items = s.batch * s.heads_q * t.wave_tiles;
  for (int64_t b = 0; b < s.batch; ++b) {
    const Sequence seq = sequence_of(host_params, b);
    for (int64_t h = 0; h < s.heads_q; ++h) {
      for (int64_t tile = 0; tile < t.query_tiles; ++tile)
        range->host[(b * s.heads_q + h) * t.query_tiles + tile] = visible_tiles(seq, tile);
      const int rank_class = class_of(b, h / t.group);
      for (int64_t tile = s.first_tile; tile < s.first_tile + t.wave_tiles; ++tile) {
        const int64_t index = item(b, h, tile);
        const decide::TileRow row =
            tile < t.query_tiles ? range->host[(b * s.heads_q + h) * t.query_tiles + tile] : decide::TileRow{};
        for (int32_t key = row.begin; key < row.end; ++key) {
          if (!decide::is_forced(row, key) && !random_.chance(s.kept)) continue;
          mask->host[index * t.mask_words + key / 64] |= uint64_t{1} << key % 64;
          ++kept->host[index];
        }
        if (tile < t.query_tiles)
          work->host[rank_class * items + work_count->host[rank_class]++] = static_cast<uint32_t>(index);
      }
    }
  }
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t h = 0; h < s.heads_q; ++h)
      for (int64_t tile = s.first_tile; tile < std::min<int64_t>(s.first_tile + t.wave_tiles, t.query_tiles); ++tile) {
        const decide::TileRow& row = range->host[(b * s.heads_q + h) * t.query_tiles + tile];
        if (kept->host[item(b, h, tile)] == row.end - row.begin)
          std::fill_n(remainder->host.begin() + item(b, h, tile) * cuda::kRemainderWidth + kD, kTile / decide::kCell,
                      -INFINITY);
      }
  for (int c = 0; c < cuda::kWorkLists; ++c) {
    const auto first = work->host.begin() + c * items;
    std::stable_sort(first, first + work_count->host[c],
                     [&](uint32_t a, uint32_t b) { return kept->host[a] > kept->host[b]; });
  }
}

void WalkProblem::upload() {
  for (const Mirror<Bf16>* x : {q.get(), k.get(), v.get(), o.get(), v_low.get(), basis.get(), group_k.get(),
                                group_v.get(), group_v_low.get(), probe_q.get(), probe_k.get()})
    x->upload();
  tables.probe_base = probe_base->upload();
  tables.probe_q = probe_q->data();
  tables.probe_k = probe_k->data();
  lse->upload();
  far_share->upload();
  found->upload();
  starts_q->upload();
  starts_k->upload();
  counters->upload();
  tables.v_mean = v_mean->upload();
  remainder->upload();
  mean_k->upload();
  if (s.remainder) {
    tables.remainder = remainder->data();
    tables.mean_k = mean_k->data();
  }
  tables.mask = mask->upload();
  tables.kept = kept->upload();
  tables.tile_range = range->upload();
  tables.work = work->upload();
  tables.work_count = work_count->upload();
  tables.v_low = v_low->data();
  tables.basis = basis->data();
  tables.group_k = group_k->data();
  tables.group_v = group_v->data();
  tables.group_v_low = group_v_low->data();
}

std::vector<WalkProblem::Swept> WalkProblem::sweep(int64_t b, int64_t h, int64_t tile) const {
  const cuda::TableShape& t = tables.shape;
  const Sequence seq = sequence_of(host_params, b);
  const int64_t head_kv = h / t.group, words = item(b, h, tile) * t.mask_words;
  const decide::TileRow row = range->host[(b * s.heads_q + h) * t.query_tiles + tile];
  const double c = static_cast<double>(params.scale) * kLog2e;
  std::vector<Swept> swept;
  for (int32_t key_tile = row.begin; key_tile < row.end; ++key_tile)
    if ((kept_mask[words + key_tile / 64] >> key_tile % 64 & 1) == 0) swept.push_back({key_tile, 0, 0});
  if (swept.empty()) return swept;
  std::vector<double> top(static_cast<size_t>(row.end));
  for (int64_t i = tile * kTile; i < std::min((tile + 1) * kTile, seq.len_q); ++i) {
    const KeyRange keys = visible_keys(host_params, seq, i);
    double kept_sum = 0, all_sum = 0;
    std::fill(top.begin(), top.end(), 0.0);
    for (int64_t j = keys.begin; j < keys.end; ++j) {
      double score = 0;
      for (int64_t d = 0; d < kD; ++d) score += at(*q, q_row(b, h, i) * kD + d) * at(*k, k_row(b, head_kv, j) * kD + d);
      const double weight = std::exp2(c * score);  // of scores that are no longer than a few
      const int64_t key_tile = j / kTile, word = words + key_tile / 64;
      if (kept_mask[word] >> key_tile % 64 & 1) kept_sum += weight;
      if (mask->host[word] >> key_tile % 64 & 1) all_sum += weight;
      if (const int64_t r = s.probe_columns; r > 0) {
        const int64_t row_q = (b * s.heads_q + h) * t.query_rows() + i;
        const int64_t row_k = (b * s.heads_kv + head_kv) * t.key_rows() + j;
        score = probe_base->host[row_q];
        for (int64_t d = 0; d < r; ++d) score += at(*probe_q, row_q * r + d) * at(*probe_k, row_k * r + d);
      }
      top[key_tile] = std::max(top[key_tile], std::exp2(c * score));
    }
    for (Swept& x : swept) {
      x.of_kept = std::max(x.of_kept, top[x.tile] / kept_sum);
      x.of_all = std::max(x.of_all, top[x.tile] / all_sum);
    }
  }
  return swept;
}

WalkProblem::Row WalkProblem::oracle(int64_t b, int64_t h, int64_t i) const {
  const cuda::TableShape& t = tables.shape;
  const Sequence seq = sequence_of(host_params, b);
  const int64_t head_kv = h / t.group, unit = b * s.heads_kv + head_kv, tile = i / kTile;
  const int given_class = class_of(b, head_kv), rank_class = given_class == cuda::kByteList ? 0 : given_class;
  const int64_t width = rank_class == 0 ? kD : decide::rank_of_class(rank_class);
  const decide::TileRow row = range->host[(b * s.heads_q + h) * t.query_tiles + tile];
  const KeyRange keys = visible_keys(host_params, seq, i);
  const double c = static_cast<double>(params.scale) * kLog2e;
  struct Entry {
    double log2_weight;
    const Mirror<Bf16>* values;
    int64_t first;  // of the value's row
    bool far;
  };
  std::vector<Entry> entries;
  const auto dot = [&](const Mirror<Bf16>& x, int64_t first, bool squared) {
    double sum = 0;
    for (int64_t d = 0; d < kD; ++d) {
      const double element = at(*q, q_row(b, h, i) * kD + d);
      sum += (squared ? element * element : element) * at(x, first + d);
    }
    return sum;
  };
  for (int32_t key_tile = row.begin; key_tile < row.end; ++key_tile) {
    const bool exact = mask->host[item(b, h, tile) * t.mask_words + key_tile / 64] >> key_tile % 64 & 1;
    if (exact) {
      for (int64_t j = std::max(keys.begin, key_tile * kTile); j < std::min(keys.end, (key_tile + 1) * kTile); ++j) {
        const int64_t at_k = k_row(b, head_kv, j) * kD;
        entries.push_back({c * dot(*k, at_k, false), rank_class == 0 ? v.get() : v_low.get(),
                           rank_class == 0 ? at_k : (unit * t.key_rows() + j) * t.max_rank, false});
      }
    } else if (s.far_field) {
      for (int64_t g = key_tile * kGroups; g < (key_tile + 1) * kGroups; ++g) {
        const int64_t group = unit * t.key_groups() + g;
        const double spread = c * dot(*group_k, group * 2 * kD + kD, true);
        const double second = spread / (1 + std::log(2.0) / 4 * spread);
        entries.push_back({std::log2(kGroup) + c * dot(*group_k, group * 2 * kD, false) + second,
                           rank_class == 0 ? group_v.get() : group_v_low.get(),
                           group * (rank_class == 0 ? kD : t.max_rank), true});
      }
    }
  }
  Row result;
  result.o.resize(kD);
  if (entries.empty()) {
    result.lse = -INFINITY;
    return result;
  }
  double top = -INFINITY, sum = 0, far = 0;
  for (const Entry& e : entries) top = std::max(top, e.log2_weight);
  const float* const rest = remainder->host.data() + item(b, h, tile) * cuda::kRemainderWidth;
  double left_out = -INFINITY;
  if (tables.remainder != nullptr) {
    double score = 0;
    for (int64_t d = 0; d < kD; ++d) {
      const int64_t at_mean = unit * 2 * kD + d / 8 * 16 + d % 8;
      score += at(*q, q_row(b, h, i) * kD + d) * (at(*mean_k, at_mean) + at(*mean_k, at_mean + 8));
    }
    left_out = rest[kD + i % kTile / decide::kCell] + c * score;
  }
  std::vector<double> mixed(static_cast<size_t>(width));
  for (const Entry& e : entries) {
    const double weight = std::exp2(e.log2_weight - top);
    sum += weight;
    far += e.far ? weight : 0;
    for (int64_t d = 0; d < width; ++d) mixed[d] += weight * at(*e.values, e.first + d);
  }
  if (const double weight = std::exp2(left_out - top); weight > 0) {
    sum += weight;
    for (int64_t d = 0; d < width; ++d) mixed[d] += weight * rest[d];
  }
  result.lse = (top + std::log2(sum)) / kLog2e;
  result.far = far / sum;
  for (int64_t d = 0; d < kD; ++d) {
    if (rank_class == 0) {
      result.o[d] = mixed[d] / sum;
      continue;
    }
    result.o[d] = v_mean->host[unit * kD + d];
    for (int64_t x = 0; x < width; ++x) result.o[d] += mixed[x] / sum * at(*basis, (unit * kD + d) * t.max_rank + x);
  }
  return result;
}

}  // namespace adaattn::test
