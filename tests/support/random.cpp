#include "support/random.h"

#include <cstdio>
#include <cstdlib>

namespace adaattn::test {

uint64_t run_seed() {
  static const uint64_t seed = [] {
    const char* text = std::getenv("ADAATTN_TEST_SEED");
    std::random_device device;
    const uint64_t value = text && *text ? std::strtoull(text, nullptr, 0) : device();
    std::printf("ADAATTN_TEST_SEED=%llu repeats this run\n", static_cast<unsigned long long>(value));
    std::fflush(stdout);
    return value;
  }();
  return seed;
}

}  // namespace adaattn::test
