#include "support/compare.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>

namespace adaattn::test {
namespace {

constexpr double kF32Epsilon = 0x1p-24;

std::string index_text(const std::vector<int64_t>& index) {
  std::ostringstream out;
  for (size_t i = 0; i < index.size(); ++i) out << (i ? ", " : "[") << index[i];
  out << ']';
  return out.str();
}

bool same_class(double a, double b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  if (std::isinf(a) || std::isinf(b)) return a == b;
  return true;
}

struct Worst {
  double ratio = 0;  // error over what is allowed
  std::vector<int64_t> index;
  double actual = 0, expected = 0;
  void see(double r, const std::vector<int64_t>& i, double a, double e) {
    if (r > ratio) *this = {r, i, a, e};
  }
  testing::AssertionResult verdict(const char* what, double tolerance) const {
    if (ratio <= 1) return testing::AssertionSuccess();
    return testing::AssertionFailure() << what << index_text(index) << " is " << actual << ", expected " << expected
                                       << ": " << ratio << " times the tolerance of " << tolerance;
  }
};

testing::AssertionResult rows_match(const char* what, const Tensor& tensor, const std::vector<double>& expected,
                                    const std::vector<double>& score_scale, double tolerance) {
  if (!tensor.present()) return testing::AssertionSuccess();
  testing::AssertionResult result = testing::AssertionSuccess();
  Worst worst;
  tensor.for_each([&](const auto& index, int64_t flat) {
    const double actual = tensor.get(index), want = expected[flat];
    if (!same_class(actual, want)) {
      if (result)
        result = testing::AssertionFailure() << what << index_text(index) << " is " << actual << ", expected " << want;
      return;
    }
    if (!std::isfinite(want)) return;
    // A score is a float: it cannot be better than its own rounding.
    const double allowed = tolerance + 4 * kF32Epsilon * (std::fabs(want) + score_scale[flat]);
    worst.see(std::fabs(actual - want) / allowed, index, actual, want);
  });
  return result ? worst.verdict(what, tolerance) : result;
}

testing::AssertionResult o_matches(const AttentionData& data, const reference::AttentionResult& expected,
                                   double tolerance, double floor) {
  const std::vector<double> actual = data.o.values();
  const int64_t d_v = data.d_v();
  const auto& shape = data.o.shape();
  const bool packed = shape.size() == 3, heads_first = data.desc.layout_q == ADAATTN_LAYOUT_BHSD;
  const int64_t batch = packed ? 1 : shape[0], heads = data.desc.heads_q;
  const int64_t tokens = packed ? shape[0] : shape[heads_first ? 2 : 1];
  Worst worst_row, worst_element;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = 0; i < tokens; ++i) {
        const int64_t row = (b * heads + h) * tokens + i;
        const int64_t o_row = heads_first ? row : (b * tokens + i) * heads + h;
        const auto index_of = [&](int64_t c) {
          return packed        ? std::vector<int64_t>{i, h, c}
                 : heads_first ? std::vector<int64_t>{b, h, i, c}
                               : std::vector<int64_t>{b, i, h, c};
        };
        const double scale = expected.o_scale[row];
        const double allowed = tolerance + 4 * kF32Epsilon * expected.score_scale[row];
        double square = 0;
        for (int64_t c = 0; c < d_v; ++c) {
          const double a = actual[o_row * d_v + c], e = expected.o[o_row * d_v + c];
          if (!same_class(a, e))
            return testing::AssertionFailure() << "o" << index_text(index_of(c)) << " is " << a << ", expected " << e;
          if (!std::isfinite(e)) continue;
          const double difference = std::fabs(a - e);
          square += difference * difference;
          if (difference == 0) continue;
          worst_element.see(difference / (kElementFactor * allowed * std::max(std::fabs(e), scale) + floor),
                            index_of(c), a, e);
        }
        if (square == 0) continue;
        // Errors of a row average out over its columns, of which there may be few.
        const double columns = static_cast<double>(d_v);
        worst_row.see(std::sqrt(square / columns) / (allowed * (1 + 1 / std::sqrt(columns)) * scale + floor),
                      index_of(0), actual[o_row * d_v], expected.o[o_row * d_v]);
      }
    }
  }
  const auto verdict = worst_element.verdict("o", kElementFactor * tolerance);
  return verdict ? worst_row.verdict("the row of o", tolerance) : verdict;
}

}  // namespace

