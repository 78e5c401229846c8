// Seeded random numbers. The seed of a run is fresh unless ADAATTN_TEST_SEED is set, and is printed.
#pragma once

#include <cstdint>
#include <random>

namespace adaattn::test {

// ADAATTN_TEST_SEED, or drawn once per process; printed on first use.
uint64_t run_seed();

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  double normal() { return normal_(engine_); }
  double uniform() { return std::uniform_real_distribution<double>()(engine_); }
  int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine_); }
  bool chance(double probability) { return uniform() < probability; }
  template <class List>
  auto pick(const List& list) {
    return std::data(list)[between(0, static_cast<int64_t>(std::size(list)) - 1)];
  }
  template <class T>
  auto pick(std::initializer_list<T> list) {
    return list.begin()[between(0, static_cast<int64_t>(list.size()) - 1)];
  }
  std::mt19937_64& engine() { return engine_; }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<double> normal_;
};

}  // namespace adaattn::test
