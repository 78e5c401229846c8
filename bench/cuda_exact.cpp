// Exact attention on a CUDA device against PyTorch's SDPA back-ends in the same run.
#include <set>
#include <string>
#include <vector>

#include "attention_call.h"
#include "cuda_call.h"
#include "harness.h"
#include "peers.h"
#include "shapes.h"

namespace adaattn::bench {
namespace {

struct Case {
  std::string name;
  Shape shape;
  NamedDtype dtype;
  adaattn_math_t math;
  bool cold;
};

std::vector<Case> cases(const Report& report) {
  std::vector<Case> list;
  const auto add = [&](const Shape& shape, NamedDtype dtype, adaattn_math_t math, bool cold) {
    const char* direction = is_decode(shape) ? "decode/" : "fwd/";
    std::string type = math == ADAATTN_MATH_FAST_F32 ? "tf32" : dtype.name;
    Case c{direction + shape_name(shape, type.c_str()) + (cold ? "/cold" : ""), shape, dtype, math, cold};
    if (report.wants(c.name)) list.push_back(c);
  };
  for (const Shape& shape : cuda_prefill_shapes()) add(shape, kDtypes[1], ADAATTN_MATH_EXACT, false);
  for (const Shape& shape : cuda_f32_shapes())
    for (const adaattn_math_t math : {ADAATTN_MATH_EXACT, ADAATTN_MATH_FAST_F32}) add(shape, kDtypes[0], math, false);
  for (const Shape& shape : cuda_decode_shapes()) {
    for (const bool cold : {false, true}) add(shape, kDtypes[1], ADAATTN_MATH_EXACT, cold);
    add(shape, kE4m3Cache, ADAATTN_MATH_EXACT, false);
  }
  for (const Shape& shape : cuda_engine_shapes())
    for (const NamedDtype& dtype : {kDtypes[1], kE4m3Cache}) add(shape, dtype, ADAATTN_MATH_EXACT, false);
  for (const Shape& shape : cuda_cache_prefill_shapes()) add(shape, kE4m3Cache, ADAATTN_MATH_EXACT, false);
  return list;
}

bool has_cache(const Case& c) { return c.dtype.dtype_kv == ADAATTN_DTYPE_E4M3; }

// What peers are timed with: keys and values of 8 bits in bf16, pages one after another.
Case peers_case(Case c) {
  if (!has_cache(c) && c.shape.page_size == 0) return c;
  c.dtype = kDtypes[1];
  c.shape.page_size = 0;
  c.name = c.name.substr(0, c.name.find('/') + 1) + shape_name(c.shape, c.dtype.name);
  return c;
}

nlohmann::json peers_of(const std::vector<Case>& list) {
  nlohmann::json request = nlohmann::json::array();
  std::set<std::string> asked;
  for (const Case& own : list) {
    const Case c = peers_case(own);
    if (c.shape.window > 0) continue;  // SDPA has no windows
    if (!asked.insert(c.name).second) continue;
    request.push_back({{"name", c.name},
                       {"dtype", c.dtype.name},
                       {"batch", c.shape.batch},
                       {"heads_q", c.shape.heads_q},
                       {"heads_kv", c.shape.heads_kv},
                       {"seqlen_q", c.shape.seqlen_q},
                       {"seqlen_k", c.shape.seqlen_k},
                       {"head_dim", c.shape.head_dim},
                       {"causal", c.shape.mask != ADAATTN_MASK_NONE},
                       {"cold", c.cold}});
  }
  return run_peers(ADAATTN_BENCH_PEERS, request);
}

double copy_tbps() {
  constexpr size_t kBytes = size_t{2} << 30;
  const CudaBuffer from(kBytes), to(kBytes);
  const Timing time = measure_on_device(
      [&](cudaStream_t stream) {
        check(cudaMemcpyAsync(to.data(), from.data(), kBytes, cudaMemcpyDeviceToDevice, stream));
      },
      false);
  return 2.0 * static_cast<double>(kBytes) / time.us * 1e-6;
}

// Rate over the ceiling of the same run: products of large matrices in the row's arithmetic, copies for a decode row.
double share_of_ceiling(const Report& report, const Case& c, double rate) {
  const std::string name = is_decode(c.shape)                    ? "copy_tbps"
                           : c.dtype.dtype == ADAATTN_DTYPE_BF16 ? "bf16_tflops"
                           : c.math == ADAATTN_MATH_FAST_F32     ? "tf32_tflops"
                                                                 : "f32_tflops";
  if (!report.has_ceiling(name)) return 0;
  return rate / (report.ceiling(name) * (is_decode(c.shape) ? 1e3 : 1));
}

void run_case(Report& report, adaattn_context_t* context, const Case& c, const nlohmann::json& peers) {
  CudaCall call(context, c.shape, c.dtype, c.math);
  Row row;
  row.name = c.name;
  row.time = measure_on_device([&](cudaStream_t stream) { call.run(stream); }, c.cold);
  const bool decode = is_decode(c.shape);
  row.rate = decode ? call.kv_bytes() / row.time.us * 1e-3 : call.flops() / row.time.us * 1e-6;
  row.unit = decode ? "GB/s" : "TFLOP/s";
  row.error = call.sampled_error();
  if (const double share = share_of_ceiling(report, c, row.rate); share > 0) row.details["of_ceiling"] = share;
  bool added = false;
  if (has_cache(c)) {
    CudaCall wide(context, c.shape, c.dtype.dtype, c.math);
    row.peer = wide.kernel();
    row.peer_us = measure_on_device([&](cudaStream_t stream) { wide.run(stream); }, c.cold).us;
    report.add(row);
    added = true;
  }
  if (const std::string name = peers_case(c).name; peers["rows"].contains(name))
    for (const auto& [peer, us] : peers["rows"][name].items()) {
      row.peer = peer;
      row.peer_us = us.get<double>();
      report.add(row);
      added = true;
    }
  if (!added) report.add(row);
}

}  // namespace

void run_cuda_exact(Report& report) {
  const CudaContext context(report);
  report.add_ceiling("copy_tbps", copy_tbps());
  const std::vector<Case> list = cases(report);
  const nlohmann::json peers = peers_of(list);
  for (const auto& [name, value] : peers["ceilings"].items()) report.add_ceiling(name, value.get<double>());
  for (const Case& c : list) run_case(report, context.get(), c, peers);
}

}  // namespace adaattn::bench
