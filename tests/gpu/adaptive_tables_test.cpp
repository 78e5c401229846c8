// What analyze and decide leave on the device: the statistics against float64, the decisions against the host's code on
// the same statistics, bit for bit.
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstring>
#include <map>
#include <memory>

#include "adaptive/analyze.h"
#include "adaptive/structured.h"
#include "attention/fixture.h"
#include "backend.h"
#include "core/adaptive_options.h"
#include "core/validate.h"
#include "decide/cells.h"
#include "gpu/device.h"

namespace adaattn::test {
namespace {

using cuda::AnalyzeArgs;
using cuda::TableShape;
using decide::kTileK;
using decide::kTileQ;
constexpr int64_t kCells = decide::kCellsOfTile;

// One analysis of a problem, with its tables on the host.
class Analysis {
 public:
  Analysis(AttentionData& data, adaattn_policy_t policy, int32_t wave_tiles = 0, bool probe = false) : data_(data) {
    problem_ = problem_from(data.desc, Use::kAttention);
    problem_.adaptive = resolve_options(adaptive_desc(policy), problem_);
    if (!probe) problem_.adaptive.probe = decide::Probe::kOff;
    args.shape = cuda::table_shape(problem_, wave_tiles);
    workspace_ = std::make_unique<DeviceMemory>(cuda::analyze_bytes(args.shape));
    const size_t units = static_cast<size_t>(args.shape.batch * args.shape.heads_kv);
    basis_ = std::make_unique<DeviceMemory>(cuda::state_basis_doubles(args.shape) * 8);
    warm_ = std::make_unique<DeviceMemory>(units * 4);
    require(cudaMemset(warm_->data(), 0, warm_->bytes()));
    args.options = problem_.adaptive;
    args.costs = cuda::device_costs(args.shape, args.options);
    args.tables = cuda::analyze_layout(args.shape, workspace_->data());
    args.state.basis = static_cast<double*>(basis_->data());
    args.state.warm = static_cast<int32_t*>(warm_->data());
    args.scale_log2 = problem_.scale * static_cast<float>(M_LOG2E);
  }

  void run() {
    data_.upload(ADAATTN_DEVICE_CUDA);
    args.p = attention_from(problem_, data_.io(ADAATTN_DEVICE_CUDA), {ADAATTN_DEVICE_CUDA, 0, nullptr}, {});
    cuda::analyze(args, nullptr);
    cuda::decide_heads(args, nullptr);
    require(cudaDeviceSynchronize());
    host = attention_from(problem_, data_.io(), {ADAATTN_DEVICE_CPU, 0, nullptr}, {});
  }
  void schedule(int32_t first_tile) {
    cuda::write_schedule(args, first_tile, nullptr);
    require(cudaDeviceSynchronize());
  }

  template <typename T>
  std::vector<T> copy(const T* device, int64_t count) const {
    std::vector<T> list(static_cast<size_t>(count));
    require(cudaMemcpy(static_cast<void*>(list.data()), device, list.size() * sizeof(T), cudaMemcpyDeviceToHost));
    return list;
  }
  std::vector<float> copy(const __nv_bfloat16* device, int64_t count) const {
    std::vector<uint16_t> raw = copy(reinterpret_cast<const uint16_t*>(device), count);
    std::vector<float> list(raw.size());
    for (size_t i = 0; i < raw.size(); ++i) {
      const uint32_t bits = static_cast<uint32_t>(raw[i]) << 16;
      std::memcpy(&list[i], &bits, 4);
    }
    return list;
  }
  int64_t units() const { return int64_t{args.shape.batch} * args.shape.heads_kv; }
  int64_t heads() const { return int64_t{args.shape.batch} * args.shape.heads_q; }
  int64_t section_units() const {
    return std::max<int64_t>(1, args.cache_bytes / (args.shape.key_rows() * (args.shape.d_qk + args.shape.d_v) * 2));
  }

  AnalyzeArgs args;
  AttnParams host;  // with host pointers

