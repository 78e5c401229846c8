// Joining partial results over disjoint keys.
#include <cmath>
#include <limits>

#include "attention/fixture.h"
#include "reference/number.h"

namespace adaattn::test {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

class Merge : public OnEveryTarget {};
ADAATTN_ON_EVERY_TARGET(Merge);

adaattn_status_t merge(const Context& context, const Tensor& o_a, const Tensor& lse_a, const Tensor& o_b,
                       const Tensor& lse_b, const Tensor& o, const Tensor& lse) {
  const auto device = context.device();
  for (const Tensor* tensor : {&o_a, &lse_a, &o_b, &lse_b, &o, &lse}) tensor->upload(device, 0);
  const adaattn_tensor_t views[] = {o_a.on(device, 0),   lse_a.on(device, 0), o_b.on(device, 0),
                                    lse_b.on(device, 0), o.on(device, 0),     lse.on(device, 0)};
  const adaattn_status_t status = adaattn_merge(context.get(), &views[0], &views[1], &views[2], &views[3], &views[4],
                                                lse.present() ? &views[5] : nullptr, nullptr);
  o.download(device, 0);
  lse.download(device, 0);
  return status;
}

TEST_P(Merge, TwoHalvesOfTheKeysMakeTheWhole) {
  const Context context(target());
  for (AttentionCase c : invariant_cases()) {
    for (const Dtypes& dtypes :
         {kF32All, Dtypes{"bf16_out_f32", ADAATTN_DTYPE_BF16, ADAATTN_DTYPE_BF16, ADAATTN_DTYPE_F32}}) {
      SCOPED_TRACE(describe(c) + dtypes.name);
      AttentionData whole(c, dtypes, run_seed());
      const auto expected = reference::attention(whole.desc, whole.io());
      const auto part = [&](int64_t first, int64_t count) {
        AttentionData data = with_own_outputs(whole);
        const auto slice = [&](const Tensor& t) {
          std::vector<int64_t> shape = t.shape();
          shape[1] = count;
          return Tensor(t.buffer(), t.dtype(), shape, {t.host().stride, t.host().stride + 4},
                        first * t.host().stride[1]);
        };
        data.k = slice(whole.k);
        data.v = slice(whole.v);
        run(context, data);
        return data;
      };
      const AttentionData a = part(0, 100), b = part(100, c.seqlen_k - 100);
      ASSERT_TRUE(succeeded(merge(context, a.o, a.lse, b.o, b.lse, whole.o, whole.lse)));
      whole.entropy = Tensor();
      EXPECT_TRUE(matches(whole, expected));

      whole.poison_outputs();
      ASSERT_TRUE(succeeded(merge(context, a.o, a.lse, b.o, b.lse, whole.o, Tensor())));
      whole.lse = Tensor();
      EXPECT_TRUE(matches(whole, expected)) << "without lse";

      ASSERT_TRUE(succeeded(merge(context, a.o, a.lse, b.o, b.lse, a.o, a.lse)));  // in place
      EXPECT_TRUE(same_bits(a.o, whole.o));
    }
  }
}

struct Partial {
  Tensor o, lse;
};

Partial random_partial(adaattn_dtype_t dtype, bool packed, Random& random) {
  Partial p;
  p.o = packed ? Tensor(dtype, {7, 3, 5}) : Tensor(dtype, {2, 7, 3, 5});
  p.lse = packed ? Tensor(ADAATTN_DTYPE_F32, {3, 7}) : Tensor(ADAATTN_DTYPE_F32, {2, 3, 7});
  p.o.fill([&] { return random.normal(); });
  p.lse.fill([&] { return 10 * random.normal(); });
  return p;
}

std::vector<int64_t> lse_index(const std::vector<int64_t>& o_index) {
  if (o_index.size() == 3) return {o_index[1], o_index[0]};
  return {o_index[0], o_index[2], o_index[1]};
}

void expect_merged(const Partial& a, const Partial& b, const Partial& out, double tolerance) {
  out.o.for_each([&](const auto& index, int64_t) {
    const auto row = lse_index(index);
    const auto want = reference::merge_rows({a.o.get(index)}, a.lse.get(row), {b.o.get(index)}, b.lse.get(row));
    EXPECT_NEAR(out.o.get(index), want.o[0], tolerance * (1 + std::fabs(want.o[0])));
    if (std::isinf(want.lse))
      EXPECT_EQ(out.lse.get(row), want.lse);
    else
      EXPECT_NEAR(out.lse.get(row), want.lse, 1e-5 * (1 + std::fabs(want.lse)));
  });
}

TEST_P(Merge, AgreesWithTheOracleInEveryDtypeAndOrder) {
  const Context context(target());
  Random random(run_seed());
  for (bool packed : {false, true}) {
    for (adaattn_dtype_t in : {ADAATTN_DTYPE_F32, ADAATTN_DTYPE_F16, ADAATTN_DTYPE_BF16}) {
      for (adaattn_dtype_t out_dtype : {ADAATTN_DTYPE_F32, ADAATTN_DTYPE_F16, ADAATTN_DTYPE_BF16}) {
        if (in != out_dtype && in != ADAATTN_DTYPE_F32) continue;
        const Partial a = random_partial(in, packed, random), b = random_partial(in, packed, random);
        const Partial out = random_partial(out_dtype, packed, random);
        ASSERT_TRUE(succeeded(merge(context, a.o, a.lse, b.o, b.lse, out.o, out.lse)));
        expect_merged(a, b, out, out_dtype == ADAATTN_DTYPE_F32 ? 1e-6 : out_dtype == ADAATTN_DTYPE_F16 ? 6e-4 : 5e-3);
      }
    }
  }
}

TEST_P(Merge, ASideWithoutKeysLeavesTheOther) {
  const Context context(target());
  Random random(run_seed());
  Partial a = random_partial(ADAATTN_DTYPE_F32, false, random), b = random_partial(ADAATTN_DTYPE_F32, false, random);
  const Partial out = random_partial(ADAATTN_DTYPE_F32, false, random);
  // Row 0: a is empty; row 1: b is empty; row 2: both are.
  for (int64_t h = 0; h < 3; ++h) {
    for (int64_t row : {0, 2}) a.lse.set({0, h, row}, -kInf);
    for (int64_t row : {1, 2}) b.lse.set({0, h, row}, -kInf);
    for (int64_t c = 0; c < 5; ++c) {
      for (int64_t row : {0, 2}) a.o.set({0, row, h, c}, 0);
      for (int64_t row : {1, 2}) b.o.set({0, row, h, c}, 0);
    }
  }
  ASSERT_TRUE(succeeded(merge(context, a.o, a.lse, b.o, b.lse, out.o, out.lse)));
  expect_merged(a, b, out, 1e-6);
  EXPECT_EQ(out.o.get({0, 2, 0, 0}), 0);
  EXPECT_EQ(out.lse.get({0, 0, 2}), -kInf);
  EXPECT_EQ(out.o.get({0, 0, 1, 3}), b.o.get({0, 0, 1, 3}));
  EXPECT_EQ(out.o.get({0, 1, 1, 3}), a.o.get({0, 1, 1, 3}));
}

TEST_P(Merge, SidesFarApartDoNotOverflow) {
  const Context context(target());
  Random random(run_seed());
  const Partial a = random_partial(ADAATTN_DTYPE_F32, true, random),
                b = random_partial(ADAATTN_DTYPE_F32, true, random);
  const Partial out = random_partial(ADAATTN_DTYPE_F32, true, random);
  for (double lse_a : {1e4, -1e4}) {
    Partial shifted = a;
    shifted.lse.fill(lse_a);
    ASSERT_TRUE(succeeded(merge(context, shifted.o, shifted.lse, b.o, b.lse, out.o, out.lse)));
    expect_merged(shifted, b, out, 1e-6);
  }
}

TEST_P(Merge, StridedViewsAreReadAndWrittenInPlace) {
  const Context context(target());
  Random random(run_seed());
  const Partial a = random_partial(ADAATTN_DTYPE_F32, true, random),
                b = random_partial(ADAATTN_DTYPE_F32, true, random);
  // Outputs with padded rows.
  Partial out;
  out.o = Tensor(std::make_shared<Buffer>(7 * 3 * 9 * 4), ADAATTN_DTYPE_F32, {7, 3, 5}, {27, 9, 1});
  out.lse = Tensor(std::make_shared<Buffer>(3 * 7 * 2 * 4), ADAATTN_DTYPE_F32, {3, 7}, {14, 2});
  const auto outside = bytes_outside(out.o);
  ASSERT_TRUE(succeeded(merge(context, a.o, a.lse, b.o, b.lse, out.o, out.lse)));
  expect_merged(a, b, out, 1e-6);
  EXPECT_EQ(bytes_outside(out.o), outside);
}

}  // namespace
}  // namespace adaattn::test
