#include <gtest/gtest.h>

#include <cmath>

#include "core/sampling.h"
#include "reference/attention.h"
#include "support/attention_data.h"
#include "support/cases.h"
#include "support/compare.h"
#include "support/context.h"

namespace adaattn::test {
namespace {

struct EntropyCall {
  int32_t mode = ADAATTN_ENTROPY_EXACT;
  int32_t normalized = 0;
  int64_t sample_rows = 256;
  uint64_t seed = 0;
  bool rows = true, heads = true;
};

struct EntropyOutputs {
  std::vector<double> rows, heads;  // in the order of the tensors; empty: not asked for
};

EntropyOutputs compute(const Context& context, AttentionData& data, const EntropyCall& call) {
  adaattn_entropy_desc_t desc;
  adaattn_entropy_desc_init(&desc, sizeof desc);
  desc.mode = call.mode;
  desc.normalized = call.normalized;
  desc.sample_rows = call.sample_rows;
  desc.seed = call.seed;
  data.poison_outputs();
  adaattn_io_t io = data.io();
  io.v = io.o = io.lse = adaattn_tensor_t{};
  if (!call.rows) io.entropy = adaattn_tensor_t{};
  Tensor heads(ADAATTN_DTYPE_F32, {data.batch(), data.desc.heads_q});
  heads.fill(std::nan(""));
  adaattn_attn_desc_t attn = data.desc;
  attn.outputs = 0;
  EntropyOutputs out;
  const adaattn_status_t status =
      adaattn_entropy(context.get(), &attn, &desc, &io, call.heads ? &heads.host() : nullptr, nullptr, 0, nullptr);
  EXPECT_TRUE(succeeded(status));
  if (call.rows) out.rows = data.entropy.values();
  if (call.heads) out.heads = heads.values();
  return out;
}

double tolerance(const AttentionCase& c) { return 2e-5 * std::max(1.0, c.input_scale); }

void expect_close(const std::vector<double>& actual, const std::vector<double>& expected, double tolerance) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    ASSERT_EQ(std::isnan(actual[i]), std::isnan(expected[i])) << "element " << i;
    if (!std::isnan(expected[i])) {
      ASSERT_NEAR(actual[i], expected[i], tolerance * std::max(1.0, expected[i])) << "element " << i;
    }
  }
}

// Means of the rows of each sequence and head; rows in the order of the entropy tensor.
std::vector<double> head_means(const AttentionData& data, const std::vector<double>& rows) {
  const std::vector<int64_t>& shape = data.entropy.shape();
  std::vector<double> means;
  for (int64_t b = 0; b < data.batch(); ++b)
    for (int64_t h = 0; h < data.desc.heads_q; ++h) {
      double sum = 0;
      for (int64_t i = 0; i < data.len_q(b); ++i) {
        int64_t flat = 0;
        const std::vector<int64_t> index = data.row_index(b, i, h);
        for (size_t k = 0; k < index.size(); ++k) flat = flat * shape[k] + index[k];
        sum += rows[static_cast<size_t>(flat)];
      }
      means.push_back(data.len_q(b) == 0 ? 0 : sum / static_cast<double>(data.len_q(b)));
    }
  return means;
}

TEST(CpuEntropy, EveryFeatureMatchesTheOracle) {
  const std::vector<Target> targets = available_targets(ADAATTN_DEVICE_CPU);
  for (const AttentionCase& c : attention_cases())
    for (const Dtypes& dtypes : uniform_dtypes()) {
      AttentionData data(c, dtypes, 7);
      const reference::AttentionResult expected = reference::attention(data.desc, data.io());
      for (const Target& target : targets) {
        if (!c.reduced && target.isa != targets.front().isa) continue;
        SCOPED_TRACE(target.name + " " + c.name + " " + dtypes.name);
        const Context context(target);
        for (int32_t normalized : {0, 1}) {
          const EntropyOutputs out = compute(context, data, {.normalized = normalized});
          std::vector<double> rows = expected.entropy;
          for (size_t i = 0; i < rows.size() && normalized != 0; ++i)
            if (!std::isnan(rows[i])) rows[i] = expected.keys[i] < 2 ? 0 : rows[i] / std::log(expected.keys[i]);
          expect_close(out.rows, rows, tolerance(c));
          expect_close(out.heads, head_means(data, rows), tolerance(c));
        }
      }
    }
}

AttentionCase plain(int64_t seqlen_q, int64_t seqlen_k, int64_t d) {
  AttentionCase c;
  c.name = "plain";
  c.seqlen_q = seqlen_q;
  c.seqlen_k = seqlen_k;
  c.d_qk = d;
  return c;
}

TEST(CpuEntropy, TenEqualKeysGiveTheLogarithmOfTen) {
  AttentionData data(plain(3, 10, 8), uniform_dtypes()[0], 1);
  data.k.fill(0.5);
  const Context context;
  for (double x : compute(context, data, {}).rows) EXPECT_NEAR(x / std::log(10), 1, 1e-6);
  for (double x : compute(context, data, {.normalized = 1}).rows) EXPECT_NEAR(x, 1, 1e-6);
}

TEST(CpuEntropy, OneHotRowsHaveNoEntropyAtAnyLength) {
  for (int64_t keys : {4096, 131072}) {
    AttentionData data(plain(2, keys, 8), uniform_dtypes()[0], 1);
    data.q.fill(30);
    data.k.fill(0);
    for (int64_t c = 0; c < 8; ++c) data.k.set({0, keys / 3, 0, c}, 1);
    const Context context;
    const EntropyOutputs out = compute(context, data, {});
    for (double x : out.rows) {
      EXPECT_GE(x, 0);
      EXPECT_LT(x, 1e-6);
    }
  }
}

