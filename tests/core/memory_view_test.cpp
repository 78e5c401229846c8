#include "core/memory_view.h"

#include <gtest/gtest.h>

#include <random>
#include <set>
#include <vector>

namespace adaattn {
namespace {

// Addresses of small integers: only the arithmetic is tested, nothing is read.
adaattn_tensor_t view_at(uintptr_t address, std::vector<int64_t> shape, std::vector<int64_t> stride) {
  adaattn_tensor_t t = {};
  t.data = reinterpret_cast<void*>(address);
  t.ndim = static_cast<int32_t>(shape.size());
  for (size_t i = 0; i < shape.size(); ++i) t.shape[i] = shape[i], t.stride[i] = stride[i];
  return t;
}

// All bytes, one by one.
std::vector<uintptr_t> bytes_of(const adaattn_tensor_t& t, int64_t size) {
  std::vector<uintptr_t> bytes;
  int64_t count = 1;
  for (int i = 0; i < t.ndim; ++i) count *= t.shape[i];
  for (int64_t n = 0; n < count; ++n) {
    int64_t rest = n, offset = 0;
    for (int i = t.ndim; i-- > 0; rest /= t.shape[i]) offset += rest % t.shape[i] * t.stride[i];
    for (int64_t byte = 0; byte < size; ++byte)
      bytes.push_back(reinterpret_cast<uintptr_t>(t.data) + static_cast<uintptr_t>(offset * size + byte));
  }
  return bytes;
}

TEST(MemoryView, AgreesWithEnumeratedBytesOnRandomViews) {
  constexpr uint32_t kSeed = 20260801;
  SCOPED_TRACE(testing::Message() << "seed " << kSeed);
  std::mt19937 rng(kSeed);
  const auto draw = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); };
  int overlapping = 0, disjoint_in_range = 0;
  for (int round = 0; round < 20000; ++round) {
    adaattn_tensor_t tensors[2];
    const int64_t size = 1 << draw(0, 2);
    for (adaattn_tensor_t& t : tensors) {
      std::vector<int64_t> shape, stride;
      const int ndim = draw(1, 4);
      for (int i = 0; i < ndim; ++i) shape.push_back(draw(1, 4)), stride.push_back(draw(0, 30));
      t = view_at(1000 + static_cast<uintptr_t>(draw(0, 60)), shape, stride);
    }
    const MemoryView a = memory_view(tensors[0], size), b = memory_view(tensors[1], size);
    const auto bytes_a = bytes_of(tensors[0], size), bytes_b = bytes_of(tensors[1], size);
    const std::set<uintptr_t> set_a(bytes_a.begin(), bytes_a.end());
    bool expected = false;
    for (uintptr_t byte : bytes_b) expected |= set_a.count(byte) != 0;
    ASSERT_EQ(a.span, static_cast<int64_t>(*set_a.rbegin() - *set_a.begin() + 1));
    // Never misses an overlap; dense inner dimensions with a broadcast among them may only widen a view.
    if (expected) {
      ASSERT_TRUE(overlap(a, b)) << "round " << round;
      ASSERT_TRUE(overlap(b, a)) << "round " << round;
    }
    if (set_a.size() != bytes_a.size()) {
      ASSERT_TRUE(overlaps_itself(a)) << "round " << round;
    }
    overlapping += expected;
    disjoint_in_range += !expected && !overlap(a, b);
  }
  EXPECT_GT(overlapping, 1000);
  EXPECT_GT(disjoint_in_range, 1000);
}

// Layouts that people have: nested strides, each a multiple of the span inside it. There the answer is exact.
TEST(MemoryView, IsExactForSlicesOfOneBuffer) {
  constexpr uint32_t kSeed = 20260802;
  SCOPED_TRACE(testing::Message() << "seed " << kSeed);
  std::mt19937 rng(kSeed);
  const auto draw = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); };
  int overlapping = 0, interleaved = 0;
  for (int round = 0; round < 20000; ++round) {
    // A dense buffer [b, s, h, d], padded rows, two boxes of it with a permuted order of dimensions.
    const int64_t extent[4] = {draw(1, 3), draw(1, 4), draw(1, 4), draw(1, 5)};
    int64_t stride[4];
    int64_t step = 1;
    for (int i = 3; i >= 0; --i) {
      stride[i] = step;
      step = step * extent[i] + draw(0, 2);
    }
    adaattn_tensor_t boxes[2];
    for (adaattn_tensor_t& box : boxes) {
      int order[4] = {0, 1, 2, 3};
      std::shuffle(order, order + 4, rng);
      int64_t offset = 0;
      std::vector<int64_t> shape(4), strides(4);
      for (int i = 0; i < 4; ++i) {
        const int dim = order[i];
        const int64_t first = draw(0, static_cast<int>(extent[dim]) - 1);
        shape[i] = draw(1, static_cast<int>(extent[dim] - first));
        strides[i] = stride[dim];
        offset += first * stride[dim];
      }
      box = view_at(4096 + static_cast<uintptr_t>(offset * 2), shape, strides);
    }
    const MemoryView a = memory_view(boxes[0], 2), b = memory_view(boxes[1], 2);
    const auto bytes_a = bytes_of(boxes[0], 2), bytes_b = bytes_of(boxes[1], 2);
    const std::set<uintptr_t> set_a(bytes_a.begin(), bytes_a.end());
    bool expected = false;
    for (uintptr_t byte : bytes_b) expected |= set_a.count(byte) != 0;
    ASSERT_EQ(overlap(a, b), expected) << "round " << round;
    ASSERT_FALSE(overlaps_itself(a)) << "round " << round;
    overlapping += expected;
    interleaved += !expected && a.begin < b.begin + static_cast<uintptr_t>(b.span) &&
                   b.begin < a.begin + static_cast<uintptr_t>(a.span);
  }
  EXPECT_GT(overlapping, 1000);
  EXPECT_GT(interleaved, 1000);
}

TEST(MemoryView, HugeFusedSlicesAreAnsweredExactly) {
  // [256, 4096, 3 x 32 x 128] bf16: the slices of a fused projection.
  constexpr int64_t kRow = 3 * 32 * 128;
  const auto slice = [](int64_t part, int64_t shift) {
    return memory_view(view_at(1 << 20 | static_cast<uintptr_t>(2 * (part * 32 * 128 + shift)), {256, 4096, 32, 128},
                               {4096 * kRow, kRow, 128, 1}),
                       2);
  };
  EXPECT_FALSE(overlap(slice(0, 0), slice(1, 0)));
  EXPECT_FALSE(overlap(slice(2, 0), slice(0, 0)));
  EXPECT_TRUE(overlap(slice(0, 1), slice(1, 0)));
  EXPECT_TRUE(overlap(slice(2, 1), slice(0, 0)));
}

TEST(MemoryView, EmptyViewsOverlapNothing) {
  const MemoryView empty = memory_view(view_at(4096, {4, 0}, {1, 1}), 4);
  const MemoryView full = memory_view(view_at(4096, {4, 4}, {4, 1}), 4);
  EXPECT_FALSE(overlap(empty, full));
  EXPECT_FALSE(overlap(full, empty));
  EXPECT_TRUE(overlap(full, full));
  EXPECT_FALSE(overlaps_itself(full));
}

}  // namespace
}  // namespace adaattn
