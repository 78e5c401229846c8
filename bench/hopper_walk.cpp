// The mask-walking kernels beside the exact one, below the C API: time against the share of key tiles kept, and the
// exact kernels of narrow values. Masks are random; the tiles that decide would force are kept first.
#include <cuda_bf16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "adaptive/tables.h"
#include "attend/sm90/walk.h"
#include "cuda_call.h"
#include "hopper_call.h"

namespace adaattn::bench {
namespace {

constexpr int64_t kD = 128, kTile = decide::kTileK;

// Normally distributed bf16: a million of them over and over.
std::unique_ptr<CudaBuffer> normal(int64_t count) {
  constexpr int64_t kPattern = 1000003;
  std::mt19937 engine(7);
  std::normal_distribution<float> distribution;
  std::vector<__nv_bfloat16> pattern(static_cast<size_t>(std::min(count, kPattern)));
  for (__nv_bfloat16& x : pattern) x = __float2bfloat16(distribution(engine));
  auto buffer = std::make_unique<CudaBuffer>(static_cast<size_t>(count) * 2);
  for (int64_t first = 0; first < count; first += kPattern)
    check(cudaMemcpy(static_cast<__nv_bfloat16*>(buffer->data()) + first, pattern.data(),
                     static_cast<size_t>(std::min(kPattern, count - first)) * 2, cudaMemcpyHostToDevice));
  return buffer;
}

template <typename T>
std::unique_ptr<CudaBuffer> copy_of(const std::vector<T>& host) {
  auto buffer = std::make_unique<CudaBuffer>(host.size() * sizeof(T));
  check(cudaMemcpy(buffer->data(), host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return buffer;
}

struct WalkCase {
  int64_t batch, heads_q, heads_kv, seqlen;
  bool causal;
};

class Problem {
 public:
  explicit Problem(const WalkCase& c) : c_(c) {
    const int64_t q_count = c.batch * c.seqlen * c.heads_q * kD, kv_count = c.batch * c.seqlen * c.heads_kv * kD;
    q_ = normal(q_count), o_ = std::make_unique<CudaBuffer>(static_cast<size_t>(q_count) * 2);
    k_ = normal(kv_count), v_ = normal(kv_count);
    counters_ = copy_of(std::vector<uint32_t>(2));
    params = hopper_params({c.batch, c.heads_q, c.heads_kv, c.seqlen, kD, c.causal}, q_->data(), k_->data(), v_->data(),
                           o_->data());
    cuda::TableShape& t = tables_.shape;
    t.batch = static_cast<int32_t>(c.batch);
    t.heads_q = static_cast<int32_t>(c.heads_q);
    t.heads_kv = static_cast<int32_t>(c.heads_kv);
    t.group = t.heads_q / t.heads_kv;
    t.d_qk = t.d_v = kD;
    t.query_tiles = t.key_tiles = t.wave_tiles = static_cast<int32_t>((c.seqlen + kTile - 1) / kTile);
    t.max_rank = 96;
    t.mask_words = (t.key_tiles + 63) / 64;
    const int64_t units = c.batch * c.heads_kv;
    v_low_ = normal(units * t.key_rows() * t.max_rank);
    basis_ = normal(units * kD * t.max_rank);
    group_k_ = normal(units * t.key_groups() * 2 * kD);
    group_v_ = normal(units * t.key_groups() * kD);
    group_v_low_ = normal(units * t.key_groups() * t.max_rank);
    v_mean_ = copy_of(std::vector<float>(static_cast<size_t>(units * kD), 0.5f));
    const auto bf16 = [](const std::unique_ptr<CudaBuffer>& x) { return static_cast<const __nv_bfloat16*>(x->data()); };
    tables_.v_low = bf16(v_low_);
    tables_.basis = bf16(basis_);
    tables_.group_k = bf16(group_k_);
    tables_.group_v = bf16(group_v_);
    tables_.group_v_low = bf16(group_v_low_);
    tables_.v_mean = static_cast<const float*>(v_mean_->data());
  }

  // Masks at a share of the visible tiles that varies between heads by up to half; `sections`: heads in groups whose K
  // and V fit half of the L2 cache, most tiles first within each. Returns the share that came out.
  double decide(double share, bool sections) {
    const cuda::TableShape& t = tables_.shape;
    const int64_t rows = int64_t{t.batch} * t.heads_q, items = rows * t.wave_tiles;
    std::vector<uint64_t> mask(static_cast<size_t>(items * t.mask_words));
    std::vector<int32_t> kept(static_cast<size_t>(items));
    std::vector<decide::TileRow> range(static_cast<size_t>(items));
    std::vector<uint32_t> work(static_cast<size_t>(items)), counts(1, static_cast<uint32_t>(items));
    std::mt19937 engine(11);
    int64_t all = 0, exact = 0;
    for (int64_t item = 0; item < items; ++item) {
      const int32_t tile = static_cast<int32_t>(item % t.wave_tiles);
      const int64_t head = item / t.wave_tiles;
      const int32_t end = c_.causal ? tile + 1 : t.key_tiles;
      const decide::TileRow row{0, end, 0, c_.causal ? tile : end};
      const double wanted = std::min(1.0, share >= 1 ? 1.0 : share * (0.5 + static_cast<double>(head % 3) / 2));
      std::vector<int32_t> free;
      int32_t count = 0;
      const auto keep = [&](int32_t key) {
        mask[static_cast<size_t>(item * t.mask_words + key / 64)] |= uint64_t{1} << key % 64;
        ++count;
      };
      for (int32_t key = 0; key < end; ++key) {
        if (decide::is_forced(row, key)) {
          keep(key);
        } else {
          free.push_back(key);
        }
      }
      std::shuffle(free.begin(), free.end(), engine);
      for (const int32_t key : free) {
        if (count >= wanted * end) break;
        keep(key);
      }
      range[static_cast<size_t>(item)] = row;
      kept[static_cast<size_t>(item)] = count;
      all += end;
      exact += count;
    }
    std::iota(work.begin(), work.end(), 0u);
    const int64_t kv_bytes = int64_t{t.key_tiles} * kTile * kD * 4;
    const int64_t units = std::max<int64_t>(1, (int64_t{25} << 20) / kv_bytes);
    const auto section = [&](uint32_t item) { return sections ? item / t.wave_tiles / t.group / units : 0; };
    std::stable_sort(work.begin(), work.end(), [&](uint32_t a, uint32_t b) {
      return section(a) != section(b) ? section(a) < section(b) : kept[a] > kept[b];
    });
    mask_ = copy_of(mask), kept_ = copy_of(kept), range_ = copy_of(range), work_ = copy_of(work);
    count_ = copy_of(counts);
    tables_.mask = static_cast<const uint64_t*>(mask_->data());
    tables_.kept = static_cast<const int32_t*>(kept_->data());
    tables_.tile_range = static_cast<const decide::TileRow*>(range_->data());
    return static_cast<double>(exact) / static_cast<double>(all);
  }

  double walk_us(int rank_class, bool far_field) {
    cuda::sm90::WalkCall call;
    call.p = params;
    call.tables = tables_;
    call.rank_class = rank_class;
    call.far_field = far_field;
    call.counters = static_cast<uint32_t*>(counters_->data());
    call.multiprocessors = multiprocessors();
    const int64_t items = int64_t{tables_.shape.batch} * tables_.shape.heads_q * tables_.shape.wave_tiles;
    // Every class finds the one list there is.
    call.tables.work = static_cast<const uint32_t*>(work_->data()) - rank_class * items;
    call.tables.work_count = static_cast<const uint32_t*>(count_->data()) - rank_class;
    return measure_on_device([&](cudaStream_t s) { check(cuda::sm90::launch_walk(call, s)); }, false).us;
  }

  double exact_us(int64_t d_v) {
    const std::string name =
        "sm90_forward_bf16_d128" + (d_v == kD ? std::string() : "v" + std::to_string(d_v)) + "_masked";
    AttnParams narrow = params;
    narrow.d_v = d_v;
    const ExactCall call = exact_call(name.c_str(), narrow, counters_->data());
    if (call.kernel == nullptr) return 0;
    return measure_on_device([&](cudaStream_t s) { check(call.kernel->launch(call.args, s)); }, false).us;
  }

  AttnParams params;

 private:
  WalkCase c_;
  std::unique_ptr<CudaBuffer> q_, k_, v_, o_, v_low_, basis_, v_mean_, group_k_, group_v_, group_v_low_, counters_;
  std::unique_ptr<CudaBuffer> mask_, kept_, range_, work_, count_;
  cuda::AdaptiveTables tables_;
};

void run(const WalkCase& c) {
  Problem x(c);
  const double exact = x.exact_us(kD);
  const double flops = 4.0 * static_cast<double>(c.batch * c.heads_q * c.seqlen * c.seqlen * kD) * (c.causal ? 0.5 : 1);
  std::printf("\nB%lld H%lld/%lld S%lld %s: exact %.0f us, %.0f TFLOP/s\n", static_cast<long long>(c.batch),
              static_cast<long long>(c.heads_q), static_cast<long long>(c.heads_kv), static_cast<long long>(c.seqlen),
              c.causal ? "causal" : "full", exact, flops / exact * 1e-6);
  for (const int64_t d_v : {32, 64, 96}) {
    const double us = x.exact_us(d_v);
    if (us > 0)
      std::printf("  exact d_v %lld: %.0f us, %.2f of d_v 128\n", static_cast<long long>(d_v), us, us / exact);
  }
  std::printf(
      "  time over exact time, and that over the share kept\n  kept order    V128         +far         V96          "
      "+far         V64          +far         V32          +far\n");
  for (const double share : {0.15, 0.2, 0.3, 0.5, 1.0}) {
    for (const bool sections : {false, true}) {
      const double kept = x.decide(share, sections);
      std::printf("  %.3f %s", kept, sections ? "L2    " : "global");
      for (int rank_class = 0; rank_class < decide::kRankClasses; ++rank_class)
        for (const bool far_field : {false, true}) {
          const double ratio = x.walk_us(rank_class, far_field) / exact;
          std::printf("  %.3f (%.2f)", ratio, ratio / kept);
        }
      std::printf("\n");
    }
  }
}

}  // namespace
}  // namespace adaattn::bench

int main() {
  adaattn::cuda::sm90::prepare_walk();
  for (const bool causal : {true, false})
    for (const adaattn::bench::WalkCase& c :
         {adaattn::bench::WalkCase{4, 6, 2, 16384, causal}, {4, 16, 16, 16384, causal}})
      adaattn::bench::run(c);
  for (const adaattn::bench::WalkCase& c :
       {adaattn::bench::WalkCase{4, 6, 2, 8192, true}, {4, 16, 16, 4096, true}, {1, 8, 8, 65536, true}})
    adaattn::bench::run(c);
}