Tolerance tolerance_of(const adaattn_attn_desc_t& desc, Weights weights) {
  Tolerance widest{1e-5, 2e-5, 2e-5, 1e-36};
  const auto widen = [&widest](const Tolerance& t) {
    widest = {std::max(widest.o, t.o), std::max(widest.lse, t.lse), std::max(widest.entropy, t.entropy),
              std::max(widest.o_floor, t.o_floor)};
  };
  const adaattn_dtype_t dtype_kv = desc.dtype_kv != ADAATTN_DTYPE_NONE ? desc.dtype_kv : desc.dtype_q;
  const adaattn_dtype_t dtype_o = desc.dtype_o != ADAATTN_DTYPE_NONE ? desc.dtype_o : desc.dtype_q;
  // Half an ulp of o.
  if (dtype_o == ADAATTN_DTYPE_F16) widen({0x1.1p-11, 0, 0, 0x1p-24});
  if (dtype_o == ADAATTN_DTYPE_BF16) widen({0x1.1p-8, 0, 0, 0});
  if (weights == Weights::kFloat) return widest;
  for (adaattn_dtype_t dtype : {desc.dtype_q, dtype_kv}) {
    const bool as_f16 = dtype == ADAATTN_DTYPE_E4M3 && weights == Weights::kInputTypeOrF16;
    if (dtype == ADAATTN_DTYPE_F16 || as_f16) widen({1.25e-3, 2e-5, 1e-3, 0x1p-22});
    // Weights in bfloat16 need an exponential of 1e-4 only, and that shows in the sums.
    if (dtype == ADAATTN_DTYPE_BF16) widen({5e-3, 1e-3, 5e-3, 0});
  }
  return widest;
}

testing::AssertionResult matches(const AttentionData& data, const reference::AttentionResult& expected,
                                 const Tolerance& tolerance) {
  if (const auto o = o_matches(data, expected, tolerance.o, tolerance.o_floor); !o) return o;
  const auto lse = rows_match("lse", data.lse, expected.lse, expected.score_scale, tolerance.lse);
  if (!lse) return lse;
  return rows_match("entropy", data.entropy, expected.entropy, expected.score_scale, tolerance.entropy);
}

testing::AssertionResult close(const std::vector<double>& actual, const std::vector<double>& expected, double absolute,
                               double relative, const char* what) {
  if (actual.size() != expected.size())
    return testing::AssertionFailure() << what << " has " << actual.size() << " elements, expected " << expected.size();
  Worst worst;
  for (size_t i = 0; i < actual.size(); ++i) {
    const std::vector<int64_t> index = {static_cast<int64_t>(i)};
    if (!same_class(actual[i], expected[i]))
      return testing::AssertionFailure() << what << index_text(index) << " is " << actual[i] << ", expected "
                                         << expected[i];
    if (!std::isfinite(expected[i]) || actual[i] == expected[i]) continue;
    const double allowed = std::max(absolute, relative * std::fabs(expected[i]));
    worst.see(allowed > 0 ? std::fabs(actual[i] - expected[i]) / allowed : std::numeric_limits<double>::infinity(),
              index, actual[i], expected[i]);
  }
  return worst.verdict(what, std::max(absolute, relative));
}

testing::AssertionResult same_bits(const Tensor& a, const Tensor& b) {
  if (a.shape() != b.shape() || a.dtype() != b.dtype()) return testing::AssertionFailure() << "different shapes";
  const auto bytes_a = a.bytes(), bytes_b = b.bytes();
  if (bytes_a == bytes_b) return testing::AssertionSuccess();
  const auto first = std::mismatch(bytes_a.begin(), bytes_a.end(), bytes_b.begin()).first - bytes_a.begin();
  const int64_t wanted = first / (static_cast<int64_t>(bytes_a.size()) / a.elements());
  testing::AssertionResult result = testing::AssertionFailure();
  a.for_each([&](const auto& index, int64_t flat) {
    if (flat == wanted) result << "element " << index_text(index) << ": " << a.get(index) << " and " << b.get(index);
  });
  return result;
}

}  // namespace adaattn::test
