// 8-bit attention: the tables of the quantise pass against K and V, the attend kernels against the oracle on those
// tables, and both together against the oracle on the 16-bit inputs.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>

#include "adaptive/int8_tables.h"
#include "attention/fixture.h"
#include "backend.h"
#include "core/adaptive_options.h"
#include "core/validate.h"
#include "gpu/device.h"
#include "gpu/eight_bits.h"

namespace adaattn::test {
namespace {

using cuda::Int8Scales;
using cuda::Int8Tables;
using cuda::kInt8ScaleBlock;
using cuda::kInt8TileK;
using cuda::v_key;

class Int8 : public OnTheDevice {};

double from_e4m3(uint8_t x) {
  const int exponent = x >> 3 & 15, mantissa = x & 7;
  if ((x & 127) == 127) return std::nan("");
  const double magnitude = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return (x & 128) != 0 ? -magnitude : magnitude;
}

// One call of an 8-bit plan, and the tables that it left in its workspace.
struct Int8Run {
  AttentionData data;
  std::vector<uint8_t> memory;
  AttnParams params;
  Int8Tables tables;  // in memory
  PlanCounters counters;

  Int8Run(const AttentionCase& c, const Dtypes& dtypes, const std::function<void(AttentionData&)>& change = {})
      : data(c, dtypes, run_seed(), ADAATTN_OUTPUT_LSE) {
    if (change) change(data);
    const auto backend = make_cuda_backend({});
    Problem problem = problem_from(data.desc, Use::kAttention);
    problem.adaptive = resolve_options(eight_bits(), problem);
    const auto plan = backend->make_plan(problem);
    const DeviceMemory workspace(plan->info().workspace_bytes);
    data.upload(ADAATTN_DEVICE_CUDA);
    params = attention_from(problem, data.io(ADAATTN_DEVICE_CUDA), {ADAATTN_DEVICE_CUDA, 0, nullptr}, {});
    plan->execute(params, workspace.data(), workspace.bytes(), nullptr);
    counters = plan->counters(true, false);
    data.download(ADAATTN_DEVICE_CUDA);
    memory.resize(workspace.bytes());
    require(cudaMemcpy(memory.data(), workspace.data(), workspace.bytes(), cudaMemcpyDeviceToHost));
    tables = cuda::lay_out_int8_tables(params, memory.data());
  }

  int64_t d() const { return data.desc.head_dim_qk; }
  int64_t keys(int64_t b) const {
    return data.seqused_k.present() ? static_cast<int64_t>(data.seqused_k.get({b})) : data.len_k(b);
  }
  int64_t tile(int64_t b, int64_t h, int64_t key) const {
    return (b * data.desc.heads_kv + h) * tables.key_tiles + key / kInt8TileK;
  }
  const Int8Scales& scales(int64_t b, int64_t h, int64_t key) const { return tables.scales[tile(b, h, key)]; }
  double k_step(int64_t b, int64_t h, int64_t key) const {
    return scales(b, h, key).k[key % kInt8TileK / kInt8ScaleBlock];
  }
  double k_mean(int64_t b, int64_t h, int64_t c) const { return tables.k_mean[(b * data.desc.heads_kv + h) * d() + c]; }
  double v_mean(int64_t b, int64_t h, int64_t c) const { return tables.v_mean[(b * data.desc.heads_kv + h) * d() + c]; }

  // The swizzle of d-byte lines: 16-byte word w of line l lies where word w ^ (l mod 8), or (l / 2 mod 4), would.
  double k8(int64_t b, int64_t h, int64_t key, int64_t c) const {
    const int64_t line = key % kInt8TileK, turn = d() == 128 ? line % 8 : line / 2 % 4;
    const int64_t at = line * d() + ((c / 16) ^ turn) * 16 + c % 16;
    return static_cast<int8_t>(tables.k[tile(b, h, key) * kInt8TileK * d() + at]);
  }
  double v8(int64_t b, int64_t h, int64_t key, int64_t c) const {
    int64_t byte = 0;
    while (v_key(static_cast<int>(byte)) != key % kInt8TileK) ++byte;
    const int64_t at = c * 128 + ((byte / 16) ^ (c % 8)) * 16 + byte % 16;
    return from_e4m3(tables.v[tile(b, h, key) * kInt8TileK * d() + at]);
  }
  double k_restored(int64_t b, int64_t h, int64_t key, int64_t c) const {
    return k8(b, h, key, c) * k_step(b, h, key) + k_mean(b, h, c);
  }
  double v_restored(int64_t b, int64_t h, int64_t key, int64_t c) const {
    return v8(b, h, key, c) * scales(b, h, key).v + v_mean(b, h, c);
  }

