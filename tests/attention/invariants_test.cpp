// Properties of exact attention that need no oracle.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "attention/fixture.h"

namespace adaattn::test {
namespace {

const double kNaN = std::numeric_limits<double>::quiet_NaN();

class Invariant : public OnEveryTarget {};
ADAATTN_ON_EVERY_TARGET(Invariant);

// A device computes the entropy in kernels that serve every feature; those that most calls run have no entropy.
constexpr uint32_t kOutputs[] = {ADAATTN_OUTPUT_ALL, ADAATTN_OUTPUT_LSE};

// Calls change(b, j, h) for every key token and key head.
template <class Change>
void for_each_key(const AttentionData& data, int64_t first, int64_t end, const Change& change) {
  for (int64_t b = 0; b < data.batch(); ++b)
    for (int64_t j = first; j < end; ++j)
      for (int64_t h = 0; h < data.desc.heads_kv; ++h) change(b, j, h);
}

void set_key(AttentionData& data, int64_t b, int64_t j, int64_t h, double value, bool keys = true, bool values = true) {
  for (int64_t c = 0; keys && c < data.desc.head_dim_qk; ++c) data.k.set(data.key_index(b, j, h, c), value);
  for (int64_t c = 0; values && c < data.d_v(); ++c) data.v.set(data.key_index(b, j, h, c), value);
}

TEST_P(Invariant, PermutedKeysGiveTheSameResult) {
  for (const AttentionCase& c : invariant_cases()) {
    SCOPED_TRACE(describe(c));
    AttentionData data(c, kF32All, run_seed());
    const auto expected = reference::attention(data.desc, data.io());
    std::vector<int64_t> order(static_cast<size_t>(c.seqlen_k));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), Random(run_seed()).engine());
    AttentionData permuted = with_own_outputs(data);
    permuted.k = Tensor(data.k.dtype(), data.k.shape());
    permuted.v = Tensor(data.v.dtype(), data.v.shape());
    for_each_key(data, 0, c.seqlen_k, [&](int64_t b, int64_t j, int64_t h) {
      for (int64_t d = 0; d < c.d_qk; ++d) {
        permuted.k.set({b, j, h, d}, data.k.get({b, order[j], h, d}));
        permuted.v.set({b, j, h, d}, data.v.get({b, order[j], h, d}));
      }
    });
    run(Context(target()), permuted);
    EXPECT_TRUE(matches(permuted, expected, weights_of(target())));
  }
}

TEST_P(Invariant, ShiftingEveryKeyShiftsOnlyTheLse) {
  for (const AttentionCase& c : invariant_cases()) {
    SCOPED_TRACE(describe(c));
    AttentionData data(c, kF32All, run_seed());
    // A dyadic grid keeps k + shift exact, so that the shift is the same for every key to the last bit.
    const auto snap = [](double x) { return std::nearbyint(x * 1024) / 1024; };
    data.k.for_each([&](const auto& index, int64_t) { data.k.set(index, snap(data.k.get(index))); });
    const auto expected = reference::attention(data.desc, data.io());
    std::vector<double> shift(static_cast<size_t>(c.d_qk));
    Random random(run_seed());
    for (double& x : shift) x = snap(random.normal());
    data.k.for_each([&](const auto& index, int64_t) { data.k.set(index, data.k.get(index) + shift[index[3]]); });
    run(Context(target()), data);

    auto shifted = expected;
    data.lse.for_each([&](const auto& index, int64_t flat) {
      double dot = 0;
      for (int64_t d = 0; d < c.d_qk; ++d) dot += data.q.get({index[0], index[2], index[1], d}) * shift[d];
      shifted.lse[flat] += dot / std::sqrt(static_cast<double>(c.d_qk));
      shifted.score_scale[flat] += 4 * std::fabs(dot);
    });
    EXPECT_TRUE(matches(data, shifted, weights_of(target())));
  }
}

// Runs data as it is and again with some of its memory changed, and expects the same bits. hidden(changed) makes the
// change.
template <class Hide>
void expect_no_influence(const Target& target, AttentionData data, const Hide& hide) {
  const Context context(target);
  AttentionData first = with_own_outputs(data);
  run(context, first);
  hide(data);
  run(context, data);
  EXPECT_TRUE(same_outputs(first, data));
}