TEST(CpuEntropy, UniformRowsOfManyKeysKeepTheirAccuracy) {
  AttentionData data(plain(2, 131072, 8), uniform_dtypes()[0], 1);
  data.k.fill(1);
  const Context context;
  for (double x : compute(context, data, {}).rows) EXPECT_NEAR(x / std::log(131072), 1, 1e-6);
}

AttentionCase grouped_causal() {
  AttentionCase c = plain(300, 420, 16);
  c.batch = 2;
  c.heads_q = 6;
  c.heads_kv = 2;
  c.mask = ADAATTN_MASK_CAUSAL;
  return c;
}

TEST(CpuEntropy, SampledMeanIsThatOfTheDrawnRows) {
  AttentionData data(grouped_causal(), uniform_dtypes()[0], 3);
  const Context context;
  const EntropyOutputs exact = compute(context, data, {});
  for (int64_t sample_rows : {1, 17, 64, 299}) {
    const EntropyOutputs sampled = compute(
        context, data, {.mode = ADAATTN_ENTROPY_SAMPLED, .sample_rows = sample_rows, .seed = 11, .rows = false});
    for (int64_t b = 0; b < 2; ++b)
      for (int64_t h = 0; h < 6; ++h) {
        double mean = 0;
        for (int64_t s = 0; s < sample_rows; ++s)
          mean += exact.rows[static_cast<size_t>((b * 6 + h) * 300 + sampled_row(11, b, h, 6, s, sample_rows, 300))];
        EXPECT_NEAR(sampled.heads[static_cast<size_t>(b * 6 + h)], mean / static_cast<double>(sample_rows), 1e-5);
      }
  }
}

TEST(CpuEntropy, SamplingAsManyRowsAsThereAreIsExact) {
  AttentionData data(grouped_causal(), uniform_dtypes()[0], 3);
  const Context context;
  const std::vector<double> exact = compute(context, data, {}).heads;
  for (int64_t sample_rows : {300, 1000})
    EXPECT_EQ(
        compute(context, data, {.mode = ADAATTN_ENTROPY_SAMPLED, .sample_rows = sample_rows, .rows = false}).heads,
        exact);
}

TEST(CpuEntropy, SampledMeanIsNearTheExactOne) {
  AttentionCase c = plain(2000, 2000, 32);
  c.mask = ADAATTN_MASK_CAUSAL;
  AttentionData data(c, uniform_dtypes()[0], 5);
  const Context context;
  const double exact = compute(context, data, {.rows = false}).heads[0];
  const EntropyCall call{.mode = ADAATTN_ENTROPY_SAMPLED, .seed = 2, .rows = false};
  EXPECT_NEAR(compute(context, data, call).heads[0], exact, 0.02 * exact);
}

TEST(CpuEntropy, ThreadsAndRepetitionDoNotChangeABit) {
  AttentionData data(grouped_causal(), uniform_dtypes()[0], 3);
  const Context one({}, 1);
  for (int32_t mode : {ADAATTN_ENTROPY_EXACT, ADAATTN_ENTROPY_SAMPLED}) {
    const EntropyCall call{.mode = mode, .sample_rows = 50, .seed = 9, .rows = mode == ADAATTN_ENTROPY_EXACT};
    const EntropyOutputs expected = compute(one, data, call);
    for (int32_t threads : {1, 2, 5}) {
      const Context context({}, threads);
      const EntropyOutputs out = compute(context, data, call);
      EXPECT_EQ(out.rows, expected.rows);
      EXPECT_EQ(out.heads, expected.heads);
    }
  }
}

TEST(CpuEntropy, NotANumberInUnseenKeysNeverReachesTheResult) {
  AttentionCase c = grouped_causal();
  c.used_k = {200, 420};
  AttentionData data(c, uniform_dtypes()[0], 3);
  const Context context;
  const EntropyOutputs before = compute(context, data, {});
  for (int64_t j = 200; j < 420; ++j)
    for (int64_t h = 0; h < 2; ++h)
      for (int64_t x = 0; x < 16; ++x) data.k.set(data.key_index(0, j, h, x), std::nan(""));
  const EntropyOutputs after = compute(context, data, {});
  EXPECT_EQ(after.rows, before.rows);
  EXPECT_EQ(after.heads, before.heads);
}

TEST(CpuEntropy, WorkspaceGrowsLinearlyWithTheSequence) {
  const Context context;
  adaattn_entropy_desc_t desc;
  adaattn_entropy_desc_init(&desc, sizeof desc);
  size_t previous = 0;
  for (int64_t length : {4096, 8192, 16384, 32768}) {
    AttentionCase c = plain(length, length, 64);
    adaattn_attn_desc_t attn = make_desc(c, uniform_dtypes()[0], 0);
    size_t bytes = 0;
    ASSERT_TRUE(succeeded(adaattn_entropy_workspace_size(context.get(), &attn, &desc, &bytes)));
    EXPECT_GT(bytes, 0u);
    if (previous != 0) {
      EXPECT_LE(static_cast<double>(bytes), 2.1 * static_cast<double>(previous));
    }
    previous = bytes;
  }
}

}  // namespace
}  // namespace adaattn::test
