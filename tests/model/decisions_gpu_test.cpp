// The shipped model's attention on both devices: what plans skip does not depend on where they run.
#include <gtest/gtest.h>

#include <utility>
#include <vector>

#include "model/device_copy.h"
#include "model/gpu.h"
#include "model_attention.h"

namespace {

using adaattn::bench::LayerOperands;
using adaattn::bench::ModelAttention;
using model_test::DeviceCopy;

// Tiles by their mass alone, whatever the error, so that what a tile costs on a device does not matter.
adaattn::AdaptiveDesc by_mass(double mass) {
  adaattn::AdaptiveDesc adaptive;
  adaptive.policy = ADAATTN_POLICY_CUSTOM;
  adaptive.tolerance = 10;
  adaptive.tile_mass = mass;
  adaptive.probe = ADAATTN_PROBE_OFF;
  adaptive.rank_mode = ADAATTN_RANK_OFF;
  adaptive.far_field = ADAATTN_SWITCH_OFF;
  adaptive.feedback = ADAATTN_SWITCH_OFF;
  adaptive.verify_rows = -1;
  return adaptive;
}

adaattn_plan_stats_t stats_of(adaattn_device_t device, const ModelAttention& model, double mass,
                              const adaattn::Io& io) {
  adaattn::Config config;
  config.device = device;
  adaattn::Context context = adaattn::Context::create(config).value();
  const adaattn::AdaptiveDesc adaptive = by_mass(mass);
  adaattn::Plan plan = context.make_plan(model.desc(), &adaptive).value();
  plan.execute(io).or_throw();
  return plan.stats().value();
}

class ShippedModelDecisions : public model_test::OnTheGpu {};

TEST_F(ShippedModelDecisions, KeepTheTilesThatTheCpuKeeps) {
  constexpr int64_t kContext = 4096;
  const ModelAttention model = adaattn::bench::capture_attention(MODEL_FOLDER, kContext, 1, ADAATTN_DTYPE_BF16, 8);
  for (const double mass : {0.85, 0.95}) {
    double cpu = 0, cuda = 0, tiles = 0;
    for (const LayerOperands& layer : model.windows[0]) {
      std::vector<char> o(layer.q.size());
      adaattn::Io io = model.io(layer, o.data());
      const adaattn_plan_stats_t host = stats_of(ADAATTN_DEVICE_CPU, model, mass, io);
      const DeviceCopy q(layer.q), k(layer.k), v(layer.v), device_o(o);
      for (auto [tensor, copy] : {std::pair{&io.q, &q}, {&io.k, &k}, {&io.v, &v}, {&io.o, &device_o}}) {
        tensor->data = copy->data();
        tensor->device = ADAATTN_DEVICE_CUDA;
      }
      const adaattn_plan_stats_t device = stats_of(ADAATTN_DEVICE_CUDA, model, mass, io);
      EXPECT_EQ(device.tiles, host.tiles);
      cpu += static_cast<double>(host.tiles_kept);
      cuda += static_cast<double>(device.tiles_kept);
      tiles += static_cast<double>(host.tiles);
    }
    EXPECT_LT(cpu, 0.8 * tiles) << mass;
    EXPECT_NEAR(cuda / cpu, 1, 0.01) << mass;
  }
}

}  // namespace
