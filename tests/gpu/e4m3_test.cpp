// E4M3 tensors on the device, through the public functions: against the oracle, repeated, outgrown maxima, what lies
// behind a sequence's keys, and what is refused.
#include "gpu/e4m3.h"

#include <limits>

namespace adaattn::test {
namespace {

class E4m3 : public OnHopper {};

TEST_F(E4m3, ErrorOnNormalInputsIsThatOfRoundedWeights) {
  const Context context(kCuda);
  for (const adaattn_mask_t mask : {ADAATTN_MASK_NONE, ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT}) {
    AttentionData data(long_case(mask), e4m3(), run_seed(), ADAATTN_OUTPUT_LSE);
    use_whole_range(data);
    run_in_8_bits(context, data);
    if (HasFatalFailure()) return;
    const reference::AttentionResult expected = reference::attention(data.desc, data.io());
    const double error = relative_error(data, expected);
    RecordProperty("error_mask_" + std::to_string(mask), std::to_string(error));
    EXPECT_LE(error, 2.7e-2);
    EXPECT_GT(error, 1e-3) << "not computed in 8 bits?";
  }
}

// Scores of thousands are beyond the 14 bits with which the tensor cores add E4M3 products.
bool is_served(const Context& context, const AttentionCase& c, const AttentionData& data) {
  return c.input_scale <= 10 && unsupported(context, data.desc).empty();
}

TEST_F(E4m3, ShapesOfTheTableAgreeWithTheOracle) {
  const Context context(kCuda);
  int served = 0;
  for (const AttentionCase& c : attention_cases()) {
    for (const Dtypes& dtypes :
         {e4m3(), Dtypes{"e4m3_out_f16", ADAATTN_DTYPE_E4M3, ADAATTN_DTYPE_E4M3, ADAATTN_DTYPE_F16}, e4m3(64),
          Dtypes{"e4m3_blocks_out_f32", ADAATTN_DTYPE_E4M3, ADAATTN_DTYPE_E4M3, ADAATTN_DTYPE_F32, 192}}) {
      SCOPED_TRACE(dtypes.name);
      AttentionData data(c, dtypes, run_seed(), ADAATTN_OUTPUT_LSE);
      if (!is_served(context, c, data)) continue;
      SCOPED_TRACE(describe(c));
      const auto outside = bytes_outside(data.o);
      run(context, data);
      EXPECT_TRUE(matches(data, reference::attention(data.desc, data.io()),
                          dtypes.descale_block != 0 ? kE4m3BlockWeights : kE4m3Weights));
      EXPECT_EQ(bytes_outside(data.o), outside) << "bytes between the rows of o were written";
      ++served;
    }
  }
  EXPECT_GT(served, 300);
}

TEST_F(E4m3, IsBitwiseRepeatable) {
  const Context context(kCuda);
  for (const int64_t descale_block : {0, 64})
    for (const adaattn_mask_t mask : {ADAATTN_MASK_NONE, ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT}) {
      AttentionCase c = long_case(mask);
      c.heads_q = 24;
      c.heads_kv = 8;
      c.seqlen_q = 300;
      AttentionData first(c, e4m3(descale_block), run_seed(), ADAATTN_OUTPUT_LSE);
      run_in_8_bits(context, first);
      if (HasFatalFailure()) return;
      for (int i = 0; i < 40; ++i) {
        AttentionData again = with_own_outputs(first);
        run(context, again);
        ASSERT_TRUE(same_outputs(first, again)) << "run " << i;
      }
    }
}

// Keys grow towards the first, which is visited last: every block outgrows the maxima before it.
TEST_F(E4m3, ScoresThatOutgrowEarlierBlocks) {
  const Context context(kCuda);
  for (const double growth : {2.0, 30.0, 400.0}) {
    AttentionData data(long_case(ADAATTN_MASK_NONE), e4m3(), run_seed(), ADAATTN_OUTPUT_LSE);
    data.q.fill(1);
    for (Tensor* factor : {&data.q_descale, &data.k_descale}) factor->fill(1);
    data.k.for_each([&](const auto& index, int64_t) {
      const double place = 1 - static_cast<double>(index[1]) / static_cast<double>(data.desc.max_seqlen_k);
      data.k.set(index, growth * place * (index[3] % 2 == 0 ? 1 : 0.5));
    });
    run_in_8_bits(context, data);
    if (HasFatalFailure()) return;
    EXPECT_TRUE(matches(data, reference::attention(data.desc, data.io()), kE4m3Weights)) << growth;
  }
}

// V behind a sequence's last key is memory that the library may read and must not use.
TEST_F(E4m3, NotANumberBehindTheKeysStaysThere) {
  const Context context(kCuda);
  AttentionCase c = long_case(ADAATTN_MASK_NONE);
  c.batch = 3;
  c.seqlen_k = 700;
  c.used_k = {700, 385, 1};
  AttentionData data(c, e4m3(), run_seed(), ADAATTN_OUTPUT_LSE);
  for (Tensor* tensor : {&data.k, &data.v})
    tensor->for_each([&](const auto& index, int64_t) {
      if (index[1] >= c.used_k[static_cast<size_t>(index[0])])
        tensor->set(index, std::numeric_limits<double>::quiet_NaN());
    });
  run_in_8_bits(context, data);
  if (HasFatalFailure()) return;
  EXPECT_TRUE(matches(data, reference::attention(data.desc, data.io()), kE4m3Weights));
}

TEST_F(E4m3, FactorOfZeroGivesTheMeanOfTheValues) {
  const Context context(kCuda);
  AttentionData data(long_case(ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT), e4m3(), run_seed(), ADAATTN_OUTPUT_LSE);
  data.k_descale.fill(0);
  run_in_8_bits(context, data);
  if (HasFatalFailure()) return;
  EXPECT_TRUE(matches(data, reference::attention(data.desc, data.io()), kE4m3Weights));
}

// A few tiles more than multiprocessors: those come in two parts, whichever of which ends last joins them.
TEST_F(E4m3, TilesLeftOverComeInTwoParts) {
  const Context context(kCuda);
  cudaDeviceProp properties{};
  require(cudaGetDeviceProperties(&properties, 0));
  for (const int64_t descale_block : {0, 64})
    for (const uint32_t flags : {0u, static_cast<uint32_t>(ADAATTN_FLAG_SINK)}) {
      AttentionCase c = long_case(ADAATTN_MASK_NONE);
      c.heads_q = properties.multiProcessorCount + 8;
      c.heads_kv = 4;
      c.seqlen_q = 40;
      c.flags = flags;
      AttentionData first(c, e4m3(descale_block), run_seed(), ADAATTN_OUTPUT_LSE);
      EXPECT_EQ(Plan(context, first.desc).info().splits, 2);
      run_in_8_bits(context, first);
      if (HasFatalFailure()) return;
      EXPECT_TRUE(matches(first, reference::attention(first.desc, first.io()), {.o = 6e-2, .lse = 8e-2, .entropy = 0}));
      for (int i = 0; i < 10; ++i) {
        AttentionData again = with_own_outputs(first);
        run(context, again);
        ASSERT_TRUE(same_outputs(first, again)) << "run " << i;
      }
    }
}

TEST_F(E4m3, RefusalsNameTheField) {
  const Context context(kCuda);
  const struct {
    void (*change)(adaattn_attn_desc_t& desc);
    const char* text;
  } rows[] = {{[](adaattn_attn_desc_t& d) { d.dtype_q = ADAATTN_DTYPE_F32; },
               "dtype_kv is E4M3 with desc.dtype_q F32; accepted"},
              {[](adaattn_attn_desc_t& d) { d.head_dim_qk = 320; }, "desc.head_dim_qk is 320; accepted"},
              {[](adaattn_attn_desc_t& d) { d.head_dim_v = 512; }, "desc.head_dim_v is 512; accepted"}};
  for (const auto& row : rows) {
    adaattn_attn_desc_t desc = make_desc(long_case(ADAATTN_MASK_NONE), e4m3(), ADAATTN_OUTPUT_LSE);
    row.change(desc);
    char reason[512] = {};
    EXPECT_EQ(adaattn_check_support(context.get(), &desc, nullptr, reason, sizeof reason), ADAATTN_ERROR_NOT_SUPPORTED)
        << row.text;
    EXPECT_NE(std::string(reason).find(row.text), std::string::npos) << reason;
  }
}

}  // namespace
}  // namespace adaattn::test
