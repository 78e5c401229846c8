#include "cpu_ceilings.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <numeric>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace adaattn::bench {
namespace {

using Clock = std::chrono::steady_clock;

// Seconds from the common start until the last thread is done; the best of some rounds.
double best_seconds(int threads, int rounds, const std::function<void(int)>& work) {
  double best = 1e30;
  for (int round = 0; round < rounds; ++round) {
    std::atomic<int> ready{0};
    std::atomic<bool> go{false};
    std::vector<std::thread> workers;
    for (int t = 0; t < threads; ++t)
      workers.emplace_back([&, t] {
        ++ready;
        while (!go) std::this_thread::yield();
        work(t);
      });
    while (ready != threads) std::this_thread::yield();
    const auto start = Clock::now();
    go = true;
    for (std::thread& worker : workers) worker.join();
    best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
  }
  return best;
}

// Twelve independent chains cover a latency of 4 cycles at 2 per cycle. The empty asm keeps the compiler from seeing
// that the values are never used.
constexpr int kChains = 12;
#define ADAATTN_BENCH_FMA(Vector, width, set, fma)                     \
  Vector a[kChains];                                                   \
  const Vector x = set(0.999f), y = set(1e-3f);                        \
  for (int i = 0; i < kChains; ++i) a[i] = set(static_cast<float>(i)); \
  for (int64_t n = 0; n < steps; ++n)                                  \
    for (int i = 0; i < kChains; ++i) a[i] = fma(a[i], x, y);          \
  for (int i = 0; i < kChains; ++i) __asm__ volatile("" ::"x"(a[i]));  \
  return 2.0 * width * kChains

#if defined(__x86_64__)
__attribute__((target("avx512f"), optimize("O3"))) double fma_avx512(int64_t steps) {
  ADAATTN_BENCH_FMA(__m512, 16, _mm512_set1_ps, _mm512_fmadd_ps);
}
__attribute__((target("avx2,fma"), optimize("O3"))) double fma_avx2(int64_t steps) {
  ADAATTN_BENCH_FMA(__m256, 8, _mm256_set1_ps, _mm256_fmadd_ps);
}
__attribute__((target("avx512f"))) double read_avx512(const char* p, const char* end) {
  __m512i sum[8] = {};
  for (; p < end; p += 512)
    for (int i = 0; i < 8; ++i) sum[i] = _mm512_add_epi64(sum[i], _mm512_loadu_si512(p + 64 * i));
  for (int i = 1; i < 8; ++i) sum[0] = _mm512_add_epi64(sum[0], sum[i]);
  alignas(64) int64_t lanes[8];
  _mm512_store_si512(lanes, sum[0]);
  return static_cast<double>(std::accumulate(lanes, lanes + 8, int64_t{0}));
}
#endif

double fma_portable(int64_t steps) {
  float a[8] = {};
  for (int64_t n = 0; n < steps; ++n)
    for (float& x : a) x = x * 0.999f + 1e-3f;
  for (float x : a) __asm__ volatile("" ::"m"(x));
  return 2.0 * 8;
}

double read_portable(const char* p, const char* end) {
  uint64_t sum[8] = {};
  for (; p < end; p += 64)
    for (int i = 0; i < 8; ++i) sum[i] += reinterpret_cast<const uint64_t*>(p)[i];
  return static_cast<double>(sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7]);
}

}  // namespace

double fma_gflops(int threads) {
  double (*kernel)(int64_t) = fma_portable;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) {
    kernel = fma_avx512;
  } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    kernel = fma_avx2;
  }
#endif
  constexpr int64_t kSteps = 12'000'000;
  const double flops_per_step = kernel(1);
  const double seconds = best_seconds(threads, 5, [&](int) { kernel(kSteps); });
  return flops_per_step * kSteps * threads / seconds * 1e-9;
}

double read_gbps(int threads) {
  double (*kernel)(const char*, const char*) = read_portable;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) kernel = read_avx512;
#endif
  constexpr int64_t kBytes = int64_t{512} << 20;
  const std::vector<char> buffer(kBytes, 1);
  const int64_t part = kBytes / threads / 4096 * 4096;
  std::vector<double> sums(threads);
  const double seconds = best_seconds(
      threads, 5, [&](int t) { sums[t] = kernel(buffer.data() + t * part, buffer.data() + (t + 1) * part); });
  for (double sum : sums) __asm__ volatile("" ::"x"(sum));
  return static_cast<double>(part) * threads / seconds * 1e-9;
}

}  // namespace adaattn::bench