  // The problem that the attend kernel solves: K and V of the tables, each row of Q rounded to 127 steps.
  AttentionData restored(const AttentionCase& c) const {
    AttentionData out(c, kF32All, 0, ADAATTN_OUTPUT_LSE);
    out.sinks = data.sinks;
    for (int64_t b = 0; b < data.batch(); ++b) {
      for (int64_t h = 0; h < data.desc.heads_q; ++h)
        for (int64_t i = 0; i < data.len_q(b); ++i) {
          double top = 0;
          for (int64_t x = 0; x < d(); ++x) top = std::max(top, std::abs(data.q.get(data.query_index(b, i, h, x))));
          for (int64_t x = 0; x < d(); ++x) {
            const double step = top / 127, q = data.q.get(data.query_index(b, i, h, x));
            out.q.set(out.query_index(b, i, h, x), step == 0 ? 0 : std::nearbyint(q / step) * step);
          }
        }
      for (int64_t h = 0; h < data.desc.heads_kv; ++h)
        for (int64_t j = 0; j < keys(b); ++j)
          for (int64_t x = 0; x < d(); ++x) {
            out.k.set(out.key_index(b, j, h, x), k_restored(b, h, j, x));
            out.v.set(out.key_index(b, j, h, x), v_restored(b, h, j, x));
          }
    }
    return out;
  }
};

struct Difference {
  double o = 0;    // Frobenius, relative
  double lse = 0;  // largest
};

Difference difference(const AttentionData& data, const reference::AttentionResult& expected) {
  double wrong = 0, all = 0;
  Difference out;
  data.o.for_each([&](const std::vector<int64_t>& index, int64_t flat) {
    const double o = data.o.get(index), e = expected.o[static_cast<size_t>(flat)];
    EXPECT_EQ(std::isnan(o), std::isnan(e)) << "o[" << flat << "]";
    if (std::isnan(o) || std::isnan(e)) return;
    wrong += (o - e) * (o - e);
    all += e * e;
  });
  data.lse.for_each([&](const std::vector<int64_t>& index, int64_t flat) {
    const double x = data.lse.get(index), e = expected.lse[static_cast<size_t>(flat)];
    if (std::isinf(x) || std::isinf(e) || std::isnan(x) || std::isnan(e)) {
      EXPECT_TRUE(x == e || (std::isnan(x) && std::isnan(e))) << "lse[" << flat << "]: " << x << ", expected " << e;
      return;
    }
    out.lse = std::max(out.lse, std::abs(x - e));
  });
  out.o = all == 0 ? std::sqrt(wrong) : std::sqrt(wrong / all);
  return out;
}

AttentionCase base(const char* name, int64_t seqlen_q, int64_t seqlen_k, int64_t d) {
  AttentionCase c = {.name = name, .batch = 2, .heads_q = 4, .heads_kv = 2, .seqlen_q = seqlen_q, .seqlen_k = seqlen_k};
  c.d_qk = d;
  return c;
}

std::vector<AttentionCase> int8_cases() {
  std::vector<AttentionCase> list;
  for (const int64_t d : {int64_t{128}, int64_t{64}}) {
    list.push_back(base("Whole", 256, 256, d));
    list.push_back(base("Ragged", 200, 333, d));
    list.push_back(base("Long", 70, 1500, d));
    AttentionCase c = base("Causal", 333, 333, d);
    c.mask = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT;
    list.push_back(c);
    c = base("CausalMoreKeys", 150, 700, d);
    c.mask = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT;
    list.push_back(c);
    c = base("CausalMoreQueries", 400, 90, d);
    c.mask = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT;
    list.push_back(c);
    c = base("TopLeft", 300, 520, d);
    c.mask = ADAATTN_MASK_CAUSAL_TOP_LEFT;
    list.push_back(c);
    c = base("Window", 500, 500, d);
    c.window_left = 130;
    c.window_right = 70;
    list.push_back(c);
    c = base("Sinks", 200, 260, d);
    c.flags = ADAATTN_FLAG_SINK;
    c.mask = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT;
    list.push_back(c);
    c = base("HeadsFirst", 180, 300, d);
    c.layout_q = c.layout_kv = ADAATTN_LAYOUT_BHSD;
    c.storage = Storage::kHeadsFirst;
    list.push_back(c);
    c = base("Used", 140, 400, d);
    c.used_k = {400, 129};
    list.push_back(c);
    c = base("Packed", 0, 0, d);
    c.layout_q = c.layout_kv = ADAATTN_LAYOUT_THD;
    c.lens_q = {130, 1, 0, 257};
    c.lens_k = {300, 129, 40, 257};
    c.slack_tokens = 5;
    c.mask = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT;
    list.push_back(c);
    list.push_back(base("OneRow", 1, 500, d));
    list.push_back(base("OneKey", 140, 1, d));
    list.push_back(base("OneRowOneKey", 1, 1, d));
  }
  return list;
}

TEST_F(Int8, TablesRestoreKeysAndValuesWithinHalfAStep) {
  for (const AttentionCase& c : int8_cases())
    for (const Dtypes& dtypes : {kBf16All, kF16All}) {
      SCOPED_TRACE(describe(c) + " " + dtypes.name);
      const Int8Run run(c, dtypes);
      int64_t wrong = 0;
      for (int64_t b = 0; b < run.data.batch(); ++b)
        for (int64_t h = 0; h < c.heads_kv; ++h) {
          const int64_t keys = run.keys(b), rows = (keys + kInt8TileK - 1) / kInt8TileK * kInt8TileK;
          for (int64_t j = 0; j < rows; ++j)
            for (int64_t x = 0; x < c.d_qk; ++x) {
              if (j >= keys) {
                wrong += run.v8(b, h, j, x) != 0;
                continue;
              }
              const double k = run.data.k.get(run.data.key_index(b, j, h, x));
              const double v = run.data.v.get(run.data.key_index(b, j, h, x));
              const double v_scale = run.scales(b, h, j).v, centred = std::abs(v - run.v_mean(b, h, x));
              wrong += !(std::abs(run.k_restored(b, h, j, x) - k) <= 0.501 * run.k_step(b, h, j));
              wrong += !(std::abs(run.v_restored(b, h, j, x) - v) <=
                         std::max(centred * 0.0626, v_scale * std::ldexp(1.01, -10)));
              wrong += !(centred <= 448 * v_scale * 1.0001);
            }
        }
      EXPECT_EQ(wrong, 0) << "elements out of bounds";
    }
}

TEST_F(Int8, AgreesWithTheOracle) {
  for (const AttentionCase& c : int8_cases())
    for (const Dtypes& dtypes : {kBf16All, kF16All}) {
      if (dtypes.q == ADAATTN_DTYPE_F16 && c.d_qk == 64) continue;
      SCOPED_TRACE(describe(c) + " " + dtypes.name);
      const Int8Run run(c, dtypes);
      const AttentionData eight = run.restored(c);
      const auto expected = reference::attention(eight.desc, eight.io());
      const Difference on_tables = difference(run.data, expected);
      const Difference on_inputs = difference(run.data, reference::attention(run.data.desc, run.data.io()));
      EXPECT_LE(on_tables.o, 2.7e-2);
      EXPECT_LE(on_tables.lse, 4e-2);  // rows of few keys: half a step of e4m3 is 6 %
      EXPECT_LE(on_inputs.o, 4.7e-2);
      EXPECT_LE(on_inputs.lse, 8e-2);
      const uint64_t heads = static_cast<uint64_t>(run.data.batch() * c.heads_q);
      EXPECT_EQ(run.counters.query_rows, expected.query_rows);
      EXPECT_EQ(run.counters.score_pairs, expected.score_pairs);
      EXPECT_EQ(run.counters.adaptive.heads, heads);
      EXPECT_EQ(run.counters.adaptive.heads_i8, heads);
      EXPECT_EQ(run.counters.adaptive.tiles_kept, run.counters.adaptive.tiles);
      std::printf("%-18s d%-4lld %s  o %.4f lse %.4f on the tables, o %.4f lse %.4f on the inputs\n", c.name.c_str(),
                  static_cast<long long>(c.d_qk), dtypes.name, on_tables.o, on_tables.lse, on_inputs.o, on_inputs.lse);
    }
}

// Each query sees one key alone, so that each row of O is one row of V.
TEST_F(Int8, OneHotWeightsReturnTheValueOfTheirKey) {
  for (const int64_t d : {int64_t{128}, int64_t{64}}) {
    const AttentionCase c = base("OneHot", 300, 300, d);
    const auto target = [](int64_t i) { return i * 7 % 300; };
    const Int8Run run(c, kBf16All, [&](AttentionData& data) {
      Random random(run_seed());
      data.k.fill([&] { return random.chance(0.5) ? 16 : -16; });
      for (int64_t b = 0; b < c.batch; ++b)
        for (int64_t h = 0; h < c.heads_q; ++h)
          for (int64_t i = 0; i < c.seqlen_q; ++i)
            for (int64_t x = 0; x < d; ++x)
              data.q.set(data.query_index(b, i, h, x), data.k.get(data.key_index(b, target(i), h / 2, x)));
    });
    int64_t wrong = 0;
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t h = 0; h < c.heads_q; ++h)
        for (int64_t i = 0; i < c.seqlen_q; ++i)
          for (int64_t x = 0; x < d; ++x) {
            const double o = run.data.o.get(run.data.query_index(b, i, h, x));
            const double v = run.v_restored(b, h / 2, target(i), x);
            if (std::abs(o - v) <= 4e-3 * std::abs(v) + 1e-4) continue;
            if (++wrong <= 10) {
              int64_t found = -1;
              for (int64_t j = 0; j < c.seqlen_k; ++j)
                if (std::abs(run.v_restored(b, h / 2, j, x) - o) < 1e-3) found = j;
              ADD_FAILURE() << "d " << d << " b " << b << " h " << h << " row " << i << " column " << x << ": " << o
                            << ", value of key " << target(i) << " is " << v << "; key " << found << " has that value";
            }
          }
    EXPECT_EQ(wrong, 0);
  }
}

// Error relative to the spread of V around the head's mean.
double spread_error(const Int8Run& run, const reference::AttentionResult& expected) {
  double wrong = 0, spread = 0, rows = 0, keys = 0;
  run.data.o.for_each([&](const std::vector<int64_t>& index, int64_t flat) {
    const double e = expected.o[static_cast<size_t>(flat)], o = run.data.o.get(index);
    EXPECT_TRUE(std::isfinite(o)) << flat;
    wrong += (o - e) * (o - e);
    rows += 1;
  });
  for (int64_t b = 0; b < run.data.batch(); ++b)
    for (int64_t h = 0; h < run.data.desc.heads_kv; ++h)
      for (int64_t x = 0; x < run.d(); ++x) {
        double mean = 0;
        for (int64_t j = 0; j < run.keys(b); ++j) mean += run.data.v.get(run.data.key_index(b, j, h, x));
        mean /= static_cast<double>(run.keys(b));
        for (int64_t j = 0; j < run.keys(b); ++j, keys += 1)
          spread += std::pow(run.data.v.get(run.data.key_index(b, j, h, x)) - mean, 2);
      }
  return spread == 0 ? std::sqrt(wrong / rows) : std::sqrt(wrong / rows / (spread / keys));
}

TEST_F(Int8, ExtremeInputsStayFiniteAndNearTheOracle) {
  const AttentionCase c = base("Extreme", 200, 400, 128);
  struct Extreme {
    const char* name;
    std::function<void(AttentionData&)> change;
    double limit;
  };
  const auto scale = [](Tensor& t, double factor, double shift, int64_t only_column = -1) {
    t.for_each([&](const std::vector<int64_t>& index, int64_t) {
      if (only_column < 0 || index.back() == only_column) t.set(index, t.get(index) * factor + shift);
    });
  };
  const Extreme cases[] = {
      {"KeysWithACommonVector", [&](AttentionData& a) { scale(a.k, 1, 40); }, 0.02},
      {"KeyChannelTimes100", [&](AttentionData& a) { scale(a.k, 100, 0, 5); }, 0.7},
      {"ValuesWithACommonVector", [&](AttentionData& a) { scale(a.v, 1, 30); }, 0.06},
      {"ValuesOf1e30", [&](AttentionData& a) { scale(a.v, 1e30, 0); }, 0.02},
      {"ValuesOf1e-30", [&](AttentionData& a) { scale(a.v, 1e-30, 0); }, 0.02},
      {"QueriesOf1e-37", [&](AttentionData& a) { scale(a.q, 1e-37, 0); }, 0.01},
      {"KeysOf1e-38", [&](AttentionData& a) { scale(a.k, 1e-38, 0); }, 0.01},
      {"SharpScores", [&](AttentionData& a) { scale(a.q, 60, 0); }, 0.4},
      {"QueriesZero", [&](AttentionData& a) { scale(a.q, 0, 0); }, 0.01},
      {"KeysZero", [&](AttentionData& a) { scale(a.k, 0, 0); }, 0.01},
      {"KeysEqual", [&](AttentionData& a) { scale(a.k, 0, 3); }, 0.01},
      {"ValuesEqual", [&](AttentionData& a) { scale(a.v, 0, 3); }, 0.02},
      {"ValuesZero", [&](AttentionData& a) { scale(a.v, 0, 0); }, 1e-30},
  };
  for (const Extreme& extreme : cases) {
    SCOPED_TRACE(extreme.name);
    const Int8Run run(c, kBf16All, extreme.change);
    const double error = spread_error(run, reference::attention(run.data.desc, run.data.io()));
    std::printf("%-24s %.5f of V's spread\n", extreme.name, error);
    EXPECT_LE(error, extreme.limit);
  }
}

TEST_F(Int8, SequencesWithoutKeysGiveZeroAndTheSinkAlone) {
  AttentionCase c = base("NoKeys", 150, 200, 128);
  c.used_k = {0, 200};
  for (const uint32_t flags : {0u, ADAATTN_FLAG_SINK}) {
    c.flags = flags;
    const Int8Run run(c, kBf16All);
    EXPECT_LE(difference(run.data, reference::attention(run.data.desc, run.data.io())).o, 4.7e-2);
  }
}

// More tiles than SMs, in a loop: a race would move bits.
TEST_F(Int8, RepeatedCallsGiveTheSameBits) {
  for (const adaattn_mask_t mask : {ADAATTN_MASK_NONE, ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT}) {
    AttentionCase c = base("Repeat", 1500, 1500, 128);
    c.heads_q = 16;
    c.heads_kv = 4;
    c.mask = mask;
    AttentionData data(c, kBf16All, run_seed(), ADAATTN_OUTPUT_LSE);
    const auto backend = make_cuda_backend({});
    Problem problem = problem_from(data.desc, Use::kAttention);
    problem.adaptive = resolve_options(eight_bits(), problem);
    const auto plan = backend->make_plan(problem);
    const DeviceMemory workspace(plan->info().workspace_bytes);
    data.upload(ADAATTN_DEVICE_CUDA);
    const AttnParams params =
        attention_from(problem, data.io(ADAATTN_DEVICE_CUDA), {ADAATTN_DEVICE_CUDA, 0, nullptr}, {});
    std::vector<std::byte> first;
    for (int i = 0; i < 40; ++i) {
      require(cudaMemset(workspace.data(), 0xff, workspace.bytes()));
      require(cudaMemset(params.o.data, 0xff, data.o.buffer()->bytes()));
      plan->execute(params, workspace.data(), workspace.bytes(), nullptr);
      data.download(ADAATTN_DEVICE_CUDA);
      if (i == 0) first = data.o.bytes();
      ASSERT_EQ(data.o.bytes(), first) << "call " << i;
    }
  }
}

}  // namespace
}  // namespace adaattn::test
