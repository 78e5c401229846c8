#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu_fallback/reference/attention.h"
#include "cpu_fallback/tools/half_float.h"
#include "cpu_fallback/tools/tool_fixture.h"

namespace adaattn::cpu::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// [batch, tokens, heads, dim] of one dtype with padded heads, or [batch, heads, tokens] for an LSE.
struct Rows {
  Operand view;
  std::vector<uint8_t> storage;

  Rows(Dtype dtype, int64_t batch, int64_t tokens, int64_t heads, int64_t dim) {
    view.dtype = dtype;
    view.stride_h = dim + 3;
    view.stride_s = heads * view.stride_h;
    view.stride_b = tokens * view.stride_s;
    allocate(batch * view.stride_b);
  }
  Rows(int64_t batch, int64_t tokens, int64_t heads) {
    view.dtype = Dtype::kF32;
    view.stride_s = 1;
    view.stride_h = tokens;
    view.stride_b = heads * tokens;
    allocate(batch * view.stride_b);
  }
  void allocate(int64_t elements) {
    storage.assign(static_cast<size_t>(elements * dtype_size(view.dtype)), 0xFF);
    view.data = storage.data();
  }
  int64_t index(int64_t b, int64_t s, int64_t h, int64_t c = 0) const {
    return b * view.stride_b + s * view.stride_s + h * view.stride_h + c;
  }
  double get(int64_t i) const {
    if (view.dtype == Dtype::kF32) return static_cast<const float*>(view.data)[i];
    const uint16_t bits = static_cast<const uint16_t*>(view.data)[i];
    return view.dtype == Dtype::kBF16 ? float_of_bf16(bits) : float_of_f16(bits);
  }
  void set(int64_t i, float x) {
    if (view.dtype == Dtype::kF32)
      static_cast<float*>(view.data)[i] = x;
    else
      static_cast<uint16_t*>(view.data)[i] = view.dtype == Dtype::kBF16 ? bf16_of_float(x) : f16_of_float(x);
  }
};

struct Problem {
  int64_t batch = 2, tokens = 37, heads = 3, dim = 70;
  Rows o_a, o_b, o, lse_a, lse_b, lse;

  Problem(Dtype in, Dtype out, Random& random)
      : o_a(in, batch, tokens, heads, dim),
        o_b(in, batch, tokens, heads, dim),
        o(out, batch, tokens, heads, dim),
        lse_a(batch, tokens, heads),
        lse_b(batch, tokens, heads),
        lse(batch, tokens, heads) {
    for_each([&](int64_t b, int64_t s, int64_t h) {
      lse_a.set(lse_a.index(b, s, h), static_cast<float>(3 * random.normal()));
      lse_b.set(lse_b.index(b, s, h), static_cast<float>(3 * random.normal()));
      for (int64_t c = 0; c < dim; ++c) {
        o_a.set(o_a.index(b, s, h, c), static_cast<float>(random.normal()));
        o_b.set(o_b.index(b, s, h, c), static_cast<float>(random.normal()));
      }
    });
  }
  template <typename Visit>
  void for_each(Visit visit) const {
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t s = 0; s < tokens; ++s)
        for (int64_t h = 0; h < heads; ++h) visit(b, s, h);
  }
  MergeParams params() {
    MergeParams p;
    p.o_a = o_a.view;
    p.o_b = o_b.view;
    p.o = o.view;
    p.lse_a = lse_a.view;
    p.lse_b = lse_b.view;
    p.lse = lse.view;
    p.batch = batch;
    p.tokens = tokens;
    p.heads = heads;
    p.d_v = dim;
    return p;
  }
};

double epsilon(Dtype dtype) { return dtype == Dtype::kF32 ? 0x1p-22 : dtype == Dtype::kF16 ? 0x1p-10 : 0x1p-7; }

TEST(CpuMerge, EveryDtypeAndInstructionSetMatchesTheOracle) {
  const Dtype dtypes[][2] = {{Dtype::kF32, Dtype::kF32},
                             {Dtype::kF16, Dtype::kF16},
                             {Dtype::kBF16, Dtype::kBF16},
                             {Dtype::kF32, Dtype::kF16},
                             {Dtype::kF32, Dtype::kBF16}};
  for (const auto& pair : dtypes)
    for (adaattn_isa_t isa : isas()) {
      Random random(adaattn::test::run_seed());
      Problem p(pair[0], pair[1], random);
      Runner runner(2, isa);
      merge(runner.context(), p.params());
      p.for_each([&](int64_t b, int64_t s, int64_t h) {
        std::vector<double> a, c;
        for (int64_t d = 0; d < p.dim; ++d) {
          a.push_back(p.o_a.get(p.o_a.index(b, s, h, d)));
          c.push_back(p.o_b.get(p.o_b.index(b, s, h, d)));
        }
        const reference::MergedRow expected =
            reference::merge_rows(a, p.lse_a.get(p.lse_a.index(b, s, h)), c, p.lse_b.get(p.lse_b.index(b, s, h)));
        for (int64_t d = 0; d < p.dim; ++d)
          ASSERT_NEAR(p.o.get(p.o.index(b, s, h, d)), expected.o[static_cast<size_t>(d)], 4 * epsilon(pair[1]));
        ASSERT_NEAR(p.lse.get(p.lse.index(b, s, h)), expected.lse, 1e-5);
      });
    }
}