TEST_P(Invariant, KeysBehindTheKeyLengthMayBeNaN) {
  for (AttentionCase c : invariant_cases()) {
    c.used_k = {static_cast<int32_t>(c.seqlen_k - 77), 3};
    for (const Dtypes& dtypes : uniform_dtypes())
      for (const uint32_t outputs : kOutputs) {
        SCOPED_TRACE(describe(c) + dtypes.name);
        expect_no_influence(target(), AttentionData(c, dtypes, run_seed(), outputs), [&](AttentionData& data) {
          for_each_key(data, 0, c.seqlen_k, [&](int64_t b, int64_t j, int64_t h) {
            if (j >= data.len_k(b)) set_key(data, b, j, h, kNaN);
          });
        });
      }
  }
}

TEST_P(Invariant, SlotsBehindTheLastKeyOfAPageMayBeNaN) {
  AttentionCase c = {.name = "Paged",
                     .batch = 2,
                     .heads_q = 4,
                     .heads_kv = 2,
                     .seqlen_q = 1,
                     .seqlen_k = 200,
                     .layout_kv = ADAATTN_LAYOUT_PAGED,
                     .page_size = 32,
                     .used_k = {170, 7}};
  for (int64_t seqlen_q : {1, 40}) {
    c.seqlen_q = seqlen_q;
    for (const Dtypes& dtypes : uniform_dtypes())
      for (const uint32_t outputs : kOutputs)
        expect_no_influence(target(), AttentionData(c, dtypes, run_seed(), outputs), [&](AttentionData& data) {
          for (int64_t b = 0; b < 2; ++b)
            for (int64_t j = data.len_k(b); j < (data.len_k(b) + 31) / 32 * 32; ++j)
              for (int64_t h = 0; h < c.heads_kv; ++h) set_key(data, b, j, h, kNaN);
        });
  }
}

TEST_P(Invariant, FutureKeysDoNotReachPastOutputs) {
  for (adaattn_mask_t mask : {ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT, ADAATTN_MASK_CAUSAL_TOP_LEFT}) {
    AttentionCase c = {.name = "Causal", .heads_q = 2, .heads_kv = 1, .seqlen_q = 200, .seqlen_k = 200, .mask = mask};
    constexpr int64_t kPast = 77;  // queries before this one see no key from this one on
    for (const Dtypes& dtypes : uniform_dtypes()) {
      for (const auto& [value, outputs] :
           {std::pair{1e4, kOutputs[0]}, {1e4, kOutputs[1]}, {kNaN, kOutputs[0]}, {kNaN, kOutputs[1]}}) {
        SCOPED_TRACE(std::string(dtypes.name) + " " + std::to_string(value));
        AttentionData data(c, dtypes, run_seed(), outputs);
        const Context context(target());
        AttentionData before = with_own_outputs(data);
        run(context, before);
        // On a GPU values of a tile that some query sees must be finite: a masked weight of 0 multiplies them.
        const double hidden = value;
        for_each_key(data, kPast, c.seqlen_k, [&](int64_t b, int64_t j, int64_t h) {
          set_key(data, b, j, h, hidden, std::isnan(hidden), kOnCpu || !std::isnan(hidden));
        });
        run(context, data);
        for (int64_t i = 0; i < kPast; ++i)
          for (int64_t h = 0; h < c.heads_q; ++h) {
            for (int64_t d = 0; d < c.d_qk; ++d) ASSERT_EQ(data.o.get({0, i, h, d}), before.o.get({0, i, h, d})) << i;
            ASSERT_EQ(data.lse.get({0, h, i}), before.lse.get({0, h, i})) << i;
            if (data.entropy.present()) {
              ASSERT_EQ(data.entropy.get({0, h, i}), before.entropy.get({0, h, i})) << i;
            }
          }
        EXPECT_NE(data.o.get({0, c.seqlen_q - 1, 0, 0}), before.o.get({0, c.seqlen_q - 1, 0, 0}));
      }
    }
  }
}

TEST_P(Invariant, KeysOutsideTheWindowMayBeNaN) {
  AttentionCase c = {.name = "Window",
                     .heads_q = 2,
                     .heads_kv = 1,
                     .seqlen_q = 20,
                     .seqlen_k = 400,
                     .mask = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT,
                     .window_left = 50};
  // A device reads keys and values in whole blocks, and a weight of 0 multiplies the values of the first.
  constexpr int64_t kBlock = kOnCpu ? 1 : 128;
  for (int64_t seqlen_q : {1, 20, 130}) {
    c.seqlen_q = seqlen_q;
    const int64_t first = c.seqlen_k - seqlen_q - 50;
    for (const Dtypes& dtypes : uniform_dtypes())
      for (const uint32_t outputs : kOutputs)
        expect_no_influence(target(), AttentionData(c, dtypes, run_seed(), outputs), [&](AttentionData& data) {
          for_each_key(data, 0, first, [&](int64_t b, int64_t j, int64_t h) {
            set_key(data, b, j, h, kNaN, true, j <= first - kBlock);
          });
        });
  }
}