 private:
  AttentionData& data_;
  Problem problem_;
  std::unique_ptr<DeviceMemory> workspace_, basis_, warm_;
};

class AdaptiveTables : public OnTheDevice {};

AttentionCase base_case() {
  AttentionCase c = {.name = "Tables", .batch = 2, .heads_q = 6, .heads_kv = 2, .seqlen_q = 1500, .seqlen_k = 1500};
  c.d_qk = c.d_v = 128;
  c.mask = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT;
  return c;
}

TEST_F(AdaptiveTables, StatisticsAreThoseOfFloat64) {
  for (const int64_t d : {64, 128}) {
    AttentionCase c = base_case();
    c.d_qk = c.d_v = d;
    AttentionData data(c, kBf16All, run_seed());
    make_structured(data, {.value_mean = 0.5}, run_seed());
    Analysis a(data, ADAATTN_POLICY_BALANCED);
    a.run();
    a.run();  // from the bases of the first
    const TableShape& s = a.args.shape;
    ASSERT_EQ(s.max_rank, d / 2);
    const auto k_mean = a.copy(a.args.tables.k_mean, a.units() * d),
               v_mean = a.copy(a.args.tables.v_mean, a.units() * d);
    const int64_t key_cells_each = cuda::key_cells_of_unit(s), query_cells_count = a.heads() * s.query_tiles * kCells;
    const auto key_cells = a.copy(a.args.tables.key_cells, a.units() * key_cells_each * d);
    const auto key_scales = a.copy(a.args.tables.key_scales, a.units() * key_cells_each);
    const auto query_cells = a.copy(a.args.tables.query_cells, query_cells_count * d);
    const auto query_scales = a.copy(a.args.tables.query_scales, query_cells_count);
    // The mean in bytes: right to half a step, and the largest element takes the whole range.
    const auto expect_cell = [&](const int8_t* bytes, float scale, const std::vector<double>& mean) {
      double top = 0;
      for (const double x : mean) top = std::max(top, std::fabs(x));
      EXPECT_NEAR(scale, top / 127, 1e-5 * top + 1e-7);
      for (size_t x = 0; x < mean.size(); ++x) EXPECT_NEAR(bytes[x] * scale, mean[x], 0.51 * scale + 1e-5);
    };
    const auto group_k = a.copy(a.args.tables.group_k, a.units() * s.key_groups() * 2 * d);
    const auto group_v = a.copy(a.args.tables.group_v, a.units() * s.key_groups() * d);
    const auto group_low = a.copy(a.args.tables.group_v_low, a.units() * s.key_groups() * s.max_rank);
    const auto v_low = a.copy(a.args.tables.v_low, a.units() * s.key_rows() * s.max_rank);
    const auto basis = a.copy(a.args.tables.basis, a.units() * d * s.max_rank);
    const auto stats = a.copy(a.args.tables.units, a.units());
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t h = 0; h < s.heads_kv; ++h) {
        const int64_t unit = b * s.heads_kv + h, n = c.seqlen_k, step = (n + cuda::kSampleRows - 1) / cuda::kSampleRows;
        const auto k = [&](int64_t j, int64_t x) { return data.k.get(data.key_index(b, j, h, x)); };
        const auto v = [&](int64_t j, int64_t x) { return data.v.get(data.key_index(b, j, h, x)); };
        for (int64_t x = 0; x < d; ++x) {
          double of_k = 0, of_v = 0, count = 0;
          for (int64_t j = 0; j < n; j += step, ++count) {
            of_k += k(j, x);
            of_v += v(j, x);
          }
          EXPECT_NEAR(k_mean[static_cast<size_t>(unit * d + x)], of_k / count, 1e-5);
          EXPECT_NEAR(v_mean[static_cast<size_t>(unit * d + x)], of_v / count, 1e-5);
        }
        // Tiles: the first, one within and the ragged last.
        for (const int64_t tile : {int64_t{0}, int64_t{5}, int64_t{s.key_tiles - 1}}) {
          const int64_t first = tile * kTileK, last = std::min(first + kTileK, n);
          for (int64_t g = tile * kCells; g < (tile + 1) * kCells; ++g) {
            const int64_t begin = g * decide::kCell, end = std::min(begin + decide::kCell, n);
            const auto at = static_cast<size_t>(unit * key_cells_each + g);
            std::vector<double> mean(static_cast<size_t>(d));
            for (int64_t x = 0; x < d && begin < end; ++x) {
              for (int64_t j = begin; j < end; ++j)
                mean[static_cast<size_t>(x)] += k(j, x) / static_cast<double>(end - begin);
              mean[static_cast<size_t>(x)] -= k_mean[static_cast<size_t>(unit * d + x)];
            }
            expect_cell(&key_cells[at * static_cast<size_t>(d)], key_scales[at], mean);
          }
          constexpr int64_t kGroup = cuda::kFarKeys, kGroups = kTileK / kGroup;
          for (int64_t g = tile * kGroups; g < (tile + 1) * kGroups && g * kGroup < n; ++g) {
            const int64_t end = std::min((g + 1) * kGroup, n);
            const auto rows = static_cast<double>(end - g * kGroup);
            std::vector<double> low(static_cast<size_t>(s.max_rank));
            for (int64_t x = 0; x < d; ++x) {
              double mean = 0, variance = 0, value = 0;
              for (int64_t j = g * kGroup; j < end; ++j) {
                mean += k(j, x) / rows;
                value += v(j, x) / rows;
              }
              for (int64_t j = g * kGroup; j < end; ++j) variance += (k(j, x) - mean) * (k(j, x) - mean) / rows;
              const size_t at = static_cast<size_t>((unit * s.key_groups() + g) * 2 * d + x);
              EXPECT_NEAR(group_k[at], mean, 4e-3 * std::fabs(mean) + 1e-6);
              const double scaled = a.args.scale_log2 * M_LN2 / 2 * variance;
              EXPECT_NEAR(group_k[at + static_cast<size_t>(d)], scaled, 4e-3 * scaled + 1e-6);
              EXPECT_NEAR(group_v[static_cast<size_t>((unit * s.key_groups() + g) * d + x)], value,
                          4e-3 * std::fabs(value) + 1e-6);
              for (int64_t r = 0; r < s.max_rank; ++r)
                low[static_cast<size_t>(r)] += (value - v_mean[static_cast<size_t>(unit * d + x)]) *
                                               basis[static_cast<size_t>((unit * d + x) * s.max_rank + r)];
            }
            for (int64_t r = 0; r < s.max_rank; ++r)
              EXPECT_NEAR(group_low[static_cast<size_t>((unit * s.key_groups() + g) * s.max_rank + r)],
                          low[static_cast<size_t>(r)], 4e-3 * std::fabs(low[static_cast<size_t>(r)]) + 2e-2);
          }
          for (const int64_t j : {first, last - 1})
            for (int64_t r = 0; r < s.max_rank; ++r) {
              double want = 0;
              for (int64_t x = 0; x < d; ++x)
                want += (v(j, x) - v_mean[static_cast<size_t>(unit * d + x)]) *
                        basis[static_cast<size_t>((unit * d + x) * s.max_rank + r)];
              EXPECT_NEAR(v_low[static_cast<size_t>((unit * s.key_rows() + j) * s.max_rank + r)], want,
                          4e-3 * std::fabs(want) + 2e-2);
            }
        }
        for (int64_t j = n; j < s.key_rows(); ++j)
          for (int64_t r = 0; r < s.max_rank; ++r)
            ASSERT_EQ(v_low[static_cast<size_t>((unit * s.key_rows() + j) * s.max_rank + r)], 0);
        // Spread, and what the rank keeps of it.
        double total = 0, captured = 0;
        const cuda::UnitStats& u = stats[static_cast<size_t>(unit)];
        ASSERT_GT(u.rank_class, 0);
        for (int64_t j = 0; j < n; ++j) {
          for (int64_t x = 0; x < d; ++x) total += std::pow(v(j, x) - v_mean[static_cast<size_t>(unit * d + x)], 2);
          for (int64_t r = 0; r < decide::rank_of_class(u.rank_class); ++r)
            captured += std::pow(v_low[static_cast<size_t>((unit * s.key_rows() + j) * s.max_rank + r)], 2);
        }
        EXPECT_NEAR(u.v_spread, std::sqrt(total / static_cast<double>(n)), 1e-4 * u.v_spread);
        EXPECT_NEAR(u.rank_energy, captured / total, 2e-3);
        EXPECT_GT(u.rank_energy, 0.9);
        EXPECT_NEAR(u.errors.rank_error[u.rank_class], std::sqrt(1 - u.rank_energy), 1e-4);
      }
    for (int64_t h = 0; h < s.heads_q; ++h)
      for (const int64_t tile : {int64_t{0}, int64_t{s.query_tiles - 1}})
        for (int64_t cell = tile * kCells; cell < (tile + 1) * kCells; ++cell) {
          const int64_t first = cell * decide::kCell, last = std::min(first + decide::kCell, c.seqlen_q);
          std::vector<double> mean(static_cast<size_t>(d));
          for (int64_t x = 0; x < d && first < last; ++x) {
            const auto count = static_cast<double>((last - first + cuda::kQueryStep - 1) / cuda::kQueryStep);
            for (int64_t i = first; i < last; i += cuda::kQueryStep)
              mean[static_cast<size_t>(x)] +=
                  static_cast<double>(a.args.scale_log2) * data.q.get(data.query_index(1, i, h, x)) / count;
          }
          const auto at = static_cast<size_t>((s.heads_q + h) * s.query_tiles * kCells + cell);
          expect_cell(&query_cells[at * static_cast<size_t>(d)], query_scales[at], mean);
        }
  }
}

// The host's walk over the device's statistics.
struct HostDecisions {
  std::vector<decide::TileLevels> levels;
  std::vector<decide::HeadLevels> head_levels;
  std::vector<decide::HeadChoice> choice;
  std::vector<uint64_t> mask;  // [heads, query_tiles, mask_words]
  uint64_t skipped = 0;
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
  for (int64_t b = 0; b < a.host.batch; ++b) {
    const Sequence seq = sequence_of(a.host, b);
    for (int64_t h = 0; h < s.heads_q; ++h)
      for (int64_t tile = 0; tile * kTileQ < seq.len_q; ++tile) {
        float visible = 0;
        decide::TileLevels& levels = out.levels[static_cast<size_t>((b * s.heads_q + h) * s.query_tiles + tile)];
        levels.row = row_of(a.host, seq, tile, &visible);
        if (levels.row.begin < levels.row.end) {
          levels.usable = weigh(b, h, tile, levels.row);
          if (levels.usable) decide::measure_cells(mass.data(), peak.data(), a.args.keep_peak, visible, &levels);
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
        weigh(b, h, tile, levels.row);
        for (int32_t t = levels.row.begin; t < levels.row.end; ++t) {
          const auto at = static_cast<size_t>(t - levels.row.begin);
          const bool keep =
              choice.dense || decide::keeps_tile(levels, choice.level, t, mass[at], peak[at], a.args.keep_peak);
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

// Every decision of the device, wave by wave; returns what is skipped.
uint64_t expect_same_decisions(Analysis& a) {
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
        EXPECT_LT(kept[item], before + coarse);
        before = kept[item];
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
  return want.skipped;
}

TEST_F(AdaptiveTables, DecisionsAreThoseOfTheHostOnTheSameStatistics) {
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
    const uint64_t here = expect_same_decisions(a);
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

TEST_F(AdaptiveTables, CentroidsBeyondASequenceAreZero) {
  AttentionCase c = base_case();
  c.used_k = {1500, 700};
  AttentionData data(c, kBf16All, run_seed());
  make_structured(data, {}, run_seed());
  Analysis a(data, ADAATTN_POLICY_SPEED);
  a.run();
  const TableShape& s = a.args.shape;
  const auto zero_beyond = [&](const __nv_bfloat16* table, int64_t width) {
    const auto rows = a.copy(table, a.units() * s.key_groups() * width);
    for (int64_t unit = s.heads_kv; unit < 2 * s.heads_kv; ++unit)  // of the second sequence
      for (int64_t g = 0; g < s.key_groups(); ++g)
        for (int64_t x = 0; x < width; ++x) {
          const float value = rows[static_cast<size_t>((unit * s.key_groups() + g) * width + x)];
          if (g * cuda::kFarKeys >= 700)
            ASSERT_EQ(value, 0) << g;
          else
            ASSERT_TRUE(std::isfinite(value)) << g;
        }
  };
  zero_beyond(a.args.tables.group_k, 2 * s.d_qk);
  zero_beyond(a.args.tables.group_v, s.d_v);
  zero_beyond(a.args.tables.group_v_low, s.max_rank);
}

TEST_F(AdaptiveTables, NotANumberLeavesItsUnitDense) {
  AttentionCase c = base_case();
  for (const bool in_query : {false, true}) {
    AttentionData data(c, kBf16All, run_seed());
    make_structured(data, {}, run_seed());
    if (in_query)
      data.q.set(data.query_index(0, 700, 1, 5), std::nan(""));
    else
      data.v.set(data.key_index(0, 700, 0, 5), std::nan(""));
    Analysis a(data, ADAATTN_POLICY_SPEED);
    a.run();
    const auto choice = a.copy(a.args.tables.choice, a.heads());
    for (int g = 0; g < 3; ++g) EXPECT_TRUE(choice[static_cast<size_t>(g)].dense) << g;
    bool skips = false;
    for (size_t h = 3; h < choice.size(); ++h) skips = skips || !choice[h].dense;
    EXPECT_TRUE(skips);
  }
}

}  // namespace
}  // namespace adaattn::test
