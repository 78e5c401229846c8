// One analysis of a problem on the device, with its tables on the host.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "adaptive/analyze.h"
#include "adaptive/structured.h"
#include "attention/fixture.h"
#include "backend.h"
#include "core/adaptive_options.h"
#include "core/validate.h"
#include "decide/cells.h"
#include "gpu/device.h"

namespace adaattn::test {

using cuda::AnalyzeArgs;
using cuda::TableShape;
using decide::kTileK;
using decide::kTileQ;
constexpr int64_t kCells = decide::kCellsOfTile;

// Of the policy as the CPU has it but for the probe; without a far field and a projected V; with needles, or with what
// is left out, besides; by levels of mass, with heads in 8 bits.
enum class Rules { kAll, kTiles, kNeedles, kRemainder, kBytes };

class Analysis {
 public:
  Analysis(AttentionData& data, adaattn_policy_t policy, int32_t wave_tiles = 0, bool probe = false,
           Rules rules = Rules::kAll)
      : data_(data) {
    problem_ = problem_from(data.desc, Use::kAttention);
    problem_.adaptive = resolve_options(adaptive_desc(policy), problem_);
    if (!probe) problem_.adaptive.probe = decide::Probe::kOff;
    if (rules != Rules::kAll) {
      problem_.adaptive.far_field = false;
      problem_.adaptive.rank_mode = decide::RankMode::kOff;
      if (rules != Rules::kBytes) problem_.adaptive.min_level = 0;
    }
    args.shape = cuda::table_shape(problem_, wave_tiles);
    args.shape.needles = rules == Rules::kNeedles;
    args.shape.by_shares = rules != Rules::kAll && rules != Rules::kBytes;
    args.shape.bytes = rules == Rules::kBytes;
    args.shape.compensates = rules == Rules::kRemainder;
    cuda::prepare_analyze();
    workspace_ = std::make_unique<DeviceMemory>(cuda::analyze_bytes(args.shape));
    const size_t units = static_cast<size_t>(args.shape.batch * args.shape.heads_kv);
    basis_ = std::make_unique<DeviceMemory>(cuda::state_basis_doubles(args.shape) * 8);
    warm_ = std::make_unique<DeviceMemory>(units * 4);
    require(cudaMemset(warm_->data(), 0, warm_->bytes()));
    args.options = problem_.adaptive;
    args.costs = cuda::device_costs(args.shape, args.options);
    args.bytes = cuda::device_bytes();
    args.tables = cuda::analyze_layout(args.shape, workspace_->data());
    args.state.basis = static_cast<double*>(basis_->data());
    args.state.warm = static_cast<int32_t*>(warm_->data());
    args.scale_log2 = problem_.scale * static_cast<float>(M_LOG2E);
  }

  void run() {
    data_.upload(ADAATTN_DEVICE_CUDA);
    args.p = attention_from(problem_, data_.io(ADAATTN_DEVICE_CUDA), {ADAATTN_DEVICE_CUDA, 0, nullptr}, {});
    if (!feedback.empty()) {
      feedback_ = std::make_unique<DeviceMemory>(feedback.size() * sizeof feedback[0]);
      require(cudaMemcpy(feedback_->data(), feedback.data(), feedback_->bytes(), cudaMemcpyHostToDevice));
      args.state.feedback = static_cast<decide::HeadFeedback*>(feedback_->data());
    }
    cuda::analyze(args, nullptr);
    cuda::decide_heads(args, nullptr);
    require(cudaDeviceSynchronize());
    host = attention_from(problem_, data_.io(), {ADAATTN_DEVICE_CPU, 0, nullptr}, {});
  }
  void schedule(int32_t first_tile) {
    cuda::write_schedule(args, first_tile, nullptr);
    require(cudaDeviceSynchronize());
  }

  template <typename T>
  std::vector<T> copy(const T* device, int64_t count) const {
    std::vector<T> list(static_cast<size_t>(count));
    require(cudaMemcpy(static_cast<void*>(list.data()), device, list.size() * sizeof(T), cudaMemcpyDeviceToHost));
    return list;
  }
  std::vector<float> copy(const __nv_bfloat16* device, int64_t count) const {
    std::vector<uint16_t> raw = copy(reinterpret_cast<const uint16_t*>(device), count);
    std::vector<float> list(raw.size());
    for (size_t i = 0; i < raw.size(); ++i) {
      const uint32_t bits = static_cast<uint32_t>(raw[i]) << 16;
      std::memcpy(&list[i], &bits, 4);
    }
    return list;
  }
  int64_t units() const { return int64_t{args.shape.batch} * args.shape.heads_kv; }
  int64_t heads() const { return int64_t{args.shape.batch} * args.shape.heads_q; }
  int64_t section_units() const {
    const int64_t all = host.batch * args.shape.heads_kv;
    const int64_t most = std::clamp<int64_t>(
        args.cache_bytes / (args.shape.key_rows() * (args.shape.d_qk + args.shape.d_v) * 2), 1, all);
    const int64_t sections = (all + most - 1) / most;
    return (all + sections - 1) / sections;
  }

  AnalyzeArgs args;
  AttnParams host;                             // with host pointers
  std::vector<decide::HeadFeedback> feedback;  // of each head before the run; empty: none is kept

 private:
  AttentionData& data_;
  Problem problem_;
  std::unique_ptr<DeviceMemory> workspace_, basis_, warm_, feedback_;
};

inline AttentionCase base_case() {
  AttentionCase c = {.name = "Tables", .batch = 2, .heads_q = 6, .heads_kv = 2, .seqlen_q = 1500, .seqlen_k = 1500};
  c.d_qk = c.d_v = 128;
  c.mask = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT;
  return c;
}

}  // namespace adaattn::test
