// Exact attention on the CPU against the processor's own limits.
#include <algorithm>
#include <cstdio>
#include <string>

#include "attention_call.h"
#include "cpu_ceilings.h"
#include "harness.h"
#include "shapes.h"

namespace adaattn::bench {
namespace {

struct Context {
  adaattn_context_t* handle = nullptr;
  Context(int threads, adaattn_isa_t isa) {
    adaattn_config_t config;
    check(adaattn_config_init(&config, sizeof config));
    config.num_threads = threads;
    config.isa = isa;
    check(adaattn_create(&config, &handle));
  }
  ~Context() { adaattn_destroy(handle); }
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
};

adaattn_isa_t best_isa() {
  const Context context(1, ADAATTN_ISA_AUTO);
  int64_t isa = 0;
  check(adaattn_get_option(context.handle, ADAATTN_OPTION_ISA, &isa));
  return static_cast<adaattn_isa_t>(isa);
}

std::string suffix(int threads) { return "/t" + std::to_string(threads); }

void prefill(Report& report, const NamedDtype& dtype, const Shape& shape, int threads, adaattn_isa_t isa) {
  const std::string name = "fwd/" + shape_name(shape, dtype.name) + suffix(threads);
  if (!report.wants(name)) return;
  const Context context(threads, isa);
  CpuCall call(context.handle, shape, dtype.dtype);
  Row row;
  row.name = name;
  row.unit = "GFLOP/s";
  Shape full = shape;
  full.mask = ADAATTN_MASK_NONE;
  const Row* own_full = report.find("fwd/" + shape_name(full, dtype.name) + suffix(threads));
  if (dtype.dtype != ADAATTN_DTYPE_F32) {
    CpuCall f32(context.handle, shape, ADAATTN_DTYPE_F32);
    const TimingPair times = measure_pair([&] { call.run(); }, [&] { f32.run(); });
    row.time = times.ours;
    row.peer = "own-f32";
    row.peer_us = times.peer.us;
  } else {
    row.time = measure([&] { call.run(); });
  }
  row.rate = call.flops() / row.time.us * 1e-3;
  row.error = call.sampled_error();
  if (row.peer.empty() && shape.mask != ADAATTN_MASK_NONE && own_full != nullptr) {
    row.peer = "own-full";
    row.peer_us = own_full->time.us;
  } else if (row.peer.empty()) {
    row.peer = "fma-f32-peak";
    row.peer_us = call.flops() / report.ceiling("fma_f32_gflops" + std::string(threads == 1 ? "_1t" : "_2t")) * 1e-3;
  }
  report.add(row);
}

void decode(Report& report, const NamedDtype& dtype, const Shape& shape, int threads) {
  const std::string name = "decode/" + shape_name(shape, dtype.name) + suffix(threads);
  if (!report.wants(name)) return;
  const Context context(threads, ADAATTN_ISA_AUTO);
  CpuCall call(context.handle, shape, dtype.dtype);
  Row row;
  row.name = name;
  row.time = measure([&] { call.run(); });
  row.rate = call.kv_bytes() / row.time.us * 1e-3;
  row.unit = "GB/s";
  row.error = call.sampled_error();
  row.peer = "memory-read";
  row.peer_us = call.kv_bytes() / report.ceiling("read_gbps" + std::string(threads == 1 ? "_1t" : "_2t")) * 1e-3;
  report.add(row);
}

}  // namespace

void run_cpu_exact(Report& report) {
  adaattn_device_info_t info;
  info.struct_size = sizeof info;
  check(adaattn_device_info(ADAATTN_DEVICE_CPU, 0, &info));
  report.set_device(std::string(info.name) + " (" + info.isa + ")");
  const int most = std::min(info.compute_units, 2);
  for (int threads = 1; threads <= most; ++threads) {
    const std::string tail = std::string("_") + std::to_string(threads) + "t";
    report.add_ceiling("fma_f32_gflops" + tail, fma_gflops(threads));
    report.add_ceiling("read_gbps" + tail, read_gbps(threads));
  }
  const adaattn_isa_t isa = best_isa();
  for (const NamedDtype& dtype : kDtypes)
    for (const Shape& shape : cpu_prefill_shapes())
      for (int threads = 1; threads <= most; ++threads) {
        // Narrow types are as fast as f32 unless tiles serve them: the largest size stands for the others.
        const bool brief = dtype.dtype != ADAATTN_DTYPE_F32 && isa != ADAATTN_ISA_AMX;
        if (brief && (shape.seqlen_q < 2048 || shape.mask != ADAATTN_MASK_NONE || threads < most)) continue;
        prefill(report, dtype, shape, threads, isa);
      }
  for (const NamedDtype& dtype : kDtypes)
    for (const Shape& shape : cpu_decode_shapes())
      for (int threads = 1; threads <= most; ++threads) decode(report, dtype, shape, threads);
}

}  // namespace adaattn::bench
