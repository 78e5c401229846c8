// 8-bit keys and values that a device widens: every number, factors of blocks far apart, queries beyond the range of
// f16, decode and prefill.
#include <cmath>
#include <limits>

#include "gpu/e4m3.h"
#include "reference/number.h"

namespace adaattn::test {
namespace {

class E4m3Cache : public OnTheDevice {};

const Dtypes kBf16Queries = {"bf16_kv_e4m3", ADAATTN_DTYPE_BF16, ADAATTN_DTYPE_E4M3, ADAATTN_DTYPE_F32};
const Dtypes kBf16QueriesBlocks = {"bf16_kv_e4m3_blocks", ADAATTN_DTYPE_BF16, ADAATTN_DTYPE_E4M3, ADAATTN_DTYPE_F32,
                                   64};

// Decode and prefill: each has a kernel of its own.
constexpr int64_t kQueries[] = {1, 60};

AttentionCase cache_case(int64_t seqlen_q, int64_t seqlen_k, int64_t d) {
  return {.name = "Cache",
          .batch = 1,
          .heads_q = 4,
          .heads_kv = 2,
          .seqlen_q = seqlen_q,
          .seqlen_k = seqlen_k,
          .d_qk = d,
          .mask = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT};
}

double value_of(int64_t byte) {
  const auto bits = static_cast<uint8_t>(byte);
  return reference::load(&bits, ADAATTN_DTYPE_E4M3, 0);
}

testing::AssertionResult agrees(const AttentionData& data) {
  return matches(data, reference::attention(data.desc, data.io()), Weights::kInputTypeOrF16);
}

// A query that sees one key returns its value: two sequences of one key hold the 256 bytes.
TEST_F(E4m3Cache, EveryValueIsWidenedExactly) {
  const Context context(kCuda);
  for (const int64_t seqlen_q : kQueries) {
    AttentionCase c = cache_case(seqlen_q, 1, 128);
    c.batch = 2;
    c.heads_kv = 1;
    c.mask = ADAATTN_MASK_NONE;
    AttentionData data(c, kBf16Queries, run_seed(), 0);
    data.q.fill(0);  // the score, and with it the weight, is exact
    data.v_descale.fill(1);
    data.v.for_each([&](const auto& index, int64_t) { data.v.set(index, value_of(128 * index[0] + index[3])); });
    run(context, data);
    data.o.for_each([&](const auto& index, int64_t) {
      const int64_t byte = 128 * index[0] + index[3];
      const double expected = value_of(byte);
      const double actual = data.o.get(index);
      EXPECT_TRUE(std::isnan(expected) ? std::isnan(actual) : actual == expected)
          << "byte " << byte << " is " << actual << ", expected " << expected;
    });
  }
}

// Queries that are unit vectors read the key's elements into the log-sum-exp of one score.
TEST_F(E4m3Cache, EveryKeyIsWidenedExactly) {
  const Context context(kCuda);
  for (const bool decode : {true, false}) {
    AttentionCase c = {.name = "Keys", .batch = 2, .heads_q = decode ? 16 : 1, .heads_kv = 1, .seqlen_k = 1};
    c.seqlen_q = decode ? 1 : 128;
    c.d_qk = 128;
    c.scale = 1;
    c.batch = decode ? 16 : 2;  // of 16 columns each, or of 128
    AttentionData data(c, kBf16Queries, run_seed(), ADAATTN_OUTPUT_LSE);
    data.k_descale.fill(1);
    const auto column_of = [&](int64_t b, int64_t row) { return decode ? 16 * (b % 8) + row : row; };
    const auto byte_of = [&](int64_t b, int64_t column) { return 128 * (decode ? b / 8 : b) + column; };
    data.q.for_each([&](const auto& index, int64_t) {
      data.q.set(index, index[3] == column_of(index[0], decode ? index[2] : index[1]) ? 1 : 0);
    });
    // A NaN beside the others would be in every score.
    data.k.for_each([&](const auto& index, int64_t) {
      const double x = value_of(byte_of(index[0], index[3]));
      data.k.set(index, std::isnan(x) ? 0 : x);
    });
    run(context, data);
    data.lse.for_each([&](const auto& index, int64_t) {
      const int64_t byte = byte_of(index[0], column_of(index[0], decode ? index[1] : index[2]));
      const double x = value_of(byte);
      const double expected = std::isnan(x) ? 0 : x;
      EXPECT_NEAR(data.lse.get(index), expected, 1e-6 * std::fabs(expected)) << "byte " << byte;
    });
  }
}

TEST_F(E4m3Cache, NotANumberInAKeyIsSeen) {
  const Context context(kCuda);
  for (const int64_t seqlen_q : kQueries) {
    AttentionData data(cache_case(seqlen_q, 200, 64), kBf16Queries, run_seed(), ADAATTN_OUTPUT_LSE);
    data.k.set({0, 3, 1, 17}, std::numeric_limits<double>::quiet_NaN());
    run(context, data);
    EXPECT_TRUE(agrees(data));
  }
}

// Factors from nothing to 2^40 apart, where the keys of one block have nearly all the weight.
TEST_F(E4m3Cache, BlocksOfFactorsFarApart) {
  const Context context(kCuda);
  for (const int64_t seqlen_q : kQueries)
    for (int64_t heavy = 0; heavy < kBlocksFarApart; ++heavy) {
      AttentionCase c = cache_case(seqlen_q, 64 * kBlocksFarApart, 128);
      c.mask = ADAATTN_MASK_NONE;
      AttentionData data(c, kBf16QueriesBlocks, run_seed(), ADAATTN_OUTPUT_LSE);
      weigh_one_block(data, heavy, 448);
      run(context, data);
      EXPECT_TRUE(agrees(data)) << "heavy block " << heavy << ", queries " << seqlen_q;
    }
}

TEST_F(E4m3Cache, KeyFactorsOfZeroAndOfEachBlock) {
  const Context context(kCuda);
  for (const int64_t seqlen_q : kQueries) {
    AttentionData data(cache_case(seqlen_q, 500, 128), kBf16QueriesBlocks, run_seed(), ADAATTN_OUTPUT_LSE);
    data.k_descale.for_each(
        [&](const auto& index, int64_t) { data.k_descale.set(index, index[2] % 3 == 1 ? 0 : 0.5 + index[2]); });
    run(context, data);
    EXPECT_TRUE(agrees(data)) << "queries " << seqlen_q;
  }
}

// bfloat16 queries have the range of floats, the products they enter that of f16.
TEST_F(E4m3Cache, QueriesBeyondTheRangeOfF16) {
  const Context context(kCuda);
  for (const int64_t seqlen_q : kQueries)
    for (const double size : {0x1p-90, 0x1p-20, 0x1p20, 0x1p90}) {
      AttentionData data(cache_case(seqlen_q, 300, 128), kBf16Queries, run_seed(), ADAATTN_OUTPUT_LSE);
      // Rows differ in size too.
      data.q.for_each([&](const auto& index, int64_t) {
        data.q.set(index, data.q.get(index) * size * std::exp2(-static_cast<double>(index[1] % 3 + index[2] % 2)));
      });
      data.k_descale.fill(1 / size);
      run(context, data);
      EXPECT_TRUE(agrees(data)) << "queries " << seqlen_q << " of size " << size;
    }
}

TEST_F(E4m3Cache, LongCachesAreSplitAndRepeatable) {
  const Context context(kCuda);
  for (const int64_t seqlen_q : {int64_t{1}, int64_t{5}, int64_t{40}}) {
    AttentionCase c = cache_case(seqlen_q, 9000, 128);
    c.batch = 2;
    c.used_k = {9000, 4321};
    AttentionData first(c, kBf16QueriesBlocks, run_seed(), ADAATTN_OUTPUT_LSE);
    run(context, first);
    EXPECT_TRUE(agrees(first)) << "queries " << seqlen_q;
    for (int i = 0; i < 5; ++i) {
      AttentionData again = with_own_outputs(first);
      run(context, again);
      ASSERT_TRUE(same_outputs(first, again)) << "run " << i;
    }
  }
}

}  // namespace
}  // namespace adaattn::test
