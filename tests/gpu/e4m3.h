// Calls in E4M3 that the Hopper kernels of E4M3 products serve, and their error.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <iterator>
#include <string>

#include "attention/fixture.h"
#include "gpu/device.h"

namespace adaattn::test {

inline Dtypes e4m3(int64_t descale_block = 0) {
  return {descale_block == 0 ? "e4m3" : "e4m3_blocks", ADAATTN_DTYPE_E4M3, ADAATTN_DTYPE_E4M3, ADAATTN_DTYPE_BF16,
          descale_block};
}

// A weight is off by 2^-4 at most, and so is the sum of them.
inline constexpr Tolerance kE4m3Weights = {.o = 6e-2, .lse = 4e-2, .entropy = 0};

// With factors for blocks of keys. A sum of weights is off by 1 / 17 where one of them, rounded, is all of it, and a
// hundredth may be lost of those whose values have a smaller factor than others.
inline constexpr Tolerance kE4m3BlockWeights = {.o = 6e-2, .lse = 8e-2, .entropy = 0};

// Enough tiles that the keys of none are split, which these kernels do not do, and keys for which O leaves the
// accumulators twice.
inline AttentionCase long_case(adaattn_mask_t mask) {
  return {.name = "Long",
          .batch = 1,
          .heads_q = 36,
          .heads_kv = 12,
          .seqlen_q = 130,
          .seqlen_k = 3300,
          .d_qk = 128,
          .mask = mask};
}

// Fewer keys than are worth splitting, however few the tiles are.
inline AttentionCase short_case(adaattn_mask_t mask) {
  AttentionCase c = long_case(mask);
  c.name = "Short";
  c.heads_q = 8;
  c.heads_kv = 4;
  c.seqlen_k = 2000;
  return c;
}

// A call of its plan's maxima, seen to be one for the kernel of E4M3 products.
inline void run_in_8_bits(const Context& context, AttentionData& data) {
  const std::string masked = data.desc.mask != ADAATTN_MASK_NONE ? "masked" : "";
  const std::string features = data.desc.descale_block != 0 ? masked + "blocks" : masked.empty() ? "plain" : masked;
  ASSERT_EQ(Plan(context, data.desc).info().kernel, "sm90_e4m3_e4m3_d128_" + features);
  run(context, data);
}

// Factors of V for blocks of 64 keys, from nothing to 2^40 apart.
inline constexpr double kFactorsFarApart[] = {1, 0x1p-20, 0, 0x1p20, 3, 0x1p-3, 0, 0x1p5, 0x1p12};
inline constexpr int64_t kBlocksFarApart = std::size(kFactorsFarApart);

// Those factors, and scores that give the keys of block `heavy` nearly all the weight: one dimension of K is `key` in
// it and -key elsewhere.
inline void weigh_one_block(AttentionData& data, int64_t heavy, double key) {
  data.q.for_each([&](const auto& index, int64_t) { data.q.set(index, index[3] == 0 ? 8 : data.q.get(index)); });
  data.k.for_each([&](const auto& index, int64_t) {
    if (index[3] == 0) data.k.set(index, index[1] / 64 == heavy ? key : -key);
  });
  data.k_descale.fill(1);
  data.v_descale.for_each([&](const auto& index, int64_t) {
    data.v_descale.set(index, 0x1p20 * kFactorsFarApart[index[2] % kBlocksFarApart]);
  });
}

// |o - expected| / |expected| over all of o, which for weights in E4M3 is about 2^-4 / sqrt(6).
inline double relative_error(const AttentionData& data, const reference::AttentionResult& expected) {
  double error = 0, size = 0;
  data.o.for_each([&](const auto& index, int64_t flat) {
    const double want = expected.o[static_cast<size_t>(flat)], off = data.o.get(index) - want;
    error += off * off;
    size += want * want;
  });
  return std::sqrt(error / size);
}

// Inputs of unit variance, as the scores of a model are, by factors that stand for their whole range.
inline void use_whole_range(AttentionData& data) {
  for (Tensor* factor : {&data.q_descale, &data.k_descale, &data.v_descale}) factor->fill(1.0 / 64);
  for (Tensor* tensor : {&data.q, &data.k, &data.v})
    tensor->for_each([&](const auto& index, int64_t) { tensor->set(index, 64 * tensor->get(index)); });
}

}  // namespace adaattn::test