TEST_P(Invariant, PackedNeighboursDoNotInfluenceEachOther) {
  AttentionCase c = {.name = "Packed",
                     .heads_q = 4,
                     .heads_kv = 2,
                     .layout_q = ADAATTN_LAYOUT_THD,
                     .layout_kv = ADAATTN_LAYOUT_THD,
                     .lens_q = {20, 140, 1},
                     .lens_k = {33, 150, 270}};
  for (const Dtypes& dtypes : uniform_dtypes())
    for (const uint32_t outputs : kOutputs) {
      AttentionData data(c, dtypes, run_seed(), outputs);
      const Context context(target());
      AttentionData before = with_own_outputs(data);
      run(context, before);
      for (int64_t j = 0; j < data.len_k(1); ++j)
        for (int64_t h = 0; h < c.heads_kv; ++h) set_key(data, 1, j, h, kNaN);
      run(context, data);
      for (int64_t b : {0, 2})
        for (int64_t i = 0; i < data.len_q(b); ++i)
          for (int64_t h = 0; h < c.heads_q; ++h) {
            ASSERT_EQ(data.lse.get(data.row_index(b, i, h)), before.lse.get(data.row_index(b, i, h)));
            for (int64_t d = 0; d < c.d_qk; ++d)
              ASSERT_EQ(data.o.get(data.query_index(b, i, h, d)), before.o.get(data.query_index(b, i, h, d)));
          }
      for (int64_t i = 0; i < data.len_q(1); ++i)
        EXPECT_TRUE(std::isnan(data.o.get(data.query_index(1, i, 0, 0)))) << "a visible NaN must show";
    }
}

TEST_P(Invariant, ConstantValuesComeOutConstant) {
  for (const AttentionCase& c : invariant_cases())
    for (const Dtypes& dtypes : uniform_dtypes())
      for (const uint32_t outputs : kOutputs) {
        SCOPED_TRACE(describe(c) + dtypes.name);
        AttentionData data(c, dtypes, run_seed(), outputs);
        data.v.fill(3.0);
        run(Context(target()), data);
        // 16-bit weights and their sum are rounded apart.
        const double tolerance = dtypes.q == ADAATTN_DTYPE_F32 ? 2e-6 : dtypes.q == ADAATTN_DTYPE_F16 ? 4e-3 : 3e-2;
        EXPECT_TRUE(close(data.o.values(), std::vector<double>(data.o.elements(), 3.0), 0, tolerance, "o"));
      }
}

TEST_P(Invariant, UniformAttentionIsTheMeanOfTheValues) {
  for (const AttentionCase& c : invariant_cases()) {
    AttentionData data(c, kF32All, run_seed());
    data.q.fill(0.0);
    const auto expected = reference::attention(data.desc, data.io());
    run(Context(target()), data);
    EXPECT_TRUE(matches(data, expected, weights_of(target())));
    const double ln_n = std::log(static_cast<double>(c.seqlen_k));
    EXPECT_TRUE(close(data.lse.values(), std::vector<double>(data.lse.elements(), ln_n), 0, 1e-6, "lse"));
    EXPECT_TRUE(close(data.entropy.values(), std::vector<double>(data.lse.elements(), ln_n), 0, 1e-6, "entropy"));
  }
}

TEST_P(Invariant, IdentityLikeAttentionReturnsTheValues) {
  AttentionCase c = {.name = "Identity", .heads_q = 1, .heads_kv = 1, .seqlen_q = 128, .seqlen_k = 128, .d_qk = 128};
  for (const Dtypes& dtypes : uniform_dtypes()) {
    AttentionData data(c, dtypes, run_seed());
    // Scores of 512 / sqrt(128) = 45 on the diagonal and 0 elsewhere: the weight off it is e^-45.
    data.q.for_each([&](const auto& i, int64_t) { data.q.set(i, i[1] == i[3] ? 32 : 0); });
    data.k.for_each([&](const auto& i, int64_t) { data.k.set(i, i[1] == i[3] ? 16 : 0); });
    run(Context(target()), data);
    EXPECT_TRUE(close(data.o.values(), data.v.values(), 0, dtypes.o == ADAATTN_DTYPE_F32 ? 2e-6 : 0, "o"));
    EXPECT_TRUE(close(data.entropy.values(), std::vector<double>(128, 0.0), 1e-6, 0, "entropy"));
  }
}

}  // namespace
}  // namespace adaattn::test
