// Counter-based random numbers: Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
// 1, 2, 3", SC 2011). A value is a pure function of (seed, stream, index), so every thread and every device draws the
// same numbers in any order. Only integers come out: float transforms through libm would differ between devices.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace adaattn {

struct PhiloxBlock {
  uint32_t word[4];
};

ADAATTN_HD inline uint32_t mul_hi32(uint32_t a, uint32_t b) { return static_cast<uint32_t>((uint64_t{a} * b) >> 32); }

// High half of a 64 x 64 bit product, from 32-bit halves (no 128-bit type on the device side of older compilers).
ADAATTN_HD inline uint64_t mul_hi64(uint64_t a, uint64_t b) {
  const uint64_t a_lo = a & 0xffffffffu, a_hi = a >> 32, b_lo = b & 0xffffffffu, b_hi = b >> 32;
  const uint64_t lo_hi = a_lo * b_hi, hi_lo = a_hi * b_lo;
  const uint64_t carry = ((a_lo * b_lo) >> 32) + (lo_hi & 0xffffffffu) + (hi_lo & 0xffffffffu);
  return a_hi * b_hi + (lo_hi >> 32) + (hi_lo >> 32) + (carry >> 32);
}

// The bijection itself: ten rounds, key bumped by the Weyl constants after each but the last.
ADAATTN_HD inline PhiloxBlock philox4x32_10(PhiloxBlock counter, uint32_t key0, uint32_t key1) {
  constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  for (int round = 0; round < 10; ++round) {
    const uint32_t hi0 = mul_hi32(kMultiplier0, counter.word[0]), lo0 = kMultiplier0 * counter.word[0];
    const uint32_t hi1 = mul_hi32(kMultiplier1, counter.word[2]), lo1 = kMultiplier1 * counter.word[2];
    counter = {{hi1 ^ counter.word[1] ^ key0, lo1, hi0 ^ counter.word[3] ^ key1, lo0}};
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return counter;
}

// 128 random bits at `index` of the stream: key = seed, counter = (index, stream).
ADAATTN_HD inline PhiloxBlock philox(uint64_t seed, uint64_t stream, uint64_t index) {
  const PhiloxBlock counter{{static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32),
                             static_cast<uint32_t>(stream), static_cast<uint32_t>(stream >> 32)}};
  return philox4x32_10(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

ADAATTN_HD inline uint32_t random_u32(uint64_t seed, uint64_t stream, uint64_t index) {
  return philox(seed, stream, index / 4).word[index % 4];
}

ADAATTN_HD inline uint64_t random_u64(uint64_t seed, uint64_t stream, uint64_t index) {
  const PhiloxBlock block = philox(seed, stream, index / 2);
  return index % 2 == 0 ? block.word[0] | uint64_t{block.word[1]} << 32 : block.word[2] | uint64_t{block.word[3]} << 32;
}

// Uniform in [0, n), n >= 1, by multiplication; the bias is below n / 2^64.
ADAATTN_HD inline int64_t random_below(uint64_t seed, uint64_t stream, uint64_t index, int64_t n) {
  return static_cast<int64_t>(mul_hi64(random_u64(seed, stream, index), static_cast<uint64_t>(n)));
}

// +1 or -1 with equal odds: the entries of a sign sketch, exact in every format. 128 entries share one block.
ADAATTN_HD inline float random_sign(uint64_t seed, uint64_t stream, uint64_t index) {
  const PhiloxBlock block = philox(seed, stream, index / 128);
  const uint32_t bit = static_cast<uint32_t>(index % 128);
  return (block.word[bit / 32] >> bit % 32 & 1u) != 0 ? -1.0f : 1.0f;
}

}  // namespace adaattn
