// Random problems for the mask-walking kernels: tensors, masks and tables on the host and the device, and their oracle.
#pragma once

#include <cuda_bf16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "adaptive/tables.h"
#include "attend/sm90/walk.h"
#include "gpu/device.h"
#include "support/random.h"

namespace adaattn::test {

// A host array and its copy on the device.
template <typename T>
class Mirror {
 public:
  explicit Mirror(size_t count) : host(count), device_(count * sizeof(T)) {}
  T* upload() const {
    require(cudaMemcpy(device_.data(), host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
    return data();
  }
  void download() { require(cudaMemcpy(host.data(), device_.data(), host.size() * sizeof(T), cudaMemcpyDeviceToHost)); }
  T* data() const { return static_cast<T*>(device_.data()); }
  std::vector<T> host;

 private:
  DeviceMemory device_;
};

using Bf16 = __nv_bfloat16;

struct WalkShape {
  const char* name = "";
  int64_t batch = 1, heads_q = 2, heads_kv = 1, seqlen_q = 256, seqlen_k = 256;
  int64_t window_left = -1, window_right = -1;
  std::vector<int32_t> lens_q = {}, lens_k = {};  // packed sequences, or (only lens_k) seqused_k
  double kept = 0.5;                              // chance of a tile that may be skipped
  bool far_field = false;
  bool remainder = false;       // of class 0
  double needle = 0;            // share of a row from which on a key's tile is taken in by the probe; 0: no probe
  int probe_columns = 0;        // of what the probe reads; 0: Q and K themselves
  int32_t multiprocessors = 3;  // so few that a CTA walks several query tiles
  int max_rank = 96;
  std::vector<int> classes = {0};          // of the KV heads, in turn; cuda::kByteList: in 8 bits
  int64_t first_tile = 0, wave_tiles = 0;  // 0: all
};

class WalkProblem {
 public:
  static constexpr int64_t kD = 128;

  WalkProblem(const WalkShape& shape, uint64_t seed) : s(shape), random_(seed) {
    packed_ = !s.lens_q.empty();
    lay_out();
    fill();
    decide_masks();
    upload();
  }

  // K and V in 8 bits.
  cuda::Int8Tables quantize() {
    const cuda::Int8Tables tables_8 = cuda::lay_out_int8_tables(params, bytes->data());
    require(cuda::launch_quantize(params, tables_8, nullptr));
    return tables_8;
  }

  // Launches every class; the arrays of results are downloaded.
  void run() {
    cuda::sm90::prepare_walk();
    cudaDeviceProp properties{};
    require(cudaGetDeviceProperties(&properties, 0));
    cuda::sm90::WalkCall call;
    call.p = params;
    call.tables = tables;
    call.far_field = s.far_field;
    call.far_share = far_share->data();
    call.counters = counters->data();
    if (s.needle > 0) {
      if (!kept_mask.empty()) mask->host = kept_mask;
      call.found = found->data();
      call.mask = mask->upload();
      call.log2_needle = static_cast<float>(std::log2(s.needle));
    }
    call.multiprocessors = std::min(s.multiprocessors, properties.multiProcessorCount);
    for (int c = 0; c < decide::kRankClasses; ++c) {
      call.rank_class = c;
      require(cuda::sm90::launch_walk(call, nullptr));
    }
    if (work_count->host[cuda::kByteList] > 0) {
      call.rank_class = 0;
      call.far_field = false;
      call.bytes = quantize();
      require(cuda::sm90::launch_walk(call, nullptr));
    }
    require(cudaDeviceSynchronize());
    o->download();
    lse->download();
    far_share->download();
    counters->download();
    found->download();
    if (s.needle <= 0) return;
    kept_mask = mask->host;
    mask->download();
  }

  struct Row {
    std::vector<double> o;
    double lse = 0, far = 0;
  };
  Row oracle(int64_t b, int64_t h, int64_t i) const;
  // The tiles of a query tile that were not kept: the most that a key of theirs has in a row by the probe's scores, of
  // what the row's kept keys have together, and of what these and those that the probe found have.
  struct Swept {
    int32_t tile;
    double of_kept, of_all;
  };
  std::vector<Swept> sweep(int64_t b, int64_t h, int64_t tile) const;

  int64_t items_of_head() const { return tables.shape.wave_tiles; }
  int64_t len_q(int64_t b) const { return sequence_of(host_params, b).len_q; }
  int64_t q_row(int64_t b, int64_t h, int64_t i) const {
    const int64_t token = packed_ ? sequence_of(host_params, b).q_start + i : b * s.seqlen_q + i;
    return token * s.heads_q + h;
  }
  int64_t k_row(int64_t b, int64_t h, int64_t j) const {
    const int64_t token = packed_ ? sequence_of(host_params, b).k_start + j : b * s.seqlen_k + j;
    return token * s.heads_kv + h;
  }
  int64_t item(int64_t b, int64_t h, int64_t tile) const {
    return (b * s.heads_q + h) * tables.shape.wave_tiles + tile - tables.first_tile;
  }
  int class_of(int64_t b, int64_t head_kv) const {
    return s.classes[static_cast<size_t>(b * s.heads_kv + head_kv) % s.classes.size()];
  }

  WalkShape s;
  AttnParams params, host_params;
  cuda::AdaptiveTables tables;
  std::unique_ptr<Mirror<Bf16>> q, k, v, o, v_low, basis, group_k, group_v, group_v_low, mean_k, probe_q, probe_k;
  std::unique_ptr<Mirror<uint8_t>> bytes;
  std::unique_ptr<Mirror<float>> lse, v_mean, far_share, remainder, probe_base;
  std::unique_ptr<Mirror<uint64_t>> mask;
  std::vector<uint64_t> kept_mask;  // before the probe added to it
  std::unique_ptr<Mirror<int32_t>> kept, found, starts_q, starts_k;
  std::unique_ptr<Mirror<uint32_t>> work, work_count, counters;
  std::unique_ptr<Mirror<decide::TileRow>> range;

 private:
  void lay_out();
  void fill();
  void decide_masks();
  void upload();
  decide::TileRow visible_tiles(const Sequence& seq, int64_t tile) const;
  double at(const Mirror<Bf16>& x, int64_t index) const { return __bfloat162float(x.host[static_cast<size_t>(index)]); }
  void set(Mirror<Bf16>& x, int64_t index, double value) const {
    x.host[static_cast<size_t>(index)] = __float2bfloat16(static_cast<float>(value));
  }
  Random random_;
  bool packed_ = false;
};

}  // namespace adaattn::test