TEST(CpuMerge, InPlaceEqualsOutOfPlaceAndLseMayBeAbsent) {
  for (Dtype dtype : {Dtype::kF32, Dtype::kF16, Dtype::kBF16}) {
    Random random(adaattn::test::run_seed());
    Problem p(dtype, dtype, random);
    Runner runner(3);
    MergeParams params = p.params();
    merge(runner.context(), params);
    const std::vector<uint8_t> o = p.o.storage;
    std::fill(p.o.storage.begin(), p.o.storage.end(), uint8_t{0xFF});
    params.lse = {};
    merge(runner.context(), params);
    EXPECT_EQ(p.o.storage, o);
    params = p.params();
    params.o = p.o_a.view;
    params.lse = p.lse_a.view;
    merge(runner.context(), params);
    EXPECT_EQ(p.lse_a.storage, p.lse.storage);
    p.for_each([&](int64_t b, int64_t s, int64_t h) {
      for (int64_t d = 0; d < p.dim; ++d) ASSERT_EQ(p.o_a.get(p.o_a.index(b, s, h, d)), p.o.get(p.o.index(b, s, h, d)));
    });
  }
}

TEST(CpuMerge, EmptySidesAreExactEvenBesideNotANumber) {
  Random random(adaattn::test::run_seed());
  for (Dtype dtype : {Dtype::kF32, Dtype::kF16, Dtype::kBF16}) {
    Problem p(dtype, dtype, random);
    p.for_each([&](int64_t b, int64_t s, int64_t h) {
      const bool empty_a = s % 3 != 1, empty_b = s % 3 != 0;
      if (empty_a) p.lse_a.set(p.lse_a.index(b, s, h), -kInf);
      if (empty_b) p.lse_b.set(p.lse_b.index(b, s, h), -kInf);
      for (int64_t d = 0; d < p.dim; ++d) {
        if (empty_a) p.o_a.set(p.o_a.index(b, s, h, d), std::nanf(""));
        if (empty_b) p.o_b.set(p.o_b.index(b, s, h, d), std::nanf(""));
      }
    });
    Runner runner;
    merge(runner.context(), p.params());
    p.for_each([&](int64_t b, int64_t s, int64_t h) {
      const Rows& o = s % 3 == 0 ? p.o_b : p.o_a;
      const Rows& lse = s % 3 == 0 ? p.lse_b : p.lse_a;
      ASSERT_EQ(p.lse.get(p.lse.index(b, s, h)), s % 3 == 2 ? -kInf : lse.get(lse.index(b, s, h)));
      for (int64_t d = 0; d < p.dim; ++d)
        ASSERT_EQ(p.o.get(p.o.index(b, s, h, d)), s % 3 == 2 ? 0 : o.get(o.index(b, s, h, d)));
    });
  }
}

TEST(CpuMerge, LargeAndDistantLsesStayFinite) {
  Random random(adaattn::test::run_seed());
  Problem p(Dtype::kF32, Dtype::kF32, random);
  p.for_each([&](int64_t b, int64_t s, int64_t h) {
    p.lse_a.set(p.lse_a.index(b, s, h), s % 2 == 0 ? 1e4f : -1e30f);
    p.lse_b.set(p.lse_b.index(b, s, h), s % 2 == 0 ? 1e4f : 1e30f);
  });
  Runner runner;
  merge(runner.context(), p.params());
  p.for_each([&](int64_t b, int64_t s, int64_t h) {
    const double a = p.o_a.get(p.o_a.index(b, s, h)), c = p.o_b.get(p.o_b.index(b, s, h));
    EXPECT_NEAR(p.o.get(p.o.index(b, s, h)), s % 2 == 0 ? (a + c) / 2 : c, 1e-6);
  });
}

TEST(CpuHalfFloat, EveryF16SurvivesTheRoundTrip) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float x = float_of_f16(static_cast<uint16_t>(bits));
    if (std::isnan(x)) {
      EXPECT_TRUE(std::isnan(float_of_f16(f16_of_float(x))));
    } else {
      ASSERT_EQ(f16_of_float(x), bits);
      // The definition: sign, 5 bits of exponent, 10 of fraction.
      const int exponent = static_cast<int>(bits >> 10 & 31), fraction = static_cast<int>(bits & 1023);
      const double magnitude = exponent == 31  ? std::numeric_limits<double>::infinity()
                               : exponent == 0 ? std::ldexp(fraction, -24)
                                               : std::ldexp(1024 + fraction, exponent - 25);
      ASSERT_EQ(x, bits >> 15 != 0 ? -magnitude : magnitude);
    }
  }
}

TEST(CpuHalfFloat, RoundsToTheNearestAndTiesToEven) {
  for (uint32_t bits = 0; bits < 0x7bffu; ++bits) {
    const double low = float_of_f16(static_cast<uint16_t>(bits)), high = float_of_f16(static_cast<uint16_t>(bits + 1));
    const float middle = static_cast<float>((low + high) / 2);
    ASSERT_EQ(f16_of_float(middle), bits % 2 == 0 ? bits : bits + 1);
    ASSERT_EQ(f16_of_float(std::nextafter(middle, 0.0f)), bits);
    ASSERT_EQ(f16_of_float(std::nextafter(middle, 1e9f)), bits + 1);
  }
  EXPECT_EQ(f16_of_float(65519.99f), 0x7bff);
  EXPECT_EQ(f16_of_float(65520.0f), 0x7c00);
  EXPECT_EQ(bf16_of_float(1.00390625f), 0x3f80);  // a tie, to even
  EXPECT_EQ(bf16_of_float(1.01171875f), 0x3f82);  // a tie, to even
  EXPECT_EQ(bf16_of_float(1.0039064f), 0x3f81);
  EXPECT_EQ(bf16_of_float(std::numeric_limits<float>::max()), 0x7f80);
  EXPECT_TRUE(std::isnan(float_of_bf16(bf16_of_float(std::nanf("")))));
}

}  // namespace
}  // namespace adaattn::cpu::test
