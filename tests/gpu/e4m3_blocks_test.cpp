// E4M3 tensors with descale factors for blocks of keys, in the Hopper kernels that multiply in E4M3: factors that are
// folded into the weights, that change the unit of the output, and that are nothing.
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "gpu/e4m3.h"

namespace adaattn::test {
namespace {

class E4m3Blocks : public OnHopper {};

constexpr adaattn_mask_t kMasks[] = {ADAATTN_MASK_NONE, ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT};

using Factors = std::function<double(int64_t head, int64_t block)>;

void multiply(Tensor& descale, const Factors& by) {
  descale.for_each(
      [&](const auto& index, int64_t) { descale.set(index, descale.get(index) * by(index[1], index[2])); });
}

// Octaves in [-most, most], the same for a head and block in every run.
Factors octaves(double most) {
  return [most](int64_t head, int64_t block) {
    Random random(run_seed() + static_cast<uint64_t>(1000 * head + block));
    return std::exp2(most * (2 * random.uniform() - 1));
  };
}

struct Spread {
  std::string name;
  Factors k, v;
};

std::vector<Spread> spreads() {
  const Factors one = [](int64_t, int64_t) { return 1.0; };
  const Factors up = octaves(3);
  return {{"Ones", one, one},
          {"ThreeOctavesOfValues", one, up},
          // Short of factors that leave one block all the weight.
          {"ThreeOctaves", [up](int64_t h, int64_t n) { return up(h, n) / 8; }, up},
          {"TenOctavesOfValues", one, octaves(10)},
          {"OneBlockAHundredfold", one, [](int64_t h, int64_t n) { return n == 7 + h ? 100.0 : 1.0; }},
          {"EveryThirdNothing", one, [](int64_t, int64_t n) { return n % 3 == 1 ? 0.0 : 1.0; }}};
}

TEST_F(E4m3Blocks, ErrorOnNormalInputsIsThatOfRoundedWeights) {
  const Context context(kCuda);
  for (const Spread& spread : spreads())
    for (const adaattn_mask_t mask : kMasks) {
      SCOPED_TRACE(spread.name);
      AttentionData data(short_case(mask), e4m3(64), run_seed(), ADAATTN_OUTPUT_LSE);
      use_whole_range(data);
      multiply(data.k_descale, spread.k);
      multiply(data.v_descale, spread.v);
      run_in_8_bits(context, data);
      if (HasFatalFailure()) return;
      const reference::AttentionResult expected = reference::attention(data.desc, data.io());
      const double error = relative_error(data, expected);
      RecordProperty("error_" + spread.name + "_mask_" + std::to_string(mask), std::to_string(error));
      // Where few keys make up O, sets of them differ: by 0.05e-2 with factors far apart, where two blocks are all of
      // it.
      EXPECT_LE(error, spread.name == "TenOctavesOfValues" ? 3e-2 : 2.8e-2);
      EXPECT_GT(error, 1e-3) << "not computed in 8 bits?";
      EXPECT_TRUE(matches(data, expected, kE4m3BlockWeights));
    }
}

// The largest factor of values that are far apart, in octaves above 1: what a weight below 2^-15 of its row's largest
// gives is lost whatever its factor, and of hundreds of keys so much of the largest values may be missing.
Tolerance with_octaves(double most) {
  Tolerance tolerance = kE4m3BlockWeights;
  tolerance.o_floor = std::exp2(most - 9);
  return tolerance;
}

// The masks, packed sequences, sinks and lengths of a few calls by blocks of several sizes.
TEST_F(E4m3Blocks, SizesOfBlocksAndShapes) {
  const Context context(kCuda);
  const auto causal = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT;
  const std::vector<AttentionCase> cases = {
      {.name = "Full", .batch = 2, .heads_q = 4, .heads_kv = 2, .seqlen_q = 200, .seqlen_k = 1000},
      {.name = "Causal", .batch = 2, .heads_q = 2, .heads_kv = 2, .seqlen_q = 450, .seqlen_k = 450, .mask = causal},
      {.name = "Window",
       .heads_q = 2,
       .heads_kv = 2,
       .seqlen_q = 300,
       .seqlen_k = 900,
       .window_left = 200,
       .window_right = 70},
      {.name = "Sinks",
       .heads_q = 6,
       .heads_kv = 2,
       .seqlen_q = 200,
       .seqlen_k = 333,
       .mask = causal,
       .flags = ADAATTN_FLAG_SINK},
      {.name = "OneKey", .batch = 3, .heads_q = 2, .heads_kv = 2, .seqlen_q = 193, .seqlen_k = 1},
      {.name = "UsedKeys",
       .batch = 3,
       .heads_q = 2,
       .heads_kv = 1,
       .seqlen_q = 100,
       .seqlen_k = 700,
       .used_k = {700, 0, 65}},
      {.name = "Lengths",
       .heads_q = 4,
       .heads_kv = 2,
       .layout_q = ADAATTN_LAYOUT_THD,
       .layout_kv = ADAATTN_LAYOUT_THD,
       .mask = causal,
       .lens_q = {250, 0, 7, 200, 129},
       .lens_k = {850, 10, 0, 100, 400}},
  };
  for (AttentionCase c : cases)
    for (const int64_t descale_block : {64, 192, 1 << 20})
      for (const double most : {0.5, 3.0, 12.0}) {
        SCOPED_TRACE(describe(c) + ", factors for " + std::to_string(descale_block) + " keys, octaves " +
                     std::to_string(most));
        c.d_qk = 128;
        AttentionData data(c, e4m3(descale_block), run_seed(), ADAATTN_OUTPUT_LSE);
        data.v_descale.fill(1);
        multiply(data.v_descale, octaves(most));
        run(context, data);
        EXPECT_TRUE(matches(data, reference::attention(data.desc, data.io()), with_octaves(most)));
      }
}

// Factors up to 2^40 apart and nothing, where the keys of one block have nearly all the weight: the unit changes from
// block to block, and what O was before counts for nothing or for all.
TEST_F(E4m3Blocks, FactorsFarApart) {
  const Context context(kCuda);
  for (const adaattn_mask_t mask : kMasks)
    for (int64_t heavy = 0; heavy < kBlocksFarApart; ++heavy) {
      AttentionCase c = short_case(mask);
      c.seqlen_k = 64 * kBlocksFarApart;
      AttentionData data(c, e4m3(64), run_seed(), ADAATTN_OUTPUT_LSE);
      data.q_descale.fill(1);
      weigh_one_block(data, heavy, 60);
      run_in_8_bits(context, data);
      if (HasFatalFailure()) return;
      EXPECT_TRUE(matches(data, reference::attention(data.desc, data.io()), with_octaves(0)))
          << "heavy block " << heavy;
    }
}

// With one factor for all blocks nothing is folded: what the kernels without blocks compute, but for the rounding of
// the row sums.
TEST_F(E4m3Blocks, OneFactorForAllIsWhatACallWithoutBlocksGives) {
  const Context context(kCuda);
  for (const adaattn_mask_t mask : kMasks) {
    AttentionCase c = long_case(mask);
    AttentionData whole(c, e4m3(), run_seed(), ADAATTN_OUTPUT_LSE), blocks(c, e4m3(64), run_seed(), ADAATTN_OUTPUT_LSE);
    for (AttentionData* data : {&whole, &blocks}) {
      data->q_descale.fill(1.25);
      data->k_descale.fill(0.75);
      data->v_descale.fill(1.5);
      run_in_8_bits(context, *data);
      if (HasFatalFailure()) return;
    }
    EXPECT_TRUE(same_outputs(whole, blocks));
  }
}

TEST_F(E4m3Blocks, KeyFactorsOfZeroAndOfEachBlock) {
  const Context context(kCuda);
  for (const adaattn_mask_t mask : kMasks)
    for (const bool all : {false, true}) {
      AttentionData data(short_case(mask), e4m3(64), run_seed(), ADAATTN_OUTPUT_LSE);
      data.k_descale.for_each([&](const auto& index, int64_t) {
        data.k_descale.set(index, all || index[2] % 3 == 1 ? 0 : 0.5 + static_cast<double>(index[2] % 5) / 4);
      });
      run_in_8_bits(context, data);
      if (HasFatalFailure()) return;
      EXPECT_TRUE(matches(data, reference::attention(data.desc, data.io()), kE4m3BlockWeights))
          << (all ? "all" : "a third");
    }
}

TEST_F(E4m3Blocks, ValueFactorsOfZeroGiveZero) {
  const Context context(kCuda);
  AttentionData data(long_case(ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT), e4m3(64), run_seed(), ADAATTN_OUTPUT_LSE);
  data.v_descale.fill(0);
  run_in_8_bits(context, data);
  if (HasFatalFailure()) return;
  data.o.for_each([&](const auto& index, int64_t) { EXPECT_EQ(data.o.get(index), 0); });
}

}  // namespace
}  // namespace adaattn::test
